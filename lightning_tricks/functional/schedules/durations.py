"""What every schedule is made of: stretches of training, factors, and the ways from one factor to another."""

import dataclasses
import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from lightning_tricks.functional.checks import check_number, message

Schedule: TypeAlias = Callable[[float, float], float]
"""What maps (step, total_steps) to a factor of the base value; both may be fractional inside a nested schedule."""

Duration: TypeAlias = int | float | str
"""A stretch of training: `int` = optimizer steps, `float` in (0, 1) = fraction of the run, `"3ep"` = epochs."""

_EPOCHS = re.compile(r"(\d+(?:\.\d+)?)ep")

_PATHS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "1-sqrt": math.sqrt,
}


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


def interpolate(shape: str, start: float, end: float, x: float) -> float:
    """The factor a fraction `x` of the way from `start` to `end`.

        linear:       start + (end - start) * x
        cosine:       start + (end - start) * (1 - cos(pi * x)) / 2
        1-sqrt:       start + (end - start) * sqrt(x)
        exponential:  start ** (1 - x) * end ** x

    Args:
        shape: one of these.
        start: factor at x = 0; above 0 where the shape is exponential.
        end: factor at x = 1; above 0 where the shape is exponential.
        x: fraction of the way; below 0 is the start, above 1 the end.
    Returns:
        The factor, exactly `start` and `end` at the two ends.
    Example:
        >>> interpolate("linear", 1.0, 0.0, 0.25)
        0.75
    """
    if x <= 0:
        return start
    if x >= 1:
        return end
    if shape == "exponential":
        return float(start ** (1 - x) * end**x)
    return start + (end - start) * _PATHS[shape](x)


def in_steps(owner: str, name: str, duration: Duration, total_steps: float) -> float:
    """A duration in optimizer steps; a fraction of the run is not rounded, apart from noise in its last digits.

    Args:
        owner: class named in an error.
        name: argument named in an error.
        duration: optimizer steps (`int`) or a fraction of the run (`float`).
        total_steps: optimizer steps of the run.
    Returns:
        The steps, which may be more than the run has.
    Raises:
        ValueError: epochs, which only a callback can turn into steps.
    Example:
        >>> in_steps("InverseSqrt", "timescale", 0.07, 100)
        7
    """
    if isinstance(duration, str):
        fix = "Epochs are known in a Trainer only: pass the schedule to LRSchedule, or call resolve_epochs first"
        raise ValueError(message(owner, name, "in steps or a fraction of the run here", duration, fix))
    if not isinstance(duration, float):
        return duration
    # 0.07 * 100 is a little above 7: what happens at step 7 must not wait for step 8.
    return snap(duration * total_steps)


def snap(number: float) -> float:
    """The whole number that a number is but for rounding noise, else the number itself.

    Args:
        number: finite.
    Example:
        >>> snap(0.07 * 100), snap(6.5)
        (7, 6.5)
    """
    nearest = round(number)
    return nearest if abs(number - nearest) <= 1e-12 * abs(number) else number


@functools.lru_cache(typed=True)  # a run asks for the same one at every step
def duration_in_steps(owner: str, name: str, duration: Duration, total_steps: float) -> float:
    """Length in steps of a stretch of a run of `total_steps`, which it must fit in.

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
        50
    """
    steps = in_steps(owner, name, duration, total_steps)
    if steps > total_steps * (1 + 1e-9):  # what is left for a nested schedule has rounding noise
        fix = "Shorten it, or train for longer"
        raise ValueError(message(owner, name, f"at most the run's {total_steps:.12g} optimizer steps", duration, fix))
    return min(steps, total_steps)


@functools.lru_cache(typed=True)
def milestones_in_steps(owner: str, milestones: tuple[Duration, ...], total_steps: float) -> tuple[float, ...]:
    """Milestones in steps, in their order.

    Args:
        owner: class named in an error.
        milestones: optimizer steps or fractions of the run.
        total_steps: optimizer steps of the run.
    Returns:
        Steps, each above the one before it.
    Raises:
        ValueError: a milestone beyond the run, or not above the one before it.
    Example:
        >>> milestones_in_steps("Steps", (30, 0.6), 100)
        (30, 60)
    """
    steps = tuple(duration_in_steps(owner, "milestones", milestone, total_steps) for milestone in milestones)
    if total_steps and any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        fix = f"Sort them; in a run of {total_steps:.12g} steps they are at {list(steps)}"
        raise ValueError(message(owner, "milestones", "each later than the one before it", milestones, fix))
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
        >>> from lightning_tricks import Cosine, Warmup
        >>> resolve_epochs(Warmup("2ep", Cosine()), 100)
        Warmup(duration=200, then=Cosine(end=0.0), start=0.0, shape='linear')
    """
    if not dataclasses.is_dataclass(schedule) or isinstance(schedule, type):
        return schedule
    owner, changes = getattr(schedule, "owner", type(schedule).__name__), {}
    for field in dataclasses.fields(schedule):
        value = getattr(schedule, field.name)
        if isinstance(value, tuple):
            resolved: Any = tuple(_resolve(owner, field.name, item, steps_per_epoch) for item in value)
        else:
            resolved = _resolve(owner, field.name, value, steps_per_epoch)
        if resolved is not value and resolved != value:
            changes[field.name] = resolved
    return dataclasses.replace(schedule, **changes) if changes else schedule


def _resolve(owner: str, name: str, value: Any, steps_per_epoch: float) -> Any:
    if not (isinstance(value, str) and (match := _EPOCHS.fullmatch(value))):
        return resolve_epochs(value, steps_per_epoch)
    if not math.isfinite(steps_per_epoch):
        fix = "Give optimizer steps instead, or steps_per_epoch (--steps-per-epoch in a shell) where that is asked for"
        condition = "in steps or a fraction of the run, since an epoch has no known length"
        raise ValueError(message(owner, name, condition, value, fix))
    return round(float(match[1]) * steps_per_epoch)


def check_duration(owner: str, name: str, value: Any, least: int = 0) -> None:
    """Raise unless the value is a stretch of training: steps, a fraction of the run, or epochs.

    Args:
        owner: class named in the error.
        name: argument named in the error.
        value: `int` of at least `least` (optimizer steps), `float` in (0, 1) (fraction of the run) or `"3ep"` (epochs).
        least: fewest steps allowed.
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
        condition = f"at least {least} when it is an int (optimizer steps)"
        check_number(owner, name, value, condition, fix, lambda x: x >= least)


