"""Schedules: `schedule(step, total_steps) -> factor` of a base value.

A schedule is a frozen value: it can be compared, printed, pickled and nested, and it knows neither an optimizer nor a
trainer. `schedule(k, T)` is the factor in force after `k` real optimizer steps of a run of `T`; `k = 0` is before the
first. A shape reaches its end at `k = T` and is constant afterwards. Any function of the same signature is a schedule
too.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_tricks.functional.checks import check_number, message

Schedule: TypeAlias = Callable[[float, float], float]
"""What maps (step, total_steps) to a factor of the base value; both may be fractional inside a nested schedule."""

Duration: TypeAlias = int | float | str
"""A stretch of training: `int` = optimizer steps, `float` in (0, 1) = fraction of the run, `"3ep"` = epochs."""

_EPOCHS = re.compile(r"(\d+(?:\.\d+)?)ep")


def progress(owner: str, step: float, total_steps: float) -> float:
    """Fraction of the run that `step` steps are: `min(step / total_steps, 1)`.

    Args:
        owner: class named in an error.
        step: steps done so far, at least 0.
        total_steps: steps of the whole run, finite and at least 0; a run of 0 steps is over at once.
    Returns:
        The fraction, in [0, 1]; exactly 1 from the last step on.
    Raises:
        ValueError: a negative or NaN step, a negative, infinite or NaN length.
    Example:
        >>> progress("Cosine", 5, 20)
        0.25
    """
    if not step >= 0:
        raise ValueError(message(owner, "step", "at least 0 (optimizer steps)", step, "Count the steps done so far"))
    if not (total_steps >= 0 and math.isfinite(total_steps)):
        fix = "Give the length of the run"
        raise ValueError(message(owner, "total_steps", "finite and at least 0 (optimizer steps)", total_steps, fix))
    return 1.0 if step >= total_steps else step / total_steps


def check_duration(owner: str, name: str, value: Any) -> None:
    """Raise unless the value is a stretch of training: steps, a fraction of the run, or epochs.

    Args:
        owner: class named in the error.
        name: argument named in the error.
        value: `int` of at least 0 (optimizer steps), `float` in (0, 1) (fraction of the run) or `"3ep"` (epochs).
    Raises:
        TypeError: another type.
        ValueError: out of range, or a string of another form.
    Example:
        >>> check_duration("Warmup", "duration", "3ep")
    """
    fix = "Give 500 for steps, 0.05 for a fraction of the run, '3ep' for epochs"
    if isinstance(value, str):
        if not _EPOCHS.fullmatch(value):
            raise ValueError(message(owner, name, "epochs written as '3ep'", value, fix))
    elif isinstance(value, float):
        check_number(owner, name, value, "in (0, 1) when it is a float (fraction of the run)", fix, lambda x: 0 < x < 1)
    else:
        check_number(owner, name, value, "at least 0 when it is an int (optimizer steps)", fix, lambda x: x >= 0)


def duration_in_steps(owner: str, name: str, duration: Duration, total_steps: float) -> float:
    """Length in steps of a stretch of a run of `total_steps`; a fraction of the run is not rounded.

    Args:
        owner: class named in an error.
        name: argument named in an error.
        duration: optimizer steps (`int`) or a fraction of the run (`float`).
        total_steps: optimizer steps of the run.
    Returns:
        The length, at most `total_steps`.
    Raises:
        ValueError: longer than the run, or epochs, which only a callback can turn into steps.
    Example:
        >>> duration_in_steps("Warmup", "duration", 0.05, 1000)
        50.0
    """
    if isinstance(duration, str):
        fix = "Epochs are known in a Trainer only: pass the schedule to LRSchedule, or call resolve_epochs first"
        raise ValueError(message(owner, name, "in steps or a fraction of the run here", duration, fix))
    steps = duration * total_steps if isinstance(duration, float) else duration
    if steps > total_steps:
        fix = "Shorten it, or train for longer"
        raise ValueError(message(owner, name, f"at most the run's {total_steps:g} optimizer steps", duration, fix))
    return steps


def resolve_epochs(schedule: Any, steps_per_epoch: float) -> Any:
    """The same schedule with every duration given in epochs (`"3ep"`) turned into optimizer steps.

    Args:
        schedule: any schedule; one that is no dataclass is returned as it is.
        steps_per_epoch: optimizer steps of one epoch.
    Returns:
        A schedule without epochs; the argument itself is untouched.
    Raises:
        ValueError: there are epochs, and their length is infinite (an unsized loader).
    Example:
        >>> resolve_epochs(Warmup("2ep", Cosine()), 100)
        Warmup(duration=200, then=Cosine(end=0.0), start=0.0)
    """
    if not dataclasses.is_dataclass(schedule) or isinstance(schedule, type):
        return schedule
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(schedule):
        value = getattr(schedule, field.name)
        if isinstance(value, str) and (match := _EPOCHS.fullmatch(value)):
            if not math.isfinite(steps_per_epoch):
                fix = "Give optimizer steps instead"
                condition = "in steps or a fraction of the run, since an epoch has no known length"
                raise ValueError(message(type(schedule).__name__, field.name, condition, value, fix))
            changes[field.name] = round(float(match[1]) * steps_per_epoch)
        elif (resolved := resolve_epochs(value, steps_per_epoch)) is not value:
            changes[field.name] = resolved
    return dataclasses.replace(schedule, **changes) if changes else schedule


def _check_factor(owner: str, name: str, value: Any) -> None:
    fix = "It multiplies the base value: 1.0 keeps it, 0.0 switches it off"
    check_number(owner, name, value, "finite and at least 0 (factor of the base value)", fix, lambda x: x >= 0)


@dataclass(frozen=True)
class Constant:
    """Keep the base value.

        factor = value

    Args:
        value: factor of the base value, at least 0.
    Returns:
        Called with (step, total_steps): `value`.
    Raises:
        ValueError: a negative or non-finite value; a negative step.
    Example:
        >>> Constant()(10, 100)
        1.0
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        _check_factor("Constant", "value", self.value)

    def __call__(self, step: float, total_steps: float) -> float:
        progress("Constant", step, total_steps)
        return self.value


