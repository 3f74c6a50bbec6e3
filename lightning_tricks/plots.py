"""Pictures: matplotlib's, and of characters for a terminal."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_tricks.functional.checks import check_count
from lightning_tricks.functional.schedules import Schedule, check_schedule, describe, resolve_epochs, survey

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 2000
"""Most steps that are evaluated for a picture: more than a screen has columns."""


def plot_schedule(
    schedule: Schedule, total_steps: int, steps_per_epoch: int | None = None, ax: "Axes | None" = None
) -> "Figure":
    """Draw the factor of every step of a run.

    Args:
        schedule: (step, total_steps) -> factor.
        total_steps: length of the run (optimizer steps), at least 1.
        steps_per_epoch: optimizer steps of an epoch, where durations are given in epochs.
        ax: matplotlib axes to draw in; None makes a figure.
    Returns:
        The figure, `figure.savefig("schedule.png")`; pyplot's state is not touched.
    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: what is no schedule or no length; what the schedule itself refuses.
    Example:
        >>> from lightning_tricks import WarmupCosine, plot_schedule
        >>> figure = plot_schedule(WarmupCosine(0.05), total_steps=1000)
        >>> figure.axes[0].get_xlabel()
        'optimizer step'
    """
    steps, factors = sample_schedule("plot_schedule", schedule, total_steps, steps_per_epoch)
    axes = new_axes("plot_schedule") if ax is None else ax
    axes.plot(steps, factors)
    axes.set(xlabel="optimizer step", ylabel="factor of the base value", title=describe(schedule))
    axes.title.set_wrap(True)
    axes.grid(alpha=0.3)
    return axes.get_figure(root=True)  # type: ignore[return-value]


def sample_schedule(
    owner: str, schedule: Schedule, total_steps: int, steps_per_epoch: int | None = None
) -> tuple[list[int], list[float]]:
    """Steps and their factors: all of a short run, evenly spaced ones of a long run.

    Args:
        owner: function named in an error.
        schedule: (step, total_steps) -> factor.
        total_steps: length of the run (optimizer steps), at least 1.
        steps_per_epoch: optimizer steps of an epoch, where durations are given in epochs.
    Returns:
        Steps from 0 to `total_steps`, and the factor at each.
    Raises:
        TypeError, ValueError: what is no schedule or no length; what the schedule itself refuses.
    """
    check_schedule(owner, "schedule", schedule)
    check_count(owner, "total_steps", total_steps, 1, "optimizer steps", "Give the length of the run")
    if steps_per_epoch is not None:
        check_count(owner, "steps_per_epoch", steps_per_epoch, 1, "optimizer steps", "None where no duration needs it")
    resolved = resolve_epochs(schedule, math.inf if steps_per_epoch is None else steps_per_epoch)
    seen = survey(owner, resolved, total_steps, POINTS)
    return [step for step, _ in seen], [factor for _, factor in seen]


def new_axes(owner: str) -> "Axes":
    """Axes in a figure of their own.

    Args:
        owner: function named in an error.
    Raises:
        ImportError: matplotlib is not installed.
    """
    return new_figure(owner, (7, 4)).add_subplot()


def new_figure(owner: str, size: tuple[float, float]) -> "Figure":
    """A figure that pyplot does not know, and that nobody has to close.

    Args:
        owner: function named in an error.
        size: width and height (inches).
    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'{owner} needs matplotlib: pip install "lightning-tricks[plots]".') from error
    return Figure(figsize=size, layout="constrained")


def text_picture(values: Sequence[float], width: int = 72, height: int = 14) -> str:
    """Draw values with characters, from left to right; jumps are filled.

    Args:
        values: at least one, at least 0.
        width: columns of the picture, at least 2.
        height: rows of the picture, at least 2.
    Returns:
        Lines; the scale begins at 0.
    Example:
        >>> print(text_picture([1, 0.5, 0], width=3, height=3))
              1 |*
                | *
              0 |  *
                +---
    """
    top = max(values) or 1.0
    columns = [values[index * (len(values) - 1) // (width - 1)] for index in range(width)]
    rows = [round((height - 1) * value / top) for value in columns]
    grid = [[" "] * width for _ in range(height)]
    for column, row in enumerate(rows):
        before = rows[column - 1] if column else row
        for filled in {row, *range(min(row, before) + 1, max(row, before))}:
            grid[filled][column] = "*"
    lines = ["".join(row).rstrip() for row in reversed(grid)]
    labels = [f"{top:7.4g} |", *["        |"] * (height - 2), f"{0:7.4g} |"]
    return "\n".join([*(label + line for label, line in zip(labels, lines, strict=True)), "        +" + "-" * width])
