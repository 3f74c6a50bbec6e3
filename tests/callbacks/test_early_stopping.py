import logging

import pytest
import torch
from kit import MemoryLogger, Net, assert_same, every_epoch, fit, loader, make_trainer, snapshot
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

import lightning_tricks as lt


class Scores(Net):
    """A module that logs these scores, one a validation, and remembers the weights that each was measured on."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.validated = list(scores), []

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log("score", torch.tensor(self.scores[len(self.validated)]))
            self.validated.append(snapshot(self))


def stop(**options):
    return lt.EarlyStopping(monitor="score", **options)


def train(callbacks, scores, **options):
    options = {"max_epochs": len(scores), "num_sanity_val_steps": 0, **options}
    return fit(callbacks, Scores(scores), **options)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("min_delta", [0.0, 0.1])
def test_it_stops_where_lightnings_stops(mode, patience, min_delta):
    generator = torch.Generator().manual_seed(patience)
    scores = torch.rand(12, generator=generator).mul(10).round().div(10).tolist()
    options = {"monitor": "score", "patience": patience, "min_delta": min_delta, "mode": mode}
    ours, theirs = lt.EarlyStopping(**options), LightningEarlyStopping(**options)
    trainer, _ = train([ours], scores)
    oracle, _ = train([theirs], scores)
    assert trainer.current_epoch == oracle.current_epoch
    for name in ("wait_count", "stopped_epoch", "best_score", "stopping_reason"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("options", [{"stopping_threshold": 0.3}, {"divergence_threshold": 0.95}, {}])
def test_thresholds_and_nan_stop_where_lightnings_do(options):
    scores = [0.9, 0.8, 0.7, 0.2, 0.96, float("nan"), 0.1]
    ours = stop(patience=100, **options)
    theirs = LightningEarlyStopping(monitor="score", patience=100, **options)
    trainer, _ = train([ours], scores)
    oracle, _ = train([theirs], scores)
    assert trainer.current_epoch == oracle.current_epoch < 7
    assert ours.stopping_reason == theirs.stopping_reason != EarlyStoppingReason.NOT_STOPPED


def test_message_says_which_way_a_threshold_was_passed():
    callback = stop(divergence_threshold=0.95)
    train([callback], [0.5, 0.96, 0.1])
    assert callback.stopping_reason_message == "score: the score 0.96 is worse than divergence_threshold=0.95"


def test_verbose_says_what_happens(caplog):
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        train([stop(patience=1, verbose=True)], [0.5, 0.25, 0.75])
    said = [record.getMessage() for record in caplog.records if "EarlyStopping:" in record.getMessage()]
    assert said == [
        "EarlyStopping: score begins at 0.5.",
        "EarlyStopping: score improved from 0.5 to 0.25.",
        "EarlyStopping: score: no improvement in the last 1 checks; the best score was 0.25.",
    ]


def test_ignored_checks_neither_count_nor_can_be_the_best():
    callback = stop(patience=2, ignore_first=3, restore_best=True)
    trainer, module = train([callback], [0.1, float("nan"), 0.0, 0.9, 0.8, 0.85, 0.9, 0.1])
    assert trainer.current_epoch == 7
    assert callback.best_score.item() == pytest.approx(0.8)
    assert_same(snapshot(module), module.validated[4])


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("ema_first", [True, False])
@pytest.mark.parametrize("patience", [2, 100])
def test_fit_ends_with_the_weights_of_the_best_score(ema, ema_first, patience, tmp_path):
    callback = stop(patience=patience, restore_best=True)
    average = [lt.EMA(decay=0.9)] if ema else []
    callbacks = [*average, callback] if ema_first else [callback, *average]
    trainer, module = train(callbacks, [0.5, 0.4, 0.6, 0.7, 0.65])
    assert trainer.current_epoch == (4 if patience == 2 else 5)
    assert_same(snapshot(module), module.validated[1])
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert_same(dict(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]), module.validated[1])
    trainer.test(module, loader(8), verbose=False)
    assert_same(snapshot(module), module.validated[1])


@pytest.mark.parametrize("ema_first", [True, False])
def test_weights_of_a_score_in_mid_epoch(ema_first):
    """The check may come at the epoch's end, when the weights that were validated are gone."""
    callback, ema = stop(patience=100, restore_best=True, check_on_train_epoch_end=True), lt.EMA(decay=0.9)
    scores = [0.5, 0.3, 0.6]
    _, module = train([ema, callback] if ema_first else [callback, ema], scores, val_check_interval=5)
    assert_same(snapshot(module), module.validated[1])


