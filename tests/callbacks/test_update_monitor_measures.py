"""Every measure of UpdateMonitor beside explicit loops in double precision."""

import copy
import math
import pickle
import re
from functools import partial
from weakref import WeakSet

import pytest
import sharded
import torch
import torch.nn.functional as F
from kit import (
    ByHand,
    MemoryLogger,
    Net,
    Turns,
    TwoOptimizers,
    Unfreeze,
    data,
    every_epoch,
    fit,
    loader,
    plugin_that_skips,
)
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from sharded import ShardedNet, on_ranks, whole
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_tricks as lt
from lightning_tricks.callbacks.gradient_noise import GradientNoise
from lightning_tricks.callbacks.step_sums import WeightCopies

EXACT = ("grad_norm", "grad_norm_clipped", "weight_norm", "update_norm", "update_ratio", "grad_zeros")
EXACT += ("grad_nonfinite", "update_cosine")
NORMS = EXACT[:5]
"""Of a small model these are measured in rows, all together tensor by tensor."""
both_ways = pytest.mark.parametrize("measures", [EXACT, NORMS], ids=["tensors", "rows"])


def entries(tensors):
    return [float(x) for tensor in tensors for x in tensor.detach().double().flatten()]


def norm(tensors):
    return math.sqrt(math.fsum(x * x for x in entries(tensors)))


def clipped(gradients, value, algorithm):
    """What Lightning does with gradient_clip_val, by hand."""
    if value is None:
        return gradients
    if algorithm == "value":
        return {name: g.clamp(-value, value) for name, g in gradients.items()}
    factor = min(1.0, value / (norm(gradients.values()) + 1e-6))
    return {name: g * factor for name, g in gradients.items()}


class Loops(Callback):
    """Rows of every step, from copies of the weights and gradients; how parameters are grouped is given by name."""

    def __init__(self, group):
        self.group, self.rows, self.last = group, {}, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {name: whole(p) for name, p in pl_module.named_parameters() if p.requires_grad}
        if not trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1:
            self.gradients = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {name: whole(p.grad) for name, p in pl_module.named_parameters() if p.grad is not None}
        self.clip = trainer.gradient_clip_val, trainer.gradient_clip_algorithm

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop._should_accumulate():
            return
        after = {name: whole(p) for name, p in pl_module.named_parameters()}
        updates = {name: after[name].double() - self.before[name].double() for name in self.before}
        groups = {"total": list(updates)}
        for name in updates:
            if self.group(name) is not None:
                groups.setdefault(self.group(name), []).append(name)
        row = {}
        for group, names in groups.items():
            gradients = {name: self.gradients.get(name, torch.zeros_like(after[name])) for name in names}
            cut = clipped(self.gradients, self.clip[0], str(getattr(self.clip[1], "value", "norm")))
            flat = entries(gradients.values())
            row[f"grad_norm/{group}"] = norm(gradients.values())
            row[f"grad_norm_clipped/{group}"] = norm(cut[name] for name in names if name in cut)
            row[f"weight_norm/{group}"] = norm(self.before[name] for name in names)
            row[f"update_norm/{group}"] = norm(updates[name] for name in names)
            weight = row[f"weight_norm/{group}"]
            row[f"update_ratio/{group}"] = row[f"update_norm/{group}"] / weight if weight else math.inf
            row[f"grad_zeros/{group}"] = sum(x == 0 for x in flat) / len(flat)
            row[f"grad_nonfinite/{group}"] = sum(not math.isfinite(x) for x in flat)
            if self.last is not None:
                this, last = (entries(of[name] for name in names) for of in (updates, self.last))
                length = norm([torch.tensor(this)]) * norm([torch.tensor(last)])
                product = math.fsum(a * b for a, b in zip(this, last, strict=True))
                row[f"update_cosine/{group}"] = product / length if length else 0.0
        self.rows[trainer.fit_loop.epoch_loop._batches_that_stepped] = row
        self.last = updates


def by_module(name):
    return name.rpartition(".")[0] or name


def ours(logger):
    return {
        step: {key: x for key, x in row.items() if key.partition("/")[0] in (*EXACT, "noise_scale")}
        for step, row in logger.rows
        if "weight_norm/total" in row
    }


def compare(rows, expected, every=1, rel=1e-5, measures=EXACT):
    expected = {
        step: {key: x for key, x in row.items() if key.partition("/")[0] in measures} for step, row in expected.items()
    }
    assert list(rows) == [step for step in expected if (step + 1) % every == 0]
    assert rows
    for step, row in rows.items():
        assert row.keys() == expected[step].keys(), step
        for key, value in row.items():
            assert value == pytest.approx(expected[step][key], rel=rel, abs=1e-7 if "cosine" in key else 1e-12), key


def check(module=None, every=1, layers="module", group=by_module, rel=1e-5, **options):
    for measures in (NORMS, EXACT):
        logger, loops = MemoryLogger(), Loops(group)
        monitor = lt.UpdateMonitor(every, measures, layers=layers)
        fit([loops, monitor], copy.deepcopy(module), logger=logger, **options)
        compare(ours(logger), loops.rows, every, rel, measures)
    return logger


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_every_measure_is_that_of_explicit_loops(optimizer, every):
    check(Net(optimizer=optimizer), every)


