"""What every callback of the package promises. A new callback adds a row to CALLBACKS and gets every check."""

import copy
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
    MemoryLogger,
    Net,
    ResumableLoader,
    TwoOptimizers,
    assert_same,
    every_epoch,
    fit,
    loader,
    make_trainer,
    plugin_that_skips,
    snapshot,
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

import lightning_tricks as lt


def scheduled_transforms(total_steps=None):
    chain = [lt.OneOf([lt.Mixup(0.5), lt.Cutout(2)]), lt.RandomApply([lt.LabelSmoothing(0.1)])]
    ramp = {"prob": lt.Linear(0, 1), "strength": lt.Linear(0.5, 1), "stop": 0.8}
    return lt.BatchTransforms(chain, seed=3, total_steps=total_steps, **ramp)


def into_unit_range(images, labels, generator=None, inplace=False):
    return images.sigmoid().expand(-1, 3, -1, -1).clone(), labels


def into_one_channel(images, labels, generator=None, inplace=False):
    return images.mean(1, keepdim=True), labels


def every_transform():
    """Each transform; the last is for every stage, and changes no number there."""
    geometry = [lt.RandomCrop(4, padding=1), lt.RandomFlip(), lt.RandomResizedCrop(4, scale=(0.5, 1.0))]
    colour = [lt.ColorJitter(0.2, 0.2, 0.2, 0.1), lt.RandAugment(2, 9), lt.TrivialAugment(), lt.PCALighting()]
    mixing = [lt.OneOf([lt.Mixup(0.5), lt.CutMix(1.0)]), lt.RandomApply(lt.LabelSmoothing(0.1))]
    erasing = [lt.Cutout(2), lt.RandomErasing(0.5)]
    return [into_unit_range, *geometry, *colour, *erasing, *mixing, into_one_channel, lt.Normalize([0.0], [1.0])]


MEASURES = ["grad_norm", "grad_norm_clipped", "weight_norm", "update_norm", "update_ratio", "grad_zeros"]
CALLBACKS = {
    "LRSchedule": lambda: [lt.LRSchedule(lt.WarmupCosine(0.25))],
    "ParamSchedule": lambda: [lt.ParamSchedule("body.2.momentum", lt.Cosine(0.1), optimizer=0)],
    "EMA": lambda: [lt.EMA(decay=0.9)],
    "EMA of every other step": lambda: [lt.EMA(lt.Warmed(0.9), start=3, every_n_steps=2)],
    "EMAs beside the raw weights": lambda: [lt.EMA([0.9, 0.5], evaluate="both", dtype="float64", exclude="head.bias")],
    "EMA behind the raw weights": lambda: [lt.EMA(lt.HalfLife(2), evaluate="raw")],
    "PolyakAverage": lambda: [lt.PolyakAverage(start=0.4)],
    "PolyakAverage with batch norm anew": lambda: [lt.PolyakAverage(start=0.4, update_bn=True)],
    "PostHocEMA": lambda: [lt.PostHocEMA(every_n_steps=5)],
    "EarlyStopping": lambda: [
        lt.EarlyStopping(monitor="val/loss", patience=100, ignore_first=1, restore_best=True),
    ],
    "SnapshotEnsemble": lambda: [lt.SnapshotEnsemble(3, keep=2)],
    "BatchTransforms": lambda: [lt.BatchTransforms([lt.Cutout(2), lt.Mixup(0.5), lt.LabelSmoothing(0.1)], seed=3)],
    "BatchTransforms of every kind": lambda: [lt.BatchTransforms(every_transform(), seed=3)],
    "BatchTransforms by schedules": lambda: [scheduled_transforms()],
    "UpdateMonitor": lambda: [lt.UpdateMonitor(every_n_steps=2)],
    "UpdateMonitor of many measures": lambda: [lt.UpdateMonitor(2, MEASURES, layers=1, band=(0.0, 1e9))],
    "UpdateMonitor in turns": lambda: [lt.UpdateMonitor(2, ["weight_norm", "update_ratio"], max_extra_memory=600)],
    "UpdateMonitor of successive updates": lambda: [lt.UpdateMonitor(2, ["weight_norm", "update_cosine"])],
    "ActivationMonitor": lambda: [lt.ActivationMonitor(every_n_steps=2, gradients=True)],
    "all": lambda: [
        lt.EarlyStopping(monitor="val/loss", patience=100, ignore_first=1, restore_best=True),
        lt.LRSchedule(lt.WarmupCosine(0.25)),
        lt.ParamSchedule("body.2.momentum", lt.Cosine(0.1), optimizer=0),
        lt.EMA(decay=0.9),
        lt.BatchTransforms([lt.Cutout(2), lt.Mixup(0.5), lt.LabelSmoothing(0.1)], seed=3),
        lt.UpdateMonitor(every_n_steps=2),
        lt.ActivationMonitor(every_n_steps=2),
    ],
}
AVERAGED = {
    "EMA": lambda steps: steps,
    "all": lambda steps: steps,
    "EMA of every other step": lambda steps: steps // 2 - 1,
    "EMAs beside the raw weights": lambda steps: steps,
    "EMA behind the raw weights": lambda steps: steps,
    "PolyakAverage": lambda steps: steps - int(0.4 * steps),
    "PolyakAverage with batch norm anew": lambda steps: steps - int(0.4 * steps),
}
"""Steps that are in an average."""
ends_elsewhere = pytest.mark.filterwarnings("ignore:.*(the schedule is for .* optimizer steps|an epoch by hand has)")
every_callback = pytest.mark.parametrize("name", CALLBACKS)


