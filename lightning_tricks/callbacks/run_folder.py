"""A folder of snapshots that is one run's alone, in which a killed process loses nothing that was there."""

import itertools
import json
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import lightning.pytorch as pl

from lightning_tricks.ensembles import MANIFEST
from lightning_tricks.functional.checks import message

T = TypeVar("T")
Row = dict[str, Any]
"""What a manifest tells of a snapshot: its file, its step, and more."""


def on_rank_zero(trainer: pl.Trainer, call: Callable[[], T]) -> T:
    """What a function gives on rank 0, on all ranks; so is its error, since the others would wait for ever.

    Args:
        trainer: with the ranks.
        call: called on rank 0.
    """
    outcome: Any = None
    if trainer.is_global_zero:
        try:
            outcome = call()
        except (OSError, ValueError, RuntimeError) as error:
            outcome = error
    outcome = trainer.strategy.broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    result: T = outcome
    return result


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that its name never stands for a part of it, whenever the process is killed.

    Args:
        path: the file; replaced if it is there.
        write: called with the open file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the new name is lost with the power
    finally:
        os.close(folder)


def claim(
    owner: str,
    directory: str | None,
    recorded: str | None,
    run: str | None,
    default: Path,
    read: Callable[[Path], dict[str, Any]],
) -> tuple[Path, str]:
    """The folder that is a run's, or becomes it.

    Args:
        owner: callback named in errors.
        directory: what the user gave.
        recorded: where the run has written so far.
        run: name of the run; None for a new one.
        default: where to, if nobody says; a new run makes a new folder beside it if need be.
        read: reads a folder's manifest.
    Returns:
        The folder, which is there, and the run's name.
    Raises:
        ValueError: it has another run's snapshots.
    """
    if run is None:
        folder = _new_folder(default) if directory is None else Path(directory)
        found = read(folder)["snapshots"] if (folder / MANIFEST).is_file() else []
        if found:
            got = f"{len(found)} snapshots of another run in {folder}"
            fix = "Give another directory, delete this one, or resume that run with ckpt_path"
            raise ValueError(message(owner, "directory", "a folder for this run alone", got, fix))
    else:
        folder = Path(directory or recorded or default)
        if (folder / MANIFEST).is_file() and read(folder)["run"] != run:
            fix = f"Give the directory that the run began with ({recorded})"
            raise ValueError(message(owner, "directory", "that of the run that is resumed", str(folder), fix))
    folder.mkdir(parents=True, exist_ok=True)
    return folder, run or uuid.uuid4().hex


def missing(folder: Path, rows: list[Row]) -> list[str]:
    """The files of snapshots that are gone.

    Args:
        folder: where they were.
        rows: the snapshots.
    """
    return [row["file"] for row in rows if not (folder / row["file"]).is_file()]


def refuse_missing(owner: str, folder: Path, gone: list[str], recorded: str | None) -> None:
    """Raise if files are gone.

    Args:
        owner: callback named in the error.
        folder: where they should be.
        gone: their names.
        recorded: where the run has written so far.
    Raises:
        ValueError: some are.
    """
    if gone:
        fix = f"Put them back from {recorded}, or begin anew"
        raise ValueError(message(owner, "directory", f"one with {', '.join(gone)}", str(folder), fix))


def later_files(folder: Path, rows: list[Row]) -> set[str]:
    """Snapshots in a folder beside those of the run so far.

    Args:
        folder: the run's.
        rows: its snapshots.
    """
    return {path.name for path in folder.glob("snapshot-step=*.pt")} - {row["file"] for row in rows}


def half_written(folder: Path) -> set[str]:
    """What a killed process was writing.

    Args:
        folder: any.
    """
    return {path.name for path in folder.glob(".*.tmp") if path.name.startswith((".snapshot-step=", f".{MANIFEST}"))}


def write_manifest(folder: Path, entries: dict[str, Any], rows: list[Row], dropped: set[str]) -> list[Row]:
    """Let the manifest name these snapshots, and only then delete files.

    Args:
        folder: the run's.
        entries: what else it tells, as its format and the run.
        rows: the snapshots.
        dropped: names of files to be deleted.
    Returns:
        The snapshots.
    """
    versions = {name: str(sys.modules[name].__version__) for name in ("lightning_tricks", "torch", "lightning")}
    text = json.dumps({**entries, "versions": versions, "snapshots": rows}, indent=1, allow_nan=False).encode()
    write_whole(folder / MANIFEST, lambda file: file.write(text))
    for name in dropped:
        (folder / name).unlink(missing_ok=True)
    return rows


def _new_folder(first: Path) -> Path:
    """The first of `snapshots`, `snapshots-2`, ... that is not there, made by this process."""
    for count in itertools.count(1):
        folder = first if count == 1 else first.with_name(f"{first.name}-{count}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        break
    return folder
