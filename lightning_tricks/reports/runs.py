"""What a run logged: found on disk and read, the same whoever wrote it."""

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, islice
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from lightning_tricks.functional.checks import message
from lightning_tricks.reports.offline import FILES, read_offline

Series: TypeAlias = Mapping[int, float]
"""Step -> value, in the order of the steps."""
Runs: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, Any]"
ROWS = 1000
"""Rows of a table that are turned to columns at a time."""
WHERE = "Give a folder of Lightning's CSVLogger (metrics.csv), an offline W&B run (offline-run-*), or one above them"


@dataclass(frozen=True)
class Run:
    """One training as it was logged.

    Args:
        name: what it is called in the report.
        path: where it was read.
        series: key -> step -> value; a step that was logged twice has the later value.
        settings: the run's hyperparameters, nested as they were logged.
        group: the name that the user gave to runs that differ by their seed; None without one.
        notes: sentences on what was left out.
    """

    name: str
    path: Path
    series: Mapping[str, Series]
    settings: Mapping[str, Any]
    group: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def tricks(self) -> Mapping[str, Any]:
        """The settings of the callbacks of this package, by their names."""
        tricks = self.settings.get("tricks")
        return tricks if isinstance(tricks, Mapping) else {}


def read_runs(owner: str, runs: Runs) -> list[Run]:
    """Every run that the paths lead to, with names that tell them apart.

    Args:
        owner: function named in an error.
        runs: a path, several, or names of groups with a path or several each.
    Raises:
        TypeError: what is no path.
        ValueError: a path without a log, and a log that cannot be read.
        ImportError: a W&B run, without W&B.
    """
    named: list[tuple[str | None, Path]]
    if isinstance(runs, Mapping):
        named = [(str(name), path) for name, paths in runs.items() for path in _listed(owner, paths)]
    else:
        named = [(None, path) for path in _listed(owner, runs)]
    if not named:
        raise ValueError(message(owner, "runs", "at least one run", runs, WHERE))
    read = [run for group, path in named for run in _read_below(owner, path, group)]
    return _told_apart(read)


