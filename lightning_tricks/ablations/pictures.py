"""The forest plot, what each trick did and how sure that is, and the page's section that begins with it."""

import math
from textwrap import fill
from typing import TYPE_CHECKING

from lightning_tricks.ablations.effects import Ablation, effect_rows, notes, signed, verdict
from lightning_tricks.plots import new_figure
from lightning_tricks.reports import page
from lightning_tricks.reports.pictures import COLOURS, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF = {True: COLOURS[0], False: COLOURS[1], None: "#5b6570"}


def forest(ablation: Ablation) -> "Figure":
    """Draw a line a trick: its paired difference and the interval around it, against 0, and each seed as a point.

    Args:
        ablation: with effects.
    Returns:
        The figure. An interval without ends is drawn as its point alone.
    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure("ablate", (5.6, 1.3 + 0.45 * len(ablation.effects)))
    axes = figure.add_subplot()
    axes.axvline(0, color="#868e96", linewidth=1)
    for row, effect in enumerate(ablation.effects.values()):
        ends = [effect.difference if math.isinf(end) else end for end in effect.interval]
        axes.plot(ends, [row, row], color=OF[effect.helps], linewidth=2.5, solid_capstyle="butt")
        axes.plot(effect.differences, [row + 0.25] * len(effect.differences), ".", color="#868e96", alpha=0.6)
        axes.plot(effect.difference, row, "D", color=OF[effect.helps])
        words = f"{verdict(effect)}\n{signed(effect.difference, effect)}"
        axes.text(
            1.02, row, words, color=OF[effect.helps], transform=axes.get_yaxis_transform(), va="center", fontsize=9
        )
    axes.set_yticks(range(len(ablation.effects)), list(map(_short, ablation.effects)), fontsize=9)
    axes.locator_params(axis="x", nbins=5)
    axes.set_ylim(len(ablation.effects) - 0.5, -0.5)
    better = "higher" if ablation.mode == "max" else "lower"
    words = f"paired difference of {plain(ablation.metric)} ({better} is better)"
    figure.supxlabel(fill(words, 70), fontsize=9)
    figure.suptitle(f"What each trick does ({ablation.design})", fontsize=10.5)
    axes.grid(axis="x", alpha=0.25)
    return figure


def _short(name: str) -> str:
    """A name in two lines at most, so that the plot keeps its width; the table has all of it."""
    text = plain(name)
    return fill(text if len(text) <= 44 else f"{text[:19]}...{text[-22:]}", 22, break_on_hyphens=False)


def answer(ablation: Ablation, png: bytes) -> tuple[str, str]:
    """The section that the page of an ablation begins with: its heading, and its HTML.

    Args:
        ablation: with effects.
        png: the forest plot.
    """
    head, *rows = effect_rows(ablation)
    found: dict[str, list[str]] = {}
    for name, effect in ablation.effects.items():
        found.setdefault(verdict(effect), []).append(name)
    words = "; ".join(f"{word}: {', '.join(found[word])}" for word in sorted(found))
    caption = "Diamonds are means over the seeds, lines their 95 % intervals, points below them single seeds."
    picture = page.picture(png, "What each trick does: paired differences and their intervals", caption)
    above = page.paragraphs([f"{words[0].upper()}{words[1:]}."]) + page.pictures([picture])
    below = page.table(head, rows, "numbers") + page.paragraphs(list(notes(ablation)), "soft")
    return "What each trick does", above + below
