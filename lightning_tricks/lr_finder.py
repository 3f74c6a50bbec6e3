"""A learning-rate range test that leaves no trace: `find_lr`."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _parse_loop_limits
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_tricks.callbacks.steps import after_real_steps, refuse_sharded
from lightning_tricks.functional.checks import check_count, check_number, message
from lightning_tricks.functional.range_test import BURN_IN, below_blow_up, heights, smooth, steepest, valley
from lightning_tricks.plots import new_axes
from lightning_tricks.rollback import Rollback

LEAST_POINTS = BURN_IN + 2  # below this no suggestion is more than a guess


@dataclass(frozen=True)
class LRCurve:
    """The loss at growing learning rates, as `find_lr` measured it.

    Args:
        lrs: rate of each step, of the parameter group with the largest base rate.
        losses: loss of each step's batches, before the step; all finite.
        base_lr: the largest base rate itself, that of `configure_optimizers`.
        reason: what ended the test: "diverged", "not finite" (a loss of NaN or infinity) or "max_lr".
    Raises:
        ValueError: by `suggestion`, `steepest` and `valley` where the loss blew up before they have points enough.
    References:
        Smith, 2017, arXiv:1506.01186, section 3.3.
    Example:
        >>> lrs = tuple(0.001 * 2**i for i in range(16))
        >>> curve = LRCurve(lrs, (3.0,) * 11 + (2.0, 1.0, 1.0, 9.0, 999.0), base_lr=0.01, reason="diverged")
        >>> f"{curve.suggestion:.2g}, {curve.factor:.2g} times the base rate"
        '1, 1e+02 times the base rate'
    """

    lrs: tuple[float, ...] = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    base_lr: float
    reason: Literal["diverged", "not finite", "max_lr"]

    @property
    def smoothed(self) -> tuple[float, ...]:
        """Bias-corrected moving average of the losses."""
        return tuple(smooth(self.losses))

    @property
    def suggestion(self) -> float:
        """The rate to use: safely below the blow-up, as `below_blow_up` has it."""
        self._enough()
        lr = below_blow_up(self.lrs, self.losses, self.reason != "max_lr")
        if lr < self.lrs[0]:
            fix = "The loss blew up soon after the first rate: lower min_lr, or raise num_steps"
            raise ValueError(message("LRCurve", "suggestion", f"at least min_lr={self.lrs[0]:g}", lr, fix))
        return lr

    @property
    def steepest(self) -> float:
        """The rate at which the loss fell fastest."""
        return steepest(self.lrs, self._enough())

    @property
    def valley(self) -> float:
        """The rate half-way down the longest valley."""
        return valley(self.lrs, self._enough())

    @property
    def factor(self) -> float:
        """The suggestion over the base rate: what to multiply the rate of every parameter group by."""
        return self.suggestion / self.base_lr

    def plot(self, ax: Any = None) -> Any:
        """Draw the losses, their average and the suggestion over the rates.

        Args:
            ax: matplotlib axes to draw into; None makes a figure of its own.
        Returns:
            The axes; `axes.figure.savefig(path)` writes the figure.
        Raises:
            ImportError: matplotlib is not installed.
        """
        ax = new_axes("LRCurve.plot") if ax is None else ax
        ax.plot(self.lrs, self.losses, alpha=0.3, label="loss")
        ax.plot(self.lrs, self.smoothed, label="smoothed")
        with contextlib.suppress(ValueError):  # the picture shows why there is none
            ax.axvline(self.suggestion, linestyle="--", color="black", label=f"suggestion {self.suggestion:.2g}")
        ax.set(xscale="log", xlabel="learning rate", ylabel="loss")
        ax.legend()
        return ax

    def _enough(self) -> tuple[float, ...]:
        if len(self.losses) < LEAST_POINTS:
            fix = "The loss blew up at the first rates: lower min_lr"
            raise ValueError(message("LRCurve", "losses", f"at least {LEAST_POINTS} (steps)", len(self.losses), fix))
        return self.smoothed


def find_lr(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    train_dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
    *,
    min_lr: float = 1e-7,
    max_lr: float = 100.0,
    num_steps: int = 100,
    stop_ratio: float = 4.0,
) -> LRCurve:
    """Train for some steps with a growing learning rate, put everything back as it was, and return the losses.

        lr = base_lr * factor;  factor[i] = min_lr / largest_base_lr * (max_lr / min_lr) ** (i / (num_steps - 1))

    `base_lr` is what `configure_optimizers` gave the group, before a scheduler scaled it, so that the ratios of the
    groups, and of several optimizers, are kept. A step is a batch, or a window of accumulated ones, after which an
    optimizer has changed weights. No callback, logger, profiler, scheduler or validation runs; the module's and the
    datamodule's own hooks do. Afterwards, and after an error or Ctrl-C too, a `fit` gives what it would have given.
    What cannot be put back: files, other processes and global variables that the module's or the dataset's code
    changed, attributes of plain objects that it keeps, the entries of its numpy arrays.

    Args:
        trainer: one that is at rest; its limits of epochs, steps and time do not end the test.
        model: as `trainer.fit` takes it.
        train_dataloaders: as `trainer.fit` takes them.
        datamodule: as `trainer.fit` takes it.
        min_lr: first rate of the group with the largest base rate, above 0.
        max_lr: its last rate, above min_lr.
        num_steps: real optimizer steps, at least 20.
        stop_ratio: ends the test at a smoothed loss above this many times the best one, above 1, by more than noise.
            Where the loss has fallen below half of the first, or is not positive, the gain `first - best` takes the
            place of the best.
    Returns:
        The curve; `curve.suggestion` is the rate to use for the group with the largest base rate, `curve.factor` what
        to multiply the rate of every group by.
    Raises:
        TypeError, ValueError: an argument out of range, `fast_dev_run`, a strategy that starts processes by spawn or
            fork or shards the parameters, a one-shot iterator, uninitialized parameters, no base rate above 0,
            manual optimization without a returned loss, no real step or no batch any more.
    References:
        Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, arXiv:1506.01186, section 3.3.
        Deviates: the rate grows geometrically, as in Gugger's "How Do You Find A Good Learning Rate", 2018.
    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> curve = find_lr(L.Trainer(barebones=True, max_epochs=1), BoringModel(), num_steps=20)
        >>> curve.reason, curve.base_lr
        ('diverged', 0.1)
    """
    check_number("find_lr", "min_lr", min_lr, "above 0", "Try 1e-7", lambda value: value > 0)
    check_number("find_lr", "max_lr", max_lr, f"above min_lr={min_lr:g}", "Try 100.0", lambda value: value > min_lr)
    check_count("find_lr", "num_steps", num_steps, 2 * BURN_IN, "optimizer steps", "Try 100")
    check_number("find_lr", "stop_ratio", stop_ratio, "above 1", "Try 4.0", lambda value: value > 1)
    if isinstance(train_dataloaders, pl.LightningDataModule):
        train_dataloaders, datamodule = None, train_dataloaders
    _refuse(trainer, model, train_dataloaders, datamodule)
    module: Any = getattr(model, "_orig_mod", model)  # of a compiled module
    with ExitStack() as undo:
        rollback = Rollback(undo)
        rollback.trainer(trainer)
        rollback.keep(model)
        rollback.keep(datamodule, data=True)
        rollback.keep(train_dataloaders, data=True)
        test = _RangeTest([min_lr * (max_lr / min_lr) ** (i / (num_steps - 1)) for i in range(num_steps)], stop_ratio)
        test.keep = rollback.keep
        _prepare(trainer, test)
        module.configure_callbacks = list
        # Nothing is validated; a loader only keeps Lightning from saying that there is none.
        val: Any = [] if datamodule is None and is_overridden("validation_step", module) else None
        trainer.fit(model, train_dataloaders, val, datamodule)
    if test.reason is None or not test.losses:
        fix = "Look at the data and the module's initialization, or at limit_train_batches"
        raise ValueError(message("find_lr", "losses", "finite at the first step", test.reason or "no batch", fix))
    return LRCurve(tuple(test.rates[: len(test.losses)]), tuple(test.losses), test.largest, test.reason)


def _refuse(trainer: Any, model: pl.LightningModule, loaders: Any, datamodule: Any) -> None:
    """What the test could not serve, or not put back."""
    for name, item, kind in (
        ("trainer", trainer, pl.Trainer),
        ("model", getattr(model, "_orig_mod", model), pl.LightningModule),
    ):
        if not isinstance(item, kind):
            fix = "Call find_lr(trainer, module, loader)"
            raise TypeError(message("find_lr", name, f"a {kind.__name__}", type(item).__name__, fix))
    if trainer.state.status == TrainerStatus.RUNNING:
        raise ValueError(
            message("find_lr", "trainer", "at rest", f"in {trainer.state.fn.value}", "Call it before trainer.fit")
        )
    if trainer.fast_dev_run:
        raise ValueError(message("find_lr", "fast_dev_run", "off", trainer.fast_dev_run, "Leave it out for this test"))
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        name = type(trainer.strategy).__name__
        fix = "What other processes measure does not come back: test on one device, or with strategy='ddp'"
        raise ValueError(message("find_lr", "strategy", "one that starts no process by spawn or fork", name, fix))
    if not isinstance(datamodule, pl.LightningDataModule | None):
        fix = "It validates nothing and takes no validation loader"
        raise TypeError(message("find_lr", "datamodule", "a LightningDataModule", type(datamodule).__name__, fix))
    refuse_sharded("find_lr", trainer)
    if isinstance(loaders, Iterator) and not hasattr(loaders, "__dict__"):
        fix = "It would be used up: give a loader, a list, or an object with __iter__"
        raise TypeError(message("find_lr", "train_dataloaders", "iterable more than once", type(loaders).__name__, fix))
    if any(is_lazy(parameter) for parameter in model.parameters()):
        fix = "Run one batch through the module first"
        raise ValueError(message("find_lr", "model", "one without uninitialized parameters", "lazy ones", fix))


def _prepare(trainer: Any, test: "_RangeTest") -> None:
    """Give the trainer loops without a past and nothing that watches; its limits stay until they have been read."""
    limits = trainer.min_steps, trainer.max_steps, trainer.min_epochs, trainer.max_epochs
    min_epochs, max_epochs = _parse_loop_limits(*limits, trainer)
    trainer.fit_loop = _FitLoop(trainer, min_epochs, max_epochs)
    trainer.fit_loop.epoch_loop = _TrainingEpochLoop(trainer, *limits[:2])
    trainer.callbacks = [test]
    trainer.loggers = [DummyLogger()] if trainer.loggers else []  # a module may log to its experiment
    trainer.profiler = PassThroughProfiler()
    trainer.limit_val_batches = trainer.num_sanity_val_steps = 0


class _RangeTest(Callback):
    """Sets the rates and notes the losses; the only callback of the test."""

    def __init__(self, rates: list[float], stop_ratio: float) -> None:
        self.rates = rates
        self.stop_ratio = stop_ratio
        self.keep: Callable[[Any], None]
        self.losses: list[float] = []
        self.largest = 0.0
        self.reason: Literal["diverged", "not finite", "max_lr"] | None = None
        self._bases: dict[int, float] = {}
        self._window: list[float] = []
        self._stepped, self._idle, self._batches = False, 0, 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop = trainer.fit_loop
        loop.min_epochs, loop.max_epochs = 0, -1
        loop.epoch_loop.min_steps, loop.epoch_loop.max_steps = None, -1
        if pl_module.automatic_optimization:
            trainer.strategy.lr_scheduler_configs = []  # by hand the module steps them, and the rates are ours anyway
        self.keep(trainer.optimizers)  # one may outlive the test, wherever the module has it from
        after_real_steps("find_lr", trainer.optimizers, self._after_step)
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(self._before_step)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.largest = max((self._base(group) for group in groups), default=0.0)
        if not self.largest > 0:
            fix = "The test scales them: give the optimizer a rate, as in SGD(parameters, lr=0.1)"
            raise ValueError(message("find_lr", "base rates", "above 0 in one group at least", self.largest, fix))

    def _base(self, group: dict[str, Any]) -> float:
        return self._bases.setdefault(id(group), float(group.get("initial_lr", group["lr"])))

    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        factor = self.rates[min(len(self.losses), len(self.rates) - 1)] / self.largest
        for group in optimizer.param_groups:
            lr = self._base(group) * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _after_step(self, optimizer: Optimizer) -> None:
        self._stepped = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        by_hand = not pl_module.automatic_optimization
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None and by_hand:
            fix = "Return it, as a tensor or under the key 'loss'"
            raise ValueError(message("find_lr", "training_step", "a function that returns the loss", None, fix))
        self._batches += 1
        if loss is not None:
            # Lightning divides the loss of an accumulated batch; all ranks must stop at the same step.
            whole = loss.detach().float() * (1 if by_hand else trainer.accumulate_grad_batches)
            self._window.append(float(trainer.strategy.reduce(whole, reduce_op="mean")))
        if self._stepped or by_hand or not trainer.fit_loop._should_accumulate():
            self._end_window()
        trainer.should_stop = self.reason is not None

    def _end_window(self) -> None:
        # The weights are those of the last real step, whether or not this window gave another.
        if not all(map(math.isfinite, self._window)):
            self.reason = "not finite"
        elif self._stepped and self._window:
            self.losses.append(fmean(self._window))
            self._window, self._stepped, self._idle = [], False, 0
            if heights(self.losses)[-1] > self.stop_ratio - 1:
                self.reason = "diverged"
            elif len(self.losses) == len(self.rates):
                self.reason = "max_lr"
        else:
            self._idle += 1
            if self._idle == len(self.rates):
                fix = "A GradScaler skipped them all, or no optimizer was called: lower its init_scale, or look at that"
                raise ValueError(message("find_lr", "steps", "real at least once in num_steps", self._idle, fix))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._batches == 0:
            fix = "The test repeats the data until it has its steps: give a loader that can be iterated again"
            raise ValueError(message("find_lr", "train_dataloaders", "of at least one batch an epoch", 0, fix))
        self._batches = 0
