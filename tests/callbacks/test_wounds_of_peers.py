"""What users of other averages and ensembles complained about, one test for each: the comment names who has it."""

import copy

import pytest
import sharded
import torch
import torch.nn.functional as F
from kit import (
    ByHand,
    MemoryLogger,
    Net,
    StopAfter,
    TwoOptimizers,
    assert_same,
    data,
    every_epoch,
    fit,
    loader,
    make_trainer,
    plugin_that_skips,
    snapshot,
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.tuner import Tuner
from test_contract import Overflow
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional import calibration_error

import lightning_tricks as lt
from lightning_tricks.ensembles import read_manifest
from lightning_tricks.functional.averaging import ema_
from lightning_tricks.functional.ensembling import disagreement

LEARNED = [name for name, _ in Net().named_parameters()]
TWO = {"strategy": "ddp_fork", "devices": 2}
X, Y = data(8, seed=5).tensors
ends_elsewhere = pytest.mark.filterwarnings("ignore:.*the schedule is for .* optimizer steps")
averages = pytest.mark.parametrize("average", [lambda: lt.EMA(0.9), lambda: lt.PolyakAverage(3)], ids=["EMA", "mean"])


class Record(Callback):
    """The raw weights after every batch, and what validation sees where it stands behind the average."""

    def __init__(self):
        self.raw, self.seen, self.start = [], [], None

    def on_train_start(self, trainer, pl_module):
        self.start = snapshot(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.raw.append(snapshot(pl_module))

    def on_validation_epoch_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append(snapshot(pl_module))


class Tell(Record):
    """Leave on disk what each rank saw and ended with."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        told = {"raw": self.raw, "seen": self.seen, "end": snapshot(pl_module)}
        torch.save(told, self.folder / f"{trainer.global_rank}.pt")

    def told(self):
        return [torch.load(self.folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def averaged(states, decay, names=LEARNED):
    """An average by an explicit loop; the decay is a number or a function of the updates that are in it."""
    average = dict(states[0])
    for updates, weights in enumerate(states[1:], start=1):
        old = decay(updates) if callable(decay) else decay
        average = {name: old * average[name] + (1 - old) * weights[name] for name in names}
    return average


def mean(updates):
    return updates / (updates + 1)


def assert_close(left, right, names=LEARNED, atol=1e-6):
    left = left.state_dict() if isinstance(left, nn.Module) else left
    for name in names:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=atol, msg=name)


def assert_raw(left, right):
    """The same weights to the bit, and others than the average's."""
    assert_same({name: left[name] for name in LEARNED}, {name: right[name] for name in LEARNED})


def distance(left, right):
    return sum((left[name] - right[name]).norm() for name in LEARNED).item()


def answer(state, images=X):
    module = Net().eval()
    module.load_state_dict(state)
    with torch.no_grad():
        return module(images)


# ---------------------------------------------------------------------------------------------- when and how to average


# Lightning's EMAWeightAveraging: #21724; its weights are those of before the training, in validation and at the end.
def test_delayed_start_never_validates_or_ends_with_the_initial_weights():
    record = Record()
    with pytest.warns(UserWarning, match="training ended after 12 real steps, before the average started"):
        _, module = fit([lt.EMA(0.9, start=100), record])
    assert_raw(record.seen[0], record.raw[5])
    assert_raw(record.seen[1], record.raw[11])
    assert_raw(snapshot(module), record.raw[11])


# The same; the first average too is of weights that were trained.
def test_average_that_starts_late_has_nothing_of_the_initial_weights():
    record = Record()
    _, module = fit([lt.EMA(0.9, start=8), record])
    assert_raw(record.seen[0], record.raw[5])
    assert_close(module, averaged(record.raw[8:], 0.9))


# Lightning, timm, ema-pytorch, NeMo, MMEngine: no half-life; Composer: none in samples.
@pytest.mark.parametrize("duration", [6, 0.5, "1ep", "24samples"])
def test_decay_can_be_said_as_a_half_life(duration):
    record = Record()
    _, module = fit([lt.EMA(lt.HalfLife(duration)), record])
    assert_close(module, averaged(record.raw, 0.5 ** (1 / 6)))


# Lightning, timm, ema-pytorch, NeMo, MMEngine: with an update every n steps it averages over n times as long.
def test_decay_keeps_its_meaning_when_updates_are_seldom():
    record = Record()
    _, module = fit([lt.EMA(0.9, every_n_steps=3), record])
    assert_close(module, averaged(record.raw[2::3], 0.9**3))


# Composer: EMA(half_life=None, smoothing=x) raises an AttributeError without an update_interval.
@pytest.mark.parametrize("decay", [0.9, lt.HalfLife(5), lt.Warmed()])
def test_decay_alone_is_enough(decay):
    ema = lt.EMA(decay)
    fit([ema], max_epochs=1)
    assert ema.updates == 6


# timm's ModelEmaV3: update(model) without step= has no warmup.
def test_warmup_needs_no_step_argument():
    record = Record()
    _, module = fit([lt.EMA(lt.Warmed(0.9999)), record])
    assert_close(module, averaged(record.raw, lambda updates: 1 - (1 + updates) ** (-2 / 3)))


# timm's ModelEmaV3: no step in its state, so that a resume warms up anew.
def test_warmup_goes_on_after_a_resume(tmp_path):
    _, whole = fit([lt.EMA(lt.Warmed(0.9999)), every_epoch(tmp_path)])
    callbacks = [lt.EMA(lt.Warmed(0.9999)), every_epoch(tmp_path / "rest")]
    _, resumed = fit(callbacks, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(snapshot(resumed), snapshot(whole))


# timm: #245, #341, #1119; the average scores worse than the weights, since a long decay keeps the first of them.
def test_long_decay_in_a_short_run_is_not_stuck_in_its_first_weights():
    record = Record()
    _, module = fit([lt.EMA(lt.Warmed(0.9999)), record], max_epochs=4)
    first, last = record.raw[0], record.raw[-1]
    assert distance(snapshot(module), last) < 0.5 * distance(first, last)


# ema-pytorch: #5, Lightning's get_ema_avg_fn; one Python call and kernel for each tensor.
def test_update_is_not_one_kernel_for_each_tensor():
    class Count(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    def kernels(tensors):
        average, weights = ([torch.full((4,), value) for _ in range(tensors)] for value in (0.0, 1.0))
        with Count() as counted:
            ema_(average, weights, 0.75)
        assert all(tensor.tolist() == [0.25] * 4 for tensor in average)
        return counted.count

    assert kernels(100) == kernels(10)


# Composer, timm, ema-pytorch: one decay for a run; another needs another run.
def test_several_decays_are_averaged_in_one_run(tmp_path):
    record = Record()
    trainer, _ = fit([lt.EMA([0.5, 0.9]), record])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    for decay in (0.5, 0.9):
        assert_close(lt.load_average(tmp_path / "end.ckpt", Net(), str(decay)), averaged(record.raw, decay))


# All but ema-pytorch: the width must be known before the run; there the snapshots are in half precision.
def test_width_of_an_average_is_chosen_after_the_run(tmp_path):
    record = Record()
    fit([lt.PostHocEMA((0.05, 0.1), "profiles", every_n_steps=4), record], max_epochs=10)
    expected = averaged(record.raw, lambda updates: lt.PowerFunction(0.08)(updates, 60))
    state = lt.synthesize_ema("profiles", 0.08)
    assert distance(state, expected) < 0.05 * distance(record.raw[-1], expected)
    content = torch.load(tmp_path / "profiles" / "snapshot-step=60.pt", weights_only=True)
    assert content["averages"][0]["head.weight"].dtype == torch.float32


# ----------------------------------------------------------------------------------------------------- steps that count


# Lightning, Composer: 10 updates, and 10 steps of the schedule, for 8 steps of the optimizer.
@ends_elsewhere
def test_gradscaler_skips_are_not_counted():
    record, ema = Record(), lt.EMA(0.9)
    options = {"train": loader(40), "max_epochs": 1, "plugins": [plugin_that_skips(8.0)]}
    callbacks = [ema, record, lt.LRSchedule(lt.Linear()), Overflow({3, 7})]
    trainer, module = fit(callbacks, **options)
    assert trainer.global_step == 10  # Lightning's own count
    assert ema.updates == trainer.lr_scheduler_configs[0].scheduler.last_epoch == 8
    assert_close(module, averaged([raw for batch, raw in enumerate(record.raw) if batch not in (3, 7)], 0.9))


# F5-TTS: #631, lightly-train: #968, rectified-flow: #46.
def test_accumulation_is_not_counted_per_microbatch():
    record, ema = Record(), lt.EMA(0.9)
    _, module = fit([ema, record], accumulate_grad_batches=3)
    assert ema.updates == 4
    assert_close(module, averaged(record.raw[2::3], 0.9))


# Lightning: #11688; no hook after an optimizer's step, so that several steps in one batch are one.
def test_every_step_of_a_batch_is_counted():
    class TwoSteps(ByHand):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

    ema = lt.EMA(0.9)
    fit([ema], TwoSteps())
    assert ema.updates == 24


# NeMo: a second fit takes its wrapped optimizers off the list.
def test_second_fit_counts_the_steps_of_every_optimizer():
    ema = lt.EMA(0.9)
    trainer, module = fit([ema], TwoOptimizers(), max_epochs=1)
    assert ema.updates == 6 + 3
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(8))
    assert ema.updates == 2 * (6 + 3)
    assert len(trainer.optimizers) == 2


# -------------------------------------------------------------------------------------------- buffers, what is averaged


# Lightning: num_batches_tracked stays at 1; ema-pytorch: at 0.
@averages
def test_integer_buffers_are_not_averaged(average):
    _, module = fit([average()])
    assert module.body[2].num_batches_tracked.item() == 12


# NCAR/miles-credit: #394; averaged singular vectors are none of the average, whose weights then explode.
def test_vectors_of_spectral_norm_are_not_averaged():
    class Spectral(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))

    _, module = fit([lt.EMA(0.99)], Spectral(), max_epochs=4)
    weight = module.eval().head.weight.detach()
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=1e-3)


# ignite: #2590, ema-pytorch: #29, #39; NeMo ignores buffers: the average is run with the raw weights' statistics.
def test_average_is_evaluated_with_statistics_of_its_own():
    record = Record()
    fit([lt.EMA(0.9), record])
    statistics = ["body.2.running_mean", "body.2.running_var"]
    assert_close(record.seen[-1], averaged(record.raw, 0.9, statistics), statistics)
    assert not torch.equal(record.seen[-1][statistics[0]], record.raw[-1][statistics[0]])


# aiaccel: #554; Lightning's callback has to be made a subclass of for this.
def test_buffers_can_be_left_out_without_a_subclass():
    record = Record()
    _, module = fit([lt.EMA(0.9, buffers="copy"), record])
    assert_same(module.body[2].running_mean, record.raw[-1]["body.2.running_mean"])
    assert_close(module, averaged(record.raw, 0.9))


# Lightning, Composer, timm: no parameter can be left out; NeMo: those of the optimizer are averaged, and no other.
def test_parameters_can_be_left_out():
    record = Record()
    _, module = fit([lt.EMA(0.9, exclude="head.*"), record])
    assert_same(module.head.weight.detach(), record.raw[-1]["head.weight"])
    assert_close(module, averaged(record.raw, 0.9), [name for name in LEARNED if not name.startswith("head.")])


# Nobody: an average of what is trained only, without a copy of the rest.
def test_frozen_parameters_can_be_left_out_of_memory(tmp_path):
    trainer, _ = fit([lt.EMA([0.5, 0.9], exclude="frozen.*")])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert "head.weight" in saved["averages"]["0.9"]
    assert not any(name.startswith("frozen") for name in saved["averages"]["0.9"])
    assert {"frozen.weight", "frozen.bias"} <= set(saved["unaveraged_weights"])


# wandb/senpai: #2899; an average by name finds no weight behind torch.compile, and stands still.
def test_compiled_prefix_does_not_freeze_the_average(tmp_path):
    def compiled():
        module = Net()
        module.body = torch.compile(module.body, backend="eager")
        return module

    record = Record()
    trainer, module = fit([lt.EMA(0.9, include=["body.*", "head.*"])], compiled())
    _, plain = fit([lt.EMA(0.9), record])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = lt.load_average(tmp_path / "end.ckpt", compiled())
    assert distance(snapshot(plain), record.raw[0]) > 0.1
    for got, other, expected in zip(module.parameters(), loaded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-6)


# Lightning: copies the whole module, its metrics and teachers too; ema-pytorch: #6, ends the process if it cannot.
@averages
def test_no_module_is_deepcopied(average):
    class NoCopies(Net):
        def __deepcopy__(self, memo):
            raise AssertionError("the module was copied")

    _, module = fit([average()], NoCopies())
    _, plain = fit([average()])
    assert_same(snapshot(module), snapshot(plain))


# ema-pytorch: its state has the online model too.
@averages
def test_callback_state_has_no_module(average, tmp_path):
    callback = average()
    trainer, module = fit([callback])
    assert callback.state_dict() == {}
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == saved["current_model_state"].keys() == module.state_dict().keys()
    assert "averages" not in saved


# ema-pytorch: #6.
@averages
def test_callback_can_be_copied(average):
    callback = average()
    _, module = fit([callback])
    twin = copy.deepcopy(callback)
    assert twin.updates == callback.updates > 0
    _, other = fit([twin])  # another module than the last: a new average
    assert twin.updates == callback.updates
    assert_same(snapshot(other), snapshot(module))


# -------------------------------------------------------------------------------- crashes, second fits, and checkpoints


# Lightning: leaves the average in the module, and its checkpoint has the two under each other's keys; nequip: #590.
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_in_validation_leaves_the_raw_weights_and_the_checkpoint_the_right_way_round(error, tmp_path):
    class Fails(Net):
        def validation_step(self, batch, batch_idx):
            if self.global_step == 6:
                raise error("failed in validation")

    record, module, start = Record(), Fails(), Record()
    with pytest.raises(RuntimeError if error is RuntimeError else SystemExit):
        fit([lt.EMA(0.9), record, OnExceptionCheckpoint(tmp_path)], module)
    assert_raw(snapshot(module), record.raw[5])
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert_close(saved["state_dict"], averaged(record.raw, 0.9))
    assert_raw(saved["current_model_state"], record.raw[5])
    fit([lt.EMA(0.9), start, every_epoch(tmp_path)], ckpt_path=tmp_path / "on_exception.ckpt")
    assert_raw(start.start, record.raw[5])


# Lightning: a second fit with the same callback loses the average.
def test_second_fit_goes_on_with_the_average():
    record, ema = Record(), lt.EMA(0.99)
    trainer, module = fit([ema, record])
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(), loader(8))
    assert_raw(record.start, record.raw[11])
    assert len(record.raw) == ema.updates == 24
    assert_close(module, averaged(record.raw, 0.99))


