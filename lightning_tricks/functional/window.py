"""A part of the run in which a value is in force."""

from dataclasses import dataclass
from typing import ClassVar

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.schedules import Duration, Schedule, check_duration, duration_in_steps


@dataclass(frozen=True)
class Window:
    """A value that is 0 before a part of the run and after it.

        value = schedule(step, total_steps)   for start <= step < stop, else 0

    Args:
        schedule: a number, or (step, total_steps) -> number; the steps are those of the run, not of the part.
        start: where the part begins: `int` = optimizer steps, `float` in (0, 1) = fraction of the run, `"3ep"` =
            epochs.
        stop: where it ends, in the same units; None for the end of the run.
    Returns:
        Called with (step, total_steps): the value.
    Raises:
        TypeError: what is no duration.
        ValueError: a duration out of range, or beyond the run, or a part that ends before it begins.
    Example:
        >>> [Window(1.0, start=2, stop=0.9)(step, 10) for step in (1, 2, 8, 9)]
        [0.0, 1.0, 1.0, 0.0]
    """

    schedule: float | Schedule
    start: Duration = 0
    stop: Duration | None = None

    owner: ClassVar[str] = "BatchTransforms"

    def __post_init__(self) -> None:
        check_duration(self.owner, "start", self.start)
        if self.stop is not None:
            check_duration(self.owner, "stop", self.stop)
            # Of several units only the run's length tells, unless one is 0.
            start, stop = _number(self.start), _number(self.stop)
            if type(self.start) is type(self.stop) or 0 in (start, stop):
                self._check_order(start, stop)

    def __call__(self, step: float, total_steps: float) -> float:
        start = duration_in_steps(self.owner, "start", self.start, total_steps)
        if self.stop is not None:
            stop = duration_in_steps(self.owner, "stop", self.stop, total_steps)
            self._check_order(start, stop)
            if step >= stop:
                return 0.0
        if step < start:
            return 0.0
        return float(self.schedule(step, total_steps) if callable(self.schedule) else self.schedule)

    def _check_order(self, start: float, stop: float) -> None:
        if stop <= start:
            fix = f"Both count from the run's beginning; here they are {start} and {stop}"
            raise ValueError(message(self.owner, "stop", f"after start={self.start!r}", self.stop, fix))


def _number(duration: Duration) -> float:
    return float(duration.removesuffix("ep") if isinstance(duration, str) else duration)
