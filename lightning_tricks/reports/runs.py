"""What a run logged: found on disk and read, the same whoever wrote it."""

import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, TypeAlias

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.metric_names import better
from lightning_tricks.reports.offline import FILES, read_offline
from lightning_tricks.reports.settings import flatten
from lightning_tricks.reports.tables import read_table

Series: TypeAlias = Mapping[int, float]
"""Step -> value, in the order of the steps."""
Runs: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, Any]"
WHERE = "Give a folder of Lightning's CSVLogger (metrics.csv), an offline W&B run (offline-run-*), or one above them"
WORDS = re.compile(r"[\w ,.:/+-]*")
"""Settings that both loggers write alike: numbers and names, and not what Python prints of an object."""


@dataclass(frozen=True)
class Run:
    """One training as it was logged.

    Args:
        name: what it is called in the report.
        path: where it was read.
        series: key -> step -> value; a step that was logged twice has the later value.
        settings: the run's hyperparameters, nested as they were logged.
        group: the name that the user gave to runs that are summed up together; None without one.
        notes: sentences on what was left out.
        offline: whether W&B wrote it.
    """

    name: str
    path: Path
    series: Mapping[str, Series]
    settings: Mapping[str, Any]
    group: str | None = None
    notes: tuple[str, ...] = ()
    offline: bool = False

    @property
    def tricks(self) -> Mapping[str, Any]:
        """The settings of the callbacks of this package, by their names."""
        tricks = self.settings.get("tricks")
        return tricks if isinstance(tricks, Mapping) else {}


def read_runs(owner: str, runs: Runs) -> list[Run]:
    """Every run that the paths lead to, with names that tell them apart.

    A run counts once: if several paths lead to it, and if CSVLogger and W&B both logged it. Of several runs those that
    cannot be read are left out, with a warning.

    Args:
        owner: function named in an error.
        runs: a path, several, or names of groups with a path or several each.
    Raises:
        TypeError: what is no path.
        ValueError: a path without a log, and logs of which none can be read.
        ImportError: W&B runs alone, without W&B.
    """
    named: list[tuple[str | None, Path]]
    if isinstance(runs, Mapping):
        named = [(str(name), path) for name, paths in runs.items() for path in _listed(owner, paths)]
    else:
        named = [(None, path) for path in _listed(owner, runs)]
    if not named:
        raise ValueError(message(owner, "runs", "at least one run", runs, WHERE))
    read, lost = _read_all(owner, named)
    if not read:
        raise lost[0]
    notes = [f"Left out: {str(error).removeprefix(f'{owner}: ')}" for error in lost]
    if notes:
        warnings.warn("\n".join(f"{owner}: {note}" for note in notes), stacklevel=3)
    twice = [any(_same_training(run, other) for other in read) for run in read]
    if any(twice):
        names = ", ".join(run.name for run in compress(read, twice))
        notes.append(f"{sum(twice)} W&B run(s) are left out, since CSV logs have the same numbers: {names}.")
    first, *others = _told_apart([run for run, other in zip(read, twice, strict=True) if not other])
    return [replace(first, notes=(*first.notes, *notes)), *others]


def is_rate(key: str) -> bool:
    """Whether a key is that of a learning rate."""
    return bool(re.match(r"(lr|learning_rate)([-_/]|$)", key)) and better(key) is None


