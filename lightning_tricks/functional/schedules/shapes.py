"""Plain shapes: one curve from the beginning of the run to its end."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_tricks.functional.checks import check_number
from lightning_tricks.functional.schedules.durations import (
    Duration,
    check_duration,
    check_factor,
    check_milestones,
    in_steps,
    interpolate,
    milestones_in_steps,
    progress,
)


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
        check_factor("Constant", "value", self.value)

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
        check_factor("Linear", "start", self.start)
        check_factor("Linear", "end", self.end)

    def __call__(self, step: float, total_steps: float) -> float:
        return interpolate("linear", self.start, self.end, progress("Linear", step, total_steps))


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
        check_factor("Cosine", "end", self.end)

    def __call__(self, step: float, total_steps: float) -> float:
        return interpolate("cosine", 1.0, self.end, progress("Cosine", step, total_steps))


@dataclass(frozen=True)
class Polynomial:
    """Decay from 1 to `end` along a power of what is left of the run.

        factor = end + (1 - end) * (1 - step / total_steps) ** power

    Args:
        power: above 0; 1 is a straight line, 2 falls fast at first, 0.5 slowly.
        end: factor from the last step on, at least 0.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        ValueError: a value out of range; a negative step.
    References:
        Chen et al., "DeepLab", 2017, arXiv:1606.00915, section 4.1 (the "poly" policy, power 0.9).
    Example:
        >>> [Polynomial(power=2)(k, 4) for k in range(6)]
        [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """

    power: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        fix = "1.0 is a straight line"
        check_number("Polynomial", "power", self.power, "finite and above 0 (exponent)", fix, lambda x: x > 0)
        check_factor("Polynomial", "end", self.end)

    def __call__(self, step: float, total_steps: float) -> float:
        left = 1 - progress("Polynomial", step, total_steps)
        return float(self.end + (1 - self.end) * left**self.power)


@dataclass(frozen=True)
class Exponential:
    """Decay from 1 to `end` by the same ratio in every step.

        factor = end ** (step / total_steps)

    In torch's terms `gamma = end ** (1 / total_steps)`; a decay of 0.95 in each of 30 epochs is `end=0.95**30`.

    Args:
        end: factor from the last step on, above 0.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        ValueError: an end of 0, negative or non-finite; a negative step.
    Example:
        >>> [round(Exponential(0.01)(k, 4), 3) for k in range(6)]
        [1.0, 0.316, 0.1, 0.032, 0.01, 0.01]
    """

    end: float = 0.01

    def __post_init__(self) -> None:
        check_factor("Exponential", "end", self.end, above_zero=True)

    def __call__(self, step: float, total_steps: float) -> float:
        return interpolate("exponential", 1.0, self.end, progress("Exponential", step, total_steps))


@dataclass(frozen=True)
class Steps:
    """Multiply the factor by `gamma` at each milestone.

        factor = gamma ** (number of milestones that are at most min(step, total_steps))

    The step at a milestone itself is done with the lower factor, as torch's MultiStepLR does it.

    Args:
        milestones: when the factor drops, each later than the one before it: `int` = optimizer steps, `float` in (0, 1)
            = fraction of the run, `"30ep"` = epochs, which LRSchedule turns into steps.
        gamma: what the factor is multiplied by, at least 0.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        TypeError: milestones that are no sequence of durations.
        ValueError: no milestone, unsorted ones, one beyond the run; a value out of range.
    References:
        He et al., "Deep Residual Learning for Image Recognition", 2016, arXiv:1512.03385, section 3.4.
    Example:
        >>> [Steps([0.5, 5], gamma=0.5)(k, 6) for k in range(8)]
        [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25]
    """

    milestones: Sequence[Duration]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", check_milestones("Steps", self.milestones))
        check_factor("Steps", "gamma", self.gamma)

    def __call__(self, step: float, total_steps: float) -> float:
        progress("Steps", step, total_steps)
        milestones = milestones_in_steps("Steps", tuple(self.milestones), total_steps)
        return float(self.gamma ** bisect.bisect_right(milestones, step + 1e-12 * total_steps))


@dataclass(frozen=True)
class InverseSqrt:
    """Decay as one over the square root of the steps.

        factor = sqrt(timescale / (timescale + min(step, total_steps)))

    After a warmup of the same length it is the schedule of the Transformer: `Warmup(4000, InverseSqrt(4000))` has
    `sqrt(4000 / step)` from step 4000 on.

    Args:
        timescale: steps after which the factor is 0.71: `int` of at least 1 = optimizer steps, `float` in (0, 1) =
            fraction of the run, `"3ep"` = epochs, which LRSchedule turns into steps. It may be longer than the run.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        TypeError, ValueError: no such duration; a negative step.
    References:
        Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, eq. 3; Zhai et al., "Scaling Vision
        Transformers", 2022, arXiv:2106.04560, section 3.5 (with a timescale).
    Example:
        >>> [round(InverseSqrt(2)(k, 6), 3) for k in range(8)]
        [1.0, 0.816, 0.707, 0.632, 0.577, 0.535, 0.5, 0.5]
    """

    timescale: Duration

    def __post_init__(self) -> None:
        check_duration("InverseSqrt", "timescale", self.timescale, least=1)

    def __call__(self, step: float, total_steps: float) -> float:
        progress("InverseSqrt", step, total_steps)
        return math.sqrt(_inverse(in_steps("InverseSqrt", "timescale", self.timescale, total_steps), step, total_steps))


@dataclass(frozen=True)
class InverseTime:
    """Decay as one over the steps: the 1/t of stochastic approximation.

        factor = timescale / (timescale + min(step, total_steps)) = 1 / (1 + step / timescale)

    Args:
        timescale: steps after which the factor is 0.5: `int` of at least 1 = optimizer steps, `float` in (0, 1) =
            fraction of the run, `"3ep"` = epochs, which LRSchedule turns into steps. It may be longer than the run.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        TypeError, ValueError: no such duration; a negative step.
    References:
        Robbins and Monro, "A Stochastic Approximation Method", 1951.
    Example:
        >>> [round(InverseTime(2)(k, 6), 3) for k in range(8)]
        [1.0, 0.667, 0.5, 0.4, 0.333, 0.286, 0.25, 0.25]
    """

    timescale: Duration

    def __post_init__(self) -> None:
        check_duration("InverseTime", "timescale", self.timescale, least=1)

    def __call__(self, step: float, total_steps: float) -> float:
        progress("InverseTime", step, total_steps)
        return _inverse(in_steps("InverseTime", "timescale", self.timescale, total_steps), step, total_steps)


def _inverse(timescale: float, step: float, total_steps: float) -> float:
    done = min(step, total_steps)
    return timescale / (timescale + done) if done else 1.0
