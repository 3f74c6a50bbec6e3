"""One row a step, alerts, and what else loggers are told; Weights & Biases by real offline runs that are read back."""

import csv
import json
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
import wandb
from kit import MemoryLogger, Net, ResumableLoader, TwoOptimizers, assert_same, every_epoch, fit, loader
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from offline_wandb import read_alerts, read_metrics, read_run, runs
from sharded import on_ranks

import lightning_tricks as lt
from lightning_tricks.loggers import alert, log_scalars, sweep_config

KEYS = {"lr-SGD", "weight_decay", "body.2.momentum", "grad_norm/total", "update_ratio/head"}


def tricks(every=1):
    return [
        lt.LRSchedule(lt.WarmupCosine(0.25)),
        lt.UpdateMonitor(every),
        lt.ParamSchedule("weight_decay", lt.Linear()),
        lt.ParamSchedule("body.2.momentum", lt.Cosine(0.5)),
    ]


def rows_of_tricks(logger):
    return [(step, row) for step, row in logger.rows if not row.keys() & {"train/loss", "val/loss"}]


@pytest.fixture
def wandb_logger(tmp_path):
    yield WandbLogger(save_dir=str(tmp_path / "wandb"), project="tests", offline=True)
    wandb.finish()


def finished_run(logger, folder):
    logger.experiment.finish()
    (run,) = runs(folder)
    return run


# ------------------------------------------------------------------------------------------------------ rows


