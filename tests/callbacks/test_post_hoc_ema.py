"""Snapshots hold the averages of an explicit loop, whole or not at all, and a resumed run's are the whole run's."""

import json
import math
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
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelPruning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, IterableDataset

import lightning_tricks as lt
from lightning_tricks.callbacks.post_hoc_ema import PostHocEMA
from lightning_tricks.functional.post_hoc import sigma_rel_to_gamma
from lightning_tricks.post_hoc import read_manifest, synthesize_ema

WIDTHS = (0.05, 0.1)


class Direct(Callback):
    """Averages of every width in float64, after every real step of every optimizer."""

    def __init__(self, widths=WIDTHS):
        self.widths, self.steps, self.after, self.handles = widths, 0, {}, []

    def on_train_start(self, trainer, pl_module):
        self.module = pl_module
        self.handles = [optimizer.register_step_post_hook(self.update) for optimizer in trainer.optimizers]

    def on_fit_end(self, trainer, pl_module):
        for handle in self.handles:
            handle.remove()

    def update(self, optimizer, *rest):
        self.steps += 1
        weights = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        now = {}
        for width in self.widths:
            decay = (1 - 1 / self.steps) ** (sigma_rel_to_gamma(width) + 1)
            for name, tensor in weights.items():
                if tensor.is_floating_point() and name != "mask":
                    before = self.after[self.steps - 1][width, name] if self.steps > 1 else torch.zeros(())
                    now[width, name] = decay * before.double() + (1 - decay) * tensor.double()
        self.after[self.steps] = now


def rows(folder):
    return read_manifest(folder)["snapshots"]


def steps_of(folder):
    return [row["step"] for row in rows(folder)]


def load(folder, step):
    return torch.load(folder / f"snapshot-step={step}.pt", weights_only=True, mmap=True)


