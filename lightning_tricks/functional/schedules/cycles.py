"""Shapes that rise and fall: one cycle or several over the run."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from lightning_tricks.functional.checks import check_count, check_flag, check_number, message
from lightning_tricks.functional.schedules.durations import (
    Duration,
    check_duration,
    check_factor,
    check_shape,
    duration_in_steps,
    in_steps,
    interpolate,
    progress,
    snap,
)


@dataclass(frozen=True)
class CosineRestarts:
    """Anneal along half a cosine again and again, each cycle from a peak to `end`.

        factor = end + (1 - end) * gamma ** cycle * (1 + cos(pi * x)) / 2

    `x` in [0, 1) is the fraction of its cycle that a step is at. At the end of the run the last cycle is over, where
    torch's CosineAnnealingWarmRestarts has begun a new one.

    Args:
        cycles: number of cycles that fill the run, at least 1. Give this or `length`.
        length: length of the first cycle, whatever then fits in the run: `int` of at least 1 = optimizer steps, `float`
            in (0, 1) = fraction of the run, `"3ep"` = epochs, which LRSchedule turns into steps.
        multiplier: each cycle is so many times as long as the one before it, at least 1.
        gamma: each peak is so many times as far above `end` as the one before it, in (0, 1].
        end: factor at the end of every cycle, at least 0.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        TypeError, ValueError: a value out of range, both or none of `cycles` and `length`; a negative step.
    References:
        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, arXiv:1608.03983, eq. 5.
    Example:
        >>> [round(CosineRestarts(cycles=2)(k, 4), 3) for k in range(6)]
        [1.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    cycles: int | None = None
    length: Duration | None = None
    multiplier: float = 1.0
    gamma: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_cycles("CosineRestarts", self.cycles, self.length, self.gamma)
        fix = "1.0 keeps the length, 2.0 doubles it"
        check_number("CosineRestarts", "multiplier", self.multiplier, "finite and at least 1", fix, lambda x: x >= 1)
        check_factor("CosineRestarts", "end", self.end)

    def __call__(self, step: float, total_steps: float) -> float:
        cycle, x = _locate("CosineRestarts", self.cycles, self.length, self.multiplier, step, total_steps)
        return self.end + (1 - self.end) * self.gamma**cycle * interpolate("cosine", 1.0, 0.0, x)


@dataclass(frozen=True)
class Triangular:
    """Rise in a straight line from `low` to a peak and fall back, again and again.

        factor = low + (1 - low) * gamma ** cycle * (x / up if x < up else (1 - x) / (1 - up))

    `x` in [0, 1) is the fraction of its cycle that a step is at. With `gamma=0.5` it is torch's CyclicLR in its mode
    `"triangular2"`; torch's base_lr is `low` times our base value, its max_lr our base value.

    Args:
        cycles: number of cycles that fill the run, at least 1. Give this or `length`.
        length: length of a cycle, whatever then fits in the run: `int` of at least 1 = optimizer steps, `float` in
            (0, 1) = fraction of the run, `"3ep"` = epochs, which LRSchedule turns into steps.
        low: factor at both ends of every cycle, at least 0.
        gamma: each peak is so many times as far above `low` as the one before it, in (0, 1].
        up: fraction of a cycle that rises, in (0, 1).
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        TypeError, ValueError: a value out of range, both or none of `cycles` and `length`; a negative step.
    References:
        Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, arXiv:1506.01186, section 3.
    Example:
        >>> [Triangular(cycles=2, gamma=0.5)(k, 8) for k in range(9)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 0.25, 0.0]
    """

    cycles: int | None = None
    length: Duration | None = None
    low: float = 0.0
    gamma: float = 1.0
    up: float = 0.5

    def __post_init__(self) -> None:
        _check_cycles("Triangular", self.cycles, self.length, self.gamma)
        check_factor("Triangular", "low", self.low)
        fix = "0.5 rises as long as it falls"
        check_number("Triangular", "up", self.up, "in (0, 1) (fraction of a cycle)", fix, lambda x: 0 < x < 1)

    def __call__(self, step: float, total_steps: float) -> float:
        cycle, x = _locate("Triangular", self.cycles, self.length, 1.0, step, total_steps)
        height = x / self.up if x < self.up else (1 - x) / (1 - self.up)
        return self.low + (1 - self.low) * self.gamma**cycle * height


@dataclass(frozen=True)
class OneCycle:
    """Rise from `start` to `peak`, then anneal far below the start.

        factor = start -> peak                   for step < warmup
        factor = peak -> end                     afterwards
        factor = peak -> start, start -> end     afterwards with three_phase: the fall to `start` as long as the rise

    along `shape`. The base value is torch's max_lr. Momentum goes the other way:
    `ParamSchedule("momentum", OneCycle(start=1, peak=0.85 / 0.95, end=1))` with a base momentum of 0.95. We peak after
    `warmup` steps and end after `total_steps`, torch's OneCycleLR one step before each: ours is torch's with
    `total_steps=total_steps + 1, pct_start=(warmup + 1) / (total_steps + 1)`.

    Args:
        warmup: length of the rise: `int` = optimizer steps, `float` in (0, 1) = fraction of the run, `"3ep"` = epochs,
            which LRSchedule turns into steps.
        start: factor before the first step, at least 0.
        peak: factor after the rise, at least 0.
        end: factor from the last step on, at least 0.
        shape: `"cosine"` or `"linear"`.
        three_phase: whether the fall is in two parts.
    Returns:
        Called with (step, total_steps): the factor.
    Raises:
        TypeError, ValueError: a value out of range; when called, phases longer than the run; a negative step.
    References:
        Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018,
        arXiv:1708.07120. Deviates: two phases along a cosine by default, as fastai and torch have it.
    Example:
        >>> [round(OneCycle(0.5)(k, 4), 3) for k in range(6)]
        [0.04, 0.52, 1.0, 0.5, 0.0, 0.0]
    """

    warmup: Duration = 0.3
    start: float = 0.04
    peak: float = 1.0
    end: float = 4e-6
    shape: Literal["cosine", "linear"] = "cosine"
    three_phase: bool = False

    def __post_init__(self) -> None:
        check_duration("OneCycle", "warmup", self.warmup)
        for name in ("start", "peak", "end"):
            check_factor("OneCycle", name, getattr(self, name))
        check_shape("OneCycle", self.shape, ("cosine", "linear"))
        check_flag("OneCycle", "three_phase", self.three_phase, "True falls to start first, and then to end")

    def __call__(self, step: float, total_steps: float) -> float:
        x = progress("OneCycle", step, total_steps)
        warmup = duration_in_steps("OneCycle", "warmup", self.warmup, total_steps)
        turn = 2 * warmup if self.three_phase else warmup
        if turn > total_steps * (1 + 1e-9):
            fix = "Shorten it, or leave three_phase out"
            condition = f"at most half the run's {total_steps:.12g} optimizer steps with three_phase"
            raise ValueError(message("OneCycle", "warmup", condition, self.warmup, fix))
        if x == 1:
            return self.end
        if step < warmup:
            return interpolate(self.shape, self.start, self.peak, step / warmup)
        if step < turn:
            return interpolate(self.shape, self.peak, self.start, (step - warmup) / warmup)
        top = self.start if self.three_phase else self.peak
        return interpolate(self.shape, top, self.end, (step - turn) / (total_steps - turn))


def _check_cycles(owner: str, cycles: Any, length: Any, gamma: Any) -> None:
    if (cycles is None) == (length is None):
        got = {"cycles": cycles, "length": length}
        fix = f"Give {owner}(cycles=4) or {owner}(length='10ep')"
        raise ValueError(message(owner, "cycles", "given, or length instead, and not both", got, fix))
    if cycles is not None:
        check_count(owner, "cycles", cycles, 1, "cycles in the run", "1 is a single cycle")
    else:
        check_duration(owner, "length", length, least=1)
    fix = "1.0 keeps the peaks, 0.5 halves each"
    check_number(owner, "gamma", gamma, "in (0, 1]", fix, lambda x: 0 < x <= 1)


def _locate(
    owner: str, cycles: int | None, length: Duration | None, multiplier: float, step: float, total_steps: float
) -> tuple[int, float]:
    """The cycle, from 0, and the fraction of it; the run's last step belongs to the cycle that ends there.

    With cycles that grow, `position` is the cycle and, in the scale of the logarithm, how far in it the step is.
    """
    over = progress(owner, step, total_steps) >= 1 - 1e-12
    if total_steps == 0:
        return 0, 1.0
    step = min(step, total_steps)
    growth = math.log(multiplier)
    if cycles is None:
        assert length is not None
        first = total_steps * length if isinstance(length, float) else in_steps(owner, "length", length, total_steps)
        position = math.log1p((multiplier - 1) * step / first) / growth if growth else step / first
    elif growth == 0:
        position = cycles * (step / total_steps)
    elif cycles * growth < 700:
        position = math.log1p(math.expm1(cycles * growth) * (step / total_steps)) / growth
    else:  # the first cycles are next to nothing
        position = cycles + math.log(step / total_steps) / growth if step else 0.0
    position = snap(position)
    cycle = max(math.floor(position), 0)
    if cycle == position:
        return (cycle - 1, 1.0) if over else (cycle, 0.0)
    x = position - cycle
    return cycle, math.expm1(x * growth) / (multiplier - 1) if growth else x