@pytest.mark.parametrize(
    ("layers", "group"),
    [
        ("tensor", lambda name: name),
        (0, lambda name: None),
        (1, lambda name: name.split(".")[0]),
        (2, by_module),
        ([r"body\.\d", "he"], lambda name: name[:6] if name.startswith("body") else "he"),
        (["head"], lambda name: "head" if name.startswith("head") else None),
    ],
)
def test_layers_are_chosen_by_depth_or_pattern(layers, group):
    check(layers=layers, group=group, max_epochs=1)


@pytest.mark.parametrize("pattern", ["encoder", "ead", "x*"])
def test_a_pattern_that_matches_no_parameter_is_an_error(pattern):
    module = Net()
    with pytest.raises(ValueError, match=f"UpdateMonitor: layers must be patterns of .*, got '{re.escape(pattern)}'"):
        fit([lt.UpdateMonitor(50, layers=["head", pattern])], module, logger=MemoryLogger())
    assert module.losses == []


def test_patterns_match_frozen_parameters_too_and_an_empty_match_is_none():
    logger = MemoryLogger()
    fit([lt.UpdateMonitor(1, layers=["frozen", "h*"])], logger=logger, max_epochs=1, limit_train_batches=1)
    assert {key.partition("/")[2] for key in ours(logger)[0]} == {"h", "total"}


def test_a_parameter_that_the_module_has_no_more_is_measured_no_more():
    """From the next epoch on: to look at all the names in each step would cost too much."""

    class Replaces(Net):
        def on_train_epoch_end(self):
            self.head = nn.Linear(8, 3)

    logger = MemoryLogger()
    fit([lt.UpdateMonitor(1)], Replaces(), logger=logger, max_epochs=2)
    assert list(logger.series("grad_norm/head")) == list(range(6))
    assert list(logger.series("grad_norm/total")) == list(range(12))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_gradients_after_clipping_are_those_that_the_optimizer_had(algorithm, optimizer):
    options = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": algorithm}
    logger = check(Net(optimizer=optimizer), accumulate_grad_batches=2, **options)
    for row in ours(logger).values():
        assert row["grad_norm_clipped/total"] < row["grad_norm/total"]


def test_an_optimizer_that_changes_its_gradients_has_them_measured_before():
    """Nesterov's momentum is added to the gradients in place."""

    class Nesterov(Net):
        def configure_optimizers(self):
            parameters = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, foreach=True)

    check(Nesterov(), gradient_clip_val=0.1)


@both_ways
@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_unscaled(fused, measures):
    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, fused=fused)

    logger, plain = MemoryLogger(), MemoryLogger()
    plugins = [plugin_that_skips(128.0)]
    fit([lt.UpdateMonitor(1, measures)], Plain(), logger=logger, plugins=plugins, max_epochs=1)
    fit([lt.UpdateMonitor(1, measures)], Plain(), logger=plain, max_epochs=1)
    for step, row in ours(logger).items():
        expected = ours(plain)[step]
        for key in ("grad_norm/total", "grad_norm_clipped/total", "update_norm/total", "update_norm/head"):
            assert row[key] == pytest.approx(expected[key], rel=0.05)


@pytest.mark.parametrize("fused", [False, True])
def test_after_a_skipped_step_there_is_no_cosine(fused):
    class Overflows(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, fused=fused)

        def on_after_backward(self):
            if self.trainer.fit_loop.epoch_loop.batch_idx == 1:
                self.head.weight.grad.fill_(torch.inf)

    logger = MemoryLogger()
    monitor = lt.UpdateMonitor(3, ("weight_norm", "update_cosine"))
    fit([monitor], Overflows(), logger=logger, plugins=[plugin_that_skips(8.0)], max_epochs=1)
    assert {step: "update_cosine/total" in row for step, row in ours(logger).items()} == {2: False, 5: True}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("every", "with_cosine"), [(1, {1, 4, 5}), (2, {1, 5})])
def test_a_cosine_needs_a_step_in_the_batch_before(every, with_cosine, fused):
    """The third step is skipped: neither it nor the one after it has a cosine, however often is logged."""

    class Overflows(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, fused=fused)

        def on_after_backward(self):
            if self.trainer.fit_loop.epoch_loop.batch_idx == 2:
                self.head.weight.grad.fill_(torch.inf)

    logger = MemoryLogger()
    monitor = lt.UpdateMonitor(every, ("weight_norm", "update_cosine"))
    fit([monitor], Overflows(), logger=logger, plugins=[plugin_that_skips(8.0)], max_epochs=1)
    assert set(logger.series("update_cosine/total")) == with_cosine


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_that_was_to_be_measured_leaves_no_update_behind(fused):
    """Of steps 2 and 3 the second is skipped, and so is step 5, the one before the next that is measured."""

    class Overflows(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, fused=fused)

        def on_after_backward(self):
            if self.trainer.fit_loop.epoch_loop.batch_idx in (2, 4):
                self.head.weight.grad.fill_(torch.inf)

    logger = MemoryLogger()
    monitor = lt.UpdateMonitor(3, ("weight_norm", "update_cosine"))
    fit([monitor], Overflows(), logger=logger, plugins=[plugin_that_skips(8.0)], max_epochs=1)
    assert list(ours(logger)) == [5]
    assert logger.series("update_cosine/total") == {}


