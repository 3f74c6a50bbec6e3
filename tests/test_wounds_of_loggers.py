"""What users of loggers, Weights & Biases above all, complained of with several callbacks and several ranks."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from kit import fit
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from offline_wandb import read_run, runs

import lightning_tricks as lt

TWO = {"strategy": "ddp_fork", "devices": 2}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MAKES = {"os.mkdir", "os.rename", "os.symlink", "os.link", "subprocess.Popen"}


def offline(folder):
    return WandbLogger(save_dir=str(folder), project="tests", offline=True)


def scalars():
    return [
        lt.LRSchedule(lt.Cosine()),
        lt.ParamSchedule("weight_decay", lt.Linear()),
        lt.UpdateMonitor(1, band=(0.0, 1e9)),
        lt.ActivationMonitor(1),
        lt.EMA(0.9),
        lt.EarlyStopping("val/loss", patience=9),
    ]


class Finish(Callback):
    """A forked process ends without the clean-up in which W&B writes what is left."""

    def teardown(self, trainer, pl_module, stage):
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.experiment.finish()


# Lightning: #13382, #13016, #4811, NeMo: #15235, wandb: #1626; W&B's own step goes on with each call, so that with each
# callback more of them are in a training step, and rows whose step is behind are dropped.
def test_the_steps_of_weights_and_biases_are_as_many_with_all_callbacks_as_with_one(tmp_path):
    def steps(name, callbacks):
        fit([*callbacks, Finish()], logger=offline(tmp_path / name), max_epochs=2)
        (run,) = runs(tmp_path / name)
        return [(row["_step"], row["trainer/global_step"]) for row in read_run(run)[0]]

    many = steps("many", scalars())
    assert many == steps("one", scalars()[:1])
    lightnings = steps("none", [])
    assert [step for step, _ in many] == list(range(len(lightnings) + 12))


class Sees(Callback):
    """Every file, folder and process that Python makes from a fit's beginning to its end, on each rank."""

    def __init__(self, folder):
        self.folder, self.made, self.looks = folder, [], False

    def setup(self, trainer, pl_module, stage):
        self.looks = True
        sys.addaudithook(self.see)  # it cannot be taken away: the process is a forked one

    def see(self, event, args):
        if self.looks and (event in MAKES or (event == "open" and args[2] & WRITING)):
            self.made.append(f"{event} {args[0]}")

    def teardown(self, trainer, pl_module, stage):
        self.looks = False
        (self.folder / f"{trainer.global_rank}.txt").write_text("\n".join(self.made))


# Lightning: #11380; each rank but the first has an empty run of its own.
@pytest.mark.filterwarnings("ignore:UpdateMonitor. .* moves")
@pytest.mark.parametrize("names", [["csv"], ["tensorboard"], ["wandb"], ["csv", "tensorboard", "wandb"], []])
def test_nothing_is_made_on_other_ranks_than_the_first(names, tmp_path):
    make = {
        "csv": lambda: CSVLogger(tmp_path / "csv"),
        "tensorboard": lambda: TensorBoardLogger(tmp_path / "tensorboard"),
        "wandb": lambda: offline(tmp_path / "wandb"),
    }
    everything = [
        *scalars()[:2],
        *scalars()[3:],
        lt.UpdateMonitor(1, band=(0.9, 1.0), patience=1),  # with alerts
        lt.BatchTransforms([lt.Cutout(2)], log_pictures=2),
    ]
    options = {"logger": [make[name]() for name in names], "default_root_dir": tmp_path, "max_epochs": 1}
    fit([Sees(tmp_path), *everything, Finish()], **options, **TWO)
    first, other = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert "png" in first or "tensorboard" in first
    assert other == ""
    assert len(runs(tmp_path)) == ("wandb" in names)


SPAWN = """
    import sys
    sys.path.insert(0, {tests!r})
    import lightning_tricks as lt
    from kit import Net, loader, make_trainer
    from lightning.pytorch.loggers import WandbLogger

    if __name__ == "__main__":
        logger = WandbLogger(save_dir={folder!r}, project="tests", offline=True)
        callbacks = [lt.LRSchedule(lt.Cosine()), lt.UpdateMonitor(1), lt.ActivationMonitor(1), lt.EMA(0.9)]
        callbacks.append(lt.EarlyStopping("val/loss"))
        trainer = make_trainer(callbacks, logger=logger, strategy="ddp_spawn", devices=2, max_epochs=1)
        trainer.fit(Net(), loader(), loader(8))
        print("ended")
"""


# Lightning: #6106; with a WandbLogger and processes that are spawned, the training never ends.
def test_spawned_ranks_with_weights_and_biases_end(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(SPAWN.format(tests=os.path.dirname(__file__), folder=str(tmp_path))))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}  # W&B of this process
    process = subprocess.Popen([sys.executable, path], env=environment, **pipes, start_new_session=True)
    try:
        out, errors = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks, too
    assert process.returncode == 0, errors
    assert "ended" in out
    (run,) = runs(tmp_path)
    rows, config = read_run(run)
    assert [row["trainer/global_step"] for row in rows if "update_ratio/total" in row] == [0, 1, 2]
    assert list(config["tricks"]) == ["LRSchedule", "UpdateMonitor", "ActivationMonitor", "EMA", "EarlyStopping"]
