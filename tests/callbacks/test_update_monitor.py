import copy
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from kit import ByHand, MemoryLogger, Net, Turns, TwoOptimizers, fit, loader
from lightning.pytorch.callbacks import Callback
from sharded import whole
from torch import nn

import lightning_tricks as lt
from lightning_tricks.callbacks import step_rows


def norm(values):
    """An explicit loop in double precision."""
    return math.sqrt(sum(float(x) ** 2 for tensor in values for x in tensor.detach().double().flatten()))


class Oracle(Callback):
    """Norms of each step from copies of the weights and gradients, module by module."""

    def __init__(self):
        self.rows, self.before, self.gradients = {}, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {name: whole(p) for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, p in pl_module.named_parameters():
            if p.grad is not None:
                self.gradients[name] = whole(p.grad)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop._should_accumulate():
            return
        after = {name: whole(p) for name, p in pl_module.named_parameters()}
        groups = {"total": list(self.before)}
        for name in self.before:
            groups.setdefault(name.rpartition(".")[0] or name, []).append(name)
        row = {}
        for group, names in groups.items():
            row[f"grad_norm/{group}"] = norm(self.gradients[name] for name in names if name in self.gradients)
            row[f"weight_norm/{group}"] = norm(self.before[name] for name in names)
            change = norm(after[name].detach().double() - self.before[name].double() for name in names)
            row[f"update_ratio/{group}"] = change / row[f"weight_norm/{group}"]
        self.rows[trainer.fit_loop.epoch_loop._batches_that_stepped] = row


def ours(logger):
    rows = {step: row for step, row in logger.rows if "update_ratio/total" in row}
    return {
        step: {key: x for key, x in row.items() if ("/" in key and "norm" in key) or "ratio" in key}
        for step, row in rows.items()
    }


def check(module=None, **options):
    """Measured tensor by tensor, and in the rows of a small model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_rows, "_ENTRIES", 0)
        compare(copy.deepcopy(module), **options)
    return compare(module, **options)


def compare(module=None, every=1, rel=1e-5, **options):
    logger, oracle = MemoryLogger(), Oracle()
    fit([oracle, lt.UpdateMonitor(every)], module, logger=logger, **options)
    rows = ours(logger)
    expected = {step: row for step, row in oracle.rows.items() if (step + 1) % every == 0}
    assert rows.keys() == expected.keys()
    assert rows
    for step, row in rows.items():
        assert row.keys() == expected[step].keys()
        for key, value in row.items():
            assert value == pytest.approx(expected[step][key], rel=rel, abs=1e-12), (step, key)
    return logger


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_norms_of_every_module_and_in_total(optimizer):
    logger = check(Net(optimizer=optimizer))
    groups = {key.removeprefix("update_ratio/") for key in ours(logger)[0] if key.startswith("update_ratio/")}
    assert groups == {"total", "body.1", "body.2", "head"}


def test_only_every_nth_step_is_logged_and_on_lightnings_own_row():
    logger = check(every=4, log_every_n_steps=4, max_epochs=3)
    losses = {step for step, row in logger.rows if "train/loss" in row}
    assert set(ours(logger)) == losses == {3, 7, 11, 15}


def test_accumulated_gradients():
    logger = check(accumulate_grad_batches=4, max_epochs=3)
    assert len(ours(logger)) == 6


def test_gradients_before_clipping_and_updates_after_it():
    logger = check(gradient_clip_val=0.01)
    assert all(row["grad_norm/total"] > 0.05 for row in ours(logger).values())


@pytest.mark.parametrize("entries", [0, step_rows._ENTRIES])
def test_manual_optimization_with_two_optimizers_of_different_rhythm(entries, monkeypatch):
    monkeypatch.setattr(step_rows, "_ENTRIES", entries)
    logger, oracle = MemoryLogger(), Oracle()
    fit([oracle, lt.UpdateMonitor(1)], TwoOptimizers(), logger=logger, max_epochs=1)
    rows = ours(logger)
    assert len(rows) == 6
    for step, row in rows.items():
        modules = {key.partition("/")[2] for key in row} - {"total"}
        assert modules == ({"head", "body.1", "body.2"} if step % 2 else {"head"})
        for module in modules:
            key = f"update_ratio/{module}"
            assert row[key] == pytest.approx(oracle.rows[step][key], rel=1e-5)


def test_optimizer_past_lightnings_hook():
    class Raw(ByHand):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    logger, plain = MemoryLogger(), MemoryLogger()
    fit([lt.UpdateMonitor(1)], Raw(), logger=logger, max_epochs=1)
    fit([lt.UpdateMonitor(1)], logger=plain, max_epochs=1)
    assert ours(logger) == ours(plain)


def test_of_several_steps_in_a_batch_the_first_is_measured():
    class Many(ByHand):
        def training_step(self, batch, batch_idx):
            for _ in range(3):
                self.optimizers().zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                self.optimizers().step()

    logger, plain = MemoryLogger(), MemoryLogger()
    fit([lt.UpdateMonitor(1)], Many(), logger=logger, max_epochs=1, limit_train_batches=1)
    fit([lt.UpdateMonitor(1)], logger=plain, max_epochs=1, limit_train_batches=1)
    assert ours(logger) == ours(plain)


def test_parameter_at_the_root_tied_unused_and_zero_ones():
    class Strange(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))
            self.unused = nn.Linear(2, 2)
            self.twin = nn.Linear(8, 3, bias=False)
            self.twin.weight = self.head.weight

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.scale.sum()

    logger = MemoryLogger()
    fit([lt.UpdateMonitor(1)], Strange(), logger=logger, max_epochs=1, limit_train_batches=1)
    row = ours(logger)[0]
    assert row["update_ratio/scale"] == math.inf
    assert (row["grad_norm/unused"], row["update_ratio/unused"]) == (0.0, 0.0)
    assert "update_ratio/twin" not in row  # its weight is the head's


def test_step_by_hand_that_comes_later_is_measured_then():
    class Accumulates(ByHand):
        def training_step(self, batch, batch_idx):
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            if batch_idx % 4 == 0:
                self.optimizers().step()
                self.optimizers().zero_grad()

    logger = MemoryLogger()
    fit([lt.UpdateMonitor(6)], Accumulates(), train=loader(64), logger=logger, max_epochs=1)
    assert list(ours(logger)) == [8, 12]


def test_optimizers_that_take_turns_are_all_measured():
    logger = MemoryLogger()
    fit([lt.UpdateMonitor(4)], Turns(), train=loader(48), logger=logger, max_epochs=1)
    modules = {step: {key.partition("/")[2] for key in row} - {"total"} for step, row in ours(logger).items()}
    assert modules == {step: {"body.1", "body.2"} if step % 2 else {"head"} for step in (3, 4, 7, 8, 11)}


@pytest.mark.parametrize("foreach", [True, False])
def test_optimizer_past_lightnings_hook_that_changes_its_gradients(foreach):
    class Nesterov(ByHand):
        def configure_optimizers(self):
            parameters = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            truth.append(norm(p.grad for p in self.parameters() if p.grad is not None))
            optimizer.step()

    truth, logger = [], MemoryLogger()
    fit([lt.UpdateMonitor(1)], Nesterov(), logger=logger, max_epochs=1)
    assert [row["grad_norm/total"] for row in ours(logger).values()] == pytest.approx(truth)


def test_sparse_gradients():
    class Embeds(Net):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 3, sparse=True)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.table(torch.tensor([1, 1, 2, 7])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.table.parameters(), lr=0.1)

    truth, logger = [], MemoryLogger()

    class Truth(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            truth.append(norm([pl_module.table.weight.grad.to_dense()]))

    fit([Truth(), lt.UpdateMonitor(1)], Embeds(), logger=logger, max_epochs=1)
    assert [row["grad_norm/table"] for row in ours(logger).values()] == pytest.approx(truth)


def test_parameters_frozen_between_the_gradients_and_the_step():
    class Freezes(Net):
        def on_before_optimizer_step(self, optimizer):
            self.body.requires_grad_(False)

    logger = MemoryLogger()
    fit([lt.UpdateMonitor(1)], Freezes(), logger=logger, max_epochs=1)
    assert "update_ratio/body.1" in ours(logger)[0]
    assert "update_ratio/body.1" not in ours(logger)[1]


def test_parameters_of_two_optimizers_count_once():
    class Shared(ByHand):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), 0.1), torch.optim.SGD(self.head.parameters(), 0.1)

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

    logger, oracle = MemoryLogger(), Oracle()
    fit([oracle, lt.UpdateMonitor(1)], Shared(), logger=logger, max_epochs=1)
    for step, row in ours(logger).items():
        assert row["weight_norm/total"] == pytest.approx(oracle.rows[step]["weight_norm/head"])


def test_weights_of_zero_that_stay_have_a_ratio_of_zero():
    class Still(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0 * self.scale.sum()

    logger = MemoryLogger()
    fit([lt.UpdateMonitor(1)], Still(), logger=logger, max_epochs=1)
    assert {row["update_ratio/scale"] for row in ours(logger).values()} == {0.0}


def test_without_a_logger_nothing_is_measured():
    monitor = lt.UpdateMonitor(1)
    trainer, _ = fit([monitor])
    assert monitor.last == {}
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_lightning_told_to_log_nothing():
    logger = MemoryLogger()
    fit([lt.UpdateMonitor(1)], logger=logger, log_every_n_steps=0, max_epochs=1)
    assert ours(logger) == {}


def test_module_called_total_is_refused():
    class Total(Net):
        def __init__(self):
            super().__init__()
            self.total = nn.Linear(2, 2)

    module = Total()
    with pytest.raises(ValueError, match="UpdateMonitor: layers must be none called 'total'"):
        fit([lt.UpdateMonitor(50)], module, logger=MemoryLogger())
    assert module.losses == []


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (None, TypeError)])
def test_every_n_steps_must_be_a_count(value, error):
    with pytest.raises(error, match=r"UpdateMonitor: every_n_steps must be a whole number of at least 1 \(optimizer"):
        lt.UpdateMonitor(value)


@pytest.mark.parametrize("monitor", [lt.UpdateMonitor, lt.ActivationMonitor])
def test_a_run_that_is_too_short_to_be_logged_says_so(monitor, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit([monitor(7)], logger=MemoryLogger(), max_epochs=1)
        told = [record.message for record in caplog.records if "nothing was logged" in record.message]
        assert told == [f"{monitor.__name__}: nothing was logged, since every_n_steps=7 and the run had 6 steps."]
        fit([monitor(6)], logger=MemoryLogger(), max_epochs=1)
        fit([monitor(7)], max_epochs=1)
    assert sum("nothing was logged" in record.message for record in caplog.records) == 1