@dataclass(frozen=True)
class Linear:
    """Go in a straight line from `start` to `end` over the run.

        factor = start + (end - start) * step / total_steps

    Args:
        start: factor before the first step, at least 0.
        end: factor from the last step on, at least 0.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        ValueError: a negative or non-finite factor; a negative step.
    Example:
        >>> [Linear()(k, 4) for k in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_factor("Linear", "start", self.start)
        _check_factor("Linear", "end", self.end)

    def __call__(self, step: float, total_steps: float) -> float:
        x = progress("Linear", step, total_steps)
        return self.end if x == 1 else self.start + (self.end - self.start) * x


@dataclass(frozen=True)
class Cosine:
    """Anneal from 1 to `end` along half a cosine.

        factor = end + (1 - end) * (1 + cos(pi * step / total_steps)) / 2

    Args:
        end: factor from the last step on, at least 0.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        ValueError: a negative or non-finite end; a negative step.
    References:
        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, arXiv:1608.03983, eq. 5.
        Deviates: one cycle, no restarts.
    Example:
        >>> [round(Cosine()(k, 4), 3) for k in range(6)]
        [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """

    end: float = 0.0

    def __post_init__(self) -> None:
        _check_factor("Cosine", "end", self.end)

    def __call__(self, step: float, total_steps: float) -> float:
        x = progress("Cosine", step, total_steps)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * x)) / 2


@dataclass(frozen=True)
class Warmup:
    """Rise linearly from `start` to 1, then follow another schedule over the steps that are left.

        factor = start + (1 - start) * step / duration              for step < duration
        factor = then(step - duration, total_steps - duration)      afterwards

    Args:
        duration: length of the rise: `int` = optimizer steps, `float` in (0, 1) = fraction of the run (not rounded),
            `"3ep"` = epochs, which LRSchedule turns into steps. 0 is no warmup.
        then: schedule of the rest of the run.
        start: factor before the first step, at least 0.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        TypeError: `then` is no schedule, or a duration of another type.
        ValueError: a value out of range, or, when called, a warmup longer than the run.
    References:
        Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, arXiv:1706.02677, section 2.2.
    Example:
        >>> [round(Warmup(2, Linear())(k, 6), 3) for k in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    duration: Duration
    then: Schedule
    start: float = 0.0

    def __post_init__(self) -> None:
        check_duration("Warmup", "duration", self.duration)
        _check_factor("Warmup", "start", self.start)
        if not callable(self.then) or isinstance(self.then, type):
            fix = "Give a schedule, as in Warmup(0.05, Cosine())"
            raise TypeError(message("Warmup", "then", "a schedule (step, total_steps) -> factor", self.then, fix))

    def __call__(self, step: float, total_steps: float) -> float:
        progress("Warmup", step, total_steps)
        duration = duration_in_steps("Warmup", "duration", self.duration, total_steps)
        if step < duration:
            return self.start + (1 - self.start) * step / duration
        return self.then(step - duration, total_steps - duration)


@dataclass(frozen=True)
class WarmupCosine:
    """Rise linearly to 1, then anneal along half a cosine: `Warmup(warmup, Cosine(end))`.

        factor = step / warmup                                                                  for step < warmup
        factor = end + (1 - end) * (1 + cos(pi * (step - warmup) / (total_steps - warmup))) / 2 afterwards

    Args:
        warmup: length of the rise: `int` = optimizer steps, `float` in (0, 1) = fraction of the run, `"3ep"` = epochs.
        end: factor from the last step on, at least 0.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        TypeError, ValueError: as `Warmup` and `Cosine` do.
    References:
        Goyal et al., 2017, arXiv:1706.02677, section 2.2; Loshchilov and Hutter, 2017, arXiv:1608.03983, eq. 5.
    Example:
        >>> [round(WarmupCosine(2)(k, 6), 3) for k in range(7)]
        [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    warmup: Duration
    end: float = 0.0

    def __post_init__(self) -> None:
        check_duration("WarmupCosine", "warmup", self.warmup)
        _check_factor("WarmupCosine", "end", self.end)

    def __call__(self, step: float, total_steps: float) -> float:
        progress("WarmupCosine", step, total_steps)
        duration = duration_in_steps("WarmupCosine", "warmup", self.warmup, total_steps)
        if step < duration:
            return step / duration
        return Cosine(self.end)(step - duration, total_steps - duration)