# Lightning: its state has the step of the last update, and not the epoch.
def test_average_of_epochs_goes_on_after_a_resume(tmp_path):
    _, whole = fit([lt.PolyakAverage("1ep", every_n_steps="1ep"), every_epoch(tmp_path)], max_epochs=4)
    resumed = lt.PolyakAverage("1ep", every_n_steps="1ep")
    callbacks = [resumed, every_epoch(tmp_path / "rest")]
    _, module = fit(callbacks, max_epochs=4, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert resumed.updates == 3
    assert_same(snapshot(module), snapshot(whole))


# Lightning: on_train_end writes over the raw weights; #20545, #6074 ask for both.
def test_raw_weights_are_not_lost_at_the_end(tmp_path):
    record = Record()
    trainer, module = fit([lt.EMA(0.9), record])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert_raw(snapshot(lt.load_average(tmp_path / "end.ckpt", Net(), "raw")), record.raw[-1])
    assert_same(snapshot(lt.load_average(tmp_path / "end.ckpt", Net())), snapshot(module))


# The same: whoever wants to go on with the raw weights has them in the module.
def test_fit_can_end_with_the_raw_weights(tmp_path):
    record = Record()
    trainer, module = fit([lt.EMA(0.9, evaluate="raw"), record])
    assert_raw(snapshot(module), record.raw[-1])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert_close(lt.load_average(tmp_path / "end.ckpt", Net(), "0.9"), averaged(record.raw, 0.9))


# Lightning: #20545 (save_last).
def test_last_checkpoint_holds_both(tmp_path):
    record = Record()
    _, module = fit([lt.EMA(0.9), record, ModelCheckpoint(tmp_path, save_last=True)])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_same(dict(saved["state_dict"]), snapshot(module))
    assert_same(dict(saved["current_model_state"]), record.raw[-1])


# NeMo: raises without its own kind of ModelCheckpoint, which writes files of another name.
def test_plain_model_checkpoint_is_enough(tmp_path):
    _, module = fit([lt.EMA(0.9), ModelCheckpoint(tmp_path, filename="end")])
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["end.ckpt"]
    assert_same(snapshot(Net.load_from_checkpoint(tmp_path / "end.ckpt")), snapshot(module))


# Lightning: the average is swapped in for the validation of a fit only; #20137 (predict from a checkpoint).
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("beside", [lambda: [lt.EMA(0.9)], list], ids=["with EMA", "without"])
def test_test_and_predict_see_the_average_also_of_a_resumed_run(beside, tmp_path):
    fit([lt.EMA(0.9), every_epoch(tmp_path)], max_epochs=1)
    saved, record = tmp_path / "rest" / "epoch=1.ckpt", Record()
    callbacks = [lt.EMA(0.9), record, every_epoch(tmp_path / "rest")]
    trainer, module = fit(callbacks, ckpt_path=tmp_path / "epoch=0.ckpt")
    expected = answer(torch.load(saved, weights_only=True)["state_dict"])
    assert not torch.allclose(expected, answer(record.raw[-1]), atol=1e-3)
    images = loader(8, batch_size=8, seed=5)
    for other, model, options in (
        (trainer, module, {}),
        (make_trainer([*beside(), every_epoch(tmp_path)]), Net(), {"ckpt_path": saved}),
    ):
        assert torch.equal(other.predict(model, images, **options)[0], expected)
        (result,) = other.test(model, images, **options, verbose=False)
        assert result["test/loss"] == pytest.approx(F.cross_entropy(expected, Y).item(), rel=1e-6)


# ecmwf/anemoi-core: #1373.
def test_migration_of_names_reaches_both_copies(tmp_path):
    class Renamed(Net):
        def __init__(self):
            super().__init__()
            self.classifier = self.head
            del self.head

        def forward(self, images):
            return self.classifier(self.frozen(self.body(images)))

        def on_load_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name.replace("head.", "classifier."): value for name, value in state.items()}

    record, start = Record(), Record()
    _, old = fit([lt.EMA(0.9), record, every_epoch(tmp_path)], max_epochs=1)
    callbacks = [lt.EMA(0.9), start, every_epoch(tmp_path / "rest")]
    fit(callbacks, Renamed(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(start.start["classifier.weight"], record.raw[-1]["head.weight"])
    loaded = lt.load_average(tmp_path / "epoch=0.ckpt", Renamed())
    assert_same(loaded.classifier.weight.detach(), old.head.weight.detach())


# Lightning, Composer, MMEngine: one of the two is validated.
def test_both_weights_are_validated_and_logged():
    record, logger = Record(), MemoryLogger()
    _, module = fit([lt.EMA(0.9, evaluate="both"), record], logger=logger)
    for name, state in (("val/loss", snapshot(module)), ("val/loss_raw", record.raw[-1])):
        seen = list(logger.series(name).values())[-1]
        assert seen == pytest.approx(F.cross_entropy(answer(state), Y).item(), rel=1e-5)


# rf-detr: #969.
def test_best_average_is_in_the_best_checkpoint(tmp_path):
    record = Record()
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/loss", mode="max")  # of a loss that falls
    fit([lt.EMA(0.9), record, best], max_epochs=3)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert_same(dict(saved["state_dict"]), record.seen[0])
    loss = F.cross_entropy(answer(saved["state_dict"]), Y).item()
    assert best.best_model_score.item() == pytest.approx(loss, rel=1e-5)


# rf-detr: #969; after a resume any score is the best.
@pytest.mark.filterwarnings("ignore:EarlyStopping. mode=")
def test_best_score_of_the_average_survives_a_resume(tmp_path):
    def best():
        return lt.EarlyStopping("val/loss", mode="max", patience=100, restore_best=True)

    record = Record()
    fit([lt.EMA(0.9), record, best(), every_epoch(tmp_path)])
    callbacks = [lt.EMA(0.9), best(), every_epoch(tmp_path / "rest")]
    _, module = fit(callbacks, max_epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_raw(snapshot(module), record.seen[0])


# ----------------------------------------------------------------------------------------------------- ranks and shards


# Lightning: #10914; an average that only rank zero has, so that the others validate and end with something else.
@averages
def test_ranks_above_zero_hold_the_same_average(average, tmp_path):
    tell = Tell(tmp_path)
    fit([average(), tell], max_epochs=4, **TWO)
    first, second = tell.told()
    assert_same(first["end"], second["end"])
    assert_same(first["seen"][1:], second["seen"][1:])  # both averages have begun by then
    decay, start = (mean, 3) if isinstance(average(), lt.PolyakAverage) else (0.9, 0)
    assert_close(second["end"], averaged(second["raw"][start:], decay))


# YOLOX: #1176.
def test_batch_norm_is_the_same_on_all_ranks(tmp_path):
    tell, name = Tell(tmp_path), "body.2.running_mean"
    fit([lt.EMA(0.9), tell], max_epochs=2, **TWO)
    first, second = tell.told()
    assert not torch.equal(first["raw"][-1][name], second["raw"][-1][name])  # each rank has its own data
    assert_same([state[name] for state in first["seen"]], [state[name] for state in second["seen"]])
    assert_same(first["end"][name], second["end"][name])


# Nobody: statistics of the average from the data of all ranks.
def test_batch_norm_estimated_anew_is_that_of_the_data_of_all_ranks(tmp_path):
    tell = Tell(tmp_path)
    fit([lt.PolyakAverage(0.5, update_bn=True), tell], max_epochs=4, **TWO)
    for told in tell.told():
        assert_statistics(told["end"])


def assert_statistics(state, tolerance=1e-5):
    """The batch-norm statistics are those of the whole training data under these weights."""
    images = data().tensors[0]
    inputs = F.linear(images.flatten(1), state["body.1.weight"], state["body.1.bias"])
    for name, expected in (("running_mean", inputs.mean(0)), ("running_var", inputs.var(0))):
        torch.testing.assert_close(state[f"body.2.{name}"], expected, rtol=tolerance, atol=tolerance)


# Lightning: #20545, #21414, NCAR/miles-credit: #414, tnt: #565; Composer: #2091, #2140, #2157 (weights that are not
# swapped, or gathered at every update and checkpoint).
@averages
def test_each_rank_averages_its_own_shard_and_gathers_nothing(average, tmp_path):
    class Held(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            for one in callback._averages.tensors:
                self.numbers = one["body.1.weight"].numel()

    def run():
        gathered, original = [], DTensor.full_tensor
        DTensor.full_tensor = lambda self, **options: gathered.append(self.shape) or original(self, **options)
        trainer, module = sharded.fit([callback, held], None, distributed=True, use_distributed_sampler=False)
        trainer.save_checkpoint(tmp_path / "end")
        DTensor.full_tensor = original
        loss = trainer.callback_metrics["val/loss"].item()
        return {"gathered": gathered, "held": held.numbers, "end": sharded.whole(module), "loss": loss}

    callback, held = average(), Held()
    trainer, expected = fit([average()])
    loss = trainer.callback_metrics["val/loss"].item()
    for rank in sharded.on_ranks(run):
        assert rank["gathered"] == []
        assert rank["held"] == 16 * 8 // 2
        assert rank["loss"] == pytest.approx(loss, rel=1e-4)
        assert_close(rank["end"], expected.state_dict(), atol=1e-5)
    assert_close(lt.load_average(tmp_path / "end", Net()), expected.state_dict(), atol=1e-5)


# Lightning, Composer: FSDP1 with a warning on rank zero, or with all parameters gathered at every update.
@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategy_that_would_be_averaged_wrongly_is_refused(strategy, monkeypatch):
    trainer = make_trainer([ema := lt.EMA()])
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", object.__new__(strategy))
    with pytest.raises(ValueError, match=r"EMA: strategy must be one that keeps whole .*, got '.*Strategy'"):
        ema.setup(trainer, Net(), "fit")


# ------------------------------------------------------------------------------------------ stochastic weight averaging


# Lightning: whole epochs only.
def test_swa_is_not_bound_to_epochs():
    record, average = Record(), lt.PolyakAverage(0.75)
    _, module = fit([average, record], train=loader(48), max_epochs=1)
    assert average.updates == 3
    assert_close(module, averaged(record.raw[9:], mean))


# Lightning: one optimizer only.
def test_swa_takes_several_optimizers():
    average, record = lt.PolyakAverage(0), Record()
    _, module = fit([average, record], TwoOptimizers(), max_epochs=1)
    assert average.updates == 6 + 3
    assert distance(snapshot(module), record.raw[-1]) > 0


# Lightning: trains an epoch more for the statistics.
def test_swa_trains_no_extra_epoch():
    trainer, module = fit([lt.PolyakAverage(0.5, update_bn=True)])
    assert len(module.losses) == trainer.global_step == 12
    assert trainer.current_epoch == 2


# Lightning: #14866, #15113 (statistics that are not estimated, with a momentum of 0); Composer, timm, MMEngine: none.
def test_swa_estimates_batch_norm_and_leaves_its_momentum():
    _, module = fit([lt.PolyakAverage(0.5, update_bn=True)])
    assert_statistics(snapshot(module))
    assert module.body[2].momentum == 0.1


# Lightning: #17245 ("No inf checks were recorded", with batch norm).
def test_swa_with_batch_norm_works_under_amp():
    average = lt.PolyakAverage(0.5, update_bn=True)
    _, module = fit([average, Overflow({8})], plugins=[plugin_that_skips(8.0)])
    assert average.updates == 5
    assert_statistics(snapshot(module), tolerance=1e-2)  # in half precision


# Lightning: #21347.
def test_swa_of_a_run_without_a_number_of_epochs():
    average = lt.PolyakAverage(0.5)
    fit([average], max_epochs=-1, max_steps=8)
    assert average.updates == 4
    average = lt.PolyakAverage(5)
    fit([average, StopAfter(2)], max_epochs=-1)
    assert average.updates == 7


# Lightning: #14813.
@pytest.mark.parametrize("finder", ["Lightning's", "ours"])
def test_swa_works_beside_an_lr_finder(finder):
    average, module = lt.PolyakAverage(0.5), Net()
    trainer = make_trainer([average])
    if finder == "ours":
        lt.find_lr(trainer, module, loader(), num_steps=20)
    else:
        Tuner(trainer).lr_find(module, loader(), loader(8), num_training=10, update_attr=False)
    trainer.fit(module, loader(), loader(8, seed=5))
    assert average.updates == 6
    assert_same(snapshot(module), snapshot(fit([lt.PolyakAverage(0.5)])[1]))


# Lightning: #9938.
def test_swa_resumes(tmp_path):
    _, whole = fit([lt.PolyakAverage(5, update_bn=True), every_epoch(tmp_path)], max_epochs=3)
    callbacks = [lt.PolyakAverage(5, update_bn=True), every_epoch(tmp_path / "rest")]
    _, resumed = fit(callbacks, max_epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same(snapshot(resumed), snapshot(whole))


# ----------------------------------------------------------------------------------------- snapshot ensembles and soups


def rows(folder="s"):
    return read_manifest(folder)["snapshots"]


# titu1994/Snapshot-Ensembles: #15.
def test_cycles_are_per_step_not_per_epoch():
    fit([lt.SnapshotEnsemble(3, "s")], max_epochs=1)
    assert [(row["step"], row["epoch"]) for row in rows()] == [(2, 0), (4, 0), (6, 0)]
    assert [row["lr"] for row in rows()] == pytest.approx([0.025] * 3)  # halfway down: cycles of two steps


# Ensemble-PyTorch: the epochs must be divisible by the number of members.
def test_cycles_need_not_divide_the_epochs():
    fit([lt.SnapshotEnsemble(5, "s")])
    assert [row["step"] for row in rows()] == [3, 5, 8, 10, 12]


# wandb/senpai: #1776 (max_time is over before the last trough).
@ends_elsewhere
def test_run_that_ends_early_still_leaves_a_snapshot():
    class Timer(Callback):  # it stops as Lightning's does
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 4

    _, module = fit([lt.SnapshotEnsemble(1, "s"), Timer()])
    assert [(row["step"], row["complete"]) for row in rows()] == [(4, False)]
    assert_same(dict(lt.Ensemble.load("s", Net()).member(0)), snapshot(module))


# Ensemble-PyTorch: cannot be resumed.
def test_snapshots_resume_in_mid_cycle(tmp_path):
    fit([lt.SnapshotEnsemble(2, "s"), every_epoch(tmp_path)], max_epochs=3)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    callbacks = [lt.SnapshotEnsemble(2, "s"), every_epoch(tmp_path / "rest")]
    fit(callbacks, max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [row["step"] for row in rows()] == [9, 18]
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == whole


# Ensemble-PyTorch: a loop of its own, without ranks or mixed precision.
@ends_elsewhere
def test_snapshots_are_taken_on_two_ranks_with_a_gradscaler():
    fit([lt.SnapshotEnsemble(3, "s"), Overflow({0, 5})], max_epochs=4, plugins=[plugin_that_skips(8.0)], **TWO)
    assert [(row["step"], row["complete"]) for row in rows()] == [(4, True), (8, True), (10, False)]
    assert len(lt.Ensemble.load("s", Net())) == 3


# Ensemble-PyTorch: no loggers.
def test_snapshots_have_their_metrics_and_the_run_their_settings():
    logger = MemoryLogger()
    fit([lt.SnapshotEnsemble(2, "s")], logger=logger)
    assert logger.hparams["tricks"]["SnapshotEnsemble"]["schedule"].startswith("CosineRestarts(cycles=2")
    for row in rows():
        loss = F.cross_entropy(answer(torch.load(f"s/{row['file']}", weights_only=True)["state_dict"]), Y)
        assert row["metrics"]["val/loss"] == pytest.approx(loss.item(), rel=1e-5)


# Lightning, Composer, timm, NeMo: none; Ensemble-PyTorch: another class.
def test_fast_geometric_ensembling_is_the_same_callback():
    _, trained = fit([])
    record = Record()
    fit([lt.SnapshotEnsemble(schedule=lt.Triangular(cycles=3, low=0.1), directory="s"), record], trained)
    assert [row["step"] for row in rows()] == [4, 8, 12]
    members = lt.Ensemble.load("s", trained)
    for index, row in enumerate(rows()):
        assert_raw(members.member(index), record.raw[row["step"] - 1])
        assert row["lr"] == min(entry["lr"] for entry in rows()) < 0.05


# Lightning: #4780 ("do it yourself"), espnet: #6249.
def test_best_checkpoints_are_averaged_without_doing_it_yourself(tmp_path):
    save = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=2)
    fit([save], max_epochs=4)
    paths = list(save.best_k_models)
    soup = lt.greedy_soup(lt.Ensemble(Net(), paths), lambda module: 1.0)
    states = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    assert soup.members == [0, 1]
    assert_close(soup.state_dict, averaged(states, mean))


def lines(*slopes):
    """Models of one number."""
    return lt.Ensemble(nn.Linear(1, 1, bias=False), [{"weight": torch.tensor([[slope]])} for slope in slopes])


# timm, NeMo, espnet: the average of the top n, whether or not it is better.
def test_soup_keeps_only_what_makes_it_no_worse():
    soup = lt.greedy_soup(lines(0.9, 1.2, 3.0), lambda module: abs(module.weight.item() - 1), mode="min")
    assert soup.members == [0, 1]
    assert soup.score == pytest.approx(0.05)


# wandb/senpai: #193 (45.9 where the ensemble has 80.2), #1447.
def test_weights_of_different_basins_are_not_averaged():
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    first = {"0.weight": torch.tensor([[1.0], [-1.0]]), "2.weight": torch.tensor([[-1.0, 1.0], [1.0, -1.0]])}
    second = {"0.weight": first["0.weight"].flip(0), "2.weight": first["2.weight"].flip(1)}  # other order of units
    x = torch.tensor([[-1.0], [1.0]])

    def accuracy(module):
        return (module(x).argmax(1) == torch.tensor([0, 1])).float().mean().item()

    ensemble = lt.Ensemble(net, [first, second]).eval()
    assert accuracy(ensemble) == 1.0
    with pytest.raises(ValueError, match="greedy_soup: barrier must be .* average their predictions with Ensemble"):
        lt.greedy_soup(ensemble, accuracy)


# Nobody: predictions and weights from one run.
def test_one_directory_serves_predictions_and_weights():
    fit([lt.SnapshotEnsemble(3, "s")])
    ensemble = lt.Ensemble.load("s", Net()).eval()
    states = [ensemble.member(index) for index in range(3)]
    together = torch.stack([answer(state).softmax(1) for state in states]).mean(0)
    torch.testing.assert_close(ensemble(X).exp(), together)
    assert_close(lt.greedy_soup(ensemble, lambda module: 1.0).state_dict, averaged(states, mean))


# Only Ensemble-PyTorch has both.
def test_members_vote_soft_or_hard():
    biases = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 9.0])]
    states = [{"weight": torch.zeros(2, 1), "bias": bias} for bias in biases]
    said = {way: lt.Ensemble(nn.Linear(1, 2), states, way).eval()(torch.ones(1, 1)) for way in ("probability", "vote")}
    assert said["probability"].argmax() == 1
    assert said["vote"].argmax() == 0


# Nobody: calibration and disagreement.
def test_calibration_and_disagreement_of_the_members_can_be_measured():
    fit([lt.SnapshotEnsemble(3, "s")])
    ensemble = lt.Ensemble.load("s", Net()).eval()
    logits = torch.stack([answer(ensemble.member(index)) for index in range(3)])
    options = {"task": "multiclass", "num_classes": 3}
    expected = calibration_error(logits.softmax(2).mean(0), Y, **options)
    torch.testing.assert_close(calibration_error(ensemble(X), Y, **options), expected)
    votes = logits.argmax(2)
    pairs = [(votes[one] != votes[other]).float() for one, other in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(disagreement(ensemble.logits(X)).mean(), torch.stack(pairs).mean())


# Nobody: members that stay on disk, and in the module's own precision.
def test_members_are_streamed_from_disk_and_cast():
    fit([lt.SnapshotEnsemble(1, "s")])
    ensemble = lt.Ensemble.load("s", Net().double(), stream=True).eval()
    torch.testing.assert_close(ensemble.logits(X.double())[0].float(), answer(ensemble.member(0)))
    torch.save({"state_dict": snapshot(Net())}, f"s/{rows()[0]['file']}")
    torch.testing.assert_close(ensemble.logits(X.double())[0].float(), answer(snapshot(Net())))
