"""What the report shows, in which order."""

import hashlib
import io
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tricks.functional.checks import check_count, message
from lightning_tricks.reports import page
from lightning_tricks.reports.groups import Group, group_runs, kinship, resumed
from lightning_tricks.reports.pictures import HEAT_MAPS, Curve, Panel, Picture, curves, drawable, layers, styles
from lightning_tricks.reports.runs import Run, Runs, read_runs
from lightning_tricks.reports.settings import differing, flatten, is_seed, seeds
from lightning_tricks.reports.summary import (
    CHAPTERS,
    QUANTITIES,
    Mode,
    best,
    by_metric,
    check_band,
    check_title,
    direction,
    last,
    metric_keys,
    quantity,
    schedule_keys,
    stage,
    with_spread,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 160
SOME = "tricks that not all have"
HOW_TO_LOG = {
    "Learning rate and schedules": "LRSchedule and Lightning's LearningRateMonitor log them",
    "Updates": "UpdateMonitor logs them",
    "Gradients": "UpdateMonitor logs them",
    "Activations": "ActivationMonitor logs them",
}


def report(
    runs: Runs,
    output: str | PathLike[str] = "report.html",
    *,
    group: str | None = None,
    smooth: int | None = None,
    band: tuple[float, float] = (1e-4, 1e-2),
    modes: Mapping[str, Mode] | None = None,
    title: str = "Training report",
) -> Path:
    """Write what runs logged as one self-contained HTML page, and its pictures as PNG files in a folder beside it.

    The page has tables of the final metrics with their spread and of the settings by which the runs differ,
    and pictures: learning curves, learning rate, update ratio (layers by steps, against its band), norms, activation
    statistics, with events (`event/*`) marked on the curves. What was not logged is left out, with a word. It needs no
    server and no network, neither to be written nor to be read. W&B writes a run from another process: of one whose end
    is not on disk yet the page shows what is there, and says so.

    Args:
        runs: a folder of Lightning's CSVLogger, an offline W&B run, or a folder above many; several in a list; or a
            dict name -> path(s), where the runs of one name are summed up together. A run that several paths lead to,
            or that both loggers wrote, counts once; of several runs those that cannot be read are left out, with a
            warning.
        output: the page to write; the pictures come into the folder `report_pictures` beside `report.html`.
        group: a setting (`arm`, `tricks.EMA.decay`): runs that have the same value are summed up together. None puts
            those together whose settings are equal but for seeds.
        smooth: logged points of a moving average, odd, 1 for none; None takes a round number.
        band: lowest and highest healthy ratio of update to weights, 0 < low < high.
        modes: metric -> "min" or "max", where its name and the callbacks that monitor it do not say what is better.
        title: of the page.
    Returns:
        The page's path.
    Raises:
        ImportError: matplotlib is not installed, or W&B for a run of its own.
        TypeError, ValueError: an argument out of range, a path without a log, logs of which none can be read.
    Example:
        >>> from lightning_tricks import report
        >>> report("no_such_folder")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: report: runs must be paths that exist, got 'no_such_folder'. Give a folder of ...
    """
    path = _check(output, smooth, band, modes, title)
    read = read_runs("report", runs)
    metrics = metric_keys(read)
    unknown = [key for key in modes or {} if key not in metrics]
    if unknown:
        fix = f"There are {', '.join(metrics) or 'none'}"
        raise ValueError(message("report", "modes", "of metrics that a run logged", unknown, fix))
    return _write(read, path, group, smooth, band, modes or {}, title, [])


def write_page(
    runs: Runs,
    output: str | PathLike[str],
    *,
    group: str | None = None,
    smooth: int | None = None,
    band: tuple[float, float] = (1e-4, 1e-2),
    modes: Mapping[str, Mode] | None = None,
    title: str,
    first: Sequence[tuple[str, str]] = (),
) -> Path:
    """The report, with sections of its caller's before its own.

    Args:
        runs, output, group, smooth, band, modes, title: as `report` takes them.
        first: headings, plain text, and what is below them, HTML.
    """
    path = _check(output, smooth, band, modes, title)
    return _write(read_runs("report", runs), path, group, smooth, band, modes or {}, title, first)


def _write(
    read: Sequence[Run],
    path: Path,
    group: str | None,
    smooth: int | None,
    band: tuple[float, float],
    modes: Mapping[str, Mode],
    title: str,
    first: Sequence[tuple[str, str]],
) -> Path:
    groups = group_runs("report", read, group)
    folder = path.with_name(f"{path.stem}_pictures")
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _embedded(path, folder)
    drawn = {
        "Learning curves": learning_curves(groups, smooth),
        "Learning rate and schedules": _learning_rates(groups),
    }
    drawn |= {chapter: _measured(groups, names, smooth, band) for chapter, names in CHAPTERS.items()}
    missing = []
    names: set[str] = set()
    sections = [*first, ("Results", _results(groups, modes))]
    for chapter, figures in drawn.items():
        words = _unseen(read, CHAPTERS.get(chapter, ()))
        above = [] if names else [_how_to_read(groups)]
        content: dict[bool, list[str]] = {}  # curves, and layers below them, in columns of their own
        for figure in figures:
            content.setdefault(figure.of_layers, []).append(_save(figure, folder, names))
        if content or words:
            words = above + words if content else words
            sections.append((chapter, page.paragraphs(words, "soft") + "".join(map(page.pictures, content.values()))))
        elif chapter in HOW_TO_LOG:
            missing.append(f"{chapter}: nothing was logged; {HOW_TO_LOG[chapter]}.")
        else:
            missing.append(f"{chapter}: no metric was logged at two steps or more.")
    events = _events(groups)
    if events:
        sections.append(("Events", page.table(["event", "run", "at step", "times"], events, "numbers")))
    else:
        missing.append("Events: nothing was logged as event/*; no callback that reports them has acted.")
    sections += [("Settings", _settings(groups)), ("Runs", _runs(groups))]
    notes = [*missing, *_not_drawn(groups), *(note for run in read for note in run.notes)]
    if notes:
        sections.append(("Left out", page.paragraphs(notes)))
    path.write_text(page.page(title, _lead(groups), sections), encoding="utf-8")
    for picture in earlier:
        if picture.stem.casefold() not in names:
            picture.unlink()
    return path


def _embedded(path: Path, folder: Path) -> list[Path]:
    """Pictures in the folder that the page of an earlier call holds too, by name and content: no other file is ours."""
    if not path.exists():
        return []
    held = path.read_text(encoding="utf-8", errors="replace")
    files = [file for file in folder.glob("*.png") if file.is_file()]
    return [file for file in files if page.source(file.read_bytes(), file.name) in held]


def _check(output: str | PathLike[str], smooth: Any, band: Any, modes: Any, title: Any) -> Path:
    """Where the page will be, if it can be made of what the user says."""
    path = Path(output)
    if path.is_dir():
        raise ValueError(message("report", "output", "a file", str(path), "Give the page's name, as 'report.html'"))
    check_title("report", title)
    if smooth is not None:
        fix = "A moving average is centred; None takes a round number"
        check_count("report", "smooth", smooth, 1, "logged points", fix)
        if smooth % 2 == 0:
            raise ValueError(message("report", "smooth", "odd (logged points)", smooth, fix))
    check_band("report", band)
    condition, fix = "'min' or 'max' for each metric", "As {'val/loss': 'min'}; None where names say what is better"
    if modes is not None and not isinstance(modes, Mapping):
        raise TypeError(message("report", "modes", f"a dict of {condition}", modes, fix))
    wrong = {key: mode for key, mode in (modes or {}).items() if mode not in ("min", "max")}
    if wrong:
        raise ValueError(message("report", "modes", condition, wrong, fix))
    return path


def _save(picture: Picture, folder: Path, names: set[str]) -> str:
    """Write a picture under a name that is not there yet, and give it as a part of the page."""
    png = as_png(picture.figure)
    name = file_name(picture.name, names)
    names.add(name.casefold())
    (folder / f"{name}.png").write_bytes(png)
    return page.picture(png, picture.title, picture.caption, f"{name}.png")


def as_png(figure: "Figure") -> bytes:
    """A figure as the bytes of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def file_name(text: str, taken: Container[str] = ()) -> str:
    """Text as the name of a file on any system.

    Args:
        text: any.
        taken: names of others, casefolded, since some systems do not tell `Loss` from `loss`.
    Example:
        >>> file_name("update_ratio, arm = a/b")
        'update_ratio-arm-a-b'
    """
    name = "-".join("".join(c if c.isalnum() or c in "._" else " " for c in text).split())
    if len(name.encode()) <= 120 and name.casefold() not in taken:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name.encode()[:100].decode(errors='ignore')}-{digest}"  # file systems take 255 bytes at most


def named(key: str) -> str:
    """A metric's name, also where it is empty."""
    return key if key.strip() else "(no name)"


def _all(groups: Sequence[Group]) -> list[Run]:
    return [run for group in groups for run in group.runs]


# ---------------------------------------------------------------------- words and tables


def _lead(groups: Sequence[Group]) -> list[str]:
    count = len(_all(groups))
    if count == 1:
        return [f"One run: {groups[0].runs[0].name}."]
    if count == len(groups):
        return [f"{count} runs."]
    named = ", ".join(f"{group.name} ({len(group.runs)})" for group in groups[:8]) + (", ..." if groups[8:] else "")
    word = "groups" if len(groups) > 1 else "group"
    alike = {"seeds": " of runs that differ by their seed", "equal settings": " of runs with equal settings"}
    return [f"{count} runs in {len(groups)} {word}{alike.get(kinship(groups), '')}: {named}."]


def _how_to_read(groups: Sequence[Group]) -> str:
    words = (
        "Points are values as logged, at the step they were logged with; lines join them where nothing else is said."
    )
    if any(len(group.runs) > 1 for group in groups):
        words += " Of a group, thin lines are single runs, and a thick one is their mean over the steps that all cover."
    return words


def _unseen(runs: Sequence[Run], quantities: Sequence[str]) -> list[str]:
    """What has no picture since it would show nothing, in words."""
    return [f"{QUANTITIES[name][0]}: {word}." for name in quantities if (word := _nothing(runs, name))]


def _nothing(runs: Sequence[Run], name: str) -> str | None:
    """What a picture of a quantity would say, where that is nothing; None where it is something, or was not logged."""
    logged = [(run, key) for run in runs for key in run.series if quantity(key) == name]
    if not logged:
        return None
    values = [run.series[key] for run, key in logged]
    if QUANTITIES[name][1] in ("share", "count") and not any(value for series in values for value in series.values()):
        return "0 at every layer and step"
    unclipped = [run.series.get(key.replace("_clipped", "", 1)) for run, key in logged]
    if name == "grad_norm_clipped" and values == unclipped:
        return "the same as before, nothing was clipped"
    return None


def _results(groups: Sequence[Group], modes: Mapping[str, Mode]) -> str:
    """A table of the last and the best values."""
    runs = _all(groups)
    keys = metric_keys(runs)
    if not keys:
        return page.paragraphs(["No metric was logged."])
    known = {key: direction(key, runs, modes) for key in keys if stage(key)[1] != "training"}  # there it is chance
    rows = [[group.name, *(_result(group, key, known.get(key)) for key in keys)] for group in groups]
    words = ["Last logged value of each metric; below it the best one and the step it was logged at."]
    if any(len(group.runs) > 1 for group in groups):
        over = {"seeds": "the seeds", "equal settings": "runs with equal settings"}
        words[0] += f" Mean ± standard deviation over {over.get(kinship(groups), 'the runs of a group')} (n - 1)."
    for column, key in enumerate(keys, 1):
        for index in _leading(groups, key, known.get(key)):
            rows[index][column] = f"★ {rows[index][column]}"
    if any(text.startswith("★") for row in rows for text in row[1:]):
        words[0] += " ★ is the best last value, however small its lead."
    for one, other in resumed(groups):
        follow = f"The steps of {other.name} follow those of {one.name}, and both have the same settings"
        words.append(f"{follow}: they are probably one resumed run, and the spread is not one over trainings.")
    unknown = [named(key) for key, mode in known.items() if mode is None]
    if unknown:
        which = ", ".join(unknown)
        words.append(f"Whether low or high is better is not known of {which}: say modes={{'{unknown[0]}': 'min'}}.")
    better = {"min": "\nlow is better", "max": "\nhigh is better"}
    head = [named(key) + better.get(known.get(key) or "", "") for key in keys]
    return page.paragraphs(words, "soft") + page.table(["", *head], rows, "numbers")


def _finals(group: Group, key: str) -> list[float]:
    finals = [last(run.series[key]) for run in group.runs if key in run.series]
    return [value for value in finals if value is not None]


def _leading(groups: Sequence[Group], key: str, mode: Mode | None) -> list[int]:
    """Places of the groups whose last values are the best in the mean, up to rounding; none where that is all."""
    finals = [_finals(group, key) for group in groups]
    means = [sum(value / len(values) for value in values) if values else math.nan for values in finals]
    finite = [mean for mean in means if math.isfinite(mean)]
    if mode is None or not finite:
        return []
    leader = min(finite) if mode == "min" else max(finite)
    leading = [index for index, mean in enumerate(means) if math.isclose(mean, leader, rel_tol=1e-9)]
    return leading if len(leading) < len(groups) else []


def _result(group: Group, key: str, mode: Mode | None) -> str:
    values = _finals(group, key)
    if not values:
        return "-"
    text = with_spread(values)
    if len(values) < len(group.runs):
        text += f" ({len(values)} of {len(group.runs)} runs)"
    logged = [run.series[key] for run in group.runs if len(run.series.get(key, ())) > 1]
    tops = [found for series in logged if mode is not None and (found := best(series, mode))]
    if tops:
        steps = sorted(top.step for top in tops)
        where = f"{steps[0]:,}" if steps[0] == steps[-1] else f"{steps[0]:,} to {steps[-1]:,}"
        text += f"\nbest {with_spread([top.value for top in tops])}, step {where}"
    return text


def _events(groups: Sequence[Group]) -> list[list[str]]:
    rows = []
    for run in _all(groups):
        for key, series in run.series.items():
            steps = [step for step, value in series.items() if value > 0]
            if quantity(key) == "event" and steps:
                shown = ", ".join(f"{step:,}" for step in steps[:10]) + (", ..." if steps[10:] else "")
                rows.append([key.partition("/")[2].replace("_", " "), run.name, shown, str(len(steps))])
    return rows


def _settings(groups: Sequence[Group]) -> str:
    """What differs between groups, the tricks, and everything."""
    each = [_shared(group) for group in groups]
    held = [{name.split(".")[1]: None for name in settings if name.startswith("tricks.")} for settings in each]
    common = set.intersection(*map(set, held))
    names = list(dict.fromkeys(name for settings in each for name in settings))
    if not names:
        return page.paragraphs(["No settings were logged."])
    head = ["", *(group.name for group in groups)]
    content = ""
    # Of a trick that some have and others not, its name says it; its settings are below.
    own = [{SOME: ", ".join(name for name in tricks if name not in common) or "none"} for tricks in held]
    short = [{**extra, **settings} for extra, settings in zip(own, each, strict=True)]
    different = [name for name in differing(short) if not is_seed(name)]
    different = [name for name in different if not name.startswith("tricks.") or name.split(".")[1] in common]
    if different:
        content += page.paragraphs(["By what the groups differ:"]) + _table(head, different, short)
    elif len(groups) > 1:
        content += page.paragraphs(["The groups have the same settings."])
    tricks = [name for name in names if name.startswith("tricks.")]
    if not tricks:
        content += page.paragraphs(["No tricks are in the settings: callbacks of this package write theirs there."])
    elif set(tricks) - set(different):
        content += page.folded("Tricks and their settings", _table(head, tricks, each))
    return content + page.folded("All settings", _table(head, names, each))


def _table(head: Sequence[str], names: Sequence[str], each: Sequence[Mapping[str, str]]) -> str:
    rows = [[name.removeprefix("tricks."), *(settings.get(name, "-") for settings in each)] for name in names]
    return page.table(head, rows)


def _shared(group: Group) -> dict[str, str]:
    """A group's settings, with all values of those that differ between its runs."""
    each = [flatten(run.settings) for run in group.runs]
    names = dict.fromkeys(name for settings in each for name in settings)
    return {name: ", ".join(dict.fromkeys(settings.get(name, "-") for settings in each)) for name in names}


def _runs(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        for run in group.runs:
            steps = [max(series) for series in run.series.values() if series]
            own = ", ".join(text for name, text in seeds(run.settings).items() if "." not in name)
            rows.append([run.name, group.name, own or "-", f"{max(steps, default=0):,}", str(run.path)])
    return page.table(["run", "group", "seed", "last step", "read from"], rows)


# ---------------------------------------------------------------------- pictures


def learning_curves(groups: Sequence[Group], smooth: int | None) -> Iterator[Picture]:
    """A picture a metric: training above validation; of a single group both in one."""
    for metric, keys in by_metric(_all(groups)).items():
        name = named(metric)
        if len(groups) == 1:
            lines = [_curve(stage(key)[1] or named(key), index, groups[0], key) for index, key in enumerate(keys)]
            panels = [Panel(name, name, tuple(line for line in lines if line.runs))]
        else:
            panels = [_panel(groups, key, ", ".join(filter(None, (name, stage(key)[1]))), name) for key in keys]
        panels = [panel for panel in panels if panel.curves]
        if panels:
            yield curves(name, name, panels, _marks(groups), smooth)


def _learning_rates(groups: Sequence[Group]) -> Iterator[Picture]:
    for key in schedule_keys(_all(groups)):
        other = quantity(key) != "lr" or key.endswith(("-momentum", "-weight_decay"))  # LearningRateMonitor's names
        title, unit = (key, key) if other else (f"Learning rate, {key}", "learning rate")
        panel = _panel(groups, key, title, unit)
        if panel.curves:
            yield curves(key, key, [replace(panel, linear=True)], _marks(groups), 1)


def _measured(
    groups: Sequence[Group], quantities: Sequence[str], smooth: int | None, band: tuple[float, float]
) -> Iterator[Picture]:
    """The total of each quantity as curves, and its layers as a picture a group."""
    runs = _all(groups)
    shown = [name for name in quantities if not _nothing(runs, name)]
    for name in shown:
        heading, unit = QUANTITIES[name]
        panel = _panel(groups, f"{name}/total", f"{heading}, all layers", unit)
        if panel.curves:
            panel = replace(panel, band=band if name == "update_ratio" else None)
            yield curves(name, panel.title, [panel], _marks(groups), smooth)
    for name in shown:
        heading, unit = QUANTITIES[name]
        limits = band if name == "update_ratio" else None
        yield from layers(f"{name}-layers", heading, unit, groups[:HEAT_MAPS], name, limits)


def _panel(groups: Sequence[Group], key: str, title: str, unit: str) -> Panel:
    # A legend says which group a line is, also where the others did not log it; one group needs none.
    lines = [_curve(group.name if groups[1:] else "", index, group, key) for index, group in enumerate(groups)]
    return Panel(title, unit, tuple(line for line in lines if line.runs))


def _curve(name: str, index: int, group: Group, key: str) -> Curve:
    logged = (run.series.get(key, {}) for run in group.runs)
    return Curve(name, *styles(index), tuple(series for series in logged if any(map(drawable, series.values()))))


def _not_drawn(groups: Sequence[Group]) -> list[str]:
    """What pictures leave out, in words."""
    notes = []
    for run in _all(groups):
        curved = (key for key in run.series if quantity(key) in (None, "lr") or key.endswith("/total"))
        lost = [key for key in curved if not any(map(drawable, run.series[key].values()))]
        if lost:
            notes.append(f"{run.name}: no value is finite of {', '.join(lost)}, which have no curves.")
    layered = {quantity(key) for run in _all(groups[HEAT_MAPS:]) for key in run.series if not key.endswith("/total")}
    if layered & QUANTITIES.keys():
        shown = f"the first {HEAT_MAPS} of {len(groups)} runs or groups"
        notes.append(f"Pictures of layers are of {shown}; the other {len(groups) - HEAT_MAPS} have none.")
    return notes


def _marks(groups: Sequence[Group]) -> list[tuple[str, str, list[int]]]:
    """Events of each group, in its colour."""
    marks = []
    for index, group in enumerate(groups):
        colour = styles(index)[0] if len(groups) > 1 else "#333333"
        for key in dict.fromkeys(key for run in group.runs for key in run.series if quantity(key) == "event"):
            happened = {step for run in group.runs for step, value in run.series.get(key, {}).items() if value > 0}
            if happened:
                marks.append((key.partition("/")[2], colour, sorted(happened)))
    return marks
