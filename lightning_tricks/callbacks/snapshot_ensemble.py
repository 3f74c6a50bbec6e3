"""A snapshot of the weights at the end of every cycle of the learning rate, to be averaged in their predictions."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_tricks.callbacks.ema import EMA
from lightning_tricks.callbacks.lr_schedule import LRSchedule
from lightning_tricks.callbacks.run_folder import (
    Row,
    claim,
    half_written,
    later_files,
    missing,
    on_rank_zero,
    refuse_missing,
    write_manifest,
    write_whole,
)
from lightning_tricks.callbacks.shards import state_dict_in_one
from lightning_tricks.callbacks.steps import refuse_sharded
from lightning_tricks.ensembles import FORMAT, read_manifest
from lightning_tricks.functional.checks import check_count, message
from lightning_tricks.functional.ensembling import ends_of_cycles
from lightning_tricks.functional.metric_names import doubt
from lightning_tricks.functional.schedules import CosineRestarts, Duration, Schedule, check_duration, describe

KEY = "snapshots"
"""Where a checkpoint has the run's snapshots."""


@dataclass(frozen=True)
class KeepBest:
    """Keep the snapshots of the best metric.

    A snapshot has the metrics of the validation that follows it without a step in between; where there is none, those
    of the validation before. One without a finite number is the worst.

    Args:
        count: how many, at least 1.
        monitor: name of the metric, as logged.
        mode: whether `"min"` or `"max"` is better.
    Raises:
        TypeError, ValueError: a value out of range.
    Example:
        >>> KeepBest(2, "val/loss")
        KeepBest(count=2, monitor='val/loss', mode='min')
    """

    count: int
    monitor: str
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        check_count("KeepBest", "count", self.count, 1, "snapshots", "keep=None keeps all")
        if self.mode not in ("min", "max"):
            raise ValueError(message("KeepBest", "mode", "'min' or 'max'", self.mode, "'min' suits a loss"))
        if odd := doubt("KeepBest", self.monitor, self.mode):
            rank_zero_warn(odd)


