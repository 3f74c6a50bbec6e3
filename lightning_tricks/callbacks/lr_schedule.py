"""The learning rate follows a schedule of real optimizer steps."""

import math
import sys
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from lightning_tricks.callbacks.clock import Clock, OnMismatch, OnNewHorizon, changes_accumulation
from lightning_tricks.callbacks.param_groups import label_groups, scale_groups
from lightning_tricks.callbacks.scheduled import Scheduled, Target
from lightning_tricks.functional.checks import check_count, check_flag, message
from lightning_tricks.functional.schedules import Schedule, describe, resolve_epochs, survey

BASE_KEPT = "beside schedulers that keep the optimizer's own rate"
BASE_LOST = "OneCycleLR and CyclicLR overwrite it, and the base is lost: begin anew without them"


class ScheduledLR(LRScheduler):
    """What Lightning and the module see in a scheduler's place: it tells the rates and never sets them.

    Args:
        optimizer: the optimizer whose rates it tells.
        clock: what counts its steps.
    """

    def __init__(self, optimizer: Optimizer, clock: Clock) -> None:
        self.clock = clock
        super().__init__(optimizer)

    @property
    def last_epoch(self) -> int:
        """Real steps so far, under torch's name."""
        return self.clock.step

    @last_epoch.setter
    def last_epoch(self, step: int) -> None:
        """Torch's constructor sets it."""

    def step(self, epoch: int | None = None) -> None:
        """Nothing: real steps are counted where they happen, and one that a module asks for must not count again."""

    def get_last_lr(self) -> list[float | Tensor]:
        """The rates in force."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: Lightning restores by position, whatever it is; the clock is saved by its name."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing, for the same reason."""


