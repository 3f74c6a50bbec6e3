"""Pictures of the report: curves of several runs, and layers by steps."""

import math
import statistics
import textwrap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from lightning_tricks.plots import new_figure
from lightning_tricks.reports.groups import Group
from lightning_tricks.reports.runs import Run, Series, natural
from lightning_tricks.reports.summary import moving_average, short, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people who see no red or no green can tell apart; without yellow, pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("solid", "dashed", "dotted", "dashdot")
MARKERS = ("v", "D", "X", "P", "s", "*")
WIDTHS = (1, 3, 5, 11, 21, 51, 101, 201, 501, 1001, 2001, 5001)
POINTS = 600
"""Most points of a run that a picture has: about as many as it has columns."""
COLUMNS = 200
"""Most steps of a picture of layers."""
LINES_OF_EVENTS = 6
"""Most events of one kind that have a line through the picture beside their mark."""
HEAT_MAPS = 8
"""Most groups whose layers have a picture: more are not read, and take minutes to draw."""
SPREAD = 30
"""From how many times the lowest value on a plain scale shows too little, and logarithms are taken."""
LARGEST = 1e100
"""Most that is drawn: a picture from -1e308 to 1e308 is larger than any number."""
ROWS = 60
"""Most layers that are named at a picture."""


@dataclass(frozen=True)
class Curve:
    """A line of a picture: one run, or several and their mean."""

    name: str
    colour: str
    line: str
    runs: tuple[Series, ...]


@dataclass(frozen=True)
class Panel:
    """What is drawn above one time axis."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    band: tuple[float, float] | None = None
    linear: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure with the words that go with it."""

    name: str
    title: str
    figure: "Figure"
    caption: str
    of_layers: bool = False


def drawable(value: float) -> bool:
    """Whether a value has a place in a picture: finite, and its size not beyond 1e100."""
    return abs(value) <= LARGEST


def styles(index: int) -> tuple[str, str]:
    """Colour and kind of line of the n-th curve; no two alike before 28, and two that coincide are both seen."""
    return COLOURS[index % len(COLOURS)], LINES[index % len(LINES)]


# ---------------------------------------------------------------------- curves