def check_milestones(owner: str, value: Any) -> tuple[Duration, ...]:
    """Milestones as a tuple; raise unless they are stretches of training, sorted as far as can be said without a run.

    Args:
        owner: class named in the error.
        value: a sequence of durations, at least one.
    Returns:
        The same as a tuple.
    Raises:
        TypeError: no sequence, or a milestone of another type.
        ValueError: none, one out of range, or two of one kind that are not in order.
    Example:
        >>> check_milestones("Steps", [30, 0.6, "80ep"])
        (30, 0.6, '80ep')
    """
    fix = "Give them as in [0.5, 0.75]"
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(message(owner, "milestones", "a sequence of steps, fractions or epochs", value, fix))
    if not value:
        raise ValueError(message(owner, "milestones", "at least one", value, fix))
    for milestone in value:
        check_duration(owner, "milestones", milestone)
    for earlier, later in itertools.pairwise(value):
        if type(earlier) is type(later) and _size(later) <= _size(earlier):
            raise ValueError(message(owner, "milestones", "each later than the one before it", value, "Sort them"))
    return tuple(value)


def _size(duration: Duration) -> float:
    return float(duration.removesuffix("ep")) if isinstance(duration, str) else duration


def check_factor(owner: str, name: str, value: Any, above_zero: bool = False) -> None:
    """Raise unless the value is a factor of a base value.

    Args:
        owner: class named in the error.
        name: argument named in the error.
        value: finite and at least 0.
        above_zero: whether 0 is refused too, where a shape multiplies its way.
    Raises:
        TypeError: no number.
        ValueError: out of range.
    """
    if above_zero:
        fix = "An exponential never leaves or reaches 0: give a small factor such as 0.01"
        check_number(owner, name, value, "finite and above 0 (factor of the base value)", fix, lambda x: x > 0)
    else:
        fix = "It multiplies the base value: 1.0 keeps it, 0.0 switches it off"
        check_number(owner, name, value, "finite and at least 0 (factor of the base value)", fix, lambda x: x >= 0)


def check_shape(owner: str, value: Any, shapes: Sequence[str]) -> None:
    """Raise unless the value is one of the shapes.

    Args:
        owner: class named in the error.
        value: what came.
        shapes: names allowed.
    Raises:
        ValueError: another.
    """
    if value not in shapes:
        raise ValueError(message(owner, "shape", f"one of {', '.join(shapes)}", value, "Choose one of them"))


def check_schedule(owner: str, name: str, value: Any) -> None:
    """Raise unless the value can be called as a schedule.

    Args:
        owner: class named in the error.
        name: argument named in the error.
        value: what came; a class is no schedule, an instance of it is one.
    Raises:
        TypeError: it cannot be called.
    """
    if not callable(value) or isinstance(value, type):
        fix = "Give a schedule, as Cosine() or Warmup(0.05, Cosine())"
        raise TypeError(message(owner, name, "a schedule (step, total_steps) -> factor", value, fix))
    try:
        inspect.signature(value).bind(0, 1)
    except TypeError as error:
        fix = "It is called with the steps that are done and those of the whole run"
        raise TypeError(message(owner, name, "a function of (step, total_steps)", value, fix)) from error
    except ValueError:  # a builtin that does not tell its signature
        pass


def survey(owner: str, schedule: Schedule, total_steps: int, points: int = 1000) -> list[tuple[int, float]]:
    """Look at a schedule before the first step: every step of a short run, evenly spaced ones of a long run.

    Args:
        owner: class or function named in an error.
        schedule: without epochs.
        total_steps: optimizer steps of the run, at least 1.
        points: most steps that are looked at, besides step 0.
    Returns:
        (step, factor) from step 0 to `total_steps`.
    Raises:
        TypeError, ValueError: a factor that is no number, not finite or negative; what the schedule itself refuses.
    Example:
        >>> survey("LRSchedule", lambda step, total_steps: 1 - step / total_steps, 2)
        [(0, 1.0), (1, 0.5), (2, 0.0)]
    """
    count = min(total_steps, points)
    factors = []
    for step in (total_steps * index // count for index in range(count + 1)):
        factor: Any = schedule(step, total_steps)
        try:
            number = float(factor)
        except (TypeError, ValueError) as error:
            fix = "Return a factor of the base value"
            raise TypeError(
                message(owner, "schedule", f"a function with a number at step {step}", factor, fix)
            ) from error
        if not (math.isfinite(number) and number >= 0):
            fix = "It multiplies the base value"
            raise ValueError(message(owner, "schedule", f"finite and at least 0 at step {step}", number, fix))
        factors.append((step, number))
    return factors