def contents(folder):
    """All bytes that a directory has, by name; the run's name is its own."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    manifest = json.loads(found["manifest.json"])
    return {**found, "manifest.json": {**manifest, "run": None}}


def assert_tracked(folder, direct, rtol=1e-5):
    """Every snapshot holds the averages of the loop."""
    assert rows(folder)
    for step in steps_of(folder):
        averages = load(folder, step)["averages"]
        for width, average in zip(direct.widths, averages, strict=True):
            expected = {name: t for (other, name), t in direct.after[step].items() if other == width}
            assert average.keys() == expected.keys()
            for name, tensor in average.items():
                torch.testing.assert_close(tensor.double(), expected[name], rtol=rtol, atol=1e-7)


def test_snapshots_hold_the_averages_of_an_explicit_loop(tmp_path):
    direct, callback = Direct(), PostHocEMA(WIDTHS, str(tmp_path / "s"), every_n_steps=5)
    _, module = fit([callback, direct])
    assert steps_of(tmp_path / "s") == [5, 10, 12]
    assert [row["due"] for row in rows(tmp_path / "s")] == [True, True, False]
    files = {path.name for path in (tmp_path / "s").iterdir()}
    assert files == {"manifest.json", *(path.name for path in callback.snapshots)}
    assert_tracked(tmp_path / "s", direct)
    content = load(tmp_path / "s", 12)
    assert content["copied"].keys() == {"mask", "body.2.num_batches_tracked"}
    assert content["copied"]["body.2.num_batches_tracked"] == 12
    assert set(content["dtypes"].values()) == {torch.float32}
    assert content["copied"].keys() | content["averages"][0].keys() == module.state_dict().keys()


def test_manifest_says_what_the_run_was(tmp_path):
    fit([PostHocEMA((0.1, 0.02), str(tmp_path / "s"), every_n_steps=6)])
    manifest = read_manifest(tmp_path / "s")
    assert manifest["sigma_rels"] == [0.1, 0.02]
    assert manifest["versions"] == {
        "lightning_tricks": lt.__version__,
        "torch": torch.__version__,
        "lightning": L.__version__,
    }
    assert manifest["snapshots"][0] == {"file": "snapshot-step=6.pt", "step": 6, "due": True}


def test_synthesis_is_the_average_that_is_tracked_directly(tmp_path):
    direct = Direct((0.04, 0.07, 0.1, 0.15, 0.2))
    _, module = fit([PostHocEMA(directory=str(tmp_path / "s")), direct], max_epochs=30)
    assert len(rows(tmp_path / "s")) == 80
    for sigma_rel in direct.widths:
        state = synthesize_ema(tmp_path / "s", sigma_rel)
        for name in [name for width, name in direct.after[180] if width == sigma_rel]:
            got, expected = state[name].double(), direct.after[180][sigma_rel, name]
            missed = (got - expected).norm()
            assert missed < 1e-3 * expected.norm(), (sigma_rel, name)  # 1e-2 is promised
        # Not near because every average is: the raw weights are far.
        raw, expected = module.head.weight.double(), direct.after[180][sigma_rel, "head.weight"]
        assert (state["head.weight"].double() - expected).norm() < 0.01 * (raw - expected).norm()
    module.load_state_dict(state)


class Drift(L.LightningModule):
    """Weights that move along a line at a constant speed, beside one that stands still."""

    step = 0.125

    def __init__(self, dtype):
        super().__init__()
        self.moving = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
        self.still = nn.Parameter(torch.tensor([0.3], dtype=dtype), requires_grad=False)

    def training_step(self, batch, batch_idx):
        return (self.moving * torch.tensor([1.0, 3.0], dtype=self.moving.dtype)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([self.moving], lr=self.step)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.15, 0.25])
def test_linear_drift_is_exact(dtype, rtol, sigma_rel, tmp_path):
    fit([PostHocEMA(directory=str(tmp_path / "s"), every_n_steps=5)], Drift(dtype), max_epochs=20)
    state = synthesize_ema(tmp_path / "s", sigma_rel)
    k = torch.arange(121, dtype=torch.float64)
    shares = ((k / 120) ** (sigma_rel_to_gamma(sigma_rel) + 1)).diff()
    start, speed = torch.tensor([1.0, -2.0]).double(), -0.125 * torch.tensor([1.0, 3.0]).double()
    expected = start + speed * (shares * k[1:]).sum()
    assert state["moving"].dtype == dtype
    torch.testing.assert_close(state["moving"].double(), expected, rtol=rtol, atol=0)
    torch.testing.assert_close(state["still"], torch.tensor([0.3], dtype=dtype), rtol=rtol, atol=0)


# ----------------------------------------------------------------------------------------------------- when and where


@pytest.mark.parametrize(
    ("every", "expected"),
    [(4, [4, 8, 12]), (0.25, [3, 6, 9, 12]), ("1ep", [6, 12]), (0.0125, list(range(1, 13))), (100, [12])],
)
def test_when_snapshots_are_due(every, expected, tmp_path):
    fit([PostHocEMA(every_n_steps=every)])
    assert steps_of(tmp_path / "post_hoc_ema") == expected


def test_default_directories(tmp_path):
    first, second, third = PostHocEMA(), PostHocEMA(), PostHocEMA()
    fit([first])
    fit([second])
    fit([second])  # another run of the same callback
    logger = CSVLogger(tmp_path / "logs")
    fit([third], logger=logger)
    assert first.snapshots[0].parent == tmp_path / "post_hoc_ema"
    assert second.snapshots[0].parent == tmp_path / "post_hoc_ema-3"
    assert len(rows(tmp_path / "post_hoc_ema-2")) == 12
    assert str(third.snapshots[0].parent) == f"{logger.log_dir}/post_hoc_ema"


class Overflow(Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.total_batch_idx in (0, 3, 4, 7):
            pl_module.head.weight.grad.fill_(torch.inf)


def test_steps_that_a_scaler_skips_do_not_count(tmp_path):
    direct = Direct()
    fit([direct, PostHocEMA(directory="s", every_n_steps=3), Overflow()], plugins=[plugin_that_skips(8.0)])
    assert steps_of(tmp_path / "s") == [3, 6, 8]
    assert_tracked(tmp_path / "s", direct)


def test_accumulation_counts_optimizer_steps(tmp_path):
    direct = Direct()
    fit([direct, PostHocEMA(directory="s", every_n_steps=0.25)], accumulate_grad_batches=4)
    assert steps_of(tmp_path / "s") == [1, 2, 3, 4]
    assert_tracked(tmp_path / "s", direct)


@pytest.mark.parametrize(("every", "expected"), [("1ep", [12, 18]), (0.25, [6, 12, 18])])
def test_each_of_two_optimizers_counts(every, expected, tmp_path):
    """18 steps, of the 24 that there could be."""
    direct = Direct()
    fit([direct, PostHocEMA(directory="s", every_n_steps=every)], TwoOptimizers())
    assert steps_of(tmp_path / "s") == expected
    assert_tracked(tmp_path / "s", direct)


class SeveralSteps(ByHand):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(3):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


def test_snapshot_in_the_middle_of_a_batch(tmp_path):
    direct = Direct()
    fit([direct, PostHocEMA(directory="s", every_n_steps=5)], SeveralSteps(), max_epochs=1)
    assert steps_of(tmp_path / "s") == [5, 10, 15, 18]
    assert_tracked(tmp_path / "s", direct)


def test_fast_dev_run_and_nothing_to_train_leave_no_directory(tmp_path):
    fit([PostHocEMA()], fast_dev_run=True)
    fit([PostHocEMA()], max_epochs=0)
    assert list(tmp_path.iterdir()) == []


def test_endless_training_asks_for_steps(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(1, 4, 4), 0

    expected = "PostHocEMA: total_steps must be known, got .* Give every_n_steps= in optimizer steps"
    with pytest.raises(ValueError, match=expected):
        fit([PostHocEMA()], train=DataLoader(Endless(), batch_size=2), max_epochs=-1)
    train = DataLoader(Endless(), batch_size=2)
    fit([PostHocEMA(directory="s", every_n_steps=4), Stop(6)], train=train, max_epochs=-1, limit_val_batches=0)
    assert steps_of(tmp_path / "s") == [4, 6]


class Stop(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


# -------------------------------------------------------------------------------------------------- the module's own


def test_module_is_never_touched():
    _, plain = fit([])
    _, module = fit([PostHocEMA()])
    assert_same(snapshot(module), snapshot(plain))
    assert set(vars(module)) == set(vars(plain))


@pytest.mark.parametrize("place", ["train", "validation"])
def test_exception_leaves_the_raw_weights_and_what_was_written(place, tmp_path):
    module, plain = Net(fail_at=(place, 8)), Net(fail_at=(place, 8))
    with pytest.raises(RuntimeError, match="failed in"):
        fit([PostHocEMA(every_n_steps=3)], module, max_epochs=3)
    with pytest.raises(RuntimeError, match="failed in"):
        fit([], plain, max_epochs=3)
    assert_same(snapshot(module), snapshot(plain))
    assert steps_of(tmp_path / "post_hoc_ema") == ([3, 6] if place == "train" else [3, 6, 9, 12])


@pytest.mark.parametrize("first", [True, False])
def test_beside_other_owners_of_the_weights(first, tmp_path):
    direct = Direct()
    others = [lt.EMA(0.5), lt.EarlyStopping(monitor="val/loss", patience=100, restore_best=True)]
    ours = PostHocEMA(directory="s", every_n_steps=5)
    _, module = fit([direct, *([ours, *others] if first else [*others, ours])])
    assert_tracked(tmp_path / "s", direct)
    others = [lt.EMA(0.5), lt.EarlyStopping(monitor="val/loss", patience=100, restore_best=True)]
    _, without = fit(others)
    assert_same(snapshot(module), snapshot(without))


class Zoo(Net):
    """Weights of every kind."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.head.to(dtype)
        self.tied = self.head
        self.phase = nn.Parameter(torch.tensor([1 + 2j]))
        self.register_buffer("volatile", torch.ones(2), persistent=False)
        self.register_buffer("grows", torch.ones(1))
        self.register_buffer("late", None)
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, images):
        hidden = self.spectral(self.frozen(self.body(images))) * self.phase.abs()
        return self.head(hidden.to(self.head.weight.dtype)).float()

    def on_train_batch_end(self, *args):
        self.grows = torch.ones(len(self.grows) + 1)
        self.late = torch.full((2,), 7.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_every_kind(dtype, tmp_path):
    watched = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            watched.append({n: p.detach().clone() for n, p in pl_module.named_parameters(remove_duplicate=False)})

    _, module = fit([PostHocEMA((0.1, 0.2), "s", every_n_steps=4), Watch()], Zoo(dtype))
    content = load(tmp_path / "s", 12)
    k = torch.arange(13, dtype=torch.float64)
    shares = ((k / 12) ** (sigma_rel_to_gamma(0.1) + 1)).diff()
    for name in watched[0]:
        wide = torch.complex128 if name == "phase" else torch.float64
        expected = sum(share * weights[name].to(wide) for share, weights in zip(shares, watched, strict=True))
        average = content["averages"][0][name]
        assert average.dtype == {torch.bfloat16: torch.float32, torch.float16: torch.float32}.get(
            watched[0][name].dtype, watched[0][name].dtype
        )
        torch.testing.assert_close(average.to(wide), expected, rtol=1e-5, atol=1e-6)
    assert content["copied"].keys() == {
        "mask",
        "grows",
        "late",
        "body.2.num_batches_tracked",
        "spectral.parametrizations.weight.0._u",
        "spectral.parametrizations.weight.0._v",
    }
    state = synthesize_ema(tmp_path / "s", 0.1)
    assert state.keys() == module.state_dict().keys()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        name: tensor.dtype for name, tensor in module.state_dict().items()
    }
    # The file's own are copied in before the batch's end, where the buffer grows.
    assert_same(state["grows"], torch.ones(12))
    assert_same(state["tied.weight"], state["head.weight"])