@pytest.mark.parametrize("plugins", [[], [plugin_that_skips(128.0)]], ids=["float32", "scaled"])
def test_a_fused_optimizer_whose_first_group_is_empty(plugins):
    class Empty(Net):
        def configure_optimizers(self):
            groups = [{"params": []}, {"params": [p for p in self.parameters() if p.requires_grad]}]
            return torch.optim.SGD(groups, lr=0.05, fused=True)

    logger, plain = MemoryLogger(), MemoryLogger()
    fit([lt.UpdateMonitor(1)], Empty(), logger=logger, plugins=plugins, max_epochs=1, limit_train_batches=1)
    fit([lt.UpdateMonitor(1)], Net(), logger=plain, max_epochs=1, limit_train_batches=1)
    got, expected = (each.series("grad_norm/total")[0] for each in (logger, plain))
    assert got == pytest.approx(expected, rel=0.05)


def test_compiled_modules_have_their_own_names():
    class Compiled(Net):
        def __init__(self):
            super().__init__()
            self.body = torch.compile(self.body, backend="aot_eager")

    check(Compiled(), group=lambda name: by_module(name.replace("_orig_mod.", "")), max_epochs=1)


@both_ways
def test_a_compiled_lightning_module_is_measured(measures):
    class Quiet(Net):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    logger, loops = MemoryLogger(), Loops(by_module)
    module = torch.compile(Quiet(), backend="aot_eager")
    fit([loops, lt.UpdateMonitor(1, measures)], module, logger=logger, max_epochs=1)
    compare(ours(logger), loops.rows, measures=measures)


@pytest.mark.parametrize("measures", [("grad_norm", "weight_norm"), ("grad_norm", "weight_norm", "grad_nonfinite")])
def test_entries_that_are_not_finite_are_seen(measures):
    class Broken(Net):
        def on_after_backward(self):
            self.head.weight.grad[0, :3] = torch.nan
            self.head.bias.grad[1] = torch.inf

    logger = MemoryLogger()
    fit([lt.UpdateMonitor(1, measures)], Broken(), logger=logger, max_epochs=1, limit_train_batches=1)
    (row,) = ours(logger).values()
    if "grad_nonfinite" in measures:
        assert (row["grad_nonfinite/head"], row["grad_nonfinite/body.1"], row["grad_nonfinite/total"]) == (4, 0, 4)
    assert math.isnan(row["grad_norm/total"])
    assert math.isnan(row["grad_norm/head"])
    assert math.isfinite(row["grad_norm/body.1"])


def test_half_precision_weights_are_measured():
    class Half(Net):
        def __init__(self):
            super().__init__()
            self.frozen.bfloat16()
            self.frozen.requires_grad_(True)

        def forward(self, images):
            return self.head(self.frozen(self.body(images).bfloat16()).float())

    check(Half(), rel=1e-4)


def test_tied_and_unused_parameters():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.twin = nn.Linear(8, 3, bias=False)
            self.twin.weight = self.head.weight

    logger = check(Tied(), max_epochs=1)
    row = ours(logger)[5]
    assert (row["grad_zeros/unused"], row["update_cosine/unused"]) == (1.0, 0.0)
    assert "weight_norm/twin" not in row


