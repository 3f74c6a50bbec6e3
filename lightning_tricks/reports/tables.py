"""A log of Lightning's CSVLogger: its table, and the settings beside it."""

import csv
from collections.abc import Iterable, Mapping
from itertools import compress, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml

from lightning_tricks.functional.checks import message

ROWS = 1000
"""Rows of a table that are turned to columns at a time."""
Columns: TypeAlias = "dict[str, Iterable[tuple[int, str]]]"


class Table(NamedTuple):
    """What a folder holds: steps with their texts for each key, settings, and sentences on what was left out."""

    columns: Columns
    settings: Mapping[str, Any]
    notes: list[str]


def read_table(owner: str, path: Path) -> Table:
    """Read a `metrics.csv`, and the `hparams.yaml` beside it.

    Args:
        owner: function named in an error.
        path: the table.
    Raises:
        ValueError: the table or the settings cannot be read, or not one whole line is there.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # with the mark that spreadsheets write
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(message(owner, "runs", "files that can be read", str(path), f"{error}")) from error
    notes = []
    lines = text.splitlines()
    if lines and not text.endswith("\n"):
        lines.pop()
        notes.append(f"{path}: its last row was cut off, and is left out.")
    if not lines:
        fix = "It is empty, or its first line is cut off: nothing was logged, or nothing yet"
        raise ValueError(message(owner, "runs", "logs that hold something", str(path), fix))
    columns, lost, twice = _columns(owner, path, lines)
    if lost:
        shown = ", ".join(map(str, lost[:10])) + (", ..." if lost[10:] else "")
        notes.append(f"{path}: {len(lost)} damaged line(s) are left out: {shown}.")
    notes += [f"{path}: of several columns named {key} the last is shown." for key in twice]
    settings, words = _hparams(owner, path.parent)
    return Table(columns, settings, notes + words)


def _columns(owner: str, path: Path, lines: list[str]) -> tuple[Columns, list[int], list[str]]:
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
    cells: Columns = {
        key: zip(compress(steps, texts), filter(None, texts), strict=True) for key, texts in named.items()
    }
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
        self.deep_construct = True  # so that what holds itself is an error


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
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        fix = f"{error}. Repair or remove it".replace("\n", " ")
        raise ValueError(message(owner, "runs", "settings that YAML can read", str(path), fix)) from error
    tags = ", ".join(dict.fromkeys(loader.unknown))
    notes = [f"{path}: of values with the unknown tag {tags} what they hold is shown."] if tags else []
    return settings if isinstance(settings, dict) else {}, notes