def test_half_precision_weights_are_averaged_where_an_average_of_their_own_would_stand_still(tmp_path):
    class Slow(Drift):
        step = 2**-7

    fit([PostHocEMA(directory="s")], Slow(torch.bfloat16), max_epochs=20)
    average = load(tmp_path / "s", 120)["averages"][1]["moving"]
    path, weight = [], torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    for _ in range(120):
        weight = weight - torch.tensor([2**-7, 3 * 2**-7], dtype=torch.bfloat16)
        path.append(weight.double())
    shares = ((torch.arange(121, dtype=torch.float64) / 120) ** (sigma_rel_to_gamma(0.1) + 1)).diff()
    torch.testing.assert_close(average.double(), shares @ torch.stack(path), rtol=1e-5, atol=0)


def test_names_that_a_state_dict_hook_changes_or_leaves_out(tmp_path):
    class Renamed(Net):
        def __init__(self):
            super().__init__()
            self.register_state_dict_post_hook(self.rename)

        @staticmethod
        def rename(module, state, prefix, metadata):
            state["classifier"] = state.pop("head.weight")
            state["body.1.weight"] = state["body.1.weight"].clone()
            del state["frozen.weight"]

    direct = Direct()
    _, module = fit([direct, PostHocEMA(directory="s", every_n_steps=6)], Renamed())
    assert_tracked(tmp_path / "s", direct)
    state = synthesize_ema(tmp_path / "s", 0.1)
    assert state.keys() == module.state_dict().keys()
    assert "classifier" in load(tmp_path / "s", 12)["averages"][0]