# Lightning: #13382, #13016, #4811, NeMo: #15235, wandb: #1626; W&B's step goes on with each call, so that one training
# step is many of them.
@pytest.mark.parametrize("accumulate", [1, 3])
def test_all_callbacks_have_one_row_a_step(accumulate):
    logger = MemoryLogger()
    fit(tricks(), logger=logger, accumulate_grad_batches=accumulate, max_epochs=2)
    rows = rows_of_tricks(logger)
    assert [step for step, _ in rows] == list(range(12 // accumulate))
    assert all(row.keys() >= KEYS for _, row in rows)


def test_the_row_is_on_the_step_of_lightnings_own():
    logger = MemoryLogger()
    fit(tricks(every=2), logger=logger, log_every_n_steps=2, max_epochs=2)
    own = [step for step, row in logger.rows if "train/loss" in row]
    assert [step for step, _ in rows_of_tricks(logger)] == own == [1, 3, 5, 7, 9, 11]


def test_callbacks_of_different_rhythm_share_the_rows_that_both_have():
    logger = MemoryLogger()
    fit(tricks(every=3), logger=logger, log_every_n_steps=2, max_epochs=1)
    rates, norms = logger.series("lr-SGD"), logger.series("grad_norm/total")
    assert (list(rates), list(norms)) == ([1, 3, 5], [2, 5])
    assert [step for step, _ in rows_of_tricks(logger)] == [1, 2, 3, 5]


def test_manual_optimization_has_one_row_a_batch():
    logger = MemoryLogger()
    callbacks = [lt.LRSchedule(lt.Linear(), optimizer=0, total_steps=6), lt.UpdateMonitor(1)]
    fit(callbacks, TwoOptimizers(), logger=logger, max_epochs=1)
    assert [step for step, _ in rows_of_tricks(logger)] == list(range(6))


class Tells(Callback):
    """Give a number in some hook, and see which callbacks there are."""

    def __init__(self, hook):
        self.seen = []
        setattr(self, hook, self.tell)

    def tell(self, trainer, *args):
        if not trainer.sanity_checking:
            log_scalars(trainer, {"event/told": 1.0})
            self.seen.append(len(trainer.callbacks))


@pytest.mark.parametrize(
    ("hook", "steps"),
    [
        ("on_train_start", [0]),
        ("on_train_epoch_start", [0, 6]),
        ("on_train_batch_start", range(12)),
        ("on_before_optimizer_step", range(12)),
        ("on_train_batch_end", range(12)),
        ("on_validation_start", [5, 11]),
        ("on_validation_end", [5, 11]),
        ("on_train_epoch_end", [6, 12]),
        ("on_train_end", [12]),
        ("on_fit_end", [12]),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_nothing_is_lost_wherever_it_is_given(hook, steps, first):
    logger, told = MemoryLogger(), Tells(hook)
    callbacks = [told, *tricks()] if first else [*tricks(), told]
    trainer, _ = fit(callbacks, logger=logger, max_epochs=2)
    assert list(logger.series("event/told")) == list(steps)
    assert list(logger.series("lr-SGD")) == list(range(12))
    after = [step for step in steps if hook.startswith("on_validation") or step == 12]  # that row is written by then
    assert sorted(step for step, _ in rows_of_tricks(logger)) == sorted([*range(12), *after])
    assert [type(callback) for callback in trainer.callbacks] == [type(callback) for callback in callbacks]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_lost_at_an_exception(error, accumulate):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise error("stop here")
            return super().training_step(batch, batch_idx)

    logger, told = MemoryLogger(), Tells("on_exception")
    callbacks = [told, *tricks()]
    with pytest.raises((error, SystemExit)):
        fit(callbacks, Fails(), logger=logger, accumulate_grad_batches=accumulate)
    rows = rows_of_tricks(logger)
    last = 3 // accumulate
    assert [step for step, _ in rows] == list(range(last + 1))
    assert {"event/told", "lr-SGD"} <= rows[-1][1].keys()


def test_a_trainer_has_its_own_callbacks_between_steps():
    counts = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, *args):
            counts.append(len(trainer.callbacks))

    fit([Count(), *tricks(every=2)], logger=MemoryLogger(), log_every_n_steps=2)
    assert set(counts) == {5}


def test_a_checkpoint_of_a_logged_step_knows_no_other_callbacks(tmp_path):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit([*tricks(), save], logger=MemoryLogger(), max_epochs=1)
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    known = [type(callback).__name__ for callback in [*tricks(), save]]
    assert {key.partition("{")[0] for key in checkpoint["callbacks"]} <= set(known)


# Nobody has: the same numbers in W&B, CSV and TensorBoard.
def test_several_loggers_have_the_same_rows(tmp_path, wandb_logger):
    loggers = [MemoryLogger(), CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb"), wandb_logger]
    fit(tricks(), logger=loggers, max_epochs=1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(loggers[2].log_dir)
    board.Reload()
    rows, _ = read_run(finished_run(wandb_logger, tmp_path / "wandb"))
    with open(tmp_path / "csv" / "version_0" / "metrics.csv") as file:
        lines = [line for line in csv.DictReader(file) if line["lr-SGD"]]
    expected = rows_of_tricks(loggers[0])
    assert len(lines) == len(expected) == 6
    in_wandb = [row for row in rows if "lr-SGD" in row]
    assert len(in_wandb) == 6
    for line, row, (step, values) in zip(lines, in_wandb, expected, strict=True):
        assert row["trainer/global_step"] == int(line["step"]) == step
        assert {key: row[key] for key in values} == values
        assert {key: float(line[key]) for key in values} == pytest.approx(values, rel=1e-12)
    for key in KEYS:
        series = {event.step: event.value for event in board.Scalars(key)}
        assert series == pytest.approx({step: values[key] for step, values in expected}, rel=1e-6)


def test_a_logger_that_fails_takes_no_rows_from_the_others():
    class Fails(MemoryLogger):
        def log_metrics(self, metrics, step=None):
            if "weight_norm/total" in metrics and step == 2:
                raise OSError("disk full")
            super().log_metrics(metrics, step)

    loggers = [Fails(), MemoryLogger(), Fails()]
    with pytest.raises(OSError, match="disk full"):
        fit([lt.UpdateMonitor(1)], logger=loggers)
    assert [list(logger.series("weight_norm/total")) for logger in loggers] == [[0, 1], [0, 1, 2], [0, 1]]


def test_no_numbers_make_no_row():
    class SaysNothing(Callback):
        def on_train_batch_end(self, trainer, *args):
            log_scalars(trainer, {})

    logger = MemoryLogger()
    fit([SaysNothing()], logger=logger, max_epochs=1)
    assert logger.rows
    assert all(row for _, row in logger.rows)


def test_without_a_logger_nothing_is_written():
    told = Tells("on_train_batch_end")
    trainer, _ = fit([told, *tricks()])
    assert len(trainer.callbacks) == 5


# ------------------------------------------------------------------------------------------------------ W&B


# Nobody has: few metrics that are declared beforehand, with their best in the summary.
def test_directions_of_monitored_metrics_are_declared(tmp_path, wandb_logger):
    save = ModelCheckpoint(tmp_path / "saved", monitor="val/acc", mode="max")
    callbacks = [
        lt.EarlyStopping("val/loss", patience=9),
        save,
        ModelCheckpoint(tmp_path / "last"),
        lt.UpdateMonitor(2),
    ]

    class Accurate(Net):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val/acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    fit([LearningRateMonitor(), *callbacks], Accurate(), logger=wandb_logger, max_epochs=3)
    run = finished_run(wandb_logger, tmp_path)
    metrics = read_metrics(run)
    assert set(metrics) == {"*", "trainer/global_step", "val/loss", "val/acc"}
    for name, best in (("val/loss", "min"), ("val/acc", "max")):
        summary = metrics[name].summary
        assert {key for key in ("min", "max", "mean", "last", "best") if getattr(summary, key)} == {best, "last"}
        assert metrics[name].step_metric == "trainer/global_step"
        assert metrics[name].options.step_sync


# Nobody has: an alert when something is wrong.
def test_an_alert_is_a_warning_and_an_alert_of_the_run(tmp_path, wandb_logger):
    module = Net(lr=5.0)
    with pytest.warns(UserWarning, match="UpdateMonitor: .* lower its learning rate") as caught:
        fit([lt.UpdateMonitor(1, band=(1e-4, 1e-2), patience=2)], module, logger=wandb_logger, max_epochs=1)
    said = [str(each.message) for each in caught if "UpdateMonitor" in str(each.message)]
    assert read_alerts(finished_run(wandb_logger, tmp_path)) == [
        ("Layers outside the update band", text, "WARN") for text in said
    ]


def test_an_alert_without_weights_and_biases_is_a_warning(tmp_path):
    class Says(Callback):
        def on_train_start(self, trainer, pl_module):
            alert(trainer, "title", "look here")

    with pytest.warns(UserWarning, match="look here"):
        fit([Says()], logger=[MemoryLogger(), CSVLogger(tmp_path)], max_epochs=1)


def test_a_resumed_run_has_the_rows_of_the_run_that_was_not_stopped(tmp_path):
    def run(folder, epochs, **options):
        logger = WandbLogger(save_dir=str(tmp_path / folder), project="tests", offline=True, id="same")
        fit(
            [*tricks(), every_epoch(tmp_path / f"{folder}_saved")],
            train=ResumableLoader(),
            logger=logger,
            max_epochs=epochs,
            **options,
        )
        rows, config = read_run(finished_run(logger, tmp_path / folder))
        return [
            {key: x for key, x in row.items() if not key.startswith("_")} for row in rows if "lr-SGD" in row
        ], config

    whole, config = run("whole", 4)
    rest, config_rest = run("rest", 4, ckpt_path=tmp_path / "whole_saved" / "epoch=1.ckpt")
    assert len(whole) == 24
    assert_same(rest, whole[12:])
    assert_same(config_rest["tricks"], config["tricks"])


# Lightning: #11380; each rank but the first has an empty run of its own.
def test_two_ranks_write_one_run_with_the_values_of_both(tmp_path):
    class End(Callback):
        """A forked process ends without the clean-up in which W&B writes what is left."""

        def teardown(self, trainer, pl_module, stage):
            memory = trainer.loggers[1]
            torch.save([row for row in memory.rows if "lr-SGD" in row[1]], tmp_path / f"{trainer.global_rank}.pt")
            if trainer.is_global_zero:
                trainer.logger.experiment.finish()

    logger = WandbLogger(save_dir=str(tmp_path), project="tests", offline=True)
    callbacks = [*tricks(), lt.EarlyStopping("val/loss"), End()]
    fit(callbacks, logger=[logger, MemoryLogger()], strategy="ddp_fork", devices=2, max_epochs=2, train=loader(48))
    (run,) = runs(tmp_path)
    rows, config = read_run(run)
    expected, others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    got = [row for row in rows if "lr-SGD" in row]
    assert others == []
    assert len(got) == len(expected) == 12
    for row, (step, values) in zip(got, expected, strict=True):
        assert row["trainer/global_step"] == step
        assert {key: row[key] for key in values} == values
    assert list(config["tricks"]) == [
        "LRSchedule",
        "UpdateMonitor",
        "ParamSchedule",
        "ParamSchedule-2",
        "EarlyStopping",
    ]
    assert "val/loss" in read_metrics(run)


# ------------------------------------------------------------------------------------------------------ sweeps

CONFIG = {"lr": 0.03, "layers": [8, 16], "name": "a"}


def sweep_logger(folder):
    return WandbLogger(save_dir=str(folder), project="tests", offline=True, config=CONFIG)


def test_a_sweeps_configuration_is_the_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_TRICKS_SWEEP", "of another run")
    assert sweep_config(sweep_logger(tmp_path)) == CONFIG
    wandb.finish()


SCRIPT = """
    import json, os, sys
    sys.path.insert(0, {tests!r})
    import lightning_tricks as lt
    from kit import Net, loader, make_trainer
    from lightning.pytorch.loggers import WandbLogger
    from lightning_tricks.loggers import sweep_config
    config = json.loads({config!r}) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    logger = WandbLogger(save_dir={folder!r}, project="tests", offline=True, config=config)
    config = sweep_config(logger)
    logger.experiment.log({{"before": 1.0}})
    callbacks = [lt.LRSchedule(lt.Cosine()), lt.UpdateMonitor(1)]
    trainer = make_trainer(callbacks, logger=logger, strategy="ddp", devices=2, max_epochs=1, limit_train_batches=1)
    trainer.fit(Net(lr=config["lr"]), loader(), loader(8))
    logger.experiment.finish()
    with open(os.path.join({folder!r}, f"{{trainer.global_rank}}.json"), "w") as file:
        json.dump(config, file)
"""


# wandb: #5695, #5003, examples: #84, lightning-kitti: #3; only the first rank has the configuration of a sweep, and the
# others train something else, or wait for ever. wandb: #5263; a run that is used before `fit` breaks on several ranks.
def test_a_sweeps_configuration_is_known_to_the_ranks_that_lightning_starts(tmp_path):
    script = SCRIPT.format(tests=os.path.dirname(__file__), config=json.dumps(CONFIG), folder=str(tmp_path))
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(script))
    environment = {key: value for key, value in os.environ.items() if key != "LIGHTNING_TRICKS_SWEEP"}
    ended = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=180, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [CONFIG, CONFIG]
    (run,) = runs(tmp_path)
    rows, config = read_run(run)
    assert [key for row in rows for key in row if key in ("before", "update_ratio/total")] == [
        "before",
        "update_ratio/total",
    ]
    assert config.items() >= CONFIG.items()
    assert list(config["tricks"]) == ["LRSchedule", "UpdateMonitor"]


def test_a_sweeps_configuration_is_broadcast_where_there_is_a_process_group(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    def ask():
        rank = int(os.environ["RANK"])
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        dist.init_process_group("gloo")
        config = sweep_config(sweep_logger(tmp_path) if rank == 0 else WandbLogger(save_dir=tmp_path, offline=True))
        if rank == 0:
            wandb.finish()
        return config

    assert on_ranks(ask) == [CONFIG, CONFIG]
    assert len(runs(tmp_path)) == 1


def test_a_rank_that_nobody_tells_says_what_to_do(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.delenv("LIGHTNING_TRICKS_SWEEP", raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.raises(RuntimeError, match="sweep_config: config must be known to rank 1.* call init_process_group"):
        sweep_config(WandbLogger(save_dir=tmp_path, offline=True))
    assert runs(tmp_path) == []


def test_other_loggers_have_no_sweeps():
    with pytest.raises(TypeError, match="sweep_config: logger must be a WandbLogger, got"):
        sweep_config(MemoryLogger())


def test_values_that_are_not_finite_are_written_too(tmp_path, wandb_logger):
    class Strange(Callback):
        def on_train_batch_end(self, trainer, *args):
            log_scalars(trainer, {"strange/inf": math.inf, "strange/nan": math.nan})

    fit([Strange()], logger=[wandb_logger, CSVLogger(tmp_path), MemoryLogger()], max_epochs=1, limit_train_batches=1)
    rows, _ = read_run(finished_run(wandb_logger, tmp_path / "wandb"))
    (row,) = [row for row in rows if "strange/inf" in row]
    assert float(row["strange/inf"]) == math.inf
    assert math.isnan(float(row["strange/nan"]))