def test_tiny_gradients_and_updates_do_not_vanish():
    class Tiny(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 1e-25

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    logger, plain = MemoryLogger(), MemoryLogger()
    fit([lt.UpdateMonitor(1)], Tiny(), logger=logger, limit_train_batches=1, max_epochs=1)
    fit([lt.UpdateMonitor(1)], logger=plain, limit_train_batches=1, max_epochs=1)
    for layer in ("total", "head", "body.1"):
        tiny, usual = (ours(each)[0][f"grad_norm/{layer}"] for each in (logger, plain))
        assert tiny == pytest.approx(usual * 1e-25, rel=1e-5)


# ------------------------------------------------------------------------------------------------------ optimizers


@both_ways
def test_lbfgs_is_measured_from_its_first_closure(measures):
    class Lbfgs(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.1, max_iter=4)

    class First(Loops):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if not self.gradients:
                super().on_before_optimizer_step(trainer, pl_module, optimizer)

        def on_train_batch_start(self, *args):
            super().on_train_batch_start(*args)
            self.gradients = {}

    logger, loops = MemoryLogger(), First(by_module)
    fit([loops, lt.UpdateMonitor(1, measures)], Lbfgs(), logger=logger, max_epochs=1)
    compare(ours(logger), loops.rows, measures=measures)


def test_the_cosine_of_several_steps_in_a_batch_is_with_the_step_before():
    """Each batch steps three times; the first is measured, the last of the batch before lies before it."""

    class Many(ByHand):
        def training_step(self, batch, batch_idx):
            for _ in range(3):
                before = [p.detach().clone() for p in self.head.parameters()]
                self.optimizers().zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                self.optimizers().step()
                pairs = zip(self.head.parameters(), before, strict=True)
                updates.append([p.detach() - old for p, old in pairs])

    updates, logger = [], MemoryLogger()
    fit([lt.UpdateMonitor(1, ("weight_norm", "update_cosine"))], Many(), logger=logger, max_epochs=1)
    rows = ours(logger)
    assert "update_cosine/head" not in rows[0]
    for step in range(1, 6):
        this, last = entries(updates[3 * step]), entries(updates[3 * step - 1])
        expected = math.fsum(a * b for a, b in zip(this, last, strict=True))
        expected /= norm(updates[3 * step]) * norm(updates[3 * step - 1])
        assert rows[step]["update_cosine/head"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_an_optimizer_that_steps_in_every_other_batch_has_no_cosine(every):
    logger = MemoryLogger()
    fit([lt.UpdateMonitor(every, ("weight_norm", "update_cosine"))], TwoOptimizers(), logger=logger, max_epochs=1)
    keys = {key for row in ours(logger).values() for key in row if "cosine" in key}
    assert "update_cosine/head" in keys
    assert not keys & {"update_cosine/body.1", "update_cosine/body.2"}


def test_an_optimizer_that_was_not_called_in_the_batch_before_has_no_cosine():
    class Uneven(Turns):
        def training_step(self, batch, batch_idx):
            chosen = self.optimizers() if batch_idx in (2, 3) else [self.optimizers()[batch_idx % 2]]
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            for optimizer in chosen:
                optimizer.step()

    logger = MemoryLogger()
    fit([lt.UpdateMonitor(4, ("weight_norm", "update_cosine"))], Uneven(), loader(32), logger=logger, max_epochs=1)
    rows = {step: {key for key in row if "cosine" in key} for step, row in ours(logger).items()}
    assert rows[3] == {f"update_cosine/{layer}" for layer in ("total", "head", "body.1", "body.2")}
    assert rows[7] == set()


# ------------------------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}])
def test_every_measure_of_parameters_in_parts(clip):
    def measure():
        logger, loops, monitor = MemoryLogger(), Loops(by_module), lt.UpdateMonitor(1, EXACT)
        sharded.fit([loops, monitor], ShardedNet(optimizer="adam"), logger=logger, **clip)
        return ours(logger), loops.rows, monitor.last

    (rows, expected, last), (_, _, other) = on_ranks(measure)
    compare(rows, expected)
    assert last == other


def test_parts_whose_sizes_differ_by_rank_take_turns_alike():
    def measure():
        logger, monitor = MemoryLogger(), lt.UpdateMonitor(1, max_extra_memory=300)
        sharded.fit([monitor], logger=logger, max_epochs=2)
        return ours(logger), monitor.last

    (rows, last), (_, other) = on_ranks(measure)
    assert last == other
    assert len({tuple(key for key in row if "ratio" in key) for row in rows.values()}) > 1


# ------------------------------------------------------------------------------------------------------ memory


class Held(Callback):
    """Bytes of the copies of weights after each batch, and where they are."""

    def __init__(self, monitor):
        self.monitor, self.bytes, self.places = monitor, [], set()

    def on_train_batch_end(self, *args):
        tensors = [tensor for copies in self.monitor._watch._copies.values() for tensor in copies.tensors]
        self.bytes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        self.places.update(tensor.data_ptr() for tensor in tensors)


def test_copies_are_kept_and_used_again():
    monitor = lt.UpdateMonitor(1, max_extra_memory=10**9)
    held = Held(monitor)
    fit([monitor, held], logger=MemoryLogger())
    parameters = [p for p in Net().parameters() if p.requires_grad]
    assert held.bytes == [4 * sum(p.numel() for p in parameters)] * 12
    assert len(held.places) == len(parameters)
    assert monitor._watch._copies == {}


@pytest.mark.parametrize(("limit", "turns"), [(552, 2), (600, 2), (699, 2), (716, 1), (10**9, 1)])
def test_with_little_memory_layers_take_turns(limit, turns):
    """Of float32 body.1 has 544 bytes, body.2 64, head 108: together 716."""
    logger, loops = MemoryLogger(), Loops(by_module)
    monitor = lt.UpdateMonitor(1, EXACT[:-1], max_extra_memory=limit)
    held = Held(monitor)
    fit([loops, monitor, held], logger=logger)
    assert max(held.bytes) <= limit
    seen = {}
    for step, row in ours(logger).items():
        for key, value in row.items():
            assert value == pytest.approx(loops.rows[step][key], rel=1e-5), key
        of_updates = {key.partition("/")[2] for key in row if key.startswith("update_ratio")}
        assert of_updates == {key.partition("/")[2] for key in row if key.startswith("update_norm")}
        seen.setdefault(step % turns, of_updates)
        assert of_updates == seen[step % turns]
        assert {f"{key}/total" for key in ("grad_norm", "weight_norm", "grad_zeros")} <= row.keys()
    assert set().union(*seen.values()) - {"total"} == {"body.1", "body.2", "head"}
    assert ("total" in set().union(*seen.values())) == (turns == 1)


@pytest.mark.parametrize("limit", [552, 600, 699])
@pytest.mark.parametrize("module", [TwoOptimizers, Turns])
def test_optimizers_share_the_memory_and_each_of_their_layers_has_its_turn(module, limit, monkeypatch):
    copies, bytes_held, take = WeakSet(), [], WeightCopies.take

    def watched(self, parameters):
        copies.add(self)
        take(self, parameters)
        bytes_held.append(sum(tensor.nbytes for each in copies for tensor in each.tensors))

    monkeypatch.setattr(WeightCopies, "take", watched)
    logger = MemoryLogger()
    fit([lt.UpdateMonitor(1, max_extra_memory=limit)], module(), logger=logger)
    assert 544 <= max(bytes_held) <= limit
    keys = {key for row in ours(logger).values() for key in row}
    assert {f"update_ratio/{layer}" for layer in ("head", "body.1", "body.2")} <= keys


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_a_layer_that_is_unfrozen_and_too_large_does_not_end_the_run():
    logger = MemoryLogger()
    with pytest.warns(UserWarning, match="at least 544 .* for what was unfrozen, body.1, got 300") as told:
        fit([Unfreeze(), lt.UpdateMonitor(1, max_extra_memory=300)], logger=logger)
    assert sum("max_extra_memory" in str(warning.message) for warning in told) == 1
    assert sorted(logger.series("update_ratio/head")) == list(range(12))
    assert sorted(logger.series("update_ratio/body.2")) == list(range(12))  # batch norm is never frozen
    assert sorted(logger.series("grad_norm/body.1")) == list(range(6, 12))
    assert not logger.series("update_ratio/body.1")
    assert sorted(logger.series("update_ratio/total")) == list(range(6))


@pytest.mark.parametrize(("layers", "advised"), [("module", True), (1, True), (["body"], True), ("tensor", False)])
def test_smaller_layers_are_advised_where_there_are_such(layers, advised):
    with pytest.raises(ValueError, match="UpdateMonitor: max_extra_memory") as caught:
        fit([lt.UpdateMonitor(1, layers=layers, max_extra_memory=9)], logger=MemoryLogger())
    assert ("layers='tensor'" in str(caught.value)) == advised


@pytest.mark.parametrize(("layers", "least"), [("module", 544), (0, 716), ("tensor", 512)])
def test_memory_must_hold_the_largest_layer(layers, least):
    module = Net()
    monitor = lt.UpdateMonitor(50, layers=layers, max_extra_memory=least - 1)
    with pytest.raises(ValueError, match=f"UpdateMonitor: max_extra_memory must be at least {least} \\(bytes"):
        fit([monitor], module, logger=MemoryLogger())
    assert module.losses == []
    fit([lt.UpdateMonitor(50, layers=layers, max_extra_memory=least)], logger=MemoryLogger(), max_epochs=1)


# ------------------------------------------------------------------------------------------------------ noise scale


def noise_of(rows, decay=0.9):
    """The running means by a loop over (small, large, batch, total)."""
    signal = noise = 0.0
    scales = []
    for small, large, batch, total in rows:
        signal = decay * signal + (1 - decay) * (total * large - batch * small) / (total - batch)
        noise = decay * noise + (1 - decay) * (small - large) / (1 / batch - 1 / total)
        scales.append(noise / signal if signal > 0 and noise > 0 else None)
    return scales


class Linear(Net):
    """Without batch norm, so that a step's gradient is the mean over its batches."""

    def __init__(self, **options):
        super().__init__(**options)
        self.body[2] = nn.Identity()


class Squares(Callback):
    """Squared norms of the gradient of a step's first batch and of the whole step, from autograd on a copy."""

    def __init__(self, count, ranks=1):
        self.count, self.ranks, self.rows, self.batches = count, ranks, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if len(self.batches) == self.count:
            self.batches = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        model = copy.deepcopy(pl_module).double()
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = []
        for images, labels in self.batches:
            loss = F.cross_entropy(model(images.double()), labels)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        small = gradients[0].square().sum()
        large = torch.stack(gradients).mean(0)
        if self.ranks > 1:
            small = trainer.strategy.reduce(small, reduce_op="mean")
            large = trainer.strategy.reduce(large, reduce_op="mean")
        self.rows.append((small.item(), large.square().sum().item(), 4, 4 * self.count * self.ranks))


def check_noise(logger, squares):
    expected = noise_of(squares.rows)
    rows = [row.get("noise_scale/total") for row in ours(logger).values()]
    assert len(rows) == len(expected) >= 3
    assert any(rows)
    for got, want in zip(rows, expected, strict=True):
        assert got is None if want is None else got == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("plugins", [[], [plugin_that_skips(128.0)]], ids=["float32", "scaled"])
def test_noise_scale_of_accumulated_gradients(plugins):
    logger, squares = MemoryLogger(), Squares(3)
    monitor = lt.UpdateMonitor(1, ("weight_norm", "noise_scale"))
    options = {"accumulate_grad_batches": 3, "max_epochs": 3}
    if plugins:  # half precision has other gradients; what it is compared with here is the size
        plain = MemoryLogger()
        fit([monitor], Linear(), logger=logger, plugins=plugins, **options)
        fit([lt.UpdateMonitor(1, ("weight_norm", "noise_scale"))], Linear(), logger=plain, **options)
        got, want = (next(iter(ours(each).values()))["noise_scale/total"] for each in (logger, plain))
        assert got == pytest.approx(want, rel=0.1)
    else:
        fit([squares, monitor], Linear(), logger=logger, **options)
        check_noise(logger, squares)


@pytest.mark.parametrize("count", [1, 3])
def test_noise_scale_over_ranks(count, tmp_path):
    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            callbacks = {type(each).__name__: each for each in trainer.callbacks}
            expected = noise_of(callbacks["Squares"].rows)
            told = expected, callbacks["UpdateMonitor"].last, list(ours(trainer.logger).values())
            torch.save(told, tmp_path / f"{trainer.global_rank}.pt")

    monitor = lt.UpdateMonitor(1, ("weight_norm", "noise_scale"))
    train = DataLoader(data(48), batch_size=4)
    options = {"strategy": "ddp_fork", "devices": 2, "accumulate_grad_batches": count, "max_epochs": 2}
    fit([Squares(count, ranks=2), monitor, Save()], Linear(), train, logger=MemoryLogger(), **options)
    (expected, last, rows), (_, other, _) = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert last == other
    assert len(rows) == len(expected) == 12 // count
    got = [row.get("noise_scale/total") for row in rows]
    assert any(got)
    assert [x is None for x in got] == [x is None for x in expected]
    assert [x for x in got if x] == pytest.approx([x for x in expected if x], rel=1e-3)


def test_a_step_of_fewer_batches_has_no_noise_scale():
    logger = MemoryLogger()
    monitor = lt.UpdateMonitor(1, ("weight_norm", "noise_scale"))
    fit([monitor], Linear(), logger=logger, accumulate_grad_batches=4, max_epochs=3)  # of 4 batches and of 2
    assert [("noise_scale/total" in row) for row in ours(logger).values()] == [True, False] * 3


@pytest.mark.parametrize(("drop", "count", "rows"), [(False, 23, 2), (True, 27, 3), (False, 24, 3)])
def test_a_step_with_a_smaller_batch_counts_for_no_noise_scale(drop, count, rows):
    train = DataLoader(data(count), batch_size=4, drop_last=drop)
    monitor, squares = lt.UpdateMonitor(1, ("weight_norm", "noise_scale")), Squares(2)
    fit([squares, monitor], Linear(), train, logger=MemoryLogger(), accumulate_grad_batches=2, max_epochs=1)
    signal = noise = 0.0
    for small, large, batch, total in squares.rows[:rows]:
        signal = 0.9 * signal + 0.1 * (total * large - batch * small) / (total - batch)
        noise = 0.9 * noise + 0.1 * (small - large) / (1 / batch - 1 / total)
    assert len(squares.rows) == 3
    assert (monitor._noise.signal, monitor._noise.noise) == pytest.approx((signal, noise), rel=1e-3)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("skipped", [4, 5])
def test_a_step_with_a_batch_without_a_loss_counts_for_no_noise_scale(skipped):
    class Skips(Linear):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == skipped else super().training_step(batch, batch_idx)

    monitor, squares = lt.UpdateMonitor(1, ("weight_norm", "noise_scale")), Squares(2)
    logger = MemoryLogger()
    fit([squares, monitor], Skips(), logger=logger, accumulate_grad_batches=2, max_epochs=1)
    signal = noise = 0.0
    for small, large, batch, total in squares.rows[:2]:
        signal = 0.9 * signal + 0.1 * (total * large - batch * small) / (total - batch)
        noise = 0.9 * noise + 0.1 * (small - large) / (1 / batch - 1 / total)
    assert len(squares.rows) == len(ours(logger)) == 3
    assert (monitor._noise.signal, monitor._noise.noise) == pytest.approx((signal, noise), rel=1e-3)


def test_a_negative_noise_is_not_logged():
    noise = GradientNoise()
    noise._batch, noise._accumulation = 4, 2
    assert noise.scale(small=1.0, large=1.5) == {}
    assert noise.signal > 0 > noise.noise


def test_noise_scale_is_of_the_whole_gradient_and_hooks_are_gone():
    logger = MemoryLogger()
    _, module = fit(
        [lt.UpdateMonitor(1, ("weight_norm", "noise_scale"))], logger=logger, accumulate_grad_batches=2, max_epochs=1
    )
    assert all(not p._backward_hooks for p in module.parameters())


class LooksAtItsGradients(Linear):
    """Takes gradients of its own for a look at them, which are none of the step's."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        torch.autograd.grad(loss, [p for p in self.parameters() if p.requires_grad], retain_graph=True)
        return loss


class Recomputes(Linear):
    """Its layer is used three times, each in a backward within the backward."""

    def forward(self, images):
        call, images = super().forward, images.clone().requires_grad_()
        if self.training and images.dtype == torch.float32:  # the loop's autograd.grad cannot go through it
            call = partial(checkpoint, call, use_reentrant=True)
        return torch.stack([call(images * k) for k in (1, 2, 3)]).mean(0)


@pytest.mark.parametrize("module", [LooksAtItsGradients, Recomputes])
def test_noise_scale_is_of_the_steps_own_backward(module):
    logger, squares = MemoryLogger(), Squares(2)
    monitor = lt.UpdateMonitor(1, ("weight_norm", "noise_scale"))
    fit([squares, monitor], module(), logger=logger, accumulate_grad_batches=2, max_epochs=3)
    check_noise(logger, squares)


class NoBatchSize:
    def __iter__(self):
        return iter(loader())

    def __len__(self):
        return 6


@pytest.mark.parametrize(
    ("module", "train", "options", "message"),
    [
        (Net, None, {}, "without 'noise_scale' where a step is one batch on one rank, got '4 samples'. Set accum"),
        (ByHand, None, {}, "without 'noise_scale' under manual optimization"),
        (
            Net,
            NoBatchSize(),
            {"accumulate_grad_batches": 2},
            "without 'noise_scale' where the loader has no batch_size",
        ),
    ],
)
def test_noise_scale_needs_two_batch_sizes(module, train, options, message):
    monitor = lt.UpdateMonitor(1, ("noise_scale",))
    with pytest.raises(ValueError, match=f"UpdateMonitor: measures must be {message}"):
        fit([monitor], module(), train, logger=MemoryLogger(), **options)


def test_noise_scale_of_parameters_in_parts_is_refused():
    def measure():
        with pytest.raises(ValueError, match="without 'noise_scale' where parameters are in parts, got 'ModelParallel"):
            sharded.fit([lt.UpdateMonitor(1, ["noise_scale"])], logger=MemoryLogger(), accumulate_grad_batches=2)
        return True

    assert all(on_ranks(measure))


# ------------------------------------------------------------------------------------------------------ band


class Rates(Net):
    """A learning rate for each layer."""

    def __init__(self, **rates):
        super().__init__()
        self.rates = rates

    def configure_optimizers(self):
        layers = {"head": self.head, "linear": self.body[1], "norm": self.body[2]}
        groups = [{"params": layer.parameters(), "lr": self.rates.get(name, 1e-3)} for name, layer in layers.items()]
        return torch.optim.SGD(groups, lr=1e-3)


BAND = (1e-5, 1e-2)


def test_layers_outside_the_band_are_named_once_and_told_what_to_do():
    logger = MemoryLogger()
    monitor = lt.UpdateMonitor(1, band=BAND, patience=3)
    with pytest.warns(UserWarning, match="UpdateMonitor: ") as caught:
        fit([monitor], Rates(head=1.0, linear=1e-5, norm=0.0), logger=logger)
    (said,) = [str(w.message) for w in caught if "UpdateMonitor" in str(w.message)]
    percent = float(said.partition("head moves ")[2].partition(" %")[0])
    assert percent == pytest.approx(100 * ours(logger)[2]["update_ratio/head"], rel=0.05)
    assert f"head moves {percent:.2g} % per step: lower its learning rate" in said
    assert "body.1 moves " in said
    assert "% per step: raise its learning rate" in said
    assert "body.2 does not move: it gets no gradient, or its learning rate is 0" in said
    assert said.endswith("(outside 0.001 % to 1 % for 3 logs in a row).")
    assert logger.series("event/update_band") == {2: 1.0}


def test_healthy_layers_are_not_named():
    fit([lt.UpdateMonitor(1, band=(1e-8, 1e3), patience=1)], logger=MemoryLogger())


def test_without_a_band_nothing_is_named():
    fit([lt.UpdateMonitor(1, patience=1)], Rates(head=1e3), logger=MemoryLogger())


def test_the_total_is_named_where_there_are_no_layers():
    with pytest.warns(UserWarning, match="UpdateMonitor: the model moves .* lower its learning rate"):
        fit([lt.UpdateMonitor(1, layers=0, band=BAND, patience=2)], Rates(head=9.0, linear=9.0), logger=MemoryLogger())


def test_logs_in_a_row_go_on_after_a_resume_and_what_was_named_stays_named(tmp_path):
    options = {"train": loader(8), "ckpt_path": None, "logger": MemoryLogger()}  # two steps an epoch
    monitor = lt.UpdateMonitor(1, band=BAND, patience=3)
    fit([monitor, every_epoch(tmp_path)], Rates(head=1.0), **{**options, "max_epochs": 1})
    rest = MemoryLogger()
    with pytest.warns(UserWarning, match="UpdateMonitor: head moves") as caught:
        fit(
            [lt.UpdateMonitor(1, band=BAND, patience=3), every_epoch(tmp_path / "rest")],
            Rates(head=1.0),
            **{**options, "logger": rest, "ckpt_path": tmp_path / "epoch=0.ckpt", "max_epochs": 3},
        )
    assert sum("UpdateMonitor" in str(w.message) for w in caught) == 1
    assert rest.series("event/update_band") == {2: 1.0}
    fit(
        [lt.UpdateMonitor(1, band=BAND, patience=3), every_epoch(tmp_path / "end")],
        Rates(head=1.0),
        **{**options, "ckpt_path": tmp_path / "rest" / "epoch=2.ckpt", "max_epochs": 5},
    )


def test_means_of_the_noise_go_on_after_a_resume(tmp_path):
    def run(epochs, path=None, folder="whole"):
        logger = MemoryLogger()
        callbacks = [lt.UpdateMonitor(1, ("weight_norm", "noise_scale")), every_epoch(tmp_path / folder)]
        options = {"accumulate_grad_batches": 3, "max_epochs": epochs, "ckpt_path": path}
        fit(callbacks, Linear(), logger=logger, **options)
        return ours(logger)

    whole = run(4)
    assert run(4, tmp_path / "whole" / "epoch=1.ckpt", "rest") == {step: whole[step] for step in (4, 5, 6, 7)}


def test_a_new_trainer_counts_anew():
    monitor = lt.UpdateMonitor(1, band=BAND, patience=2)
    for _ in range(2):
        with pytest.warns(UserWarning, match="UpdateMonitor: head moves"):
            fit([monitor], Rates(head=1.0), logger=MemoryLogger(), max_epochs=1)


# ------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"measures": "grad_norm"}, TypeError, "measures must be names out of grad_norm"),
        ({"measures": ["norm"]}, ValueError, "measures must be different names out of grad_norm"),
        ({"measures": [["a"]]}, TypeError, "measures must be names out of grad_norm"),
        ({"measures": []}, ValueError, "measures must be different names"),
        ({"measures": ["grad_norm", "grad_norm"]}, ValueError, "measures must be different names"),
        ({"layers": "modules"}, ValueError, "layers must be 'module', 'tensor', a depth"),
        ({"layers": -1}, ValueError, "layers must be 'module', 'tensor', a depth"),
        ({"layers": True}, TypeError, "layers must be 'module', 'tensor', a depth"),
        ({"layers": []}, TypeError, "layers must be 'module', 'tensor', a depth"),
        ({"layers": ["("]}, ValueError, "layers must be .* It does not compile"),
        ({"band": 1e-3}, TypeError, "band must be a pair of ratios or None"),
        ({"band": (1e-2, 1e-4)}, ValueError, "band must be a lower and a higher ratio"),
        ({"band": (-1, 1)}, ValueError, "band must be of at least 0"),
        ({"band": (0, 1), "measures": ["grad_norm"]}, ValueError, "band must be None without that measure"),
        ({"patience": 0}, ValueError, "patience must be a whole number of at least 1"),
        ({"max_extra_memory": 0}, ValueError, "max_extra_memory must be a whole number of at least 1"),
        ({"max_extra_memory": 1e9}, TypeError, "max_extra_memory must be a whole number"),
        ({"max_extra_memory": 9, "measures": ["update_cosine"]}, ValueError, "must be None beside 'update_cosine'"),
    ],
)
def test_arguments_are_checked_at_once(arguments, error, message):
    with pytest.raises(error, match=f"UpdateMonitor: .*{message}" if "beside" in message else message):
        lt.UpdateMonitor(**arguments)


def test_a_layer_called_total_by_its_pattern_is_refused():
    class Totals(Net):
        def __init__(self):
            super().__init__()
            self.total_head = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="UpdateMonitor: layers must be none called 'total'"):
        fit([lt.UpdateMonitor(1, layers=["total", "body"])], Totals(), logger=MemoryLogger())


def test_a_copy_goes_on_with_what_was_counted():
    monitor = lt.UpdateMonitor(1, EXACT, 1, (1e-4, 1.0), 2, None)
    fit([monitor], logger=MemoryLogger(), max_epochs=1, limit_train_batches=1)
    for other in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert other.settings == monitor.settings
        assert (other.last, other._outside) == (monitor.last, monitor._outside)
        fit([other], logger=MemoryLogger(), max_epochs=1, limit_train_batches=1)


def test_a_checkpoint_of_an_exception_knows_whose_turn_it_is(tmp_path):
    monitor = lt.UpdateMonitor(1, ["update_norm"], max_extra_memory=8 * 17 * 4)
    with pytest.raises(RuntimeError, match="failed in training"):
        fit([monitor, OnExceptionCheckpoint(tmp_path)], Net(fail_at=("train", 3)), logger=MemoryLogger())
    assert torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["update_monitor"]["measured"] == [3]
