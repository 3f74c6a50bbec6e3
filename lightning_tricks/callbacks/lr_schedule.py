"""The learning rate follows a schedule of real optimizer steps."""

import math
import sys
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from lightning_tricks.callbacks.steps import after_real_steps, refuse_twins
from lightning_tricks.functional.checks import check_count, message
from lightning_tricks.functional.schedules import Schedule, resolve_epochs
from lightning_tricks.loggers import log_settings

STATE = ("last_epoch", "total_steps", "steps_per_epoch", "extra_steps")


class ScheduledLR(LRScheduler):
    """The torch scheduler that Lightning saves, restores and monitors; `begin` tells it the length of the run.

    Until then, and for good where the length stays None, it keeps the base rates.

    Args:
        optimizer: the optimizer whose groups it scales.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.schedule: Schedule | None = None
        self.total_steps: int | None = None
        self.steps_per_epoch: int | None = None
        self.extra_steps = 0  # what earlier epochs had more than epochs of this length
        self.restored = False
        super().__init__(optimizer)

    def begin(self, schedule: Schedule | None, total_steps: int, steps_per_epoch: int | None) -> None:
        """Follow the schedule from the step it is at; None keeps the base rates."""
        self.schedule, self.total_steps, self.steps_per_epoch = schedule, total_steps, steps_per_epoch
        self._apply()

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group: its base times the factor. A group that was added later has its own rate as base."""
        factor = 1.0
        if self.schedule is not None and self.total_steps is not None:
            factor = self.schedule(self.last_epoch, self.total_steps)
        for group in self.optimizer.param_groups:
            if "initial_lr" not in group:
                group["initial_lr"] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
        return [group["initial_lr"] * factor for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Count one real step and set the rates in force after it."""
        self.last_epoch += 1
        self._apply()

    def _apply(self) -> None:
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """The step, and the length of the run and of the epochs it belongs to."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the count of another run; the rates follow in `begin`."""
        if not set(STATE) <= state_dict.keys():
            fix = "The checkpoint was trained with another scheduler: resume with that one, or load the weights alone"
            raise ValueError(message("LRSchedule", "checkpoint", "one of LRSchedule", sorted(state_dict), fix))
        for name in STATE:
            setattr(self, name, state_dict[name])
        self.restored = True


class LRSchedule(Callback):
    """Let the learning rate of every parameter group follow a schedule of real optimizer steps.

        lr = base_lr * schedule(step, total_steps)

    `base_lr` is what `configure_optimizers` gave the group. A step counts when the optimizer changed weights: batches
    that only accumulate gradients and steps that a GradScaler skipped do not count. The length is taken from the run:
    `max_epochs` or `max_steps`, the loader's length, `limit_train_batches` and accumulation; under manual optimization
    one step of each optimizer for each batch is assumed. Lightning saves and restores the step; a run resumed with
    another length stretches the schedule to it and says so. `LearningRateMonitor` logs the rates. In `fast_dev_run` the
    rates stay at their base.

    Args:
        schedule: (step, total_steps) -> factor, as `WarmupCosine(0.05)`.
        total_steps: length of the run (optimizer steps), at least 1; None takes it from the run.
    Raises:
        TypeError: the schedule is not callable, or an optimizer has no step hooks.
        ValueError: the length cannot be known (endless training, an unsized loader, an accumulation that changes,
            several optimizers that share `max_steps`), the module returns a scheduler of its own, another LRSchedule is
            in the Trainer, or the checkpoint was trained with another scheduler.
    References:
        Goyal et al., 2017, arXiv:1706.02677, section 2.2 (warmup); Loshchilov and Hutter, 2017, arXiv:1608.03983
            (cosine).
    Example:
        >>> import lightning as L
        >>> from lightning_tricks import Cosine, LRSchedule, Warmup
        >>> trainer = L.Trainer(callbacks=[LRSchedule(Warmup(500, Cosine(end=0.01)))], logger=False, barebones=False)
    """

    def __init__(self, schedule: Schedule, total_steps: int | None = None) -> None:
        if not callable(schedule) or isinstance(schedule, type):
            fix = "Give one, as in LRSchedule(WarmupCosine(0.05))"
            raise TypeError(
                message("LRSchedule", "schedule", "a schedule (step, total_steps) -> factor", schedule, fix)
            )
        if total_steps is not None:
            check_count("LRSchedule", "total_steps", total_steps, 1, "optimizer steps", "None takes it from the run")
        self.schedule = schedule
        self.total_steps = total_steps
        self._schedulers: list[ScheduledLR] = []
        self._handles: list[RemovableHandle] = []
        self._last: list[dict[str, Any]] = []  # states of the schedulers at the end of the last fit

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        return {"schedule": repr(self.schedule), "total_steps": self.total_steps}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a second owner of the learning rate."""
        refuse_twins(self, trainer, "the learning rate")
        owners = (StochasticWeightAveraging, BackboneFinetuning)
        others = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, owners)]
        if others:
            fix = "Both would own the learning rate; keep one"
            raise ValueError(message("LRSchedule", "callbacks", "the only one that sets the rate", others, fix))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the schedulers before Lightning restores a checkpoint; the length of the run is not known yet."""
        log_settings(self, trainer)
        if trainer.lr_scheduler_configs:
            got = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
            fix = "Return the optimizer alone from configure_optimizers, or leave LRSchedule out"
            raise ValueError(message("LRSchedule", "schedulers", "the only one of the optimizers", got, fix))
        self._schedulers = [ScheduledLR(optimizer) for optimizer in trainer.optimizers]
        if trainer.global_step == 0:
            self._last = []  # a new run
        for scheduler, last in zip(self._schedulers, self._last, strict=False):
            scheduler.load_state_dict(last)  # a further fit of this run; a checkpoint's state comes after it
        # Lightning saves, restores and logs these, and never steps them: it would count skipped steps too.
        configs = [LRSchedulerConfig(s, interval="step", frequency=sys.maxsize) for s in self._schedulers]
        trainer.strategy.lr_scheduler_configs.extend(configs)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Forget an earlier fit: the steps are the checkpoint's."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._last = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the length from the run, set the rates of the first step, and count real steps from here."""
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        steps_per_epoch = math.ceil(batches) if math.isfinite(batches) else None
        schedule: Schedule | None = None
        if not trainer.fast_dev_run:
            schedule = resolve_epochs(self.schedule, math.inf if steps_per_epoch is None else steps_per_epoch)
        for scheduler in self._schedulers:
            if not scheduler.restored and trainer.global_step > 0:
                scheduler.last_epoch = trainer.global_step // len(self._schedulers)
                rank_zero_info(
                    "LRSchedule: the checkpoint was trained without it; the schedule goes on at step"
                    f" {scheduler.last_epoch}."
                )
            total_steps = 1 if schedule is None else self._length(trainer, scheduler, steps_per_epoch)
            if schedule is not None and scheduler.restored and scheduler.total_steps != total_steps:
                rank_zero_info(
                    f"LRSchedule: the run had {scheduler.total_steps} optimizer steps, now it has {total_steps}; the"
                    f" schedule is stretched, and goes on at step {scheduler.last_epoch}."
                )
            scheduler.begin(schedule, total_steps, steps_per_epoch)
            self._handles += after_real_steps("LRSchedule", [scheduler.optimizer], partial(_advance, scheduler))

    def _length(self, trainer: pl.Trainer, scheduler: ScheduledLR, steps_per_epoch: int | None) -> int:
        """The run's length as it was given, or as the run tells it, what was done with epochs of another length too."""
        if self.total_steps is not None:
            return self.total_steps
        total_steps = run_length(trainer, len(self._schedulers))
        if steps_per_epoch is None or not scheduler.restored:
            return total_steps
        if scheduler.steps_per_epoch != steps_per_epoch:
            scheduler.extra_steps = extra_steps(trainer, scheduler.last_epoch, steps_per_epoch)
        if not scheduler.extra_steps:
            return total_steps
        total_steps = (trainer.max_epochs or 0) * steps_per_epoch + scheduler.extra_steps
        return total_steps if trainer.max_steps == -1 else min(total_steps, trainer.max_steps)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop counting."""
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        self._detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_schedulers": [], "_handles": []}

    def _detach(self) -> None:
        if self._handles:
            self._last = [scheduler.state_dict() for scheduler in self._schedulers]
        for handle in self._handles:
            handle.remove()
        self._handles, self._schedulers = [], []


def _advance(scheduler: ScheduledLR, optimizer: Optimizer) -> None:
    scheduler.step()


def run_length(trainer: pl.Trainer, optimizers: int) -> int:
    """Optimizer steps of the whole run, for each optimizer; to be asked once the loops are restored.

    Args:
        trainer: the trainer in `on_train_start`.
        optimizers: number of optimizers.
    Returns:
        Steps from the beginning of the run, if all its epochs are as long as this one.
    Raises:
        ValueError: it cannot be known; the error names `total_steps` as the way out.
    """
    got: Any = None
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        got = "an accumulation that changes between epochs"
    elif optimizers > 1 and trainer.max_steps != -1:
        got = f"max_steps={trainer.max_steps} shared by {optimizers} optimizers"
    elif (steps := trainer.estimated_stepping_batches) == float("inf"):
        got = "endless training (max_epochs=-1 without max_steps)"
    elif steps <= 0:
        got = "a loader without a length and no max_steps"
    if got is not None:
        fix = "Give LRSchedule(schedule, total_steps=...)"
        raise ValueError(message("LRSchedule", "total_steps", "given where the run does not tell it", got, fix))
    return int(steps)


def extra_steps(trainer: pl.Trainer, step: int, steps_per_epoch: int) -> int:
    """Optimizer steps that a run has more than if all its epochs had the length they have from now on.

    Args:
        trainer: the trainer in `on_train_start`.
        step: steps done before.
        steps_per_epoch: length of the epochs that are left.
    Returns:
        Steps, negative where the earlier epochs were shorter; 0 where `max_steps` alone ends the run.
    """
    if trainer.max_epochs in (None, -1):
        return 0
    extra = step - trainer.current_epoch * steps_per_epoch
    epochs = trainer.fit_loop.epoch_progress.current
    if epochs.started > epochs.processed:  # in the middle of an epoch: of its steps some are done
        batches = trainer.num_training_batches - trainer.fit_loop.epoch_loop.batch_progress.current.ready
        extra -= steps_per_epoch - math.ceil(max(batches, 0) / trainer.accumulate_grad_batches)
    return extra