def test_compiled_part(tmp_path):
    module, direct = Net(), Direct()
    module.body = torch.compile(module.body, backend="eager")
    fit([direct, PostHocEMA(directory="s")], module)
    assert_tracked(tmp_path / "s", direct)
    module.load_state_dict(synthesize_ema(tmp_path / "s", 0.1))


def test_lazy_parameters_are_averaged(tmp_path):
    class Lazy(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.LazyLinear(3)

    fit([direct := Direct(), PostHocEMA(directory="s")], Lazy())
    assert_tracked(tmp_path / "s", direct)


@pytest.mark.parametrize(("dtype", "eps"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_dtype_of_the_files(dtype, eps, tmp_path):
    fit([PostHocEMA(directory="own")])
    fit([PostHocEMA(directory="s", dtype=dtype)])
    own, narrow = load(tmp_path / "own", 12), load(tmp_path / "s", 12)
    assert narrow["dtypes"] == own["dtypes"]
    for left, right in zip(own["averages"], narrow["averages"], strict=True):
        for name, tensor in right.items():
            assert tensor.dtype == getattr(torch, dtype)
            torch.testing.assert_close(tensor.float(), left[name], rtol=eps, atol=1e-7)
    state = synthesize_ema(tmp_path / "s", 0.07)
    assert state["head.weight"].dtype == torch.float32


def test_average_that_half_precision_cannot_hold_stays_as_it_is(tmp_path):
    class Large(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("large", torch.tensor([1e6]))

    fit([PostHocEMA(directory="s", dtype="float16")], Large())
    averages = load(tmp_path / "s", 12)["averages"][0]
    assert_same(averages["large"], torch.tensor([1e6]))
    assert averages["head.weight"].dtype == torch.float16


# ------------------------------------------------------------------------------------------------------------ resume


def every_steps(steps, folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=steps, save_top_k=-1)


@pytest.mark.parametrize("at", [1, 4, 8, 12, 17])
def test_resumed_run_has_the_files_of_the_whole_one_to_the_byte(at, tmp_path):
    folder = tmp_path / "post_hoc_ema"
    fit(
        [PostHocEMA(every_n_steps=4), every_steps(1, tmp_path / "saved")],
        train=ResumableLoader(),
        max_epochs=3,
    )
    whole, run = contents(folder), read_manifest(folder)["run"]
    assert steps_of(folder) == [4, 8, 12, 16, 18]
    (folder / ".snapshot-step=18.pt.tmp").write_bytes(b"half of it")
    (folder / "snapshot-step=17.pt").write_bytes(b"never named")
    fit(
        [PostHocEMA(every_n_steps=4), every_steps(1, tmp_path / "rest")],
        train=ResumableLoader(),
        max_epochs=3,
        ckpt_path=tmp_path / "saved" / f"step={at}.ckpt",
    )
    assert contents(folder) == whole
    assert read_manifest(folder)["run"] == run
    assert [path.name for path in tmp_path.glob("post_hoc_ema*")] == ["post_hoc_ema"]


def test_checkpoint_of_a_step_has_the_snapshot_of_that_step(tmp_path):
    """Whichever of the two callbacks comes first."""
    for first in (True, False):
        ours, save = PostHocEMA(every_n_steps=4), every_steps(4, tmp_path / str(first))
        fit([ours, save] if first else [save, ours], train=ResumableLoader())
        saved = torch.load(tmp_path / str(first) / "step=8.ckpt", weights_only=True)["post_hoc_ema"]
        assert [row["step"] for row in saved["rows"]] == [4, 8]


def test_snapshot_at_an_end_that_was_not_the_end_is_removed(tmp_path):
    folder = tmp_path / "post_hoc_ema"
    fit([PostHocEMA(every_n_steps=5), StopAfter(2), every_epoch(tmp_path / "saved")], max_epochs=3)
    assert steps_of(folder) == [5, 10, 12]
    fit(
        [PostHocEMA(every_n_steps=5), every_epoch(tmp_path / "rest")],
        max_epochs=3,
        ckpt_path=tmp_path / "saved" / "epoch=1.ckpt",
    )
    assert steps_of(folder) == [5, 10, 15, 18]
    assert len(list(folder.glob("*.pt"))) == 4


def test_second_fit_goes_on(tmp_path):
    class Plain(Net):
        """Without momentum the optimizer has no state, so that two fits are one."""

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    fit([PostHocEMA(directory="whole", every_n_steps=5)], Plain(), max_epochs=4)
    callback = PostHocEMA(directory="twice", every_n_steps=5)
    trainer, module = fit([callback], Plain())
    trainer.fit(module, loader(), loader(8, seed=5))  # max_epochs was reached
    assert steps_of(tmp_path / "twice") == [5, 10, 12]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(), loader(8, seed=5))
    assert contents(tmp_path / "twice") == contents(tmp_path / "whole")


def test_second_fit_of_another_module_is_refused():
    trainer, _ = fit([PostHocEMA()])
    trainer.fit_loop.max_epochs = 4
    other = Net()
    other.head = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"module must be the one whose weights .*others at head.weight, head.bias'"):
        trainer.fit(other, loader(), loader(8))


def test_second_fit_of_a_module_with_more_parameters_is_refused():
    trainer, module = fit([PostHocEMA()])
    trainer.fit_loop.max_epochs = 4
    module.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"module must be the one .*others at more.weight, more.bias'"):
        trainer.fit(module, loader(), loader(8))


def test_parameters_that_are_made_during_training_are_refused():
    class Late(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                self.late = nn.Linear(2, 2)

    with pytest.raises(
        ValueError, match=r"module must be one whose parameters .* got 'later ones at late.weight, late"
    ):
        fit([PostHocEMA(every_n_steps=5)], Late())


def test_averages_leave_the_run_and_come_back(tmp_path):
    callback = PostHocEMA()
    fit([callback, every_epoch(tmp_path)])
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["post_hoc_ema"]
    assert saved["steps"] == 12
    assert_same(saved["averages"], callback._averages.tensors)
    assert_same(saved["averages"][0], dict(load(tmp_path / "post_hoc_ema", 12)["averages"][0]))
    twin = pickle.loads(pickle.dumps(callback))
    assert twin.settings == callback.settings
    assert twin.snapshots == callback.snapshots


def test_run_begun_without_it_is_counted_from_where_it_came(tmp_path):
    fit([every_epoch(tmp_path / "a")])
    direct = Direct()
    fit(
        [direct, PostHocEMA(every_n_steps=4), every_epoch(tmp_path / "b")],
        ckpt_path=tmp_path / "a" / "epoch=0.ckpt",
        max_epochs=3,
    )
    assert steps_of(tmp_path / "post_hoc_ema") == [4, 8, 12]
    assert_tracked(tmp_path / "post_hoc_ema", direct)


def test_directory_of_another_run_is_refused(tmp_path):
    fit([PostHocEMA(directory="s"), every_epoch(tmp_path / "a")])
    with pytest.raises(
        ValueError, match=r"PostHocEMA: directory must be a folder for this run alone, got '12 snap.* ckpt_path"
    ):
        fit([PostHocEMA(directory="s")])
    fit([PostHocEMA(directory="other"), every_epoch(tmp_path / "b")])
    with pytest.raises(ValueError, match=r"directory must be that of the run that is resumed, got 's'. .*other"):
        fit([PostHocEMA(directory="s"), every_epoch(tmp_path / "c")], ckpt_path=tmp_path / "b" / "epoch=0.ckpt")
    assert len(rows(tmp_path / "s")) == len(rows(tmp_path / "other")) == 12


def test_snapshots_of_a_checkpoint_that_are_gone(tmp_path):
    fit([PostHocEMA(directory="s", every_n_steps=3), every_epoch(tmp_path / "a")])
    checkpoint = tmp_path / "a" / "epoch=0.ckpt"
    expected = r"directory must be one with snapshot-step=3.pt, snapshot-step=6.pt, got 'new'. Put them back"
    with pytest.raises(ValueError, match=expected):
        fit([PostHocEMA(directory="new", every_n_steps=3), every_epoch(tmp_path / "b")], ckpt_path=checkpoint)


def test_directory_that_was_moved(tmp_path):
    fit([PostHocEMA(directory="s", every_n_steps=4), every_epoch(tmp_path / "a")])
    whole = contents(tmp_path / "s")
    (tmp_path / "s").rename(tmp_path / "moved")
    fit(
        [PostHocEMA(directory="moved", every_n_steps=4), every_epoch(tmp_path / "b")],
        ckpt_path=tmp_path / "a" / "epoch=0.ckpt",
    )
    assert contents(tmp_path / "moved") == whole


def test_checkpoint_of_other_widths_is_refused(tmp_path):
    fit([PostHocEMA((0.05, 0.1)), every_epoch(tmp_path / "a")])
    with pytest.raises(ValueError, match=r"sigma_rels must be those of the checkpoint, got \(0.2,\). Give .*0.05, 0.1"):
        fit([PostHocEMA((0.2,)), every_epoch(tmp_path / "b")], ckpt_path=tmp_path / "a" / "epoch=0.ckpt")


def test_directory_of_a_snapshot_ensemble_is_refused(tmp_path):
    fit([lt.SnapshotEnsemble(2, "s")])
    with pytest.raises(ValueError, match="directory must be of format 'post-hoc EMA 1', got 1"):
        fit([PostHocEMA(directory="s")])
    fit([PostHocEMA(directory="t")])
    with pytest.raises(ValueError, match="directory must be of format 1, got 'post-hoc EMA 1'"):
        fit([lt.SnapshotEnsemble(2, "t")])


# ------------------------------------------------------------------------------------------------------------ crashes


SCRIPT = """
import os, signal, sys
import torch
sys.path.insert(0, {tests!r})
from kit import fit
from lightning_tricks.callbacks.post_hoc_ema import PostHocEMA
torch.set_num_threads(1)
replace, count = os.replace, 0
def not_replaced(source, target):
    global count
    count += {place!r} in str(target)
    if count == {nth}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = not_replaced
fit([PostHocEMA(directory={folder!r}, every_n_steps=4)])
"""


@pytest.mark.parametrize(("place", "nth"), [("step=", 2), ("manifest", 3)])
def test_process_killed_while_it_writes_loses_nothing_older(place, nth, tmp_path):
    folder, tests = tmp_path / "s", os.path.dirname(os.path.dirname(__file__))
    script = textwrap.dedent(SCRIPT).format(tests=tests, folder=str(folder), place=place, nth=nth)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(list(folder.glob(".*.tmp"))) == 1
    assert steps_of(folder) == [4]
    Net().load_state_dict(synthesize_ema(folder, 0.1))


# ------------------------------------------------------------------------------------------------------------- ranks


def test_two_ranks_write_one_directory_and_only_one_holds_averages(tmp_path):
    class Seen(Callback):
        def on_train_end(self, trainer, pl_module):
            ours = trainer.callbacks[1]
            report = [ours._rows, ours._steps, ours._folder, ours._run, len(ours._averages.tensors)]
            torch.save(report, tmp_path / f"{trainer.global_rank}.pt")
            if trainer.is_global_zero:
                torch.save({str(step): now for step, now in trainer.callbacks[0].after.items()}, tmp_path / "direct.pt")

    options = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 4}
    fit([Direct(), PostHocEMA(every_n_steps=5), Seen(), every_epoch(tmp_path / "a")], **options)
    first, second = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert first[:4] == second[:4]
    assert (first[4], second[4]) == (2, 0)
    direct = Direct()
    direct.after = {int(step): now for step, now in torch.load(tmp_path / "direct.pt", weights_only=True).items()}
    folder = tmp_path / "post_hoc_ema"
    assert steps_of(folder) == [5, 10, 12]
    assert_tracked(folder, direct)
    whole = contents(folder)
    fit(
        [Direct(), PostHocEMA(every_n_steps=5), Seen(), every_epoch(tmp_path / "b")],
        ckpt_path=tmp_path / "a" / "epoch=1.ckpt",
        **options,
    )
    assert contents(folder) == whole
    assert [torch.load(tmp_path / f"{rank}.pt", weights_only=True)[4] for rank in (0, 1)] == [2, 0]


def test_error_of_rank_zero_is_every_ranks_error():
    fit([PostHocEMA(directory="s")])
    with pytest.raises(Exception, match="directory must be a folder for this run alone"):
        fit([PostHocEMA(directory="s")], strategy="ddp_fork", devices=2)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({"sigma_rels": 0.1}, TypeError, r"sigma_rels must be a list of at least one width, got 0.1"),
        ({"sigma_rels": []}, TypeError, r"sigma_rels must be a list of at least one width, got \[\]"),
        ({"sigma_rels": ["0.1"]}, TypeError, "sigma_rels must be a number in"),
        ({"sigma_rels": [0.3]}, ValueError, r"sigma_rels must be in \[1e-6, 0.2887\) .* got 0.3"),
        ({"sigma_rels": [0.1, 0.1]}, ValueError, "sigma_rels must be different from each other"),
        ({"directory": "s3://bucket"}, ValueError, "directory must be a local folder"),
        ({"every_n_steps": 0}, ValueError, "PostHocEMA: every_n_steps must be at least 1"),
        ({"every_n_steps": 1.5}, ValueError, "PostHocEMA: every_n_steps must be in"),
        ({"dtype": "float64"}, ValueError, "dtype must be 'float32', 'bfloat16' or 'float16', got 'float64'"),
    ],
)
def test_arguments_out_of_range(arguments, error, expected):
    with pytest.raises(error, match=expected):
        PostHocEMA(**arguments)


