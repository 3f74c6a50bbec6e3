"""Any hyperparameter of the optimizer, or any rate of the module, follows a schedule of real optimizer steps."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_tricks.callbacks.clock import OnMismatch, OnNewHorizon
from lightning_tricks.callbacks.param_groups import label_groups, numbers_of, read_value, scale_groups
from lightning_tricks.callbacks.scheduled import Scheduled, Target
from lightning_tricks.functional.checks import message
from lightning_tricks.functional.schedules import Schedule

BELOW_ONE = ("momentum", "betas[0]", "betas[1]")


class ParamSchedule(Scheduled):
    """Let a hyperparameter of the optimizer, or a rate of the module, follow a schedule of real optimizer steps.

        value = base_value * schedule(step, total_steps)

    The base of a hyperparameter is what `configure_optimizers` gave each group; that of a rate of the module is its
    value when `fit` starts, which it has again when `fit` ends, also by an exception. Steps and the run's length are
    those of `LRSchedule`. The values are logged under `name` on the steps that Lightning logs. A rate that is a plain
    number is a constant to `torch.compile`, which compiles anew when it changes and gives up after a few values; a
    tensor of no dimensions, in a buffer with `persistent=False`, is filled in place and compiled once.

    Args:
        name: a key of the optimizer's groups, `"weight_decay"`, `"momentum"`, `"betas[0]"`, or a dotted path of
            attributes from the LightningModule, `"model.block.drop_rate"`. A name without a dot that no optimizer
            knows is an attribute of the LightningModule itself.
        schedule: (step, total_steps) -> factor, as `Linear(0, 1)`.
        total_steps: length of the run (optimizer steps), at least 1; None takes it from the run.
        optimizer: index of the one optimizer whose groups they are, or whose steps count; None takes all. A rate of the
            module needs it where there are several.
        on_new_horizon: as in `LRSchedule`.
        on_mismatch: as in `LRSchedule`.
        prog_bar: whether the value is shown in the progress bar.
    Raises:
        TypeError: the schedule is not callable, the name is no string, or the attribute no number.
        ValueError: no such name, a base of 0 everywhere, a momentum or beta that reaches 1, another ParamSchedule of
            the same name, `"lr"` (LRSchedule's), or what LRSchedule refuses of the run's length and of checkpoints.
    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, arXiv:1711.05101 (one schedule for rate
        and weight decay); Smith, 2018, arXiv:1803.09820 (cyclical momentum).
    Example:
        >>> from lightning_tricks import Cosine, ParamSchedule
        >>> ParamSchedule("weight_decay", Cosine(end=0.1)).settings
        {'name': 'weight_decay', 'schedule': 'Cosine(end=0.1)', 'total_steps': None}
    """

    owner = "ParamSchedule"

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        total_steps: int | None = None,
        *,
        optimizer: int | None = None,
        on_new_horizon: OnNewHorizon = "stretch",
        on_mismatch: OnMismatch = "refuse",
        prog_bar: bool = False,
    ) -> None:
        fix = "Give a key such as 'weight_decay' or a path such as 'model.block.drop_rate'"
        if not isinstance(name, str):
            raise TypeError(message("ParamSchedule", "name", "a string", name, fix))
        if not all(name.split(".")):
            raise ValueError(message("ParamSchedule", "name", "a name, or names separated by dots", name, fix))
        if name.partition("[")[0] in ("lr", "initial_lr"):
            fix = "LRSchedule(schedule) is for the learning rate"
            raise ValueError(message("ParamSchedule", "name", "another than lr", name, fix))
        super().__init__(name, schedule, total_steps, optimizer, on_new_horizon, on_mismatch, prog_bar)
        self._rate: Rate | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        return {"name": self.name, **super().settings}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what is to be set."""
        super().on_fit_start(trainer, pl_module)
        groups = [group for target in self._targets.values() for group in target.optimizer.param_groups]
        found = [read_value(group, self.name) for group in groups]
        self._rate = find_rate(pl_module, self.name) if None in found else None
        if None in found and self._rate is None:
            known = ", ".join(sorted(set.intersection(*(set(numbers_of(group)) for group in groups)) - {"lr"}))
            condition = f"a number of every chosen group ({known}) or a path of {type(pl_module).__name__}"
            fix = "A path begins at the LightningModule: 'encoder.block.drop_rate', with an index 'body.2.p'"
            if any(value is not None for value in found):
                fix = "Some groups have it: choose their optimizer, as in optimizer=1"
            raise ValueError(message("ParamSchedule", "name", condition, self.name, fix))
        for other in trainer.callbacks:
            theirs = other._rate if isinstance(other, ParamSchedule) and other is not self else None
            if theirs is not None and self._rate is not None and self._rate.same_as(theirs):
                fix = f"Both would own it; {other.name!r} is another path to it"
                raise ValueError(message("ParamSchedule", "name", "of a rate with one owner", self.name, fix))
        if self._rate is not None and len(self._targets) > 1:
            fix = "Give the index of the one whose steps count"
            raise ValueError(message("ParamSchedule", "optimizer", f"given for {self.name!r}", self.optimizer, fix))
        if not any(found if self._rate is None else [self._rate.base]):
            fix = "It is multiplied by the schedule's factor: set the value it has at a factor of 1"
            raise ValueError(message("ParamSchedule", self.name, "other than 0", 0, fix))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, and refuse a value that will not do for an optimizer."""
        super().on_train_start(trainer, pl_module)
        for target in self._targets.values() if self._rate is None and self.name in BELOW_ONE else ():
            base = max(float(group[f"initial_{self.name}"]) for group in target.optimizer.param_groups)
            if base * target.clock.highest >= 1:
                fix = "Lower the base value or the schedule"
                got = base * target.clock.highest
                raise ValueError(message("ParamSchedule", self.name, "below 1 at every step", got, fix))

    def apply(self, target: Target) -> None:
        """Set the hyperparameter of every group, or the rate of the module."""
        if self._rate is not None:
            self._rate.scale(target.clock.factor)
        else:
            scale_groups(target.optimizer, self.name, target.clock.factor)

    def values(self, trainer: pl.Trainer) -> dict[str, float]:
        """The values in force; with several optimizers or groups, named as LearningRateMonitor names those."""
        if self._rate is not None:
            return {self.name: self._rate.value}
        chosen = {place: target.optimizer for place, target in self._targets.items()}
        labels = label_groups(trainer, chosen, self.name, kinds=len(trainer.optimizers) > 1)
        return {label: float(read_value(group, self.name)) for label, group in labels}

    def release(self) -> None:
        """Let go of the optimizers, and give the module its own value back."""
        super().release()
        if self._rate is not None:
            self._rate.scale(1.0)
        self._rate = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rate": None}


class Rate:
    """A number of a module, found by name again whenever it is set.

    Args:
        owner: the object whose attribute it is.
        attribute: the name; a number, or a floating tensor of one element.
    """

    def __init__(self, owner: Any, attribute: str) -> None:
        self.owner, self.attribute = owner, attribute
        self.base = self.value

    @property
    def value(self) -> float:
        """The value in force."""
        value = getattr(self.owner, self.attribute)
        return value.item() if isinstance(value, Tensor) else value

    def same_as(self, other: "Rate") -> bool:
        """Whether two rates, found by two paths, are one."""
        return self.owner is other.owner and self.attribute == other.attribute

    def scale(self, factor: float) -> None:
        """Set it to the base times a factor; a factor of 1 gives exactly the base back, an int too."""
        value = self.base if factor == 1 else self.base * factor
        current = getattr(self.owner, self.attribute)
        if isinstance(current, Tensor):
            current.fill_(value)
        else:
            setattr(self.owner, self.attribute, value)


def find_rate(pl_module: pl.LightningModule, path: str) -> Rate | None:
    """A number of a module by its path of attributes.

    Args:
        pl_module: where the path begins.
        path: names, separated by dots.
    Returns:
        The rate; None if there is nothing of this name.
    Raises:
        TypeError: it is no number, or cannot be set.
        ValueError: it would be saved in checkpoints with the value of the moment.
    """
    *parts, attribute = path.split(".")
    owner: Any = pl_module
    for part in parts:
        owner = getattr(owner, part, None)
    value = getattr(owner, attribute, None)
    if value is None:
        return None
    tensor = isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, nn.Parameter) or not (tensor or number):
        fix = "Give the path of the number itself; a tensor must be a floating one of one element"
        raise TypeError(message("ParamSchedule", "name", "the path of a number", type(value).__name__, fix))
    saved = isinstance(owner, nn.Module) and attribute in owner._buffers.keys() - owner._non_persistent_buffers_set
    if saved or "hparams" in parts:
        fix = "Make it a plain attribute, or a buffer with persistent=False"
        raise ValueError(message("ParamSchedule", "name", "of what a checkpoint does not save", path, fix))
    rate = Rate(owner, attribute)
    try:
        rate.scale(1.0)
    except AttributeError as error:
        fix = "Give the path of what it is computed from"
        raise TypeError(message("ParamSchedule", "name", "of an attribute that can be set", path, fix)) from error
    return rate