class LRSchedule(Scheduled):
    """Let the learning rate of every parameter group follow a schedule of real optimizer steps.

        lr = base_lr * schedule(step, total_steps) * batch_scale

    `base_lr` is what `configure_optimizers` gave the group, or what it had when a callback added it (as Lightning's
    `BaseFinetuning` does; `BackboneFinetuning`, which sets rates itself, is refused). A step counts when the optimizer
    changed weights: batches that only accumulate gradients and steps that a GradScaler skipped do not count. The length
    is taken from the run: `max_epochs` or `max_steps`, the loader's length, `limit_train_batches` and accumulation;
    under manual optimization one step of each optimizer for each batch is assumed. Before the first step a line says
    what the schedule does, and after the last a warning if the training was more than 1 % shorter or longer. Lightning
    saves and restores the step. The rates are logged as `LearningRateMonitor` logs them. In `fast_dev_run` the rates
    stay at their base.

    Args:
        schedule: (step, total_steps) -> factor, as `WarmupCosine(0.05)`.
        total_steps: length of the run (optimizer steps), at least 1; None takes it from the run.
        scale_with_batch: `"linear"` multiplies the rates by global batch / `base_batch_size`, `"sqrt"` by the root of
            it; None leaves them. The global batch is the loader's batch x accumulation x ranks of all nodes.
        base_batch_size: global batch (samples) that the base rates are meant for, at least 1.
        optimizer: index of the one optimizer whose rate it is; None takes all. Two LRSchedules can have one each.
        replace: whether schedulers that the module returns for these optimizers are taken out; else they are an error.
        on_new_horizon: a run that is gone on with by another length, say a longer `max_epochs`, `"stretch"`es the
            schedule to it or `"keep"`s the old length, and says so.
        on_mismatch: a checkpoint of another schedule is an error that shows both (`"refuse"`), or gone on with
            (`"use_new"`). A plain function is known by its name alone.
        prog_bar: whether the rate of the first group is shown in the progress bar.
    Raises:
        TypeError: the schedule is not callable, or an optimizer has no step hooks.
        ValueError: the length cannot be known (endless training, an unsized loader, an accumulation that changes,
            several optimizers that share `max_steps`), the module returns a scheduler of its own, another LRSchedule
            has the same optimizer, the loader's batch size is not known but wanted, or the checkpoint was trained with
            another scheduler.
    References:
        Goyal et al., 2017, arXiv:1706.02677, section 2.2 (warmup) and 2.1 (linear scaling); Loshchilov and Hutter,
            2017, arXiv:1608.03983 (cosine); Krizhevsky, 2014, arXiv:1404.5997, section 5 (square-root scaling).
    Example:
        >>> from lightning_tricks import Linear, LRSchedule
        >>> LRSchedule(Linear()).preview(total_steps=4)
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    owner = "LRSchedule"

    def __init__(
        self,
        schedule: Schedule,
        total_steps: int | None = None,
        scale_with_batch: Literal["linear", "sqrt"] | None = None,
        base_batch_size: int = 256,
        *,
        optimizer: int | None = None,
        replace: bool = False,
        on_new_horizon: OnNewHorizon = "stretch",
        on_mismatch: OnMismatch = "refuse",
        prog_bar: bool = False,
    ) -> None:
        super().__init__("lr", schedule, total_steps, optimizer, on_new_horizon, on_mismatch, prog_bar)
        if scale_with_batch not in (None, "linear", "sqrt"):
            fix = "None leaves the rates as they are"
            raise ValueError(message("LRSchedule", "scale_with_batch", "'linear' or 'sqrt'", scale_with_batch, fix))
        check_count("LRSchedule", "base_batch_size", base_batch_size, 1, "samples", "256 is usual for ImageNet")
        if base_batch_size != 256 and scale_with_batch is None:
            fix = "It is what scale_with_batch='linear' or 'sqrt' scales from"
            raise ValueError(message("LRSchedule", "base_batch_size", "left out here", base_batch_size, fix))
        check_flag("LRSchedule", "replace", replace, "True takes the module's schedulers out")
        self.scale_with_batch, self.base_batch_size, self.replace = scale_with_batch, base_batch_size, replace
        self._batch: dict[str, Any] = {}
        self._foreign: list[dict[str, Any]] = []  # states of other schedulers in a checkpoint

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        return {**super().settings, **self._batch}

    def preview(self, total_steps: int | None = None, steps_per_epoch: int | None = None) -> list[float]:
        """The factor at every step, from before the first to after the last, without a run.

        Args:
            total_steps: length of the run (optimizer steps); None takes that of the callback, or of the run it is in.
            steps_per_epoch: optimizer steps of an epoch, where durations are given in epochs; None takes the run's.
        Returns:
            `total_steps + 1` factors of the base rates.
        Raises:
            ValueError: no length is known; what the schedule itself refuses.
        """
        known = next(iter(self._states().values()), {})
        if total_steps is None:
            total_steps = known.get("total_steps") or self.total_steps
        if steps_per_epoch is None:
            steps_per_epoch = known.get("steps_per_epoch")
        fix = "Give LRSchedule(schedule, total_steps=...) or preview(total_steps=...)"
        if total_steps is None:
            raise ValueError(message("LRSchedule.preview", "total_steps", "known before a run", None, fix))
        check_count("LRSchedule.preview", "total_steps", total_steps, 1, "optimizer steps", fix)
        if steps_per_epoch is not None:
            check_count("LRSchedule.preview", "steps_per_epoch", steps_per_epoch, 1, "optimizer steps", fix)
        schedule = resolve_epochs(self.schedule, steps_per_epoch or math.inf)
        return [factor for _, factor in survey("LRSchedule", schedule, total_steps, points=total_steps)]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a second owner of the learning rate."""
        super().setup(trainer, pl_module, stage)
        self._foreign = []
        owners = (StochasticWeightAveraging, BackboneFinetuning)
        others = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, owners)]
        if others:
            fix = "Both would own the learning rate; keep one"
            raise ValueError(message("LRSchedule", "callbacks", "the only one that sets the rate", others, fix))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put schedulers where torch's would be, before Lightning restores a checkpoint."""
        super().on_fit_start(trainer, pl_module)
        configs = trainer.lr_scheduler_configs
        theirs = [config for config in configs if not isinstance(config.scheduler, ScheduledLR)]
        replaced = self._replaced(theirs)
        self._meet_foreign(len(theirs) - len(replaced))
        groups = [group for target in self._targets.values() for group in target.optimizer.param_groups]
        fresh = [group for group in groups if "initial_lr" not in group]
        ours = {
            id(target.optimizer): LRSchedulerConfig(
                ScheduledLR(target.optimizer, target.clock), interval="step", frequency=sys.maxsize
            )
            for target in self._targets.values()
        }
        if trainer.strategy.restore_checkpoint_after_setup:
            for group in fresh:  # a distributed checkpoint must have all that the groups have; the clock has the base
                group.pop("initial_lr", None)
        # In place of what it replaces: a module that steps its schedulers by hand knows them by their order. Beside
        # schedulers of other optimizers it stays out, so that the module has as many as it returned.
        configs = [
            ours.get(id(config.scheduler.optimizer), config) if config in replaced else config for config in configs
        ]
        trainer.strategy.lr_scheduler_configs = configs if theirs else [*configs, *ours.values()]

    def _meet_foreign(self, others: int) -> None:
        """Refuse, or say, that a checkpoint had schedulers that are not the module's any more.

        Args:
            others: how many the module still has, for optimizers without a clock of ours.
        """
        foreign, self._foreign = self._foreign, []
        if len(foreign) <= others:
            return
        names = f"a scheduler of torch with {_plain(foreign[-1])}"
        if any({"max_lrs", "_schedule_phases"} & state.keys() for state in foreign):
            raise ValueError(message("LRSchedule", "checkpoint", BASE_KEPT, names, BASE_LOST))
        for target in self._targets.values():
            if not target.clock.restored:
                target.clock.check_same(names)

    def _replaced(self, configs: list[LRSchedulerConfig]) -> list[LRSchedulerConfig]:
        """The module's own schedulers of these optimizers; an error unless they are to be replaced."""
        optimizers = [target.optimizer for target in self._targets.values()]
        # A foreign scheduler need not say whose it is.
        found = [config for config in configs if getattr(config.scheduler, "optimizer", None) in [None, *optimizers]]
        names = ", ".join(f"{type(c.scheduler).__name__}({_plain(c.scheduler.state_dict())})" for c in found)
        if found and not self.replace:
            got = f"{names} beside {describe(self.schedule)}"
            fix = "Return the optimizer alone from configure_optimizers, or give LRSchedule(..., replace=True)"
            raise ValueError(message("LRSchedule", "schedulers", "the only one of the optimizers", got, fix))
        if any(_overwrites_base(config.scheduler) for config in found):
            raise ValueError(message("LRSchedule", "replace", BASE_KEPT, names, BASE_LOST))
        if found:
            rank_zero_info(f"LRSchedule: it replaces {names}, which the module returned.")
        return found

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the clocks of a checkpoint, and see what else it was trained under."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn == TrainerFn.FITTING:
            self._foreign = [state for state in checkpoint.get("lr_schedulers", []) if state]  # ours are empty
            if self._targets:
                configs = trainer.lr_scheduler_configs
                if self._foreign:  # whose rates of the moment are no base
                    for target in self._targets.values():
                        for group, base in zip(target.optimizer.param_groups, target.given, strict=True):
                            group.setdefault("initial_lr", base)
                self._meet_foreign(sum(not isinstance(config.scheduler, ScheduledLR) for config in configs))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the length and the batch from the run, and begin."""
        scale = self._batch_scale(trainer)
        for target in self._targets.values():
            clock = target.clock
            if clock.restored and clock.scale != scale:
                rank_zero_info(f"LRSchedule: the batch had scaled the rates by {clock.scale:.4g}, now by {scale:.4g}.")
            clock.scale = scale
        super().on_train_start(trainer, pl_module)

    def _batch_scale(self, trainer: pl.Trainer) -> float:
        """What the batch does to the rates; says so, and remembers it for the run's configuration."""
        if self.scale_with_batch is None or trainer.fast_dev_run:
            return 1.0
        batch, accumulation, ranks = global_batch_size(trainer)
        total = batch * accumulation * ranks
        ratio = total / self.base_batch_size
        scale = ratio if self.scale_with_batch == "linear" else math.sqrt(ratio)
        self._batch = {"global_batch_size": total, "batch_scale": scale}
        rank_zero_info(
            f"LRSchedule: a global batch of {total} = {batch} x {accumulation} x {ranks} (loader x accumulation x"
            f" ranks) scales the rates by {scale:.4g} ({self.scale_with_batch} from {self.base_batch_size})."
        )
        return scale

    def apply(self, target: Target) -> None:
        """Set the rate of every group of an optimizer."""
        scale_groups(target.optimizer, "lr", target.clock.factor)

    def values(self, trainer: pl.Trainer) -> dict[str, float]:
        """The rates, under the names of LearningRateMonitor."""
        chosen = {place: target.optimizer for place, target in self._targets.items()}
        return {name: float(group["lr"]) for name, group in label_groups(trainer, chosen, "lr")}

    def logs(self, trainer: pl.Trainer) -> bool:
        """Not where LearningRateMonitor does."""
        return not any(isinstance(callback, LearningRateMonitor) for callback in trainer.callbacks)


