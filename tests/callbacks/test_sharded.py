"""What callbacks promise where the parameters are in parts: two ranks under FSDP2 (ModelParallelStrategy, DTensor)."""

import copy

import kit
import pytest
import sharded
import torch
import torch.nn.functional as F
from kit import ByHand, MemoryLogger, Net, assert_same, every_epoch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from sharded import RootedNet, ShardedNet, on_ranks, whole
from test_contract import CALLBACKS, CountSteps, hooks_left, state_of
from test_update_monitor import Oracle, ours
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lightning_tricks as lt

LEFT_OUT = {"UpdateMonitor in turns", "UpdateMonitor of successive updates"}
"""Rows whose keys depend on how much a rank holds, or on the step before a checkpoint."""
ROWS = {
    **{name: row for name, row in CALLBACKS.items() if name not in LEFT_OUT},
    "ParamSchedule of the optimizer": lambda: [lt.ParamSchedule("weight_decay", lt.Cosine(0.1))],
}
# FSDP2 keeps buffers apart on each rank and a checkpoint has one rank's, so that validation depends on them only where
# all ranks see the same data.
SAME_DATA = {name: {"use_distributed_sampler": False} for name in ("EarlyStopping", "EMAs beside the raw weights")}
every_row = pytest.mark.parametrize("name", ROWS)
both_kinds = pytest.mark.parametrize("distributed", [False, True], ids=["one file", "a folder"])


@pytest.fixture(scope="module", autouse=True)
def first_fit():
    """What a first fit costs is paid once, before the ranks are forked."""
    kit.fit([], max_epochs=1)


def learned(state):
    return {name: tensor for name, tensor in state.items() if "running" not in name and "tracked" not in name}


def report(trainer, module):
    """All that a rank knows at the end, with whole tensors."""
    state = whole(state_of(trainer))
    for part in (state, *state["optimizer_states"]):  # a folder has averages and raw weights beside those
        for key in ("state_dict", "current_model_state"):
            part[key] = learned(part.get(key, {}))
        part["averages"] = {name: learned(average) for name, average in part.get("averages", {}).items()}
    return {
        "weights": learned(whole(module)),
        "state": state,
        "seen": module.seen,
        "norms": [callback.last for callback in trainer.callbacks if isinstance(callback, lt.UpdateMonitor)],
        "decisions": [
            (callback.best_score, callback.wait_count, callback.stopped_epoch, callback.checks)
            for callback in trainer.callbacks
            if isinstance(callback, lt.EarlyStopping)
        ],
    }


def run(callbacks, module=None, distributed=False, **options):
    return report(*sharded.fit(callbacks, module, distributed, **{"max_epochs": 3, **options}))


class Report(Callback):
    """Leave a report of rank 0 on disk."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        told = report(trainer, pl_module)
        if trainer.is_global_zero:
            torch.save(told, self.path)


def assert_close(left, right):
    """Equal but for rounding, through containers."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_close(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        for one, other in zip(left, right, strict=True):
            assert_close(one, other)
    else:
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ 1. the same training


@every_row
def test_training_in_parts_is_training_on_whole_parameters(name, tmp_path):
    options = SAME_DATA.get(name, {})
    first, second = on_ranks(lambda: run([*ROWS[name]()], logger=MemoryLogger(), **options))
    for key in ("weights", "norms", "decisions"):
        assert_same(first[key], second[key])

    path = tmp_path / "whole.pt"
    options = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 3, "logger": MemoryLogger(), **options}
    kit.fit([*ROWS[name](), Report(path)], **options)
    expected = torch.load(path, weights_only=True)
    assert_same(first["seen"], expected["seen"])
    assert_close(first["weights"], expected["weights"])
    assert_close(first["norms"], expected["norms"])
    assert_close(first["decisions"], expected["decisions"])


# --------------------------------------------------------------------------------------------- 2. resume, bit for bit