def test_what_only_a_trainer_can_tell(tmp_path):
    with pytest.raises(
        ValueError, match=r"PostHocEMA: callbacks must be the only one of its kind in a Trainer, got \["
    ):
        fit([PostHocEMA(), PostHocEMA((0.2,))])
    pruning = ModelPruning("l1_unstructured", amount=0.5)
    with pytest.raises(ValueError, match="callbacks must be without ModelPruning"):
        fit([PostHocEMA(), pruning])
    trainer = make_trainer([])
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(ValueError, match="PostHocEMA: strategy must be one that keeps whole parameters on each rank"):
        PostHocEMA().setup(trainer, Net(), "fit")
    assert list(tmp_path.iterdir()) == []


def test_settings():
    logger = MemoryLogger()
    fit([PostHocEMA(every_n_steps="1ep", dtype="float16")], logger=logger)
    expected = {"sigma_rels": [0.05, 0.1], "every_n_steps": "1ep", "dtype": "float16"}
    assert logger.hparams["tricks"]["PostHocEMA"] == expected


def test_widths_of_the_paper_are_the_default():
    assert PostHocEMA().sigma_rels == (0.05, 0.10)
    assert math.isclose(PostHocEMA().every_n_steps * 80, 1)


def test_error_of_rank_zero_ends_all_ranks():
    class Grows(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.late = torch.nn.Linear(2, 2)

    with pytest.raises(Exception, match="module must be one whose parameters are all there when training starts"):
        fit([PostHocEMA(every_n_steps=2)], Grows(), strategy="ddp_fork", devices=2, max_epochs=3)
