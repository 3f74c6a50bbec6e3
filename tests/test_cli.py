"""Every callback and value can be built from YAML by LightningCLI."""

import lightning as L
import pytest
import yaml
from kit import Net, loader
from lightning.pytorch.cli import LightningCLI

import lightning_tricks as lt

TRICKS = """
- class_path: lightning_tricks.LRSchedule
  init_args:
    schedule:
      class_path: lightning_tricks.Warmup
      init_args:
        duration: 1ep
        start: 0.1
        then:
          class_path: lightning_tricks.Cosine
          init_args: {end: 0.01}
    total_steps: 12
- class_path: lightning_tricks.EMA
  init_args: {decay: 0.9}
- class_path: lightning_tricks.EarlyStopping
  init_args: {monitor: val/loss, patience: 5, ignore_first: 1, restore_best: true, min_delta: 0.001}
- class_path: lightning_tricks.BatchTransforms
  init_args:
    transforms:
    - class_path: lightning_tricks.Cutout
      init_args: {size: 2}
    - class_path: lightning_tricks.Mixup
      init_args: {alpha: 0.2}
    - class_path: lightning_tricks.LabelSmoothing
      init_args: {smoothing: 0.1}
    seed: 1
- class_path: lightning_tricks.ParamSchedule
  init_args:
    name: weight_decay
    schedule: {class_path: lightning_tricks.Cosine}
    total_steps: 12
- class_path: lightning_tricks.UpdateMonitor
  init_args:
    every_n_steps: 2
    measures: [update_ratio, grad_nonfinite]
    layers: ["body", "head"]
    band: [1.0e-4, 1.0e-2]
    patience: 5
    max_extra_memory: 1000000
- class_path: lightning_tricks.ActivationMonitor
  init_args: {every_n_steps: 3, layers: ["body.*"], gradients: true}
"""


COSINE = {"class_path": "lightning_tricks.Cosine"}


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(8, seed=5)


@pytest.fixture(autouse=True)
def without_arguments(monkeypatch):
    """LightningCLI warns where arguments are given both ways."""
    monkeypatch.setattr("sys.argv", ["train.py"])


def run(config, tmp_path):
    path = tmp_path / "tricks.yaml"
    path.write_text(yaml.safe_dump(config))
    return LightningCLI(Net, Data, args=["fit", "--config", str(path)])


def config_with(callbacks):
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return {"seed_everything": 3, "trainer": {**options, **quiet, "callbacks": callbacks}}


def test_a_run_from_yaml(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")  # LightningCLI sets it; taken back after the test
    cli = run(config_with(yaml.safe_load(TRICKS)), tmp_path)
    schedule, ema, stop, transforms, param, monitor, activations = cli.trainer.callbacks[:7]
    assert schedule.schedule == lt.Warmup("1ep", lt.Cosine(0.01), start=0.1)
    assert ema.updates == 12
    assert (stop.checks, stop.ignore_first, stop.restore_best) == (2, 1, True)
    assert transforms.transforms == [lt.Cutout(2), lt.Mixup(0.2), lt.LabelSmoothing(0.1)]
    assert (param.name, param.schedule) == ("weight_decay", lt.Cosine())
    assert (monitor.every_n_steps, monitor.measures, monitor.patience) == (2, ("update_ratio", "grad_nonfinite"), 5)
    assert (monitor.layers, monitor.band, monitor.max_extra_memory) == (["body", "head"], (1e-4, 1e-2), 1000000)
    assert activations.settings == {"every_n_steps": 3, "layers": ["body.*"], "gradients": True}
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.01)