@every_row
@both_kinds
def test_run_resumed_at_an_epoch_end_is_the_run_that_was_not_stopped(name, distributed, tmp_path):
    options = {"distributed": distributed, **SAME_DATA.get(name, {})}

    def twice():
        logger, rest_logger = MemoryLogger(), MemoryLogger()
        whole_run = run([*ROWS[name](), every_epoch(tmp_path)], logger=logger, **options)
        callbacks = [*ROWS[name](), every_epoch(tmp_path / "rest")]
        rest = run(callbacks, logger=rest_logger, ckpt_path=tmp_path / "epoch=0.ckpt", **options)
        return whole_run, rest, [comparable(logger.rows), comparable(rest_logger.rows)]

    def comparable(rows):
        hidden = () if name in SAME_DATA else ("val/loss",)
        return [(step, {key: value for key, value in row.items() if key not in hidden}) for step, row in rows]

    for whole_run, rest, (rows, rest_rows) in on_ranks(twice):
        if name == "all":  # its ranks transform their batches differently, and so validate with other statistics
            for told in (whole_run, rest):
                del told["decisions"], told["state"]["callbacks"]
        assert len(rest["seen"]) == 2 * len(whole_run["seen"]) // 3 > 0
        whole_run["seen"] = whole_run["seen"][-len(rest["seen"]) :]
        assert_same(rest, whole_run)
        assert_same(rest_rows, [row for row in rows if row[0] >= len(rest["seen"]) // 2])


class Rates(Callback):
    """Rate and momentum after every batch, in turn."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *args):
        group = trainer.optimizers[0].param_groups[0]
        self.rows += [group["lr"], group["momentum"]]


@both_kinds
def test_schedule_begins_in_a_run_that_had_none(distributed, tmp_path):
    def twice():
        sharded.fit([every_epoch(tmp_path)], distributed=distributed)
        callbacks = [lt.LRSchedule(lt.Linear()), lt.ParamSchedule("momentum", lt.Linear()), every_epoch(tmp_path / "b")]
        options = {"max_epochs": 4, "ckpt_path": tmp_path / "epoch=0.ckpt", "limit_train_batches": 3}
        rates = Rates()
        sharded.fit([*callbacks, rates], distributed=distributed, **options)
        return rates.rows

    for rows in on_ranks(twice):
        assert rows == pytest.approx([rate * (1 - step / 12) for step in range(4, 13) for rate in (0.05, 0.9)])


@both_kinds
def test_checkpoint_of_another_schedule_is_refused(distributed, tmp_path):
    def refused():
        sharded.fit([lt.LRSchedule(lt.Linear()), every_epoch(tmp_path)], distributed=distributed)
        callbacks = [lt.LRSchedule(lt.Cosine()), every_epoch(tmp_path / "b")]
        with pytest.raises(ValueError, match="LRSchedule: checkpoint must be of a run under the same schedule"):
            sharded.fit(callbacks, distributed=distributed, ckpt_path=tmp_path / "epoch=0.ckpt")

    on_ranks(refused)


@both_kinds
def test_scheduler_of_torch_in_the_checkpoint_is_met_with(distributed, tmp_path):
    class Decays(ShardedNet):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def resume():
        sharded.fit([every_epoch(tmp_path)], Decays(), distributed)
        rates, options = Rates(), {"ckpt_path": tmp_path / "epoch=0.ckpt", "distributed": distributed}
        with pytest.raises(ValueError, match="LRSchedule: checkpoint must be of a run under the same schedule"):
            sharded.fit([lt.LRSchedule(lt.Linear()), every_epoch(tmp_path / "b")], **options)
        schedule = lt.LRSchedule(lt.Linear(), on_mismatch="use_new")
        sharded.fit([schedule, rates, every_epoch(tmp_path / "c")], **options)
        return rates.rows[::2]

    for rates in on_ranks(resume):
        assert rates == pytest.approx([0.05 * (1 - step / 6) for step in (4, 5, 6)])


@both_kinds
@pytest.mark.parametrize("rate", [float, torch.tensor], ids=["number", "tensor"])
def test_step_that_a_checkpoint_makes_does_not_count(rate, distributed, tmp_path):
    """Torch makes the state of plain SGD, which has none, by a step, if there are no gradients at the moment."""

    class Frees(ShardedNet, ByHand):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=rate(0.05))

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            optimizer.zero_grad()

    def train():
        schedule = lt.LRSchedule(lt.Warmup(2, lt.Linear()))
        count = CountSteps()
        sharded.fit([schedule, count, every_epoch(tmp_path)], Frees(), distributed, max_epochs=2)
        return count.steps, schedule._last[0]["step"]

    assert on_ranks(train) == [(6 + 2, 6)] * 2


# ------------------------------------------------------------------------------------------------------ 3. exceptions


@every_row
def test_exception_leaves_the_module_as_the_user_had_it(name):
    class KeepRaw(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.raw = learned(whole(pl_module))

    def fail():
        told = []
        for fail_at in (("train", 4), ("validation", 6)):
            module, keep = ShardedNet(fail_at=fail_at), KeepRaw()
            with pytest.raises(RuntimeError, match="failed in"):
                sharded.fit([*ROWS[name](), keep], module, max_epochs=3, logger=MemoryLogger())
            assert hooks_left(module) == []
            assert module.body[2].momentum == 0.1
            told.append((learned(whole(module)), keep.raw))
        return told

    for told in on_ranks(fail):
        for weights, raw in told:
            assert_same(weights, raw)


# ------------------------------------------------------------------------------------------------------ UpdateMonitor


class Unused(ShardedNet):
    """With a layer that has no gradients."""

    def __init__(self, **options):
        super().__init__(**options)
        self.unused = nn.Linear(3, 3)


@pytest.mark.parametrize("kind", [ShardedNet, RootedNet, Unused])
def test_norms_are_those_of_the_whole_tensors(kind):
    def measure():
        logger, oracle, monitor = MemoryLogger(), Oracle(), lt.UpdateMonitor(1)
        sharded.fit([oracle, monitor], kind(optimizer="adam"), logger=logger)
        return ours(logger), oracle.rows, monitor.last

    (rows, expected, last), (_, _, other) = on_ranks(measure)
    assert list(rows) == list(expected) == list(range(6))
    for step, row in rows.items():
        assert row.keys() == expected[step].keys()
        assert row == pytest.approx(expected[step], rel=1e-5)
    measured = {key.removeprefix("update_ratio/") for key in rows[0] if "ratio" in key}
    assert measured - {"unused"} == {"total", "body.1", "body.2", "head"}
    assert last == other == rows[5]


def test_norms_and_best_weights_under_tensor_parallelism():
    """Two layers in parts beside whole ones, one of them along its columns."""

    class Parallel(Net):
        def configure_model(self):
            first, last = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
            parallelize_module(self, self.device_mesh["tensor_parallel"], {"body.1": first, "head": last})

    def train():
        logger, oracle, record, module = MemoryLogger(), Oracle(), Record(), Parallel()
        callbacks = [oracle, lt.UpdateMonitor(1), stop(), Valley(), record]
        strategy = ModelParallelStrategy(1, 2)
        kit.fit(callbacks, module, logger=logger, strategy=strategy, devices=2, max_epochs=3)
        return ours(logger), oracle.rows, record.weights[1], learned(whole(module))

    (rows, expected, *_), _ = told = on_ranks(train)
    assert len(rows) == 18
    for step, row in rows.items():
        assert row == pytest.approx(expected[step], rel=1e-5)
    for _, _, best, end in told:
        assert_same(end, best)


# ------------------------------------------------------------------------------------------------------ EarlyStopping


class Valley(Callback):
    """A score whose best check is the second one."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("score", abs(trainer.current_epoch - 1.0), sync_dist=True)


class Record(Callback):
    """The weights of every validation."""

    def __init__(self):
        self.weights = []

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.weights.append(learned(whole(pl_module)))


def stop():
    return lt.EarlyStopping("score", patience=100, restore_best=True)


@pytest.mark.parametrize("kind", [ShardedNet, RootedNet])
def test_fit_ends_with_the_best_weights_and_forward_uses_them(kind):
    def train():
        record, module, callback = Record(), kind(), stop()
        trainer, _ = sharded.fit([callback, Valley(), record], module, max_epochs=3)
        assert all(isinstance(callback.best_weights[name], DTensor) for name, _ in module.named_parameters())
        state = copy.deepcopy(whole(module))
        outputs = torch.cat(trainer.predict(module, kit.loader(8, seed=5)))
        return record.weights[1], learned(state), state, outputs

    for best, end, state, outputs in on_ranks(train):
        assert_same(end, best)
        plain = Net()
        plain.load_state_dict(state)
        mine = kit.data(8, seed=5)
        expected = plain.eval()(mine.tensors[0])
        assert any(torch.allclose(outputs, part, atol=1e-6) for part in (expected[::2], expected[1::2]))


@both_kinds
def test_checkpoint_carries_whole_best_weights(distributed, tmp_path):
    def train():
        record = Record()
        sharded.fit([stop(), Valley(), record, every_epoch(tmp_path)], distributed=distributed, max_epochs=3)
        # From a checkpoint after the best: it cannot be trained to again, nor is there anything to train.
        ends = []
        for epochs in (4, 3):
            module = ShardedNet()
            callbacks = [stop(), Valley(), every_epoch(tmp_path / "rest")]
            options = {"max_epochs": epochs, "ckpt_path": tmp_path / "epoch=2.ckpt"}
            sharded.fit(callbacks, module, distributed, **options)
            ends.append(learned(whole(module)))
        return record.weights[1], ends

    for best, ends in on_ranks(train):
        for end in ends:
            assert_same(end, best)
    path = tmp_path / "epoch=2.ckpt"
    saved = torch.load(path / "meta.pt" if distributed else path, weights_only=True)["callbacks"]
    (state,) = (state for key, state in saved.items() if "score" in key)
    assert_same(learned(state["best_weights"]), best)


# ---------------------------------------------------------------------------------------------------- SnapshotEnsemble


@pytest.mark.parametrize("kind", [ShardedNet, RootedNet])
@both_kinds
def test_snapshots_are_whole_and_load_in_a_plain_process(kind, distributed, tmp_path):
    class Ends(Callback):
        def __init__(self):
            self.weights = {}

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.weights[trainer.global_step] = whole(pl_module)

    def train():
        ends = Ends()
        sharded.fit([ends, lt.SnapshotEnsemble(3, str(tmp_path))], kind(), distributed, max_epochs=2)
        return ends.weights

    weights, _ = on_ranks(train)
    ensemble = lt.Ensemble.load(tmp_path, Net().eval())
    assert len(ensemble) == 3
    images = kit.data(8).tensors[0]
    for index, step in enumerate((2, 4, 6)):
        member = Net().eval()
        member.load_state_dict(weights[step])
        assert_same(dict(ensemble.member(index)), dict(weights[step]))
        torch.testing.assert_close(ensemble.logits(images)[index], member(images))


@both_kinds
@pytest.mark.parametrize("weights", ["raw", "average"])
def test_snapshots_beside_an_average_are_whole(weights, distributed, tmp_path):
    ends = {}

    class Ends(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            raw, average = whole(dict(pl_module.named_parameters())), ema._averages.values()
            ends[trainer.global_step] = {"raw": raw, "average": whole(average)}

    def train():
        sharded.fit([ema, Ends(), lt.SnapshotEnsemble(2, str(tmp_path), weights=weights)], None, distributed)
        return ends

    ema = lt.EMA(0.5)
    told, _ = on_ranks(train)
    ensemble = lt.Ensemble.load(tmp_path, Net())
    for index, step in enumerate((3, 6)):
        member = ensemble.member(index)
        for name, _ in Net().named_parameters():
            assert_same(member[name], told[step][weights][name])
        assert not torch.equal(told[step]["raw"]["head.weight"], told[step]["average"]["head.weight"])


# ----------------------------------------------------------------------------------------------------- BatchTransforms


def test_ranks_that_share_a_batch_transform_it_alike():
    """Tensor parallelism: the ranks of a group see the same batch, and would train on a chimera otherwise."""

    def train(data_parallel):
        strategy = ModelParallelStrategy(data_parallel, 2 // data_parallel)

        class Shares(Net):
            def configure_model(self):
                pass

        transforms = lt.BatchTransforms([lt.Mixup(0.5)], seed=1)
        return kit.fit([transforms], Shares(), strategy=strategy, devices=2, max_epochs=1)[1].seen

    (first, second), (other, another) = on_ranks(lambda: [train(1), train(2)])
    assert_same(first, other)
    assert not any(torch.equal(one, two) for one, two in zip(second, another, strict=True))


def test_batch_of_ranks_that_share_it_counts_once():
    def train():
        class Shares(Net):
            def configure_model(self):
                pass

        schedule = lt.LRSchedule(lt.Constant(), scale_with_batch="linear", base_batch_size=4)
        kit.fit([schedule], Shares(), strategy=ModelParallelStrategy(1, 2), devices=2, max_epochs=1)
        return schedule.settings["global_batch_size"]

    assert on_ranks(train) == [4, 4]


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "callback",
    [lt.UpdateMonitor(), lt.SnapshotEnsemble(2), lt.EarlyStopping("val/loss", restore_best=True)],
    ids=lambda callback: type(callback).__name__,
)
def test_parameters_that_are_flattened_are_refused(callback, monkeypatch):
    trainer = kit.make_trainer([callback])
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", FSDPStrategy())
    with pytest.raises(ValueError, match=r"strategy must be one that keeps whole .* or DTensors, got 'FSDPStrategy'"):
        callback.setup(trainer, Net(), "fit")
