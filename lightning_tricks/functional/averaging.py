"""In-place averaging of lists of tensors, and the decays under which an average is exponential, warmed up or a mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_tricks.functional.checks import check_number
from lightning_tricks.functional.schedules import Duration, check_duration, in_steps

Decay: TypeAlias = Callable[[int, float], float]
"""What maps (updates, total_steps) to the weight of the old average in the next update; `updates` is at least 1."""


@dataclass(frozen=True)
class HalfLife:
    """The decay under which what was averaged weighs half after so many optimizer steps.

        decay = 0.5 ** (1 / duration)

    Args:
        duration: `int` of at least 1 = optimizer steps, `float` in (0, 1) = fraction of the run, `"2ep"` = epochs,
            which EMA turns into steps.
    Returns:
        Called with (updates, total_steps): the decay, in (0, 1), the same at every update.
    Raises:
        TypeError, ValueError: no such duration.
    References:
        Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, arXiv:1912.04958 (a half-life for
        the average of the generator's weights).
    Example:
        >>> HalfLife(1)(7, 100), round(HalfLife(693)(1, 10000), 4)
        (0.5, 0.999)
    """

    duration: Duration

    def __post_init__(self) -> None:
        check_duration("HalfLife", "duration", self.duration, least=1)

    def __call__(self, updates: int, total_steps: float) -> float:
        return float(0.5 ** (1 / in_steps("HalfLife", "duration", self.duration, total_steps)))


@dataclass(frozen=True)
class Warmed:
    """A decay that grows from 0 to its full value, so that the first weights are soon forgotten.

        decay = min(decay, 1 - (1 + updates / inv_gamma) ** -power)

    With a power of 2/3 it is 0.99 after 1,000 updates and 0.999 after 31,600; the average spans a growing part of the
    run meanwhile.

    Args:
        decay: full value, in [0, 1).
        power: above 0; 2/3 for long runs, 3/4 for shorter ones.
        inv_gamma: updates by which the growth is stretched, above 0.
    Returns:
        Called with (updates, total_steps): the decay, in [0, 1).
    Raises:
        TypeError, ValueError: a value out of range.
    References:
        Crowson, "k-diffusion", 2022 (`EMAWarmup`), as timm and ema-pytorch have it.
    Example:
        >>> [round(Warmed(0.9)(updates, 1000), 3) for updates in (1, 10, 30, 100)]
        [0.37, 0.798, 0.899, 0.9]
    """

    decay: float = 0.9999
    power: float = 2 / 3
    inv_gamma: float = 1.0

    def __post_init__(self) -> None:
        check_decay("Warmed", self.decay)
        check_number("Warmed", "power", self.power, "finite and above 0", "2/3 is usual", lambda value: value > 0)
        fix = "1.0 is usual"
        check_number(
            "Warmed", "inv_gamma", self.inv_gamma, "finite and above 0 (updates)", fix, lambda value: value > 0
        )

    def __call__(self, updates: int, total_steps: float) -> float:
        return float(min(self.decay, 1 - (1 + updates / self.inv_gamma) ** -self.power))


def mean(updates: int, total_steps: float) -> float:
    """The decay under which an average is the plain mean of all that was averaged.

        decay = updates / (updates + 1)

    Args:
        updates: weights that are in the average, at least 1.
        total_steps: not looked at.
    Returns:
        The decay, in [0.5, 1).
    References:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.
    Example:
        >>> mean(3, 100)
        0.75
    """
    return updates / (updates + 1)


@dataclass(frozen=True)
class Averaging:
    """When an average is updated, and how much the old one weighs then.

    The average begins as a copy of the weights after the first step beyond `start` that is due; a step is due where it
    completes a stretch of `every_n_steps`. Between two updates the old average decays as often as steps were done.

    Args:
        decay: number in [0, 1), or a decay of (updates, total_steps) such as `HalfLife("2ep")`.
        start: stretch of the run that is left out: `int` = optimizer steps, `float` in (0, 1) = fraction of the run,
            `"3ep"` = epochs, which a callback turns into steps.
        every_n_steps: in the same units, at least 1 step; `"1ep"` is once an epoch.
    Returns:
        Called with (step, updates, total_steps), after a step and with the updates that are in the average, at least 1:
        the weight of the old average in the update that is due, or None where none is.
    Raises:
        TypeError, ValueError: a value out of range.
    Example:
        >>> plan = Averaging(0.9, start=2, every_n_steps=2)
        >>> [plan(step, 1, 10) is not None for step in range(1, 7)], round(plan(4, 1, 10), 2)
        ([False, False, False, True, False, True], 0.81)
    """

    decay: "float | Decay"
    start: Duration = 0
    every_n_steps: Duration = 1

    def __post_init__(self) -> None:
        if isinstance(self.decay, type) or not callable(self.decay):
            check_decay("EMA", self.decay)
        check_duration("EMA", "start", self.start)
        check_duration("EMA", "every_n_steps", self.every_n_steps, least=1)

    def __call__(self, step: int, updates: int, total_steps: float) -> float | None:
        every = in_steps("EMA", "every_n_steps", self.every_n_steps, total_steps)
        if step <= in_steps("EMA", "start", self.start, total_steps) or step // every == (step - 1) // every:
            return None
        decay = self.decay(updates, total_steps) if callable(self.decay) else self.decay
        return decay if self.decay is mean else float(decay**every)

    @property
    def needs_length(self) -> bool:
        """Whether the length of the run is looked at."""
        given = (self.start, self.every_n_steps, getattr(self.decay, "duration", 0))
        known = isinstance(self.decay, (int, float, HalfLife, Warmed)) or self.decay is mean
        return not known or any(isinstance(duration, float) for duration in given)


def check_decay(owner: str, decay: Any) -> None:
    """Raise unless `decay` is a weight of the old average, in [0, 1).

    Args:
        owner: class or function named in the error.
        decay: what came.
    Raises:
        TypeError: no number.
        ValueError: outside [0, 1).
    Example:
        >>> check_decay("EMA", 0.999)
    """
    fix = "It is the weight of the old average: 0.999 averages over about the last 1,000 steps"
    check_number(owner, "decay", decay, "in [0, 1)", fix, lambda value: 0 <= value < 1)


@torch.no_grad()
def ema_(average: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """Move the average towards the weights, in place, in one foreach call.

        average = decay * average + (1 - decay) * weights

    Args:
        average: floating or complex tensors; changed in place.
        weights: as many tensors of the same shapes and dtypes; read only.
        decay: weight of the old average, in [0, 1).
    Raises:
        TypeError, ValueError: decay is no number in [0, 1).
    References:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; as an exponential average
        Tarvainen and Valpola, "Mean teachers are better role models", 2017, arXiv:1703.01780, section 2.
        Deviates: no debiasing division; what starts the average is the caller's choice.
    Example:
        >>> average = [torch.tensor([1.0])]
        >>> ema_(average, [torch.tensor([2.0])], decay=0.75)
        >>> average
        [tensor([1.2500])]
    """
    check_decay("ema_", decay)
    if average:
        torch._foreach_lerp_(list(average), list(weights), 1 - decay)


@torch.no_grad()
def can_average(tensor: Tensor) -> bool:
    """Whether an average of this tensor means anything: floating or complex, dense and finite throughout.

    Integers (batch counts, masks of indices) have no running mean, and an infinite entry (an attention mask's -inf)
    would turn into NaN.

    Args:
        tensor: any tensor.
    Returns:
        True where it can be averaged; otherwise it is to be copied.
    Example:
        >>> can_average(torch.ones(2)), can_average(torch.tensor(3)), can_average(torch.tensor(-torch.inf))
        (True, False, False)
    """
    number = tensor.is_floating_point() or tensor.is_complex()
    return number and tensor.layout == torch.strided and bool(torch.isfinite(tensor).all())