def curves(
    name: str,
    title: str,
    panels: Sequence[Panel],
    events: Sequence[tuple[str, str, list[int]]],
    smooth: int | None,
) -> Picture:
    """Panels above each other, with one time axis and one legend.

    Args:
        name: of the file.
        title: of the picture.
        panels: at least one.
        events: name, colour and steps of what happened.
        smooth: points of a moving average; None takes a round number, at most a fifteenth of a run's.
    """
    figure = new_figure("report", (5.6, 1))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    words = []
    for place, panel in zip(axes, panels, strict=True):
        words.append(_draw(place, panel, smooth))
        _mark(place, events)
    _in_whole_steps(axes[-1])
    handles = {text: handle for place in axes for handle, text in zip(*place.get_legend_handles_labels(), strict=True)}
    widest = max((len(line) for text in handles for line in text.splitlines()), default=1)
    columns = max(1, min(len(handles), 64 // (widest + 6)))
    below = -(-len(handles) // columns) * max((text.count("\n") + 1 for text in handles), default=0)
    above = sum(place.get_title().count("\n") for place in axes)
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
    figure.set_size_inches(5.6, 0.6 + 2.5 * len(panels) + 0.1 * bool(handles) + 0.2 * below + 0.17 * above)
    if len(set(words)) > 1:
        words = [f"{panel.title}: {text}" for panel, text in zip(panels, words, strict=True) if text]
    return Picture(name, title, figure, " ".join(dict.fromkeys(words)))


def _draw(axes: "Axes", panel: Panel, smooth: int | None) -> str:
    """Draw one panel, and say what its points and lines are."""
    widths = {}
    apart: list[str] = []
    for curve in panel.curves:
        longest = max(map(len, curve.runs))
        widths[curve.name] = width = smooth or max(width for width in WIDTHS if width == 1 or 15 * width <= longest)
        averages = []
        for series in curve.runs:
            points = thin({step: value for step, value in series.items() if drawable(value)}, POINTS)
            axes.scatter(list(points), list(points.values()), s=6, color=curve.colour, alpha=0.25, linewidths=0)
            shown = [value if drawable(value) else math.nan for value in series.values()]
            every = -(-len(series) // POINTS)
            means = moving_average(shown, width, every)
            averages.append(dict(zip(list(series)[::every], means, strict=True)))
        for average in averages if len(averages) > 1 else []:
            axes.plot(list(average), list(average.values()), color=curve.colour, alpha=0.4, linewidth=0.7)
        mean, label = averages[0] if len(averages) == 1 else mean_line(averages), wrapped(curve.name, 60, 4)
        if mean:
            steps, means = list(mean), list(mean.values())
            axes.plot(steps, means, color=curve.colour, linestyle=curve.line, linewidth=1.8, label=label)
        else:  # the legend shows a line that is there
            axes.lines[-1].set_label(label)
            apart.append(curve.name)
    values = [value for curve in panel.curves for series in curve.runs for value in series.values()]
    finite = [value for value in values if drawable(value)]
    if not panel.linear and finite and min(finite) > 0 and (panel.band or max(finite) > SPREAD * min(finite)):
        axes.set_yscale("log")
    if panel.band is not None:
        label = "band, {} to {}".format(*map(short, panel.band))
        axes.axhspan(*panel.band, color="#777777", alpha=0.15, linewidth=0, label=label)
    axes.set_title(wrapped(panel.title, 52, 3), fontsize=10.5, pad=9)
    axes.set_ylabel(wrapped(panel.unit, 28, 2), fontsize=9)
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    return _what_lines_are(panel, widths, apart, len(values) - len(finite))


def mean_line(lines: Sequence[Series]) -> Series:
    """The mean of several lines at all their steps, over the range that all of them cover; empty where that is no line.

    A mean of those that are left would jump where one of them ends.

    Args:
        lines: step -> value, straight between the steps.
    Example:
        >>> mean_line([{0: 0.0, 10: 10.0, 20: 20.0}, {5: 1.0, 15: 3.0}])
        {5: 3.0, 10: 6.0, 15: 9.0}
    """
    steps = [list(line) for line in lines]
    first, final = max(each[0] for each in steps), min(each[-1] for each in steps)
    shared = sorted({step for each in steps for step in each if first <= step <= final})
    shown = shared[:: -(-len(shared) // POINTS) or 1]
    means = {step: statistics.fmean(map(_between, lines, steps, [step] * len(lines))) for step in shown}
    pairs = pairwise(map(math.isfinite, means.values()))
    return means if any(one and other for one, other in pairs) else {}


def _between(line: Series, steps: Sequence[int], step: int) -> float:
    """The value of a line at a step within its range."""
    if step in line:
        return line[step]
    place = bisect_right(steps, step)
    before, after = steps[place - 1], steps[place]
    share = (step - before) / (after - before)
    return (1 - share) * line[before] + share * line[after]


def _what_lines_are(panel: Panel, widths: dict[str, int], apart: list[str], lost: int) -> str:
    longest = max(len(series) for curve in panel.curves for series in curve.runs)
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{width} points ({name})" for name, width in widths.items() if width > 1)
        words = [f"Lines are moving averages of {listed}."]
    else:
        width = next(iter(widths.values()))
        words = [f"Lines are moving averages of {width} points."] if width > 1 else []
    if apart:
        of = ", ".join(filter(None, apart))
        words.append(f"No mean is drawn{of and f' of {of}'}: at no two steps in a row have all its runs a value.")
    if longest > POINTS:
        words.append(f"Points are, of up to {longest:,} a run, the lowest and the highest of each stretch.")
    if lost:
        words.append(f"{lost} value{'s are' if lost > 1 else ' is'} not finite, or beyond 1e100, and not drawn.")
    return " ".join(words)


def _in_whole_steps(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def _mark(axes: "Axes", events: Sequence[tuple[str, str, list[int]]]) -> None:
    """Marks on the upper edge, outside of the data, at the steps where something happened."""
    names = list(dict.fromkeys(name for name, _, _ in events))
    for name, colour, steps in events:
        marker = MARKERS[names.index(name) % len(MARKERS)]
        top = [1.0] * len(steps)
        (marks,) = axes.plot(steps, top, marker, color=colour, transform=axes.get_xaxis_transform(), markersize=6)
        marks.set(clip_on=False, zorder=5)
        for step in steps if len(steps) <= LINES_OF_EVENTS else []:
            axes.axvline(step, color=colour, linewidth=0.8, linestyle="dotted", zorder=1)
    for name in names:  # one entry for all colours
        marker = MARKERS[names.index(name) % len(MARKERS)]
        axes.plot([], [], marker, color="#555555", markersize=6, label=wrapped(name.replace("_", " "), 60, 4))


def wrapped(text: str, width: int, lines: int) -> str:
    """Text for a picture, in lines of at most so many characters."""
    found = [plain(part) for line in text.splitlines() for part in textwrap.wrap(_written(line), width)]
    return "\n".join(found[:lines]) + "…" * (len(found) > lines)


def plain(text: str) -> str:
    r"""Text that matplotlib takes for neither mathematics nor a label to hide, in letters that its font has.

    Example:
        >>> plain("損失 in $")
        '\\u640d\\u5931 in \\$'
    """
    text = _written(text)
    return f" {text}".replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")


def _written(text: str) -> str:
    known = _letters()
    return "".join(c if c == "\n" or ord(c) in known else c.encode("unicode_escape").decode() for c in text)


@cache
def _letters() -> frozenset[int]:
    """What matplotlib's font can write; it draws empty boxes for the rest."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


# ---------------------------------------------------------------------- layers by steps


def layers(
    name: str,
    title: str,
    unit: str,
    groups: Sequence[Group],
    quantity: str,
    band: tuple[float, float] | None = None,
) -> Iterator[Picture]:
    """A picture a group: a row a layer, a column a step, the median over the runs as colour, on one scale for all.

    Args:
        name: of the file, before the group's.
        title: of the picture.
        unit: of the colours.
        groups: runs of which the medians are taken; one without such layers has no picture.
        quantity: prefix of the keys.
        band: what lies in between is grey; the colours are then of both sides.
    """
    found = {group.name: _by_layer(group, quantity) for group in groups}
    values = [value for median in found.values() for series in median.values() for value in series.values()]
    for group in groups:
        if found[group.name]:
            colours, norm = _plain(values, unit) if band is None else _banded(band)
            heading = title if len(groups) == 1 else f"{title}\n{group.name}"
            figure, words = _heat_map(heading, unit, found[group.name], colours, norm)
            if band is not None:
                for edge in band:
                    figure.axes[1].axvline(edge, color="black", linewidth=1.2)
                words.append(_verdict(found[group.name], band))
            if len(group.runs) > 1:
                words.insert(0, f"Median of {len(group.runs)} runs.")
            yield Picture(f"{name}-{group.name}", heading, figure, " ".join(words), of_layers=True)


def _heat_map(
    title: str, unit: str, median: dict[str, Series], colours: "Colormap", norm: "Normalize"
) -> "tuple[Figure, list[str]]":
    """Layers by steps, and what is left out, in words."""
    from matplotlib.ticker import NullFormatter

    names = list(median)
    steps = sorted({step for series in median.values() for step in series})
    every = -(-len(steps) // COLUMNS)
    shown = steps[::every]
    values = [[median[layer].get(step, math.nan) for step in shown] for layer in names]
    heat = [[_within(value, norm) for value in row] for row in values]
    seen = {value for row in values for value in row if not math.isnan(value)}
    extend = "both" if any(_within(value, norm) != value for value in seen) else "neither"
    heading = wrapped(title, 60, 5)
    rows = min(max(len(names), 3), ROWS) + heading.count("\n")
    figure = new_figure("report", (5.6, 1.8 + 0.17 * rows))
    axes = figure.add_subplot()
    middles = [(a + b) / 2 for a, b in pairwise(shown)] or [shown[0] - 0.5, shown[0] + 0.5]
    edges = [2 * shown[0] - middles[0], *middles, 2 * shown[-1] - middles[-1]] if len(shown) > 1 else middles
    mesh = axes.pcolormesh(
        edges, range(len(names) + 1), heat, cmap=colours.with_extremes(bad="#ffffff"), norm=norm, rasterized=True
    )
    axes.invert_yaxis()
    labelled = range(0, len(names), -(-len(names) // ROWS))
    texts = [plain(shorten(names[index])) for index in labelled]
    axes.set_yticks([index + 0.5 for index in labelled], texts, fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    _in_whole_steps(axes)
    figure.suptitle(heading, fontsize=10.5)
    bar = figure.colorbar(mesh, ax=axes, location="bottom", aspect=40, label=unit, pad=0.02, extend=extend)
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    words = ["White: not logged, or not a number."] if any(math.isnan(value) for row in heat for value in row) else []
    if every > 1:
        words.append(f"One in {every} of {len(steps):,} logged steps is shown.")
    if labelled.step > 1:
        words.append(f"One in {labelled.step} of {len(names)} layers is named.")
    return figure, words


def _by_layer(group: Group, quantity: str) -> dict[str, Series]:
    """Medians of all layers that have a value, from the first to the last by their names."""
    keys = {key for run in group.runs for key in run.series if key.startswith(f"{quantity}/")} - {f"{quantity}/total"}
    median = {key.partition("/")[2]: _median(group.runs, key) for key in sorted(keys, key=natural)}
    return {name: series for name, series in median.items() if series}


def _median(runs: Sequence[Run], key: str) -> Series:
    """Median over the runs that have the step."""
    logged = [run.series[key] for run in runs if key in run.series]
    if len(logged) == 1:  # of hundreds of thousands of values the medians would take a minute
        return logged[0]
    values: dict[int, list[float]] = {}
    for series in logged:
        for step, value in series.items():
            known = values.setdefault(step, [])
            if not math.isnan(value):
                known.append(value)
    return {step: statistics.median(known) if known else math.nan for step, known in values.items()}


def _verdict(median: dict[str, Series], band: tuple[float, float]) -> str:
    """Layers that are outside of the band for most of the time, and those that are not finite, in words."""
    finite = {name: [value for value in series.values() if math.isfinite(value)] for name, series in median.items()}
    turns = "now above and now below"
    said: dict[str, list[str]] = {"above": [], "below": [], turns: []}
    words = []
    for name, values in finite.items():
        above, below = sum(value > band[1] for value in values), sum(value < band[0] for value in values)
        if 2 * (above + below) > len(values):
            said["above" if 2 * above > len(values) else "below" if 2 * below > len(values) else turns].append(name)
    lost = [name for name, values in finite.items() if len(values) < len(median[name])]
    outside = "; ".join(f"{word} the band: {_some(found)}" for word, found in said.items() if found)
    if outside:
        words.append(f"For more than half of the steps {outside}.")
    elif any(finite.values()):
        which = "Every layer is" if all(finite.values()) else "Every layer that is finite is"
        words.append(f"{which} in the band for half of the steps or more.")
    if lost:
        words.append(f"At some steps or at all not finite: {_some(lost)}.")
    return " ".join(words)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _within(value: float, norm: "Normalize") -> float:
    """A zero or an infinite value at the end of the colours, since a logarithm has no place for it."""
    if math.isnan(value) or norm.vmin is None or norm.vmax is None:
        return math.nan
    return min(max(value, float(norm.vmin)), float(norm.vmax))


def _banded(band: tuple[float, float]) -> "tuple[Colormap, Normalize]":
    """Blue below the band, grey within, orange above, on a scale of logarithms."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    low, high = math.log10(band[0]) - 2, math.log10(band[1]) + 2
    below, above = (math.log10(band[0]) - low) / (high - low), (math.log10(band[1]) - low) / (high - low)
    stops = [(0.0, "#053061"), (below, "#6baed6"), (below, "#c4c4c4"), ((below + above) / 2, "#e6e6e6")]
    stops += [(above, "#c4c4c4"), (above, "#fdae61"), (1.0, "#a63603")]
    return LinearSegmentedColormap.from_list("band", stops), LogNorm(10**low, 10**high)


def _plain(values: Sequence[float], unit: str) -> "tuple[Colormap, Normalize]":
    """From dark to bright; a share from 0 to 1, and logarithms of what spans more than a plain scale shows."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    finite = [value for value in values if drawable(value)] or [0.0]
    low, high = (0.0, 1.0) if unit == "share" else (min(finite), max(finite))
    least = min((value for value in finite if value > 0), default=math.inf)
    if unit != "share" and low >= 0 and high > SPREAD * least:
        return colormaps["cividis"], LogNorm(max(least, 1e-8 * high), high)
    return colormaps["cividis"], Normalize(low, high) if low < high else Normalize(low - 0.5, low + 0.5)


def shorten(name: str) -> str:
    """The end of a layer's name, which says more than its beginning, in at most 30 characters.

    Example:
        >>> shorten("backbone.encoder.blocks.11.attention.projection")
        '…11.attention.projection'
    """
    if len(name) <= 30:
        return name
    end = name[-29:]
    return "…" + (end.partition(".")[2] or end)