def natural(text: str) -> list[tuple[int, int, str]]:
    """Key that sorts `layers.2` before `layers.10`, as a model's layers follow each other."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def _listed(owner: str, paths: Any) -> list[Path]:
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    if not isinstance(several, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in several):
        raise TypeError(message(owner, "runs", "a path, several, or a dict of name -> path(s)", paths, WHERE))
    return [Path(path) for path in several]


def _read_all(owner: str, named: Sequence[tuple[str | None, Path]]) -> tuple[list[Run], list[ValueError | ImportError]]:
    """The runs that the paths of each group lead to, each once, and why others cannot be read."""
    found: dict[tuple[Any, ...], tuple[int, list[Path]]] = {}
    for number, (group, path) in enumerate(named):
        for file in _logs(owner, path):
            whole = file.resolve()
            # A resumed W&B run has a folder for each of its parts, side by side; the id, the file's name, is the same.
            same = (whole.parent.parent, whole.name) if file.match(FILES) else (whole,)
            files = found.setdefault((group, *same), (number, []))[1]
            if whole not in [other.resolve() for other in files]:
                files.append(file)
    read: list[tuple[int, Run]] = []
    lost: list[ValueError | ImportError] = []
    for (group, *_), (number, files) in found.items():
        try:
            read.append((number, _read(owner, sorted(files, key=_by_name), group, lost)))
        except (ImportError, ValueError) as error:
            lost.append(error)
    # Of two W&B runs of one second the folders say no order.
    read.sort(key=lambda each: (each[0], each[1].offline, natural(each[1].name) if each[1].offline else []))
    return [run for _, run in read], lost


def _logs(owner: str, path: Path) -> list[Path]:
    """The files that a path leads to: CSV logs, then those of W&B."""
    if not path.exists():
        raise ValueError(message(owner, "runs", "paths that exist", str(path), WHERE))
    if path.is_file():
        return [path]
    found = [*_below(path, "metrics.csv"), *_below(path, FILES)]
    if not found:
        raise ValueError(message(owner, "runs", "folders with a log", str(path), WHERE))
    return found


def _by_name(path: Path) -> list[tuple[int, int, str]]:
    return natural(str(path))


def _below(folder: Path, pattern: str) -> list[Path]:
    # Links below the folder are not followed: W&B's latest-run would be there twice.
    found = {path.resolve(): path for path in folder.rglob(pattern)}
    return sorted(found.values(), key=_by_name)


def _read(owner: str, files: Sequence[Path], group: str | None, lost: list[ValueError | ImportError]) -> Run:
    """A run from its file, or the parts of it that can be read; why others cannot be is added to what is lost."""
    path = files[0]
    if path.match(FILES):
        return _read_offline(owner, files, group, lost)
    table = read_table(owner, path)
    series, words = _numbers(table.columns)
    notes = (*table.notes, *(f"{path}: {word}" for word in words))
    return Run(path.parent.absolute().name, path.parent, series, table.settings, group, notes)


def _read_offline(owner: str, files: Sequence[Path], group: str | None, lost: list[ValueError | ImportError]) -> Run:
    parts, damaged = [], []
    for file in files:
        try:
            parts.append((file, read_offline(owner, file)))
        except ValueError as error:
            damaged.append(error)
    if not parts:
        raise damaged[0]
    lost += damaged
    notes = []
    for file, part in parts:
        if part.cut_off:
            notes.append(f"{file}: the run is not finished or was killed; what it had written by then is shown.")
    series, words = in_steps([row for _, part in parts for row in part.rows])
    notes += [f"{files[0]}: {word}" for word in words]
    name = next((part.name for _, part in reversed(parts) if part.name), files[0].stem)
    settings = {key: value for _, part in parts for key, value in part.settings.items()}
    return Run(name, parts[-1][0].parent, series, settings, group, tuple(notes), offline=True)


def _same_training(run: Run, other: Run) -> bool:
    """Whether a W&B run and a CSV log are of one training: all values that both have are equal, and there are some.

    Both write numbers in full. Rates and what is not finite may be equal in different trainings, and do not count; nor
    does anything where settings differ.
    """
    if not run.offline or other.offline or run.group != other.group:
        return False
    known = flatten(other.settings)
    settings = {name: value for name, value in flatten(run.settings).items() if known.get(name, value) != value}
    if any(WORDS.fullmatch(value) and WORDS.fullmatch(known[name]) for name, value in settings.items()):
        return False
    keys = sorted(run.series.keys() & other.series.keys(), key=lambda key: len(run.series[key]))  # the quick ones first
    found = False
    for key in keys:
        ours, theirs = run.series[key], other.series[key]
        for step in ours.keys() & theirs.keys():
            if ours[step] != theirs[step] and not (math.isnan(ours[step]) and math.isnan(theirs[step])):
                return False
            found = found or (math.isfinite(ours[step]) and not is_rate(key))
    return found


def _told_apart(runs: list[Run]) -> list[Run]:
    """Runs of one name are called by where they lie below the folder that holds all."""
    names = [run.name for run in runs]
    above = os.path.commonpath([run.path.absolute() for run in runs])
    return [replace(run, name=os.path.relpath(run.path, above)) if names.count(run.name) > 1 else run for run in runs]


def in_steps(rows: Sequence[tuple[int, Mapping[str, Any]]]) -> tuple[dict[str, Series], list[str]]:
    """Sort rows into series.

    Args:
        rows: step and what was logged there, in the order of writing.
    Returns:
        Key -> step -> value, the last one written at a step, and sentences on what is left out.
    Example:
        >>> in_steps([(4, {"loss": "0.5"}), (2, {"loss": 1, "text": "abc"}), (4, {"loss": 0.25})])
        ({'loss': {2: 1.0, 4: 0.25}}, ['text is left out, since it holds no plain numbers.'])
    """
    columns: dict[str, list[tuple[int, Any]]] = {}
    for step, row in rows:
        for key, value in row.items():
            columns.setdefault(key, []).append((step, value))
    return _numbers(columns)


def _numbers(columns: Mapping[str, Iterable[tuple[int, Any]]]) -> tuple[dict[str, Series], list[str]]:
    """The numbers of each column in the order of their steps, and sentences on what is none."""
    series: dict[str, Series] = {}
    notes = []
    for key in sorted(columns, key=natural):
        found: dict[int, float] = {}
        others = []
        for step, value in columns[key]:
            try:
                found[step] = float(value)
            except (TypeError, ValueError):
                others.append((step, value))
        if found:
            series[key] = {step: found[step] for step in sorted(found)}
        if found and others:
            shown = ", ".join(f"{value!r} (step {step})" for step, value in others[:3])
            shown += f", ... ({len(others)})" if others[3:] else ""
            notes.append(f"of {key} these are no numbers, and left out: {shown}.")
        elif others:
            notes.append(f"{key} is left out, since it holds no plain numbers.")
    return series, notes
