"""In-place averaging of lists of tensors, and the decays under which an average is exponential, warmed up or a mean."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_tricks.functional.checks import check_number, message
from lightning_tricks.functional.ensembling import ends_of_cycles
from lightning_tricks.functional.post_hoc import PowerFunction
from lightning_tricks.functional.schedules import Duration, Schedule, check_duration, in_steps
from lightning_tricks.functional.schedules.durations import snap

_SAMPLES = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)samples")
_SERIAL = (1 << 15) - 1  # the most numbers that torch does not share out among the threads of a CPU
_NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
_LARGE = 1 << 17  # numbers from which on several threads are worth their start

Decay: TypeAlias = Callable[[int, float], float]
"""What maps (updates, total_steps) to the weight of the old average in the next update; `updates` is at least 1.

Where not every step is averaged, it is called with the steps since the average began, and applied once for each."""


@dataclass(frozen=True)
class HalfLife:
    """The decay under which what was averaged weighs half after so many optimizer steps, epochs or samples.

        decay = 0.5 ** (1 / duration);  of samples: 0.5 ** (samples of a step / duration)

    Args:
        duration: `int` of at least 1 = optimizer steps, `float` in (0, 1) = fraction of the run, `"2ep"` = epochs,
            `"50000samples"` = training samples of all ranks, where a step has as many as the loader's batch says. EMA
            turns epochs and samples into steps.
    Returns:
        Called with (updates, total_steps): the decay, in (0, 1), the same at every update.
    Raises:
        TypeError, ValueError: no such duration; called with samples, of which only a run knows how many a step has.
    References:
        Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, arXiv:1912.04958 (a half-life for
        the average of the generator's weights).
    Example:
        >>> HalfLife(1)(7, 100), round(HalfLife(693)(1, 10000), 4)
        (0.5, 0.999)
    """

    duration: Duration

    def __post_init__(self) -> None:
        if self.samples is None:
            check_duration("HalfLife", "duration", self.duration, least=1)
        elif not 0 < self.samples < math.inf:
            fix = "Half a million is '500000samples'"
            raise ValueError(message("HalfLife", "duration", "above 0 samples", self.duration, fix))

    @property
    def samples(self) -> float | None:
        """The samples that the duration is given in; None where it is given in steps, epochs or a fraction."""
        if not (isinstance(self.duration, str) and self.duration.endswith("samples")):
            return None
        found = _SAMPLES.fullmatch(self.duration)
        if found is None:
            fix = "Half a million is '500000samples' or '5e5samples'"
            raise ValueError(message("HalfLife", "duration", "samples written as '50000samples'", self.duration, fix))
        return float(found[1])

    def __call__(self, updates: int, total_steps: float) -> float:
        if self.samples is not None:
            fix = "Use it in EMA, or give steps"
            raise ValueError(message("HalfLife", "duration", "in steps outside a run", self.duration, fix))
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
        every_n_steps: in the same units, at least 1 step; `"1ep"` is once an epoch. Or a schedule that has cycles, as
            `CosineRestarts(5)`: at the end of each.
        owner: callback named in errors.
    Returns:
        Called with (step, updates, total_steps), after a step and with the updates that are in the average, at least 1:
        the weight of the old average in the update that is due, or None where none is. A further argument says how many
        steps ago the average began, where that is not in this run.
    Raises:
        TypeError, ValueError: a value out of range.
    Example:
        >>> plan = Averaging(0.9, start=2, every_n_steps=2)
        >>> [plan(step, 1, 10) is not None for step in range(1, 7)], round(plan(4, 1, 10), 2)
        ([False, False, False, True, False, True], 0.81)
    """

    decay: "float | Decay"
    start: Duration = 0
    every_n_steps: "Duration | Schedule" = 1
    owner: str = "EMA"

    def __post_init__(self) -> None:
        if isinstance(self.decay, type) or not callable(self.decay):
            check_decay(self.owner, self.decay)
        check_duration(self.owner, "start", self.start)
        if not callable(self.every_n_steps):
            check_duration(self.owner, "every_n_steps", self.every_n_steps, least=1)
        elif not hasattr(self.every_n_steps, "cycles"):
            fix = "Give one such as CosineRestarts(5) or Triangular(5), or steps"
            raise ValueError(
                message(self.owner, "every_n_steps", "a schedule that has cycles", self.every_n_steps, fix)
            )

    def __call__(self, step: int, updates: int, total_steps: float, since: int | None = None) -> float | None:
        start = in_steps(self.owner, "start", self.start, total_steps) if self.start else 0
        if step <= start:
            return None
        if self.every_n_steps == 1:
            return self._decay(updates, total_steps)
        before = self._due_before(step, total_steps)
        if before is None:
            return None
        if self._counts_updates:
            return self._decay(updates, total_steps)
        if since is None:
            since = step - next(due for due in range(math.floor(start) + 1, step + 1) if self._is_due(due, total_steps))
        return float(self._decay(max(since, 1), total_steps) ** (step - before))

    def _decay(self, updates: int, total_steps: float) -> float:
        if not callable(self.decay):
            return self.decay
        given: Any = self.decay(updates, total_steps)
        decay = given.item() if hasattr(given, "item") else given  # a number of torch or numpy
        check_decay(self.owner, decay)
        return float(decay)

    @property
    def _counts_updates(self) -> bool:
        """Whether the decay is one of averaged weights, however many steps lie between them."""
        return self.decay is mean or isinstance(self.decay, PowerFunction)

    def _due_before(self, step: int, total_steps: float) -> int | None:
        """The due step before a due one, which may be 0; None where a step is not due."""
        if not self._is_due(step, total_steps):
            return None
        return next((due for due in range(step - 1, 0, -1) if self._is_due(due, total_steps)), 0)

    def _is_due(self, step: int, total_steps: float) -> bool:
        """Whether a step completes a stretch."""
        if callable(self.every_n_steps):
            return step in _ends_of_cycles(self.every_n_steps, int(total_steps))
        every = in_steps(self.owner, "every_n_steps", self.every_n_steps, total_steps)
        return bool(math.floor(snap(step / every)) > math.floor(snap((step - 1) / every)))

    @property
    def needs_length(self) -> bool:
        """Whether the length of the run is looked at."""
        given = (self.start, self.every_n_steps, getattr(self.decay, "duration", 0))
        known = isinstance(self.decay, (int, float, HalfLife, Warmed)) or self._counts_updates
        return not known or any(isinstance(duration, float) or callable(duration) for duration in given)


@functools.lru_cache  # a run asks for the same ones at every step
def _ends_of_cycles(schedule: Schedule, total_steps: int) -> frozenset[int]:
    return frozenset(ends_of_cycles(schedule, total_steps))


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


def pieces(average: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The same numbers in tensors that a CPU updates sooner: of middling size, cut so that each is one thread's work.

    To wake other threads for each of hundreds of such tensors takes longer than the update itself.

    Args:
        average: tensors.
        weights: as many, of the same shapes.
    Returns:
        Two lists of tensors, as many in each; what was cut are views.
    Example:
        >>> [len(tensor) for tensor in pieces([torch.zeros(50000)], [torch.zeros(50000)])[0]]
        [25000, 25000]
    """
    cut: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pair in zip(average, weights, strict=True):
        size = pair[0].numel()
        cuttable = _SERIAL < size < _LARGE and all(t.device.type == "cpu" and t.is_contiguous() for t in pair)
        length = math.ceil(size / math.ceil(size / _SERIAL)) if cuttable else 0
        for tensor, parts in zip(pair, cut, strict=True):
            parts.extend(torch.split(tensor.detach().view(-1), length) if cuttable else [tensor])
    return cut


@torch.no_grad()
def can_average(tensor: Tensor) -> bool:
    """Whether an average of this tensor means anything: floating or complex, dense and finite throughout.

    Integers (batch counts, masks of indices) have no running mean, eight bits are too few to move, and an infinite
    entry (an attention mask's -inf) would turn into NaN.

    Args:
        tensor: any tensor.
    Returns:
        True where it can be averaged; otherwise it is to be copied.
    Example:
        >>> can_average(torch.ones(2)), can_average(torch.tensor(3)), can_average(torch.tensor(-torch.inf))
        (True, False, False)
    """
    return tensor.dtype in _NUMBERS and tensor.layout == torch.strided and bool(torch.isfinite(tensor).all())
