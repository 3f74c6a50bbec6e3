"""A real offline run, read back from disk and compared with what the callbacks measured."""

import pytest
import wandb
from kit import MemoryLogger, assert_same, fit
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from offline_wandb import read_run, runs
from test_contract import CALLBACKS

import lightning_tricks as lt


@pytest.fixture
def logger(tmp_path):
    yield WandbLogger(save_dir=str(tmp_path), project="tests", offline=True)
    wandb.finish()


# Nobody has: the settings of every trick in the run's configuration, and one row a step for all of them.
def test_rows_and_settings_are_those_of_the_callbacks(logger, tmp_path):
    memory = MemoryLogger()
    fit(CALLBACKS["all"](), logger=[logger, memory], max_epochs=2)
    logger.experiment.finish()
    (run,) = runs(tmp_path)
    rows, config = read_run(run)
    expected = [(step, row) for step, row in memory.rows if "update_ratio/total" in row]
    got = [row for row in rows if "update_ratio/total" in row]
    assert len(got) == len(expected) == 6
    for row, (step, values) in zip(got, expected, strict=True):
        assert row["trainer/global_step"] == step
        assert {key: row[key] for key in values} == values
    assert_same(config["tricks"], memory.hparams["tricks"])
    assert config["tricks"]["LRSchedule"] == {"schedule": "WarmupCosine(warmup=0.25, end=0)", "total_steps": 12}


def test_scheduled_values_are_in_the_run(logger, tmp_path):
    callbacks = [
        lt.LRSchedule(lt.WarmupCosine(0.25), scale_with_batch="linear", base_batch_size=8),
        lt.ParamSchedule("weight_decay", lt.Linear()),
        lt.ParamSchedule("body.2.momentum", lt.Cosine(0.5)),
    ]
    fit(callbacks, logger=logger, max_epochs=2)
    logger.experiment.finish()
    (run,) = runs(tmp_path)
    rows, config = read_run(run)
    for key, base, schedule in (
        ("lr-SGD", 0.05 / 2, lt.WarmupCosine(0.25)),
        ("weight_decay", 1e-3, lt.Linear()),
        ("body.2.momentum", 0.1, lt.Cosine(0.5)),
    ):
        got = {row["trainer/global_step"]: row[key] for row in rows if key in row}
        assert got == pytest.approx({step: base * schedule(step, 12) for step in range(12)}, abs=1e-15)
    assert config["tricks"]["LRSchedule"] == {
        "schedule": "WarmupCosine(warmup=0.25, end=0)",
        "total_steps": 12,
        "global_batch_size": 4,
        "batch_scale": 0.5,
    }
    assert config["tricks"]["ParamSchedule"]["name"] == "weight_decay"
    assert config["tricks"]["ParamSchedule-2"]["name"] == "body.2.momentum"


def test_two_batch_transforms_are_numbered_in_the_settings():
    memory = MemoryLogger()
    fit([lt.BatchTransforms([lt.Cutout(1)]), lt.BatchTransforms([lt.Mixup(0.2)])], logger=memory, max_epochs=1)
    assert list(memory.hparams["tricks"]) == ["BatchTransforms", "BatchTransforms-2"]
    assert memory.hparams["tricks"]["BatchTransforms-2"]["transforms"] == ["Mixup(alpha=0.2, per_sample=True)"]


class Foreign(Callback):
    """A user's own callback that happens to use the same names."""

    settings = None
    restore_best = True


def test_settings_are_those_of_this_package_alone():
    memory = MemoryLogger()
    fit([Foreign(), lt.EMA(0.5), lt.EarlyStopping("val/loss")], logger=memory, max_epochs=1)
    assert list(memory.hparams["tricks"]) == ["EMA", "EarlyStopping"]


def test_tensorboard_gets_no_metric_of_its_own(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tb")
    written = []
    logger.log_metrics = lambda metrics, step=None: written.extend(metrics)
    fit([lt.EMA(0.5)], logger=logger, max_epochs=1)
    assert "hp_metric" not in written
    assert logger.hparams["tricks"] == {"EMA": {"decay": 0.5, "start": 0, "every_n_steps": 1}}


# wandb: #5263; a run that is asked for, or logged to, before `fit` loses what comes after.
def test_a_run_that_was_used_before_fit_has_all_rows_and_settings(logger, tmp_path):
    logger.experiment.config["chosen"] = "before"
    logger.log_metrics({"before": 1.0}, step=0)
    memory = MemoryLogger()
    fit([lt.LRSchedule(lt.Cosine()), lt.UpdateMonitor(every_n_steps=2)], logger=[logger, memory], max_epochs=1)
    logger.experiment.finish()
    (run,) = runs(tmp_path)
    rows, config = read_run(run)
    assert [row["before"] for row in rows if "before" in row] == [1.0]
    expected = [values["update_ratio/total"] for _, values in memory.rows if "update_ratio/total" in values]
    assert [row["update_ratio/total"] for row in rows if "update_ratio/total" in row] == expected
    assert len(expected) == 3
    assert config["chosen"] == "before"
    assert set(config["tricks"]) == {"LRSchedule", "UpdateMonitor"}
