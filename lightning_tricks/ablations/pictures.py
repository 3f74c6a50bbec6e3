"""The forest plot: what each trick did, and how sure that is."""

import math
from typing import TYPE_CHECKING

from lightning_tricks.ablations.effects import Ablation
from lightning_tricks.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {True: "#2b8a3e", False: "#c92a2a", None: "#6b7280"}


def forest(ablation: Ablation) -> "Figure":
    """Draw a line a trick: its paired difference and the interval around it, against 0, and each seed as a point.

    Args:
        ablation: with effects.
    Returns:
        The figure. An interval without ends is drawn as its point alone.
    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure("ablate", (8, 1.6 + 0.45 * len(ablation.effects)))
    axes = figure.add_subplot()
    axes.axvline(0, color="#adb5bd", linewidth=1)
    for row, effect in enumerate(ablation.effects.values()):
        ends = [effect.difference if math.isinf(end) else end for end in effect.interval]
        axes.plot(ends, [row, row], color=COLOURS[effect.helps], linewidth=2.5, solid_capstyle="butt")
        axes.plot(effect.differences, [row + 0.2] * len(effect.differences), ".", color="#868e96", alpha=0.6)
        axes.plot(effect.difference, row, "D", color=COLOURS[effect.helps])
        words = f"{effect.difference:+.3g}\n{effect.time:+.0%} time"
        axes.annotate(words, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_yticks(range(len(ablation.effects)), list(ablation.effects))
    axes.set_ylim(len(ablation.effects) - 0.5, -0.5)
    better = "higher" if ablation.mode == "max" else "lower"
    axes.set_xlabel(f"paired difference of {ablation.metric} ({better} is better), 95 % interval over seeds")
    axes.set_title(f"What each trick does ({ablation.design})")
    axes.grid(axis="x", alpha=0.2)
    return figure