def global_batch_size(
    trainer: pl.Trainer,
    owner: str = "LRSchedule",
    name: str = "scale_with_batch",
    otherwise: str = "None",
    fix: str = "Leave it out and scale the base rates yourself",
) -> tuple[int, int, int]:
    """How many samples an optimizer step sees: the product of the three numbers.

    Args:
        trainer: the trainer in `on_train_start`.
        owner: callback named in an error.
        name: argument named in an error.
        otherwise: what that must be where the number is not known.
        fix: what to do then.
    Returns:
        Samples of a batch of the training loader on one rank, batches of an optimizer step, and ranks of all nodes that
        have batches of their own.
    Raises:
        ValueError: the batch size is not known, or the accumulation changes.
    """
    if changes_accumulation(trainer):
        got = "GradientAccumulationScheduler"
        raise ValueError(message(owner, name, f"{otherwise} where the accumulation changes", got, fix))
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(size, int):
        got = type(loader).__name__
        raise ValueError(message(owner, name, f"{otherwise} where the loader has no batch_size", got, fix))
    ranks = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    # The optimizer steps at an epoch's end, however many batches it was to wait for.
    return size, int(min(trainer.accumulate_grad_batches, trainer.num_training_batches)), ranks


def _overwrites_base(scheduler: Any) -> bool:
    """Whether a scheduler of torch, or one that it is made of, put its own rates over the optimizer's."""
    parts = getattr(scheduler, "_schedulers", [])
    return isinstance(scheduler, (OneCycleLR, CyclicLR)) or any(map(_overwrites_base, parts))


def _plain(state: dict[str, Any]) -> str:
    """The plain values of a torch scheduler's state."""
    hidden = ("base_lrs", "last_epoch", "verbose")
    values = {key: value for key, value in state.items() if key not in hidden and not key.startswith("_")}
    return ", ".join(f"{key}={value!r}" for key, value in values.items() if isinstance(value, (int, float, str)))