def natural(text: str) -> list[tuple[int, int, str]]:
    """Key that sorts `layers.2` before `layers.10`, as a model's layers follow each other."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def _listed(owner: str, paths: Any) -> list[Path]:
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    if not isinstance(several, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in several):
        raise TypeError(message(owner, "runs", "a path, several, or a dict of name -> path(s)", paths, WHERE))
    return [Path(path) for path in several]


def _read_below(owner: str, path: Path, group: str | None) -> list[Run]:
    if not path.exists():
        raise ValueError(message(owner, "runs", "paths that exist", str(path), WHERE))
    if path.is_file():
        return [_read_offline(owner, [path], group) if path.match(FILES) else _read_csv(owner, path, group)]
    logs = _below(path, "metrics.csv")
    offline = _below(path, FILES)
    if logs:
        full = [log for log in logs if log.stat().st_size]
        runs = [_read_csv(owner, log, group) for log in full or logs[:1]]
        words = [f"{log} is empty, and left out." for log in logs if log not in full]
        if offline:
            words.append(
                f"{len(offline)} W&B run(s) below {path} are left out, since CSV logs are there too: give their folder."
            )
        return [replace(runs[0], notes=(*runs[0].notes, *words)), *runs[1:]]
    if not offline:
        raise ValueError(message(owner, "runs", "folders with a log", str(path), WHERE))
    # A resumed run has a folder for each of its parts; the id, which both names end with, is the same.
    parts: dict[str, list[Path]] = {}
    for file in offline:
        parts.setdefault(file.stem, []).append(file)
    read = [_read_offline(owner, files, group) for files in parts.values()]
    return sorted(read, key=lambda run: natural(run.name))  # of two runs of one second the folders say no order


def _below(folder: Path, pattern: str) -> list[Path]:
    # Links below the folder are not followed: W&B's latest-run would be there twice.
    found = {path.resolve(): path for path in folder.rglob(pattern)}
    return sorted(found.values(), key=lambda path: natural(str(path)))


def _told_apart(runs: list[Run]) -> list[Run]:
    """Runs of one name are called by where they lie below the folder that holds all."""
    names = [run.name for run in runs]
    above = os.path.commonpath([run.path.absolute() for run in runs])
    return [replace(run, name=os.path.relpath(run.path, above)) if names.count(run.name) > 1 else run for run in runs]


# ---------------------------------------------------------------------- CSV


def _read_csv(owner: str, path: Path, group: str | None) -> Run:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # with the mark that spreadsheets write
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(message(owner, "runs", "files that can be read", str(path), f"{error}")) from error
    if not text:
        fix = "It is empty: nothing was logged, or nothing yet"
        raise ValueError(message(owner, "runs", "logs that hold something", str(path), fix))
    notes = []
    lines = text.splitlines()
    if len(lines) > 1 and not text.endswith("\n"):
        lines.pop()
        notes.append(f"{path}: its last row was cut off, and is left out.")
    columns, lost, twice = _csv_columns(owner, path, lines)
    if lost:
        shown = ", ".join(map(str, lost[:10])) + (", ..." if lost[10:] else "")
        notes.append(f"{path}: {len(lost)} damaged line(s) are left out: {shown}.")
    series, words = _numbers(columns)
    notes += [f"{path}: {word}" for word in words]
    notes += [f"{path}: of several columns named {key} the last is shown." for key in twice]
    settings, note = _hparams(owner, path.parent)
    return Run(path.parent.absolute().name, path.parent, series, settings, group, (*notes, *note))


def _csv_columns(
    owner: str, path: Path, lines: list[str]
) -> tuple[dict[str, Iterable[tuple[int, str]]], list[int], list[str]]:
    """Steps with their texts for each key, the numbers of the lines that are none, and keys of several columns."""
    # What a machine that lost power leaves; csv of Python 3.10 stops at it.
    reader = csv.reader(["damaged" if "\0" in line else line for line in lines])
    steps: list[int] = []
    lost = []
    try:
        head = next(reader, [])
        if "step" not in head:
            fix = "That is how Lightning's CSVLogger writes it"
            raise ValueError(message(owner, "runs", "logs with a column 'step'", str(path), fix))
        columns: list[list[str]] = [[] for _ in head]
        rows = ((reader.line_num, row) for row in reader if row)
        while some := list(islice(rows, ROWS)):  # turned while they are near: a million rows at once take seconds
            kept = []
            for line, row in some:
                step = _step(row[head.index("step")]) if len(row) == len(head) else None
                if step is None:
                    lost.append(line)
                else:
                    steps.append(step)
                    kept.append(row)
            for column, texts in zip(columns, zip(*kept, strict=True), strict=False):
                column.extend(texts)
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        raise ValueError(message(owner, "runs", "tables that can be read", where, f"{error}")) from error
    if lost and not steps:
        where = f"{path}, line {lost[0]}"
        fix = "It was damaged, or written by another program"
        raise ValueError(message(owner, "runs", "tables with a step and one value a column", where, fix))
    named = {key: texts for key, texts in zip(head, columns, strict=True) if key not in ("step", "epoch")}
    cells: dict[str, Iterable[tuple[int, str]]]
    cells = {key: zip(compress(steps, texts), filter(None, texts), strict=True) for key, texts in named.items()}
    return cells, lost, [key for key in dict.fromkeys(head) if head.count(key) > 1]


def _step(text: str) -> int | None:
    """A step; None of what is none. Beyond 2**53 neighbours are the same as numbers of a picture."""
    try:
        step = int(float(text))
    except (OverflowError, ValueError):
        return None
    return step if abs(step) <= 2**53 else None


class _Plain(yaml.SafeLoader):
    """Reads the objects of Python that Lightning may have written as what they hold, and makes none."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.unknown: list[str] = []


def _as_plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return node.value or suffix.partition(":")[2]


def _as_unknown(loader: _Plain, tag: str, node: yaml.Node) -> Any:
    loader.unknown.append(tag)
    return _as_plain(loader, tag, node)


_Plain.add_multi_constructor("tag:yaml.org,2002:python/", _as_plain)
_Plain.add_multi_constructor(None, _as_unknown)


def _hparams(owner: str, folder: Path) -> tuple[Mapping[str, Any], list[str]]:
    """The settings, and what is to be said of them."""
    path = folder / "hparams.yaml"
    if not path.exists():
        return {}, []
    try:
        loader = _Plain(path.read_text(encoding="utf-8"))
        settings = loader.get_single_data()
    except (OSError, ValueError, yaml.YAMLError) as error:
        fix = f"{error}. Repair or remove it".replace("\n", " ")
        raise ValueError(message(owner, "runs", "settings that YAML can read", str(path), fix)) from error
    tags = ", ".join(dict.fromkeys(loader.unknown))
    notes = [f"{path}: of values with the unknown tag {tags} what they hold is shown."] if tags else []
    return settings if isinstance(settings, dict) else {}, notes


# ---------------------------------------------------------------------- W&B


def _read_offline(owner: str, files: list[Path], group: str | None) -> Run:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    settings: dict[str, Any] = {}
    notes = []
    name = files[0].stem
    for file in files:
        part = read_offline(owner, file)
        rows += part.rows
        settings |= part.settings
        name = part.name or name
        if part.cut_off:
            notes.append(f"{file}: the run is not finished or was killed; what it had written by then is shown.")
    series, words = in_steps(rows)
    notes += [f"{files[0]}: {word}" for word in words]
    return Run(name, files[-1].parent, series, settings, group, tuple(notes))


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