def hooks_left(module: L.LightningModule) -> list[str]:
    return [key for key, value in vars(module).items() if callable(value) and key.startswith("on_")]


def state_of(trainer: L.Trainer) -> dict:
    """All that a run is afterwards: weights, averages, optimizers, callbacks, as a checkpoint holds it."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    callbacks = {key: value for key, value in checkpoint["callbacks"].items() if "ModelCheckpoint" not in key}
    keys = ("state_dict", "current_model_state", "averaging_state", "averages", "averaging_steps")
    keys += ("optimizer_states", "lr_schedulers", "global_step")
    return {"callbacks": callbacks, **{key: checkpoint[key] for key in keys if key in checkpoint}}


class Record(Callback):
    """Remember the validated weights, and the rates of every step."""

    def __init__(self):
        self.rows = []

    def on_validation_epoch_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.rows.append(("validated", trainer.global_step, snapshot(pl_module)))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rows.append(("rate", trainer.global_step, optimizer.param_groups[0]["lr"]))


# ---------------------------------------------------------------------------------------------- 1. resume, bit for bit


@every_callback
@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_run_resumed_at_an_epoch_end_is_the_run_that_was_not_stopped(name, limit, tmp_path):
    length = {"max_epochs": 4} if limit == "max_epochs" else {"max_epochs": -1, "max_steps": 24}
    whole, record = MemoryLogger(), Record()
    trainer, module = fit([*CALLBACKS[name](), record, every_epoch(tmp_path)], logger=whole, **length)
    rest, record_rest = MemoryLogger(), Record()
    resumed, module_rest = fit(
        [*CALLBACKS[name](), record_rest, every_epoch(tmp_path / "rest")],
        logger=rest,
        ckpt_path=tmp_path / "epoch=1.ckpt",
        **length,
    )
    assert_same(state_of(resumed), state_of(trainer))
    assert_same(module_rest.seen, module.seen[-12:])
    assert_same(record_rest.rows, record.rows[-len(record_rest.rows) :])
    assert len(record_rest.rows) >= 14
    if limit == "max_epochs":  # a run by max_steps resumes with Lightning's own rows a step later
        assert_same(rest.rows, [row for row in whole.rows if row[0] >= 12])


@every_callback
def test_run_resumed_in_the_middle_of_an_epoch_is_the_run_that_was_not_stopped(name, tmp_path):
    whole = MemoryLogger()
    save = every_steps(8, tmp_path)
    trainer, module = fit([*CALLBACKS[name](), save], train=ResumableLoader(), logger=whole, max_epochs=3)
    rest = MemoryLogger()
    resumed, module_rest = fit(
        [*CALLBACKS[name](), every_steps(8, tmp_path / "rest")],
        train=ResumableLoader(),
        logger=rest,
        max_epochs=3,
        ckpt_path=tmp_path / "step=8.ckpt",
    )
    assert_same(state_of(resumed), state_of(trainer))
    assert_same(module_rest.seen, module.seen[8:])
    assert_same(rest.rows, [row for row in whole.rows if row[0] >= 8])


@ends_elsewhere
@every_callback
def test_two_optimizers_by_hand_resume_too(name, tmp_path):
    trainer, module = fit([*CALLBACKS[name](), every_epoch(tmp_path)], TwoOptimizers(), max_epochs=4)
    resumed, module_rest = fit(
        [*CALLBACKS[name](), every_epoch(tmp_path / "rest")],
        TwoOptimizers(),
        max_epochs=4,
        ckpt_path=tmp_path / "epoch=1.ckpt",
    )
    assert_same(state_of(resumed), state_of(trainer))
    assert_same(module_rest.seen, module.seen[12:])


def every_steps(steps, folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=steps, save_top_k=-1)


SCRIPT = """
import os, signal, sys, warnings
import torch
sys.path.insert(0, {tests!r})
sys.path.insert(0, {contract!r})
from kit import ResumableLoader, fit
from lightning.pytorch.callbacks import Callback
from test_contract import CALLBACKS, every_steps
torch.set_num_threads(1)
class Kill(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 11:
            os.kill(os.getpid(), signal.SIGKILL)
fit([*CALLBACKS["all"](), Kill(), every_steps(5, {folder!r})], train=ResumableLoader(), max_epochs=3)
"""


def test_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path):
    here = os.path.dirname(__file__)
    script = textwrap.dedent(SCRIPT).format(tests=os.path.dirname(here), contract=here, folder=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=10.ckpt", "step=5.ckpt"]
    trainer, module = fit(CALLBACKS["all"](), train=ResumableLoader(), max_epochs=3)
    resumed, module_rest = fit(
        [*CALLBACKS["all"](), every_steps(5, tmp_path / "rest")],
        train=ResumableLoader(),
        max_epochs=3,
        ckpt_path=tmp_path / "step=10.ckpt",
    )
    assert_same(state_of(resumed), state_of(trainer))
    assert_same(module_rest.seen, module.seen[10:])


@every_callback
def test_checkpoint_loads_with_weights_only(name, tmp_path):
    fit([*CALLBACKS[name](), every_epoch(tmp_path)])
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 1
    fit([*CALLBACKS[name](), every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)


# ------------------------------------------------------------------------------------------------- 3. real steps count


@every_callback
def test_accumulation_counts_optimizer_steps(name):
    trainer, _ = fit(callbacks := CALLBACKS[name](), accumulate_grad_batches=4, max_epochs=2)
    assert trainer.global_step == 4  # 6 batches an epoch: one window of four and a last one of two
    for callback in callbacks:
        if isinstance(callback, lt.EMA):
            assert callback._steps == 4
            assert callback.updates == AVERAGED[name](4)
        if isinstance(callback, lt.LRSchedule):
            assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4
            assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0
        if isinstance(callback, lt.ParamSchedule):
            assert callback._last[0]["step"] == 4


class Overflow(Callback):
    """Make the gradients of some steps infinite."""

    def __init__(self, batches):
        self.batches = batches

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.total_batch_idx in self.batches:
            pl_module.head.weight.grad.fill_(torch.inf)


class CountSteps(Callback):
    def __init__(self):
        self.steps = 0

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(self.count)

    def count(self, *args):
        self.steps += 1


@ends_elsewhere
@every_callback
def test_steps_that_a_scaler_skips_do_not_count(name):
    count = CountSteps()
    callbacks = CALLBACKS[name]()
    trainer, _ = fit(
        [*callbacks, Overflow({0, 3, 4, 7}), count],
        plugins=[plugin_that_skips(8.0)],
        max_epochs=2,
        logger=MemoryLogger(),
    )
    assert (trainer.global_step, count.steps) == (12, 8)
    for callback in callbacks:
        if isinstance(callback, lt.EMA):
            assert callback._steps == 8
            assert callback.updates == (
                AVERAGED[name](8) if "PolyakAverage" not in name else 4
            )  # of 12 steps 0.4 is left out
        if isinstance(callback, lt.LRSchedule):
            assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 8
        if isinstance(callback, lt.ParamSchedule):
            assert callback._last[0]["step"] == 8
        if isinstance(callback, lt.UpdateMonitor):
            # Batches 3 and 7 would have been logged, but changed no weight.
            assert list(trainer.logger.series("weight_norm/total")) == [1, 5, 9, 11]


# ---------------------------------------------------------------------------------------------------- 4. exceptions


@every_callback
@pytest.mark.parametrize("place", ["train", "validation"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_leaves_the_module_as_the_user_had_it(name, place, error, tmp_path):
    class Interrupted(Net):
        def raise_it(self):
            raise error("stop here")

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if place == "train" and self.global_step == 8:
                self.raise_it()
            return loss

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if place == "validation" and self.global_step == 12:
                self.raise_it()

    module = Interrupted()
    raw = {}

    class KeepRaw(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            raw.update(snapshot(pl_module))

    save = OnExceptionCheckpoint(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((RuntimeError, SystemExit)):
        fit([*CALLBACKS[name](), KeepRaw(), save], module, train=ResumableLoader(), max_epochs=3)
    signal.signal(signal.SIGINT, handler)
    learned = {key for key, _ in module.named_parameters()}
    assert_same({k: v for k, v in snapshot(module).items() if k in learned}, {k: raw[k] for k in raw if k in learned})
    assert module.body[2].momentum == 0.1
    assert hooks_left(module) == []
    assert set(vars(module)) == set(vars(fit([])[1]))

    if place == "validation":  # a checkpoint from the middle of a batch cannot be gone on with exactly
        trainer, _ = fit(CALLBACKS[name](), train=ResumableLoader(), max_epochs=3)
        resumed, _ = fit(
            CALLBACKS[name](), train=ResumableLoader(), max_epochs=3, ckpt_path=tmp_path / "on_exception.ckpt"
        )
        left, right = state_of(resumed), state_of(trainer)
        left["callbacks"].clear(), right["callbacks"].clear()  # the interrupted validation is done again
        assert_same(left, right)


# ------------------------------------------------------------------------------------- 5. company, repeats, other sta


@ends_elsewhere
@every_callback
def test_second_fit_goes_on(name):
    """Without momentum the optimizer has no state, so that two fits are one."""

    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def tricks():
        longer = {
            lt.LRSchedule: lt.LRSchedule(lt.Linear(), 24),
            lt.PolyakAverage: lt.PolyakAverage(start=5, update_bn="anew" in name),
            lt.SnapshotEnsemble: lt.SnapshotEnsemble(3, keep=2, total_steps=24),
            lt.ParamSchedule: lt.ParamSchedule("body.2.momentum", lt.Cosine(0.1), 24, optimizer=0),
        }
        if "by schedules" in name:
            longer[lt.BatchTransforms] = scheduled_transforms(24)
        return [longer.get(type(callback), callback) for callback in CALLBACKS[name]()]

    whole, whole_module = fit(tricks(), Plain(), max_epochs=4)
    callbacks = tricks()
    twice, module = fit(callbacks, Plain(), max_epochs=2)
    if any(isinstance(callback, lt.EarlyStopping) for callback in callbacks):
        # The best weights are where the second fit starts: it is another run than the whole one.
        assert_same(snapshot(module), callbacks[0].best_weights)
    twice.fit_loop.max_epochs = 4
    twice.fit(module, loader(), loader(8, seed=5))
    assert hooks_left(module) == []
    if not any(isinstance(callback, lt.EarlyStopping) for callback in callbacks):
        assert_same(state_of(twice), state_of(whole))
        assert_same(module.seen, whole_module.seen)


@every_callback
def test_stages_without_fit_see_the_module_as_it_is(name):
    module, val = Net(), loader(8)
    before = snapshot(module)
    trainer = make_trainer(CALLBACKS[name]())
    expected = make_trainer([]).validate(module, val, verbose=False)
    assert trainer.validate(module, val, verbose=False) == expected
    trainer.test(module, val, verbose=False)
    assert len(trainer.predict(module, val)) == 2
    assert_same(snapshot(module), before)
    assert hooks_left(module) == []


@every_callback
def test_stages_after_a_fit_see_the_module_as_fit_left_it(name):
    trainer, module = fit(CALLBACKS[name]())
    end = snapshot(module)
    first = trainer.test(module, loader(8), verbose=False)
    assert trainer.test(module, loader(8), verbose=False) == first
    trainer.validate(module, loader(8), verbose=False)
    trainer.predict(module, loader(8))
    assert_same(snapshot(module), end)
    assert first == make_trainer([]).test(module, loader(8), verbose=False)


@every_callback
def test_fit_with_nothing_to_train(name, tmp_path):
    module = Net()
    fit(CALLBACKS[name](), module, max_epochs=0)
    assert_same(snapshot(module), snapshot(Net()))
    assert hooks_left(module) == []

    trainer, module = fit([*CALLBACKS[name](), every_epoch(tmp_path)])
    end = snapshot(module)
    trainer.fit(module, loader(), loader(8, seed=5))  # max_epochs was reached
    assert_same(snapshot(module), end)

    _, resumed = fit([*CALLBACKS[name](), every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same(snapshot(resumed), end)
    assert hooks_left(resumed) == []


@every_callback
def test_fast_dev_run(name):
    trainer, module = fit(CALLBACKS[name](), fast_dev_run=True)
    assert trainer.global_step == 1
    assert hooks_left(module) == []


@every_callback
def test_copies_of_callback_and_module_before_in_and_after_a_run(name):
    callbacks, module = CALLBACKS[name](), Net()
    copies = []

    class CopyAll(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                copies.append(copy.deepcopy(pl_module))
                copies.append(pickle.loads(pickle.dumps(pl_module)))
                for callback in callbacks:
                    pickle.loads(pickle.dumps(callback))
                    copy.deepcopy(callback)

    for callback in callbacks:
        assert pickle.loads(pickle.dumps(callback)).settings == callback.settings
    fit([*callbacks, CopyAll()], module)
    _, expected_module = fit(CALLBACKS[name]())
    assert_same(snapshot(module), snapshot(expected_module))
    for callback in callbacks:
        pickle.loads(pickle.dumps(callback))
    # A copy taken in mid-run is a module of its own: it trains like one that never met the callbacks.
    for twin in copies:
        plain = Net()
        plain.load_state_dict(twin.state_dict())
        plain.body[2].momentum = twin.body[2].momentum  # a copy keeps the rate it was taken with
        start = len(twin.seen)
        fit([], twin, max_epochs=1)
        fit([], plain, max_epochs=1)
        assert_same(snapshot(twin), snapshot(plain))
        assert_same(twin.seen[start:], plain.seen)


@every_callback
def test_global_random_state_is_untouched(name):
    torch.manual_seed(7)
    fit([])
    expected = torch.random.get_rng_state()
    torch.manual_seed(7)
    fit(CALLBACKS[name]())
    assert torch.equal(torch.random.get_rng_state(), expected)


@every_callback
def test_module_is_left_as_it_was_found(name):
    module = Net()
    fit(CALLBACKS[name](), module)
    _, plain = fit([])
    assert hooks_left(module) == []
    assert module.body[2].momentum == 0.1
    assert set(vars(module)) == set(vars(plain))


MISSED = ("LRSchedule", "ParamSchedule", "SnapshotEnsemble", "PolyakAverage", "PostHocEMA", "EMA", "EarlyStopping")


@pytest.mark.parametrize("name", [*MISSED, "BatchTransforms"])
def test_lightning_says_at_a_resume_that_one_is_missing(name, tmp_path):
    fit([*CALLBACKS[name](), every_epoch(tmp_path)], max_epochs=1)
    with pytest.warns(UserWarning, match=rf"Please add the following callbacks: .*{name}"):
        fit([every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt")


def test_lightning_says_which_of_two_schedules_is_missing(tmp_path):
    both = [lt.ParamSchedule("momentum", lt.Linear()), lt.ParamSchedule("weight_decay", lt.Linear())]
    fit([*both, every_epoch(tmp_path)], max_epochs=1)
    with pytest.warns(UserWarning, match=r"add the following callbacks: \[.ParamSchedule{'name': 'momentum'}.\]"):
        fit([both[1], every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt")


TWINS = {
    "LRSchedule": r"LRSchedule: callbacks must be the only one of its kind in a Trainer, got \[",
    "ParamSchedule": r"ParamSchedule: callbacks must be the only one of its kind in a Trainer, got \[",
    "SnapshotEnsemble": r"SnapshotEnsemble: callbacks must be the only one of its kind in a Trainer, got \[",
    "PolyakAverage": r"PolyakAverage: callbacks must be the only one of its kind in a Trainer, got \[",
    "PostHocEMA": r"PostHocEMA: callbacks must be the only one of its kind in a Trainer, got \[",
    "EMA": r"EMA: callbacks must be the only one of its kind in a Trainer, got \[",
    "EarlyStopping": "EarlyStopping: restore_best must be True in one callback only",
    "BatchTransforms": None,
    "ActivationMonitor": r"ActivationMonitor: callbacks must be the only one of its kind in a Trainer, got \[",
    "UpdateMonitor": r"UpdateMonitor: callbacks must be the only one of its kind in a Trainer, got \[",
}


@pytest.mark.parametrize("name", TWINS)
def test_two_instances_work_or_are_refused(name):
    first, second = CALLBACKS[name]()[0], CALLBACKS[name]()[0]
    if name == "EarlyStopping":  # two of one key are Lightning's own refusal
        second = lt.EarlyStopping(monitor="train/loss", patience=100, restore_best=True)
    if TWINS[name] is None:
        _, module = fit([first, second])
        assert hooks_left(module) == []
    else:
        with pytest.raises(ValueError, match=TWINS[name]):
            fit([first, second])


def test_early_stopping_on_two_metrics():
    first = lt.EarlyStopping(monitor="val/loss", patience=100, restore_best=True)
    second = lt.EarlyStopping(monitor="train/loss", patience=100)
    fit([first, second])
    assert (first.checks, second.checks) == (2, 2)


def test_settings_of_every_trick_are_in_the_run_configuration():
    logger = MemoryLogger()
    fit(CALLBACKS["all"](), logger=logger)
    assert list(logger.hparams["tricks"]) == [
        "EarlyStopping",
        "LRSchedule",
        "ParamSchedule",
        "EMA",
        "BatchTransforms",
        "UpdateMonitor",
        "ActivationMonitor",
    ]
    assert logger.hparams["tricks"]["EMA"] == {"decay": 0.9, "start": 0, "every_n_steps": 1}
    assert logger.hparams["tricks"]["BatchTransforms"]["transforms"][1] == "Mixup(alpha=0.5, per_sample=True)"


@pytest.mark.parametrize("watch", [lt.EarlyStopping, lambda monitor, **mode: lt.KeepBest(1, monitor, **mode)])
def test_a_mode_that_the_metrics_name_speaks_against_is_doubted(watch):
    with pytest.warns(UserWarning, match="mode='min' takes a low 'val/acc' for better. Give mode='max' if a high"):
        watch("val/acc")
    with pytest.warns(UserWarning, match="mode='max' takes a high 'val/loss' for better. Give mode='min' if a low"):
        watch("val/loss", mode="max")
    watch("val/acc", mode="max")
    watch("val/score")