class SnapshotEnsemble(LRSchedule):
    """Anneal the learning rate in cycles, and keep the weights that each one ends with: M models for the price of one.

        lr = base_lr * schedule(step, total_steps)
        a snapshot after ceil(total_steps * i / cycles) real steps, i = 1 ... cycles

    It is an LRSchedule: in its place, not beside one. `Ensemble.load(directory, module)` lets the snapshots answer
    together. A snapshot is written at the end of the batch whose step ended the cycle (before the next step, where a
    batch has several), on rank 0, as `{"state_dict": ...}` that `torch.load` reads with `weights_only=True`, beside a
    `manifest.json` with the step, epoch, rate and metrics of each. Both are put in place whole: a crash loses nothing
    that was there. A training that ends within a cycle ends with a snapshot that the manifest calls incomplete. Under
    ModelParallelStrategy (FSDP2) a snapshot has whole weights; all ranks put them together on rank 0.

    A resumed run goes on in its directory and removes what was written after the checkpoint; one of another length
    keeps the snapshots it has. In `fast_dev_run` there are none.

    Fast geometric ensembling is `SnapshotEnsemble(schedule=Triangular(cycles=5, low=0.01))` from trained weights.

    Args:
        cycles: how many cycles of `CosineRestarts` fill the run, at least 1. Give this, `cycle_length` or `schedule`.
        directory: a folder for this run alone; None takes a new `snapshots` in the logger's folder, or in the Trainer's
            `default_root_dir`.
        cycle_length: how long each of its cycles is, whatever then fits in the run: `int` = optimizer steps, `float` in
            (0, 1) = fraction of the run, `"10ep"` = epochs. What is left over is a cycle that is not complete.
        schedule: a schedule with cycles, as `CosineRestarts(cycles=5, gamma=0.8)` or `Triangular(cycles=5)`.
        keep: how many of the last snapshots stay on disk, or `KeepBest(2, "val/loss")`; None keeps all. The others are
            deleted.
        weights: `"raw"`, or `"average"`: those of the EMA in the same Trainer.
        total_steps: length of the run (optimizer steps), at least 1; None takes it from the run.
        optimizer: index of the one optimizer whose rate it is and whose steps count; None takes all, and counts the
            first one's.
    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of range, more cycles than steps, a directory with another run's snapshots,
            snapshots of a checkpoint that are gone, a metric that was not logged, FSDP1 or DeepSpeed; what
            LRSchedule refuses.
    References:
        Huang et al., "Snapshot Ensembles: Train 1, get M for free", 2017, arXiv:1704.00109, section 3.
        Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", 2018, arXiv:1802.10026,
            section 4 (Deviates: one snapshot a cycle, where the rate is least).
        Deviates: the cycles fill the run whatever its length, and their ends need not be an epoch's.
    Example:
        >>> from lightning_tricks import SnapshotEnsemble
        >>> SnapshotEnsemble(cycles=2).preview(total_steps=4)
        [1.0, 0.5, 1.0, 0.5, 0.0]
    """

    owner = "SnapshotEnsemble"

    def __init__(
        self,
        cycles: int | None = None,
        directory: str | None = None,
        *,
        cycle_length: Duration | None = None,
        schedule: Schedule | None = None,
        keep: int | KeepBest | None = None,
        weights: Literal["raw", "average"] = "raw",
        total_steps: int | None = None,
        optimizer: int | None = None,
    ) -> None:
        if [cycles, cycle_length, schedule].count(None) != 2:
            fix = "SnapshotEnsemble(5) has five cycles of a cosine"
            got = {"cycles": cycles, "cycle_length": cycle_length, "schedule": schedule}
            condition = "given, or cycle_length or schedule instead, and one of them alone"
            raise ValueError(message(self.owner, "cycles", condition, got, fix))
        if cycles is not None:
            check_count(self.owner, "cycles", cycles, 1, "cycles in the run", "5 are usual")
            schedule = CosineRestarts(cycles=cycles)
        if cycle_length is not None:
            check_duration(self.owner, "cycle_length", cycle_length, least=1)
            schedule = CosineRestarts(length=cycle_length)
        assert schedule is not None
        if not hasattr(schedule, "cycles"):
            fix = "Give one such as CosineRestarts(cycles=5) or Triangular(cycles=5)"
            raise ValueError(message(self.owner, "schedule", "one that has cycles", schedule, fix))
        if keep is not None and not isinstance(keep, KeepBest):
            fix = "None keeps all, KeepBest(2, 'val/loss') the best"
            check_count(self.owner, "keep", keep, 1, "snapshots", fix)
        if weights not in ("raw", "average"):
            fix = "'average' takes those of the EMA callback"
            raise ValueError(message(self.owner, "weights", "'raw' or 'average'", weights, fix))
        if directory is not None and "://" in str(directory):
            fix = "Copy the snapshots there afterwards"
            raise ValueError(message(self.owner, "directory", "a local folder", directory, fix))
        super().__init__(schedule, total_steps, optimizer=optimizer)
        self.directory, self.keep, self.weights = directory, keep, weights
        self._ends: list[int] = []
        self._folder: str | None = None
        self._run: str | None = None  # which run the folder belongs to
        self._rows: list[Row] = []
        self._earlier: dict[str, float | None] = {}  # metrics of before a resume, which Lightning forgets

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        keep = repr(self.keep) if isinstance(self.keep, KeepBest) else self.keep
        return {**super().settings, "keep": keep, "weights": self.weights}

    @property
    def snapshots(self) -> list[Path]:
        """The files of this run's snapshots so far, in the order in which they were taken."""
        return [Path(self._folder or ".") / row["file"] for row in self._rows]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a second owner of the learning rate, weights that are in parts, and an average that is not there."""
        super().setup(trainer, pl_module, stage)
        refuse_sharded(self.owner, trainer, dtensors=True)
        if self.weights == "average" and _ema(trainer) is None:
            fix = "Add EMA to the Trainer's callbacks"
            raise ValueError(message(self.owner, "weights", "'raw' without an EMA callback", self.weights, fix))

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the schedule, find out when its cycles end, and make the directory this run's."""
        super().on_train_start(trainer, pl_module)
        optimizer, clock = self._counted()
        if clock.schedule is None or clock.total_steps is None:  # fast_dev_run
            self._ends = []
            return
        self._ends = ends_of_cycles(clock.schedule, clock.total_steps, self.owner, "cycle_length")
        if not clock.restored:
            self._folder, self._run, self._rows, self._earlier = None, None, [], {}
        default = Path(trainer.log_dir or trainer.default_root_dir) / "snapshots"
        self._folder, self._run, self._rows = on_rank_zero(trainer, lambda: self._claim(default, clock.step))
        rank_zero_info(f"{self.owner}: snapshots go to {self._folder}, after the steps {self._ends}.")

        def before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
            self._take(trainer)

        self._handles.append(optimizer.register_step_pre_hook(before_step))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot if a cycle has ended."""
        self._take(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the metrics of a snapshot that was validated."""
        if self._ends and self._targets and self._rows and not trainer.sanity_checking:
            metrics, last = self._metrics(trainer), self._rows[-1]
            if last["step"] == self._counted()[1].step:
                self._keep(trainer, [*self._rows[:-1], {**last, "metrics": metrics}])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End with a snapshot, of a cycle that is not over if need be."""
        if self._ends:
            step = self._counted()[1].step
            if step > self._last_step():
                self._snapshot(trainer, step, complete=step in self._ends)
            self._keep(trainer, _kept(self._rows, self.keep))
            self._earlier = self._metrics(trainer)
        super().on_train_end(trainer, pl_module)

    # ------------------------------------------------------------------ what

    def _counted(self) -> tuple[Optimizer, Any]:
        """The optimizer whose steps count, and their clock."""
        target = self._targets[min(self._targets)]
        return target.optimizer, target.clock

    def _last_step(self) -> int:
        return self._rows[-1]["step"] if self._rows else 0

    def _take(self, trainer: pl.Trainer) -> None:
        step = self._counted()[1].step
        if step in self._ends and step > self._last_step():
            self._snapshot(trainer, step, complete=True)

    def _snapshot(self, trainer: pl.Trainer, step: int, complete: bool) -> None:
        optimizer, clock = self._counted()
        row = {
            "file": f"snapshot-step={step}.pt",
            "cycle": 1 + sum(end < step for end in self._ends),
            "step": step,
            "epoch": trainer.current_epoch,
            "complete": complete,
            # What the last step was done with: the optimizer has the next cycle's already.
            "lr": float(optimizer.param_groups[0]["initial_lr"]) * clock.schedule(step - 1, clock.total_steps),
            "metrics": self._metrics(trainer),
        }
        path = Path(self._folder or ".") / row["file"]
        weights = self._weights(trainer)

        def save(file: BinaryIO) -> None:
            torch.save({"state_dict": weights}, file)

        on_rank_zero(trainer, lambda: write_whole(path, save))
        if isinstance(self.keep, KeepBest):  # the newest is not judged before its own validation
            self._keep(trainer, [*_kept(self._rows, self.keep), row])
        else:
            self._keep(trainer, _kept([*self._rows, row], self.keep))

    def _metrics(self, trainer: pl.Trainer) -> dict[str, float | None]:
        """The logged metrics; what is not finite has no number in JSON."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return dict(sorted({**self._earlier, **finite}.items()))

    def _weights(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The state dict that is kept, on rank 0 at least."""
        state, ema = state_dict_in_one(trainer), _ema(trainer)
        if ema is not None and ema.updates > 0:
            average, raw = ema.both_state_dicts(trainer, state, state_dict_in_one)
            state = average if self.weights == "average" else raw
        return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in state.items()}

    def _keep(self, trainer: pl.Trainer, rows: list[Row]) -> None:
        """Let the manifest name these snapshots, then delete the others."""
        dropped = {row["file"] for row in self._rows} - {row["file"] for row in rows}
        self._rows = on_rank_zero(trainer, lambda: self._write(Path(self._folder or "."), rows, dropped))

    def _write(self, folder: Path, rows: list[Row], dropped: set[str]) -> list[Row]:
        entries = {"format": FORMAT, "run": self._run, "schedule": describe(self.schedule), "weights": self.weights}
        return write_manifest(folder, entries, rows, dropped)

    def _claim(self, default: Path, step: int) -> tuple[str, str, list[Row]]:
        """On rank 0: the folder, the run's name and its snapshots up to a step; what was written later is removed."""
        new = self._run is None
        folder, self._run = claim(self.owner, self.directory, self._folder, self._run, default, read_manifest)
        rows = [] if new else [row for row in self._rows if row["complete"] and row["step"] <= step]
        gone = missing(folder, rows)
        if self.keep is None:
            refuse_missing(self.owner, folder, gone, self._folder)
        rows = [row for row in rows if row["file"] not in gone]  # dropped for later ones, which are taken again
        later = set() if new else later_files(folder, rows)
        return str(folder), self._run, self._write(folder, rows, later | half_written(folder))

    # ------------------------------------------------------------------ saved

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save which snapshots there are, and where."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._run is not None:
            rows, metrics = [dict(row) for row in self._rows], self._metrics(trainer)
            checkpoint[KEY] = {"directory": self._folder, "run": self._run, "rows": rows, "metrics": metrics}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the snapshots of a checkpoint, if it has any, and forget an earlier fit."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn == TrainerFn.FITTING:
            saved = checkpoint.get(KEY, {})
            self._folder, self._run = saved.get("directory"), saved.get("run")
            self._rows = [dict(row) for row in saved.get("rows", [])]
            self._earlier = saved.get("metrics", {})


def _kept(rows: list[Row], keep: int | KeepBest | None) -> list[Row]:
    """The snapshots that stay, in their order; of equal ones the later."""
    if not isinstance(keep, KeepBest):
        return rows if keep is None else rows[-keep:]
    if rows and not any(keep.monitor in row["metrics"] for row in rows):
        fix = f"Log it with that name, before the first cycle ends; found {sorted(rows[-1]['metrics'])}"
        raise ValueError(message("KeepBest", "monitor", "a logged metric", keep.monitor, fix))
    sign = -1 if keep.mode == "min" else 1

    def rank(row: Row) -> tuple[float, int]:
        value = row["metrics"].get(keep.monitor)
        return (-math.inf if value is None else sign * value), row["step"]

    best = sorted(rows, key=rank)[-keep.count :]
    return [row for row in rows if row in best]


def _ema(trainer: pl.Trainer) -> EMA | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)
