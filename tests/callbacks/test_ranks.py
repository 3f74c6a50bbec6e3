"""Two ranks (gloo) agree in all that they should, differ in their draws, and write one run."""

import pytest
import torch
from kit import MemoryLogger, Net, assert_same, every_epoch, fit, loader
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from offline_wandb import read_run, runs
from test_contract import AVERAGED, CALLBACKS, every_callback, state_of

import lightning_tricks as lt

TWO = {"strategy": "ddp_fork", "devices": 2}


class SaveRank(Callback):
    """Let each rank leave on disk what it knows at the end."""

    def __init__(self, folder):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.validated = []

    def on_validation_epoch_start(self, trainer, pl_module):
        self.validated.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    def on_train_end(self, trainer, pl_module):
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, lt.UpdateMonitor)]
        stops = [callback for callback in trainer.callbacks if isinstance(callback, lt.EarlyStopping)]
        report = {
            "state": state_of(trainer),
            "seen": pl_module.seen,
            "validated": self.validated,
            "norms": [monitor.last for monitor in monitors],
            "decisions": [(stop.best_score, stop.wait_count, stop.stopped_epoch, stop.checks) for stop in stops],
            "epochs": trainer.current_epoch,
        }
        torch.save(report, self.folder / f"{trainer.global_rank}.pt")


class FinishRun(Callback):
    """A forked process ends without the clean-up in which W&B writes what is left."""

    def teardown(self, trainer, pl_module, stage):
        if trainer.is_global_zero:
            trainer.logger.experiment.finish()


def train(callbacks, folder, module=None, **options):
    fit([*callbacks, SaveRank(folder)], module, **{**TWO, "max_epochs": 4, **options})
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def learned(state):
    return {name: tensor for name, tensor in state.items() if "running" not in name and "tracked" not in name}


@every_callback
def test_ranks_agree_also_after_a_resume(name, tmp_path):
    first, second = train([*CALLBACKS[name](), every_epoch(tmp_path / "saved")], tmp_path / "whole")
    # Batch statistics are each rank's own in Lightning; the average's are rank 0's on both.
    averaged = name in AVERAGED and "behind" not in name
    compare = (lambda state: state) if averaged else learned
    assert_same(compare(first["state"].pop("state_dict")), compare(second["state"].pop("state_dict")))
    if averaged:
        raw, other = first["state"].pop("current_model_state", {}), second["state"].pop("current_model_state", {})
        assert_same(learned(raw), learned(other))
        assert_same(first["validated"][3:], second["validated"][3:])  # every average has started by then
        assert_same([learned(seen) for seen in first["validated"]], [learned(seen) for seen in second["validated"]])
    for state in (first["state"], second["state"]):
        for callback in state["callbacks"].values():
            if callback.get("best_weights"):
                callback["best_weights"] = learned(callback["best_weights"])
    assert_same(first["state"], second["state"])
    assert_same(first["norms"], second["norms"])
    assert_same(first["decisions"], second["decisions"])

    whole = train([*CALLBACKS[name](), every_epoch(tmp_path / "saved")], tmp_path / "whole")
    checkpoint = tmp_path / "saved" / "epoch=1.ckpt"
    resumed = train([*CALLBACKS[name](), every_epoch(tmp_path / "rest")], tmp_path / "resumed", ckpt_path=checkpoint)
    for expected, got in zip(whole, resumed, strict=True):
        assert_same(learned(got["state"]["state_dict"]), learned(expected["state"]["state_dict"]))
        assert_same(got["decisions"], expected["decisions"])
        assert_same(got["seen"], expected["seen"][-len(got["seen"]) :])
        assert_same(got["norms"], expected["norms"])
    assert_same(resumed[0]["state"], whole[0]["state"])


def test_ranks_draw_differently(tmp_path):
    transforms = lt.BatchTransforms([lt.Mixup(0.5)], seed=1)
    first, second = train([transforms], tmp_path / "out", use_distributed_sampler=False, max_epochs=1)
    assert len(first["seen"]) == 6
    for one, other in zip(first["seen"], second["seen"], strict=True):
        assert not torch.equal(one, other)


def test_ranks_share_a_seed_that_nobody_gave(tmp_path):
    transforms = lt.BatchTransforms([lt.Mixup(0.5)])
    train([transforms, every_epoch(tmp_path)], tmp_path / "out", max_epochs=1)
    seeds = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["batch_transforms_seeds"]
    assert seeds[0] >= 0


unreduced = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")


@unreduced
@pytest.mark.parametrize("rank_with_nan", [0, 1])
def test_nan_on_one_rank_stops_all(rank_with_nan, tmp_path):
    class OneNan(Net):
        def validation_step(self, batch, batch_idx):
            bad = self.global_rank == rank_with_nan and self.current_epoch == 1
            self.log("val/loss", torch.tensor(torch.nan if bad else 1.0), sync_dist=False)

    stop = lt.EarlyStopping(monitor="val/loss", patience=100)
    first, second = train([stop], tmp_path / "out", OneNan())
    assert first["epochs"] == second["epochs"] == 2
    assert_same(first["decisions"], second["decisions"])


@unreduced
def test_ranks_decide_on_one_score_where_the_module_does_not_reduce_it(tmp_path):
    class Unreduced(Net):
        def validation_step(self, batch, batch_idx):
            score = [1.0, 0.9, 0.8, 0.7] if self.global_rank == 0 else [1.0, 1.1, 1.2, 1.3]
            self.log("val/loss", torch.tensor(score[self.current_epoch]), sync_dist=False)

    stop = lt.EarlyStopping(monitor="val/loss", patience=1, restore_best=True)
    first, second = train([stop], tmp_path / "out", Unreduced())
    assert first["epochs"] == second["epochs"] == 4
    assert_same(first["decisions"], second["decisions"])
    assert_same(learned(first["state"]["state_dict"]), learned(second["state"]["state_dict"]))


def test_one_offline_run_with_the_norms_of_both_ranks(tmp_path):
    logger = WandbLogger(save_dir=str(tmp_path), project="ranks", offline=True)
    first, second = train([*CALLBACKS["all"](), FinishRun()], tmp_path / "out", logger=logger, max_epochs=1)
    (run,) = runs(tmp_path)
    rows, config = read_run(run)
    (last,) = [row for row in rows if "update_ratio/total" in row][-1:]
    assert_same(first["norms"], second["norms"])
    assert {key: value for key, value in last.items() if key in first["norms"][0]} == first["norms"][0]
    assert sum("update_ratio/total" in row for row in rows) == 1
    assert config["tricks"]["EMA"] == {"decay": 0.9, "start": 0, "every_n_steps": 1}


def test_logger_is_only_written_by_rank_zero(tmp_path):
    class Rows(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save(trainer.logger.rows, tmp_path / f"rows{trainer.global_rank}.pt")

    fit([lt.UpdateMonitor(1), Rows()], logger=MemoryLogger(), max_epochs=1, train=loader(), **TWO)
    rows = [torch.load(tmp_path / f"rows{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [step for step, row in rows[0] if "grad_norm/total" in row] == [0, 1, 2]
    assert not [row for _, row in rows[1] if "grad_norm/total" in row]
