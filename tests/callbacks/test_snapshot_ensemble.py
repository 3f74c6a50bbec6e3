"""Snapshots are the weights at the cycles' ends, whole or not there, and a resumed run's are the whole run's."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import lightning as L
import pytest
import torch
from kit import (
    ByHand,
    MemoryLogger,
    Net,
    ResumableLoader,
    StopAfter,
    TwoOptimizers,
    assert_same,
    every_epoch,
    fit,
    loader,
    make_trainer,
    plugin_that_skips,
    snapshot,
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_tricks as lt
from lightning_tricks.callbacks.run_folder import write_whole
from lightning_tricks.callbacks.snapshot_ensemble import KeepBest, SnapshotEnsemble
from lightning_tricks.ensembles import Ensemble, read_manifest

ends_elsewhere = pytest.mark.filterwarnings("ignore:.*the schedule is for .* optimizer steps")


class EveryStep(Callback):
    """The weights and the rate of every real step, by its count."""

    def __init__(self):
        self.weights, self.rates, self.steps = {}, [], 0

    def on_train_start(self, trainer, pl_module):
        self.handle = trainer.optimizers[0].register_step_post_hook(self.count)
        self.module = pl_module
        self.before = trainer.optimizers[0].register_step_pre_hook(
            lambda optimizer, *rest: self.rates.append(optimizer.param_groups[0]["lr"])
        )

    def count(self, *args):
        self.steps += 1
        self.weights[self.steps] = snapshot(self.module)


def rows(folder):
    return read_manifest(folder)["snapshots"]


def contents(folder):
    """All that a directory has, by name; the run's name is its own."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name == "manifest.json":
            found[path.name] = {**json.loads(path.read_text()), "run": None}
        else:
            found[path.name] = torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("cycles", [1, 2, 3, 5, 12])