class Reads(Callback):
    """Lightning makes a new tensor of a metric at every look."""

    def on_validation_end(self, trainer, pl_module):
        trainer.callback_metrics.get("score")


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 5}])
@pytest.mark.parametrize("other", [Reads, lambda: lt.EarlyStopping("score", patience=50, mode="max")])
def test_whoever_looks_at_the_metrics_changes_nothing(other, options):
    callback = stop(patience=100, restore_best=True, check_on_train_epoch_end=True)
    _, module = train([lt.EMA(decay=0.9), callback, other()], [0.5, 0.3, 0.6], **options)
    assert_same(snapshot(module), module.validated[1])


@pytest.mark.parametrize("ema_first", [True, False])
def test_score_of_training_checked_in_validation_keeps_the_raw_weights(ema_first):
    raw = []

    class LogsInTraining(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/score", [0.5, 0.3, 0.6, 0.7][self.global_step // 3])
            return loss

        def on_train_batch_end(self, *args):
            if self.global_step % 3 == 0:
                raw.append(snapshot(self))

    callback, ema = lt.EarlyStopping("train/score", patience=100, restore_best=True), lt.EMA(decay=0.9)
    callbacks = [ema, callback] if ema_first else [callback, ema]
    _, module = fit(callbacks, LogsInTraining(), val_check_interval=3, num_sanity_val_steps=0)
    assert_same(
        {k: v for k, v in snapshot(module).items() if "tracked" not in k and "running" not in k},
        {k: v for k, v in raw[1].items() if "tracked" not in k and "running" not in k},
    )


def test_score_that_was_ignored_is_not_checked_again_where_there_is_no_validation():
    options = {"ignore_first": 1, "check_on_train_epoch_end": True, "strict": False}  # epoch 0 has no score at all
    callback = stop(patience=100, restore_best=True, **options)
    _, module = train([callback], [0.1, 0.5, 0.4, 0.3], check_val_every_n_epoch=2, max_epochs=8)
    assert callback.checks == 4
    assert_same(snapshot(module), module.validated[3])


def test_new_trainer_begins_anew():
    """As in cross-validation: the last fold's weights must not end up in this one's module."""
    callback = stop(patience=2, restore_best=True)
    train([callback], [0.1, 0.2, 0.3, 0.4])
    trainer, module = train([callback], [0.9, 0.8, 0.7, 0.6])
    assert trainer.current_epoch == 4
    assert_same(snapshot(module), module.validated[3])


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_resume_from_a_checkpoint_written_before_the_check(epoch, tmp_path):
    scores = [0.5, 0.4, 0.6, 0.7, 0.65]
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    whole, module = train([lt.EMA(0.9), stop(patience=2, restore_best=True), save], scores)
    callback = stop(patience=2, restore_best=True)
    rest = Scores(scores[epoch + 1 :])
    save = ModelCheckpoint(tmp_path / "rest", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    trainer = make_trainer([lt.EMA(0.9), callback, save], max_epochs=5, num_sanity_val_steps=0)
    trainer.fit(rest, loader(), loader(8, seed=5), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert trainer.current_epoch == whole.current_epoch == 4
    assert_same(snapshot(rest), snapshot(module))


def test_restoration_of_a_buffer_that_grows():
    class Grows(Scores):
        def __init__(self, scores):
            super().__init__(scores)
            self.register_buffer("bank", torch.zeros(0))

        def training_step(self, batch, batch_idx):
            self.bank = torch.cat([self.bank, torch.ones(1)])
            return super().training_step(batch, batch_idx)

    callback = stop(patience=100, restore_best=True)
    _, module = fit([callback, lt.EMA(0.9)], Grows([0.5, 0.4, 0.6]), max_epochs=3, num_sanity_val_steps=0)
    assert_same(snapshot(module), module.validated[1])
    assert len(module.bank) == 12


def test_score_of_training_keeps_the_raw_weights():
    raw = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raw.append(snapshot(pl_module))

    callback = lt.EarlyStopping(monitor="train/score", patience=100, restore_best=True)

    class LogsInTraining(Net):
        def on_train_epoch_end(self):
            self.log("train/score", [0.5, 0.3, 0.4][self.current_epoch])

    _, module = fit([lt.EMA(decay=0.9), callback, Keep()], LogsInTraining(), max_epochs=3)
    assert_same(snapshot(module), raw[1])


def test_it_keeps_what_model_checkpoint_calls_the_best(tmp_path):
    save = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    callback = lt.EarlyStopping(monitor="val/loss", patience=100, restore_best=True)
    _, module = fit([callback, lt.EMA(decay=0.5), save], max_epochs=4)
    assert save.best_model_score == callback.best_score
    assert_same(dict(torch.load(save.best_model_path, weights_only=True)["state_dict"]), snapshot(module))


def test_no_score_that_counted_keeps_the_last_weights():
    callback = stop(patience=100, ignore_first=5, restore_best=True)
    _, module = train([callback], [0.5, 0.4])
    assert_same(snapshot(module), module.validated[1])


def test_last_ckpt_is_written_after_the_restoration(tmp_path):
    callback = stop(patience=100, restore_best=True)
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=100, save_top_k=1)
    _, module = train([callback, save], [0.5, 0.4, 0.6])
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_same(dict(last), module.validated[1])


def test_min_epochs_hold_a_stop_up_that_an_improvement_takes_back():
    callback = stop(patience=1)
    trainer, _ = train([callback], [0.5, 0.6, 0.4, 0.3, 0.2, 0.1], min_epochs=4)
    assert trainer.current_epoch == 6
    assert (callback.stopped_epoch, callback.stopping_reason) == (0, EarlyStoppingReason.NOT_STOPPED)


def test_min_epochs_without_an_improvement_stop():
    trainer, _ = train([stop(patience=1)], [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], min_epochs=4)
    assert trainer.current_epoch == 4


@pytest.mark.parametrize("limits", [{"min_epochs": 4}, {"min_steps": 15}, {"min_epochs": 3, "min_steps": 20}])
@pytest.mark.parametrize(
    "checks",
    [
        {},
        {"check_on_train_epoch_end": False},
        {"val_check_interval": 0.5},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 8, "check_val_every_n_epoch": None},
    ],
    ids=str,
)
def test_stop_that_was_held_up_comes_where_lightnings_comes(limits, checks, tmp_path):
    """Whenever it checks, and also if the run is stopped and resumed while the stop waits."""
    given = dict(checks)
    options = {"patience": 1, **({k: given.pop(k) for k in checks if k == "check_on_train_epoch_end"})}
    scores, given = [1.0] * 30, {"max_epochs": 12, **limits, **given}
    save = every_epoch(tmp_path)
    trainer, module = train([stop(**options), save], scores, **given)
    oracle, _ = train([LightningEarlyStopping(monitor="score", **options)], scores, **given)
    assert trainer.global_step == oracle.global_step < 30

    again = Scores(scores)
    resumed = make_trainer([stop(**options), every_epoch(tmp_path / "rest")], num_sanity_val_steps=0, **given)
    resumed.fit(again, loader(), loader(8), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.global_step == trainer.global_step
    assert_same(snapshot(again), snapshot(module))


@pytest.mark.filterwarnings("ignore:.*val_check_interval")
@pytest.mark.parametrize("options", [{"min_steps": 16}, {"min_steps": 16, "val_check_interval": 4}])
def test_stop_that_was_held_up_is_logged_and_said_once(options, caplog):
    """Lightning validates once more between the request and the end."""
    logger = MemoryLogger()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer, _ = train([stop(patience=1, verbose=True)], [1.0] * 30, logger=logger, max_epochs=6, **options)
    assert trainer.global_step == 16
    assert len(logger.series("event/early_stopping")) == 1
    assert sum("last 1 checks" in message or "last 2 checks" in message for message in caplog.messages) == 1


def test_stop_that_was_held_up_to_the_end_is_none_of_the_next_run():
    callback = stop(patience=1)
    train([callback], [1.0] * 3, min_epochs=5)
    trainer, _ = train([callback], [1.0, 0.9, 0.8, 0.7])
    assert trainer.current_epoch == 4


@pytest.mark.parametrize("epoch", [0, 2])
def test_stop_of_another_callback_is_not_taken_back(epoch):
    class StopNow(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.should_stop or trainer.current_epoch == epoch

    trainer, _ = train([StopNow(), stop(patience=1)], [0.5, 0.6, 0.7, 0.4, 0.3, 0.2], min_epochs=4)
    assert trainer.current_epoch == 4


def test_resume_has_the_new_patience(tmp_path):
    train([stop(patience=1), every_epoch(tmp_path)], [0.5, 0.6])
    callback = stop(patience=3)
    module = Scores([0.7, 0.8, 0.9, 1.0])
    trainer = make_trainer([callback, every_epoch(tmp_path / "rest")], max_epochs=6, num_sanity_val_steps=0)
    trainer.fit(module, loader(), loader(8), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert callback.patience == 3
    assert trainer.current_epoch == 4


def test_checkpoint_of_lightnings_own_early_stopping_can_be_resumed(tmp_path):
    fit([LightningEarlyStopping("val/loss", patience=100), every_epoch(tmp_path)], max_epochs=1)
    callback = lt.EarlyStopping("val/loss", patience=100, restore_best=True)
    fit([callback, every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert callback.best_score < 10


def test_second_fit_goes_on_from_the_best_weights():
    callback = stop(patience=100, restore_best=True)
    ema = lt.EMA(decay=0.9)
    trainer, module = train([callback, ema], [0.5, 0.4, 0.6])
    start = []

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(snapshot(pl_module))

    trainer.callbacks.append(Start())
    trainer.fit_loop.max_epochs = 4
    module.scores.append(0.7)
    trainer.fit(module, loader(), loader(8))
    assert_same(start[0], module.validated[1])
    assert ema.updates == 6


def test_missing_metric_is_an_error_or_skipped():
    with pytest.raises(RuntimeError, match="`nothing` which is not available"):
        fit([lt.EarlyStopping(monitor="nothing")])
    callback = lt.EarlyStopping(monitor="nothing", strict=False)
    fit([callback])
    assert callback.checks == 0


def test_it_is_lightnings_by_type_and_signature():
    import inspect

    callback = lt.EarlyStopping("score", 0.1, 7)
    assert isinstance(callback, LightningEarlyStopping)
    assert (callback.min_delta, callback.patience) == (-0.1, 7)
    theirs = list(inspect.signature(LightningEarlyStopping.__init__).parameters)
    ours = inspect.signature(lt.EarlyStopping.__init__).parameters
    assert list(ours)[: len(theirs)] == theirs
    assert [ours[name].kind.name for name in list(ours)[len(theirs) :]] == ["KEYWORD_ONLY", "KEYWORD_ONLY"]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"patience": -1}, ValueError, r"patience must be a whole number of at least 0 \(validation checks\), got -1"),
        ({"patience": 1.5}, TypeError, r"patience must be a whole number of at least 0 \(validation checks\), got 1.5"),
        ({"ignore_first": -1}, ValueError, "ignore_first must be a whole number of at least 0"),
        ({"ignore_first": "3"}, TypeError, "ignore_first must be a whole number of at least 0"),
        ({"min_delta": -0.1}, ValueError, "min_delta must be at least 0, got -0.1"),
        ({"min_delta": None}, TypeError, "min_delta must be a number at least 0, got None"),
        ({"mode": "best"}, ValueError, "mode must be 'min' or 'max', got 'best'"),
        ({"stopping_threshold": float("nan")}, ValueError, "stopping_threshold must be finite, got nan"),
        ({"divergence_threshold": "1"}, TypeError, "divergence_threshold must be a number finite, got '1'"),
    ],
)
def test_bad_arguments(options, error, text):
    with pytest.raises(error, match=f"EarlyStopping: {text}"):
        stop(**options)


def test_monitor_must_be_a_name():
    with pytest.raises(TypeError, match="EarlyStopping: monitor must be the name of a metric, got None"):
        lt.EarlyStopping(monitor=None)


def test_restore_best_beside_lightnings_averaging_is_refused():
    with pytest.raises(ValueError, match="restore_best must be False beside Lightning's averaging"):
        fit([lt.EarlyStopping("val/loss", restore_best=True), EMAWeightAveraging()])