@pytest.mark.parametrize(
    ("class_path", "init_args", "expected"),
    [
        ("WarmupCosine", {"warmup": 0.05, "end": 0.1}, lt.WarmupCosine(0.05, 0.1)),
        ("WarmupCosine", {"warmup": 500}, lt.WarmupCosine(500)),
        ("WarmupCosine", {"warmup": "3ep"}, lt.WarmupCosine("3ep")),
        ("Linear", {"start": 1.0, "end": 0.1}, lt.Linear(1.0, 0.1)),
        ("Constant", {"value": 0.5}, lt.Constant(0.5)),
        ("Cosine", {}, lt.Cosine()),
        ("Polynomial", {"power": 2, "end": 0.1}, lt.Polynomial(2, 0.1)),
        ("Exponential", {"end": 0.1}, lt.Exponential(0.1)),
        ("Steps", {"milestones": [300, 0.5, "40ep"], "gamma": 0.5}, lt.Steps([300, 0.5, "40ep"], 0.5)),
        ("InverseSqrt", {"timescale": "3ep"}, lt.InverseSqrt("3ep")),
        ("InverseTime", {"timescale": 0.1}, lt.InverseTime(0.1)),
        ("CosineRestarts", {"length": "3ep", "multiplier": 2}, lt.CosineRestarts(length="3ep", multiplier=2)),
        ("CosineRestarts", {"cycles": 4, "gamma": 0.5}, lt.CosineRestarts(cycles=4, gamma=0.5)),
        ("Triangular", {"cycles": 2, "low": 0.1, "up": 0.3}, lt.Triangular(cycles=2, low=0.1, up=0.3)),
        (
            "OneCycle",
            {"warmup": 0.2, "shape": "linear", "three_phase": True},
            lt.OneCycle(0.2, 0.04, 1, 4e-6, "linear", True),
        ),
        (
            "Warmup",
            {"duration": 5, "then": COSINE, "start": 0.1, "shape": "exponential"},
            lt.Warmup(5, lt.Cosine(), 0.1, "exponential"),
        ),
        (
            "Cooldown",
            {"duration": 0.2, "before": COSINE, "shape": "1-sqrt"},
            lt.Cooldown(0.2, lt.Cosine(), 0.0, "1-sqrt"),
        ),
        ("WarmupStableDecay", {"warmup": 10, "cooldown": 0.2}, lt.WarmupStableDecay(10, 0.2)),
        ("Join", {"schedules": [COSINE, COSINE], "milestones": ["3ep"]}, lt.Join([lt.Cosine(), lt.Cosine()], ["3ep"])),
    ],
)
def test_every_schedule_from_yaml(class_path, init_args, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    schedule = {"class_path": f"lightning_tricks.{class_path}", "init_args": init_args}
    options = {"schedule": schedule, "total_steps": 1000, "scale_with_batch": "linear", "on_new_horizon": "keep"}
    callback = {"class_path": "lightning_tricks.LRSchedule", "init_args": options}
    config = config_with([callback])
    config["trainer"]["max_epochs"] = 0
    cli = run(config, tmp_path)
    assert cli.trainer.callbacks[0].schedule == expected


def test_wrong_value_in_yaml_is_said_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    with pytest.raises((SystemExit, ValueError)) as error:
        run(config_with([{"class_path": "lightning_tricks.EMA", "init_args": {"decay": 1.5}}]), tmp_path)
    assert "decay must be in [0, 1), got 1.5" in str(error.value) + capsys.readouterr().err


def test_config_that_the_cli_saves_builds_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    first = run(config_with(yaml.safe_load(TRICKS)), tmp_path)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").unlink()
    second = run(saved, tmp_path)
    assert [c.settings for c in second.trainer.callbacks[:6]] == [c.settings for c in first.trainer.callbacks[:6]]


RESTARTS = {"class_path": "lightning_tricks.CosineRestarts", "init_args": {"cycles": 4}}


@pytest.mark.parametrize(
    ("class_path", "init_args", "settings"),
    [
        ("EMA", {"decay": [0.9, 0.99]}, {"decay": [0.9, 0.99]}),
        (
            "EMA",
            {"decay": {"class_path": "lightning_tricks.HalfLife", "init_args": {"duration": "2ep"}}},
            {"decay": "HalfLife(duration='2ep')"},
        ),
        (
            "EMA",
            {
                "decay": [0.9, {"class_path": "lightning_tricks.Warmed", "init_args": {"decay": 0.99}}],
                "evaluate": "both",
                "device": "cpu",
                "dtype": "float32",
                "include": ["body.*", "head.*"],
                "exclude": "head.bias",
                "buffers": "copy",
            },
            {
                "decay": [0.9, "Warmed(decay=0.99, power=0.6666666666666666, inv_gamma=1)"],
                "evaluate": "both",
                "device": "cpu",
                "dtype": "float32",
                "include": ["body.*", "head.*"],
                "exclude": ["head.bias"],
                "buffers": "copy",
            },
        ),
        (
            "PolyakAverage",
            {"start": 0.5, "every_n_steps": RESTARTS, "update_bn": True},
            {"start": 0.5, "every_n_steps": "CosineRestarts(cycles=4", "update_bn": True},
        ),
        ("PolyakAverage", {"start": "1ep", "every_n_steps": "1ep"}, {"start": "1ep", "every_n_steps": "1ep"}),
        ("PostHocEMA", {"sigma_rels": [0.05, 0.15], "every_n_steps": 5}, {"sigma_rels": [0.05, 0.15]}),
        ("SnapshotEnsemble", {"cycles": 2, "keep": 1}, {"keep": 1}),
    ],
)
def test_every_average_from_yaml(class_path, init_args, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    monkeypatch.chdir(tmp_path)
    callback = {"class_path": f"lightning_tricks.{class_path}", "init_args": init_args}
    cli = run(config_with([callback]), tmp_path)
    got = cli.trainer.callbacks[0].settings
    for key, value in settings.items():
        assert got[key] == value or got[key].startswith(value)