def test_snapshots_are_the_weights_at_the_ends_of_the_cycles(cycles, tmp_path):
    record = EveryStep()
    callback = SnapshotEnsemble(cycles, str(tmp_path / "s"))
    fit([callback, record])
    ends = [-(-12 * (i + 1) // cycles) for i in range(cycles)]
    assert [row["step"] for row in rows(tmp_path / "s")] == ends
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == sorted(
        ["manifest.json", *(f"snapshot-step={end}.pt" for end in ends)]
    )
    for row, path in zip(rows(tmp_path / "s"), callback.snapshots, strict=True):
        content = torch.load(path, weights_only=True)
        assert list(content) == ["state_dict"]
        assert_same(dict(content["state_dict"]), record.weights[row["step"]])
        assert row["lr"] == pytest.approx(record.rates[row["step"] - 1], abs=1e-12)
        assert row["complete"]
        assert row["epoch"] == (row["step"] - 1) // 6
    assert [row["cycle"] for row in rows(tmp_path / "s")] == list(range(1, cycles + 1))


@pytest.mark.parametrize(
    ("options", "ends", "complete"),
    [
        ({"cycle_length": 5}, [5, 10, 12], [True, True, False]),
        ({"cycle_length": "1ep"}, [6, 12], [True, True]),
        ({"cycle_length": 0.25}, [3, 6, 9, 12], [True] * 4),
        ({"schedule": lt.CosineRestarts(length=2, multiplier=2.0)}, [2, 6, 12], [True, True, False]),
        ({"schedule": lt.Triangular(length=6, low=0.1)}, [6, 12], [True, True]),
    ],
)
def test_cycles_of_a_given_length(options, ends, complete, tmp_path):
    record = EveryStep()
    callback = SnapshotEnsemble(directory=str(tmp_path / "s"), **options)
    fit([callback, record, every_epoch(tmp_path)])
    assert [row["step"] for row in rows(tmp_path / "s")] == ends
    assert [row["complete"] for row in rows(tmp_path / "s")] == complete
    for row, path in zip(rows(tmp_path / "s"), callback.snapshots, strict=True):
        assert_same(dict(torch.load(path, weights_only=True)["state_dict"]), record.weights[row["step"]])
        assert row["lr"] == pytest.approx(record.rates[row["step"] - 1], abs=1e-12)
    before = contents(tmp_path / "s")
    again = SnapshotEnsemble(directory=str(tmp_path / "s"), **options)
    fit([again, every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(contents(tmp_path / "s"), before)


def test_cycle_that_is_longer_than_the_run_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="SnapshotEnsemble: cycle_length must be between one and the run's 12 optimizer"
    ):
        fit([SnapshotEnsemble(cycle_length=13, directory=str(tmp_path / "s"))])
    with pytest.raises(
        ValueError, match=r"SnapshotEnsemble: cycles must be few enough .* the run's 12 optimizer steps"
    ):
        fit([SnapshotEnsemble(cycles=13, directory=str(tmp_path / "s"))])
    with pytest.raises(ValueError, match="SnapshotEnsemble: cycle_length must be at least 1"):
        SnapshotEnsemble(cycle_length=0)


def test_manifest_says_what_the_run_was(tmp_path):
    fit([SnapshotEnsemble(2, str(tmp_path / "s"))])
    manifest = read_manifest(tmp_path / "s")
    assert manifest["schedule"] == lt.schedules.describe(lt.CosineRestarts(cycles=2))
    assert manifest["versions"] == {
        "lightning_tricks": lt.__version__,
        "torch": torch.__version__,
        "lightning": L.__version__,
    }
    first, last = manifest["snapshots"]
    assert first["metrics"]["val/loss"] != last["metrics"]["val/loss"]


def test_metrics_are_those_of_the_snapshot_itself(tmp_path):
    trainer, _ = fit([SnapshotEnsemble(2, str(tmp_path / "s"))])
    for row, path in zip(rows(tmp_path / "s"), trainer.callbacks[0].snapshots, strict=True):
        module = Net()
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        (result,) = make_trainer([]).validate(module, loader(8, seed=5), verbose=False)
        assert row["metrics"]["val/loss"] == pytest.approx(result["val/loss"], rel=1e-6)


def test_metric_that_is_not_finite_is_null(tmp_path):
    class Nan(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(torch.nan))

    fit([SnapshotEnsemble(2, str(tmp_path / "s"))], Nan())
    assert rows(tmp_path / "s")[0]["metrics"]["val/loss"] is None
    assert "NaN" not in (tmp_path / "s" / "manifest.json").read_text()


def test_loaded_members_answer(tmp_path):
    record = EveryStep()
    _, module = fit([SnapshotEnsemble(3, str(tmp_path / "s")), record])
    ensemble = Ensemble.load(tmp_path / "s", module)
    by_hand = Ensemble(Net(), [record.weights[step] for step in (4, 8, 12)]).eval()
    with ensemble.as_forward():
        predicted = make_trainer([]).predict(module, loader(8))
    assert torch.equal(predicted[0], by_hand(next(iter(loader(8)))[0]))


# ----------------------------------------------------------------------------------------------------- where and when


def test_default_directories(tmp_path):
    first = SnapshotEnsemble(2)
    fit([first])
    second = SnapshotEnsemble(2)
    fit([second])
    fit([second])  # another run of the same callback
    logger = CSVLogger(tmp_path / "logs")
    third = SnapshotEnsemble(2)
    fit([third], logger=logger)
    assert first.snapshots[0].parent == tmp_path / "snapshots"
    assert second.snapshots[0].parent == tmp_path / "snapshots-3"
    assert len(rows(tmp_path / "snapshots-2")) == 2
    assert str(third.snapshots[0].parent) == f"{logger.log_dir}/snapshots"


@ends_elsewhere
def test_run_that_ends_within_a_cycle_ends_with_a_snapshot(tmp_path):
    record = EveryStep()
    fit([SnapshotEnsemble(2, str(tmp_path / "s")), StopAfter(3), record], max_epochs=5)
    assert [(row["step"], row["cycle"], row["complete"]) for row in rows(tmp_path / "s")] == [
        (15, 1, True),
        (18, 2, False),
    ]
    state = torch.load(tmp_path / "s" / "snapshot-step=18.pt", weights_only=True)["state_dict"]
    assert_same(dict(state), record.weights[18])
    assert rows(tmp_path / "s")[1]["lr"] == pytest.approx(record.rates[17], abs=1e-12)


class Overflow(Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.total_batch_idx in self.batches:
            pl_module.head.weight.grad.fill_(torch.inf)


@ends_elsewhere
@pytest.mark.parametrize(
    ("skipped", "expected"), [({0, 3}, [(6, True), (10, False)]), ({1, 2, 3, 4, 5, 6}, [(6, True)])]
)
def test_skipped_steps_do_not_count(skipped, expected, tmp_path):
    record = EveryStep()
    fit([SnapshotEnsemble(2, str(tmp_path / "s")), Overflow(skipped), record], plugins=[plugin_that_skips(8.0)])
    assert [(row["step"], row["complete"]) for row in rows(tmp_path / "s")] == expected
    for row in rows(tmp_path / "s"):
        state = torch.load(tmp_path / "s" / row["file"], weights_only=True)["state_dict"]
        learned = ("head.weight", "body.1.weight")
        assert_same({name: state[name] for name in learned}, {n: record.weights[row["step"]][n] for n in learned})


def test_accumulation_and_odd_lengths(tmp_path):
    fit([SnapshotEnsemble(3, str(tmp_path / "a"))], accumulate_grad_batches=4, max_epochs=5)  # 2 steps an epoch
    assert [row["step"] for row in rows(tmp_path / "a")] == [4, 7, 10]
    fit([SnapshotEnsemble(3, str(tmp_path / "b"))], max_epochs=-1, max_steps=13)
    assert [row["step"] for row in rows(tmp_path / "b")] == [5, 9, 13]
    growing = SnapshotEnsemble(directory=str(tmp_path / "c"), schedule=lt.CosineRestarts(cycles=2, multiplier=2.0))
    fit([growing])
    assert [row["step"] for row in rows(tmp_path / "c")] == [4, 12]


def test_fast_geometric_ensembling(tmp_path):
    record = EveryStep()
    schedule = lt.Triangular(cycles=3, low=0.1)
    fit([SnapshotEnsemble(schedule=schedule, directory=str(tmp_path / "s")), record])
    assert record.rates == [0.05 * schedule(step, 12) for step in range(12)]
    assert [row["step"] for row in rows(tmp_path / "s")] == [4, 8, 12]


class SeveralSteps(ByHand):
    """Three steps a batch, so that a cycle ends in the middle of one."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(3):
            optimizer.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


def test_cycle_that_ends_in_the_middle_of_a_batch(tmp_path):
    record = EveryStep()
    fit([record, SnapshotEnsemble(5, str(tmp_path / "s"), total_steps=36)], SeveralSteps())
    assert [row["step"] for row in rows(tmp_path / "s")] == [8, 15, 22, 29, 36]
    for row in rows(tmp_path / "s"):
        state = torch.load(tmp_path / "s" / row["file"], weights_only=True)["state_dict"]
        learned = [name for name, _ in Net().named_parameters()]
        assert_same({name: state[name] for name in learned}, {n: record.weights[row["step"]][n] for n in learned})


@ends_elsewhere
@pytest.mark.filterwarnings("ignore:.*an epoch by hand has 3 optimizer steps")
@pytest.mark.parametrize(("optimizer", "steps"), [(None, [6, 12]), (0, [6, 12]), (1, [6])])
def test_two_optimizers_by_hand(optimizer, steps, tmp_path):
    fit([SnapshotEnsemble(2, str(tmp_path / "s"), optimizer=optimizer)], TwoOptimizers())
    assert [row["step"] for row in rows(tmp_path / "s")] == steps


@pytest.mark.parametrize("first", ["ema", "snapshots"])
def test_weights_beside_an_average(first, tmp_path):
    class Averages(Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.seen[trainer.global_step] = {k: v.clone() for k, v in ema._averages.tensors[0].items()}

    for weights in ("raw", "average"):
        ema, record, averages = lt.EMA(0.5), EveryStep(), Averages()
        taken = SnapshotEnsemble(5, str(tmp_path / weights), weights=weights)
        fit([*([ema, taken] if first == "ema" else [taken, ema]), record, averages], max_steps=11, max_epochs=-1)
        for row in rows(tmp_path / weights):
            state = torch.load(tmp_path / weights / row["file"], weights_only=True)["state_dict"]
            expected = record.weights if weights == "raw" else averages.seen
            assert_same({k: state[k] for k in expected[row["step"]]}, expected[row["step"]])
            assert row["complete"]


@ends_elsewhere
@pytest.mark.parametrize("weights", ["raw", "average"])
@pytest.mark.parametrize("first", ["ema", "snapshots"])
def test_end_within_a_cycle_beside_an_average(first, weights, tmp_path):
    ema, record = lt.EMA(0.5), EveryStep()
    taken = SnapshotEnsemble(1, str(tmp_path / "s"), weights=weights)
    _, module = fit([*([ema, taken] if first == "ema" else [taken, ema]), record, StopAfter(1)])
    state = dict(torch.load(taken.snapshots[0], weights_only=True)["state_dict"])
    assert_same(state, record.weights[6] if weights == "raw" else snapshot(module))


def test_fast_dev_run_and_nothing_to_train_leave_no_directory(tmp_path):
    fit([SnapshotEnsemble(2)], fast_dev_run=True)
    fit([SnapshotEnsemble(2)], max_epochs=0)
    assert not (tmp_path / "snapshots").exists()


# -------------------------------------------------------------------------------------------------------------- keep


def test_keep_the_last(tmp_path):
    callback = SnapshotEnsemble(5, str(tmp_path / "s"), keep=2)
    fit([callback])
    assert [row["step"] for row in rows(tmp_path / "s")] == [10, 12]
    assert len(list((tmp_path / "s").glob("*.pt"))) == 2
    assert [path.name for path in callback.snapshots] == ["snapshot-step=10.pt", "snapshot-step=12.pt"]


class Scores(Net):
    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def validation_step(self, batch, batch_idx):
        self.log("val/score", self.scores[self.current_epoch])


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        (KeepBest(2, "val/score"), [6, 18]),
        (KeepBest(2, "val/score", mode="max"), [12, 24]),
        (KeepBest(1, "val/score", mode="max"), [24]),
        (KeepBest(9, "val/score"), [6, 12, 18, 24]),
    ],
)
def test_keep_the_best_by_their_own_validation(keep, steps, tmp_path):
    module = Scores([1.0, 3.0, 2.0, 4.0])
    fit([SnapshotEnsemble(4, str(tmp_path / "s"), keep=keep)], module, max_epochs=4)
    assert [row["step"] for row in rows(tmp_path / "s")] == steps
    assert sorted(path.name for path in (tmp_path / "s").glob("*.pt")) == sorted(f"snapshot-step={s}.pt" for s in steps)


def test_metric_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match=r"KeepBest: monitor must be a logged metric, got 'val/kappa'. .* found \['train"
    ):
        fit([SnapshotEnsemble(2, str(tmp_path / "s"), keep=KeepBest(1, "val/kappa"))])


# ------------------------------------------------------------------------------------------------------------ resume


def every_steps(steps, folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=steps, save_top_k=-1)


@pytest.mark.parametrize("at", [3, 5, 8, 9, 15])
@pytest.mark.parametrize("keep", [None, 2])
def test_resumed_run_has_the_snapshots_of_the_whole_one(at, keep, tmp_path):
    folder = tmp_path / "snapshots"
    save = every_steps(1, tmp_path / "saved")
    fit([SnapshotEnsemble(4, keep=keep), save], train=ResumableLoader(), max_epochs=3)
    whole, run = contents(folder), read_manifest(folder)["run"]
    assert [row["step"] for row in rows(folder)] == ([5, 9, 14, 18] if keep is None else [14, 18])
    (folder / ".snapshot-step=18.pt.tmp").write_bytes(b"half of it")
    (folder / "snapshot-step=17.pt").write_bytes(b"never named")
    fit(
        [SnapshotEnsemble(4, keep=keep), every_steps(1, tmp_path / "rest")],
        train=ResumableLoader(),
        max_epochs=3,
        ckpt_path=tmp_path / "saved" / f"step={at}.ckpt",
    )
    assert_same(contents(folder), whole)
    assert read_manifest(folder)["run"] == run
    assert [path.name for path in tmp_path.glob("snapshots*")] == ["snapshots"]


def test_files_of_a_resumed_run_are_equal_to_the_byte(tmp_path):
    folder = tmp_path / "snapshots"
    fit([SnapshotEnsemble(3), every_epoch(tmp_path / "saved")], max_epochs=3)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    fit(
        [SnapshotEnsemble(3), every_epoch(tmp_path / "rest")],
        max_epochs=3,
        ckpt_path=tmp_path / "saved" / "epoch=1.ckpt",
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@ends_elsewhere
def test_run_that_is_gone_on_with_completes_its_cycle(tmp_path):
    fit([SnapshotEnsemble(2), StopAfter(2), every_epoch(tmp_path / "saved")], max_epochs=3)
    folder = tmp_path / "snapshots"
    assert [(row["step"], row["complete"]) for row in rows(folder)] == [(9, True), (12, False)]
    fit(
        [SnapshotEnsemble(2), every_epoch(tmp_path / "rest")],
        max_epochs=3,
        ckpt_path=tmp_path / "saved" / "epoch=1.ckpt",
    )
    assert [(row["step"], row["complete"]) for row in rows(folder)] == [(9, True), (18, True)]
    assert len(list(folder.glob("*.pt"))) == 2


def test_second_fit_goes_on(tmp_path):
    callback = SnapshotEnsemble(2)
    trainer, module = fit([callback])
    trainer.fit(module, loader(), loader(8, seed=5))  # max_epochs was reached
    assert [row["step"] for row in rows(tmp_path / "snapshots")] == [6, 12]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(), loader(8, seed=5))
    assert [row["step"] for row in rows(tmp_path / "snapshots")] == [6, 12, 24]


def test_directory_of_another_run_is_refused(tmp_path):
    fit([SnapshotEnsemble(2, "s"), every_epoch(tmp_path / "a")])
    with pytest.raises(
        ValueError, match=r"directory must be a folder for this run alone, got '2 snapshots .* ckpt_path"
    ):
        fit([SnapshotEnsemble(2, "s")])
    fit([SnapshotEnsemble(2, "other"), every_epoch(tmp_path / "b")])
    with pytest.raises(ValueError, match=r"directory must be that of the run that is resumed, got 's'. .*other"):
        fit([SnapshotEnsemble(2, "s"), every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "b" / "epoch=0.ckpt")
    assert len(rows(tmp_path / "s")) == len(rows(tmp_path / "other")) == 2


def test_snapshots_of_a_checkpoint_that_are_gone(tmp_path):
    fit([SnapshotEnsemble(2, "s"), every_epoch(tmp_path / "a")])
    with pytest.raises(ValueError, match=r"directory must be one with snapshot-step=6.pt, got 'new'. Put them back"):
        fit([SnapshotEnsemble(2, "new"), every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "a" / "epoch=0.ckpt")


def test_checkpoint_of_a_run_without_snapshots(tmp_path):
    fit([lt.LRSchedule(lt.CosineRestarts(cycles=2)), every_epoch(tmp_path / "a")])
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: \['LRSchedule'\]"):
        fit([SnapshotEnsemble(2), every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "a" / "epoch=0.ckpt")
    assert [row["step"] for row in rows(tmp_path / "snapshots")] == [6, 12]  # the first cycle had ended with it


# ----------------------------------------------------------------------------------------------------------- crashes


SCRIPT = """
import os, signal, sys
import torch
sys.path.insert(0, {tests!r})
from kit import fit
from lightning_tricks.callbacks import snapshot_ensemble
torch.set_num_threads(1)
save, replace, count = torch.save, os.replace, 0
def killed(content, file):
    global count
    count += {place!r} == "weights"
    if count == 2:
        file.write(b"PK half of a file")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, file)
def not_replaced(source, target):
    global count
    count += {place!r} in str(target)
    if count == 2 + ({place!r} == "manifest"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
torch.save, os.replace = killed, not_replaced
fit([snapshot_ensemble.SnapshotEnsemble(3, {folder!r}, keep=1)])
"""


@pytest.mark.parametrize("place", ["weights", "step=", "manifest"])
def test_process_killed_while_it_writes_loses_nothing_older(place, tmp_path):
    folder = tmp_path / "s"
    tests = os.path.dirname(os.path.dirname(__file__))
    script = textwrap.dedent(SCRIPT).format(tests=tests, folder=str(folder), place=place)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(list(folder.glob(".*.tmp"))) == 1
    ensemble = Ensemble.load(folder, Net()).eval()
    assert [row["step"] for row in rows(folder)] == [4]
    assert len(ensemble) == 1


def test_error_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["train", "validation"])
def test_exception_takes_no_snapshot_and_the_run_can_be_resumed(place, tmp_path):
    with pytest.raises(RuntimeError, match="failed in"):
        fit([SnapshotEnsemble(2), every_epoch(tmp_path / "a")], Net(fail_at=(place, 8)), max_epochs=3)
    steps = [row["step"] for row in rows(tmp_path / "snapshots")]
    assert steps == ([] if place == "train" else [9])
    fit([SnapshotEnsemble(2), every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "a" / "epoch=0.ckpt", max_epochs=3)
    assert [row["step"] for row in rows(tmp_path / "snapshots")] == [9, 18]


# ------------------------------------------------------------------------------------------------------------- ranks


def test_two_ranks_write_one_directory(tmp_path):
    class Seen(Callback):
        def on_fit_end(self, trainer, pl_module):
            callback = trainer.callbacks[0]
            torch.save([callback._rows, [str(p) for p in callback.snapshots]], tmp_path / f"{trainer.global_rank}.pt")

    options = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 4}
    fit([SnapshotEnsemble(3, keep=KeepBest(2, "val/loss")), Seen(), every_epoch(tmp_path / "a")], **options)
    whole = contents(tmp_path / "snapshots")
    first, second = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same(first, second)
    assert len(first[0]) == 2
    fit(
        [SnapshotEnsemble(3, keep=KeepBest(2, "val/loss")), every_epoch(tmp_path / "rest")],
        ckpt_path=tmp_path / "a" / "epoch=1.ckpt",
        **options,
    )
    resumed = contents(tmp_path / "snapshots")
    assert resumed.keys() == whole.keys()
    for name in whole.keys() - {"manifest.json"}:
        left, right = whole[name]["state_dict"], resumed[name]["state_dict"]
        assert_same(
            {k: v for k, v in left.items() if "running" not in k}, {k: right[k] for k in left if "running" not in k}
        )


def test_error_of_rank_zero_is_every_ranks_error(tmp_path):
    class Fails(Callback):
        def on_exception(self, trainer, pl_module, exception):
            (tmp_path / str(trainer.global_rank)).write_text(str(exception))

    fit([SnapshotEnsemble(2, "s")])
    with pytest.raises(Exception, match="a folder for this run alone"):
        fit([SnapshotEnsemble(2, "s"), Fails()], strategy="ddp_fork", devices=2)


# ----------------------------------------------------------------------------------------------------- what it refuses


def test_another_owner_of_the_rate_is_refused():
    for callbacks in (
        [SnapshotEnsemble(2), lt.LRSchedule(lt.Cosine())],
        [lt.LRSchedule(lt.Cosine()), SnapshotEnsemble(2)],
    ):
        names = ", ".join(f"'{type(callback).__name__}'" for callback in callbacks)
        with pytest.raises(ValueError, match=rf"LRSchedule: callbacks must be the only one .* got \[{names}\]"):
            fit(callbacks)
    with pytest.raises(ValueError, match="SnapshotEnsemble: callbacks must be the only one of its kind"):
        fit([SnapshotEnsemble(2), SnapshotEnsemble(2)])


def test_arguments():
    for arguments in ({}, {"cycles": 2, "schedule": lt.CosineRestarts(cycles=2)}, {"cycles": 2, "cycle_length": 3}):
        with pytest.raises(
            ValueError,
            match="SnapshotEnsemble: cycles must be given, or cycle_length or schedule instead, and one of them alone",
        ):
            SnapshotEnsemble(**arguments)
    with pytest.raises(ValueError, match="SnapshotEnsemble: cycles must be a whole number of at least 1"):
        SnapshotEnsemble(0)
    for schedule in (lt.Cosine(), lambda step, total_steps: 1.0):
        with pytest.raises(
            ValueError, match=r"SnapshotEnsemble: schedule must be one that has cycles, got .* Triangular"
        ):
            SnapshotEnsemble(schedule=schedule)
    with pytest.raises(ValueError, match=r"SnapshotEnsemble: keep must be a whole number of at least 1 \(snapshots\)"):
        SnapshotEnsemble(2, keep=0)
    with pytest.raises(ValueError, match="SnapshotEnsemble: weights must be 'raw' or 'average', got 'ema'"):
        SnapshotEnsemble(2, weights="ema")
    with pytest.raises(ValueError, match="SnapshotEnsemble: directory must be a local folder, got 's3://bucket/a'"):
        SnapshotEnsemble(2, "s3://bucket/a")
    with pytest.raises(ValueError, match="KeepBest: count must be"):
        KeepBest(0, "val/loss")
    with pytest.raises(ValueError, match="KeepBest: mode must be 'min' or 'max', got 'up'"):
        KeepBest(1, "val/loss", "up")


def test_what_only_a_trainer_can_tell():
    with pytest.raises(
        ValueError, match="cycles must be few enough for each to have one of the run's 12 optimizer steps"
    ):
        fit([SnapshotEnsemble(13)])
    with pytest.raises(ValueError, match="weights must be 'raw' without an EMA callback, got 'average'"):
        fit([SnapshotEnsemble(2, weights="average")])


def test_settings_and_copies():
    callback = SnapshotEnsemble(2, keep=KeepBest(1, "val/loss"))
    logger = MemoryLogger()
    fit([callback], logger=logger)
    assert logger.hparams["tricks"]["SnapshotEnsemble"] == {
        "schedule": lt.schedules.describe(lt.CosineRestarts(cycles=2)),
        "total_steps": 12,
        "keep": "KeepBest(count=1, monitor='val/loss', mode='min')",
        "weights": "raw",
    }
    twin = pickle.loads(pickle.dumps(callback))
    assert twin.settings == callback.settings
    assert twin.snapshots == callback.snapshots
