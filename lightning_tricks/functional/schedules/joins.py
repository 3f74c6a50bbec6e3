"""Schedules made of schedules."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.schedules.durations import (
    Duration,
    Schedule,
    check_duration,
    check_factor,
    check_milestones,
    check_schedule,
    check_shape,
    duration_in_steps,
    interpolate,
    milestones_in_steps,
    progress,
)

Rise = Literal["linear", "cosine", "exponential"]
Fall = Literal["linear", "cosine", "1-sqrt"]


@dataclass(frozen=True)
class Warmup:
    """Rise from `start` to 1, then follow another schedule over the steps that are left.

        factor = start + (1 - start) * step / duration              for step < duration, shape="linear"
        factor = then(step - duration, total_steps - duration)      afterwards

    The rise can be half a cosine, or exponential: `start ** (1 - step / duration)`.

    Args:
        duration: length of the rise: `int` = optimizer steps, `float` in (0, 1) = fraction of the run (not rounded),
            `"3ep"` = epochs, which LRSchedule turns into steps. 0 is no warmup.
        then: schedule of the rest of the run.
        start: factor before the first step, at least 0; above 0 for the exponential.
        shape: `"linear"`, `"cosine"` or `"exponential"`.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        TypeError: `then` is no schedule, or a duration of another type.
        ValueError: a value out of range, or, when called, a warmup longer than the run.
    References:
        Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, arXiv:1706.02677, section 2.2.
    Example:
        >>> from lightning_tricks import Linear
        >>> [round(Warmup(2, Linear())(k, 6), 3) for k in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    duration: Duration
    then: Schedule
    start: float = 0.0
    shape: Rise = "linear"

    def __post_init__(self) -> None:
        check_duration("Warmup", "duration", self.duration)
        check_schedule("Warmup", "then", self.then)
        check_shape("Warmup", self.shape, ("linear", "cosine", "exponential"))
        check_factor("Warmup", "start", self.start, above_zero=self.shape == "exponential")

    def __call__(self, step: float, total_steps: float) -> float:
        progress("Warmup", step, total_steps)
        duration = duration_in_steps("Warmup", "duration", self.duration, total_steps)
        if step < duration:
            return interpolate(self.shape, self.start, 1.0, step / duration)
        return self.then(step - duration, total_steps - duration)


@dataclass(frozen=True)
class Cooldown:
    """Follow another schedule, then fall from where it is to `end` over the last steps of the run.

        factor = before(step, total_steps - duration)               for step <= total_steps - duration
        factor = end + (before's last - end) * (1 - x)              afterwards, shape="linear"

    `x` is the fraction of the cooldown that is done. The fall can be half a cosine, `(1 + cos(pi * x)) / 2`, or
    `1 - sqrt(x)`.

    Args:
        duration: length of the fall: `int` = optimizer steps, `float` in (0, 1) = fraction of the run (not rounded),
            `"3ep"` = epochs, which LRSchedule turns into steps. 0 is no cooldown.
        before: schedule of the run before it.
        end: factor from the last step on, at least 0.
        shape: `"linear"`, `"cosine"` or `"1-sqrt"`.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        TypeError: `before` is no schedule, or a duration of another type.
        ValueError: a value out of range, or, when called, a cooldown longer than the run.
    References:
        Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024,
        arXiv:2405.18392, section 3 (1-sqrt).
    Example:
        >>> from lightning_tricks import Constant
        >>> [Cooldown(4, Constant())(k, 6) for k in range(8)]
        [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    duration: Duration
    before: Schedule
    end: float = 0.0
    shape: Fall = "linear"

    def __post_init__(self) -> None:
        check_duration("Cooldown", "duration", self.duration)
        check_schedule("Cooldown", "before", self.before)
        check_shape("Cooldown", self.shape, ("linear", "cosine", "1-sqrt"))
        check_factor("Cooldown", "end", self.end)

    def __call__(self, step: float, total_steps: float) -> float:
        progress("Cooldown", step, total_steps)
        duration = duration_in_steps("Cooldown", "duration", self.duration, total_steps)
        begin = total_steps - duration
        if self.duration != 0 and step >= total_steps:
            return self.end
        if step <= begin or self.duration == 0:
            return self.before(step, begin)
        return interpolate(self.shape, self.before(begin, begin), self.end, (step - begin) / duration)


@dataclass(frozen=True)
class Join:
    """Follow one schedule after another, each over its own stretch of the run.

        factor = schedules[i](step - begin, stop - begin)    for begin <= step < stop

    `begin` and `stop` are the milestones around the step; the first stretch begins at 0, the last stops at
    `total_steps`. At a milestone the next schedule begins. Joined schedules need not meet: give each the values it is
    to have there.

    Args:
        schedules: at least two.
        milestones: where one follows the other, one fewer than schedules and each later than the one before it: `int` =
            optimizer steps, `float` in (0, 1) = fraction of the run, `"3ep"` = epochs, which LRSchedule turns into
            steps.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        TypeError: what is no schedule or no duration.
        ValueError: numbers that do not fit, milestones unsorted or, when called, beyond the run.
    Example:
        >>> from lightning_tricks import Constant, Linear
        >>> [Join([Linear(0.0, 1.0), Constant(), Linear()], [2, 0.5])(k, 8) for k in range(9)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    schedules: Sequence[Schedule]
    milestones: Sequence[Duration]

    def __post_init__(self) -> None:
        fix = "Give them as in Join([Constant(), Linear()], [0.5])"
        if not isinstance(self.schedules, Sequence):
            raise TypeError(message("Join", "schedules", "a sequence of schedules", self.schedules, fix))
        if len(self.schedules) < 2:
            raise ValueError(message("Join", "schedules", "at least two", self.schedules, fix))
        for schedule in self.schedules:
            check_schedule("Join", "schedules", schedule)
        object.__setattr__(self, "schedules", tuple(self.schedules))
        object.__setattr__(self, "milestones", check_milestones("Join", self.milestones))
        if len(self.schedules) != len(self.milestones) + 1:
            condition = f"one fewer than the {len(self.schedules)} schedules"
            raise ValueError(message("Join", "milestones", condition, self.milestones, fix))

    def __call__(self, step: float, total_steps: float) -> float:
        progress("Join", step, total_steps)
        bounds = [0, *milestones_in_steps("Join", tuple(self.milestones), total_steps), total_steps]
        index = bisect.bisect_right(bounds, step + 1e-12 * total_steps, 1, len(bounds) - 1) - 1
        return self.schedules[index](max(step - bounds[index], 0), bounds[index + 1] - bounds[index])


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
        check_factor("WarmupCosine", "end", self.end)

    def __call__(self, step: float, total_steps: float) -> float:
        over = progress("WarmupCosine", step, total_steps) == 1
        warmup = duration_in_steps("WarmupCosine", "warmup", self.warmup, total_steps)
        if step < warmup:
            return step / warmup
        return self.end if over else interpolate("cosine", 1.0, self.end, (step - warmup) / (total_steps - warmup))


@dataclass(frozen=True)
class WarmupStableDecay:
    """Rise linearly to 1, stay there, and fall over the last steps: the trapezoid.

        factor = step / warmup                              for step < warmup
        factor = 1                                          until total_steps - cooldown
        factor = end + (1 - end) * (1 - x)                  afterwards, shape="linear"

    It is `Warmup(warmup, Cooldown(cooldown, Constant(), end, shape))` with both durations of the whole run. A run can
    be gone on with from before its cooldown, without having known its length.

    Args:
        warmup: length of the rise: `int` = optimizer steps, `float` in (0, 1) = fraction of the run, `"3ep"` = epochs,
            which LRSchedule turns into steps.
        cooldown: length of the fall, in the same units.
        end: factor from the last step on, at least 0.
        shape: of the fall: `"linear"`, `"cosine"` or `"1-sqrt"`.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        TypeError, ValueError: a value out of range; warmup and cooldown longer than the run together.
    References:
        Hu et al., "MiniCPM", 2024, arXiv:2404.06395, section 4; Hägele et al., 2024, arXiv:2405.18392.
    Example:
        >>> [WarmupStableDecay(2, 0.5)(k, 8) for k in range(9)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    warmup: Duration
    cooldown: Duration
    end: float = 0.0
    shape: Fall = "linear"

    def __post_init__(self) -> None:
        check_duration("WarmupStableDecay", "warmup", self.warmup)
        check_duration("WarmupStableDecay", "cooldown", self.cooldown)
        check_factor("WarmupStableDecay", "end", self.end)
        check_shape("WarmupStableDecay", self.shape, ("linear", "cosine", "1-sqrt"))
        if (
            isinstance(self.warmup, float)
            and isinstance(self.cooldown, float)
            and self.warmup + self.cooldown > 1 + 1e-9
        ):
            self._refuse("the whole run")

    def __call__(self, step: float, total_steps: float) -> float:
        progress("WarmupStableDecay", step, total_steps)
        warmup = duration_in_steps("WarmupStableDecay", "warmup", self.warmup, total_steps)
        cooldown = duration_in_steps("WarmupStableDecay", "cooldown", self.cooldown, total_steps)
        begin = total_steps - cooldown
        if warmup > begin + 1e-9 * total_steps:  # not for rounding noise of two fractions
            self._refuse(f"the run's {total_steps:.12g} optimizer steps")
        if step < warmup:
            return step / warmup
        if self.cooldown == 0 or step <= begin < total_steps:
            return 1.0
        return self.end if step >= total_steps else interpolate(self.shape, 1.0, self.end, (step - begin) / cooldown)

    def _refuse(self, most: str) -> None:
        got = {"warmup": self.warmup, "cooldown": self.cooldown}
        condition = f"at most {most} together with cooldown"
        raise ValueError(message("WarmupStableDecay", "warmup", condition, got, "Shorten one of them"))
