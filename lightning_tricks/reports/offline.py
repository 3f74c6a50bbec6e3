"""Read a W&B run from the folder it was written to, without a login or a network."""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning_tricks.functional.checks import message

IDENT, BLOCK, HEADER, FILE_HEADER = b":W&B", 32768, 7, 7
FILES = "*.wandb"
"""How the file of a run is called."""
STEP = "trainer/global_step"
"""Lightning's name of the step of a row."""


class OfflineRun(NamedTuple):
    """What one file holds: name, steps with their rows, settings, and whether its end is missing."""

    name: str
    rows: list[tuple[int, dict[str, Any]]]
    settings: dict[str, Any]
    cut_off: bool


def read_offline(owner: str, path: Path) -> OfflineRun:
    """Read the `*.wandb` file of a run.

    A row's step is Lightning's `trainer/global_step`; a row without one, logged by hand, has that of the row before.
    Of a run without any it is W&B's own `_step`.

    Args:
        owner: function named in an error.
        path: the file.
    Raises:
        ImportError: W&B, which has the format, is not installed.
        ValueError: the file is damaged, or something else.
    """
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise ImportError(f'{owner} needs wandb to read {path}: pip install "lightning-tricks[wandb]".') from error
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(message(owner, "runs", "files that can be read", str(path), f"{error}")) from error
    if not data.startswith(IDENT):
        raise ValueError(message(owner, "runs", "files that W&B wrote", str(path), "Give the folder of an offline run"))
    name, cut_off = "", True
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    try:
        for payload in _records(data):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(payload)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                rows.append(_row(record.history.item))
            elif kind == "run":
                name = record.run.display_name or name
                _update(settings, record.run.config)
            elif kind == "config":
                _update(settings, record.config)
            elif kind == "exit":
                cut_off = False
        on_steps = list(_on_steps(rows))
    except Exception as error:  # protobuf's implementations have errors of their own
        fix = f"It is damaged: {error}. Take its CSV log, or leave it out"
        raise ValueError(message(owner, "runs", "W&B runs that can be read", str(path), fix)) from error
    settings.pop("_wandb", None)
    return OfflineRun(name, on_steps, settings, cut_off)


def _records(data: bytes) -> Iterator[bytes]:
    """The payloads of a LevelDB log: chunks in blocks of 32 KiB, each with checksum, length and kind."""
    position, parts = FILE_HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        if left < HEADER or kind == length == 0:  # what is left of a block is filled with zeros
            position += left
            continue
        position += HEADER + length
        if position > len(data):
            return
        if zlib.crc32(data[position - length - 1 : position]) != checksum:  # of the kind and what follows
            if not any(data[position - 1 :]):  # zeros to the end: what a machine that lost power had not written yet
                return
            raise ValueError(f"byte {position - length:,} and those after it are not what was written")
        parts += data[position - length : position]
        if kind in (1, 4):  # a whole record, or the last chunk of one
            yield parts
            parts = b""


def _row(items: Any) -> dict[str, Any]:
    """Names with dots and values, without pictures, histograms and other media: W&B marks them with a `_type`."""
    found = list(_items(items))
    media = [keys[:-1] for keys, _ in found if len(keys) > 1 and keys[-1] == "_type"]
    media += [keys for keys, value in found if isinstance(value, dict) and "_type" in value]
    return {".".join(keys): value for keys, value in found if not any(keys[: len(each)] == each for each in media)}


def _items(items: Any) -> Iterator[tuple[list[str], Any]]:
    for item in items:
        yield list(item.nested_key) or [item.key], json.loads(item.value_json)


def _update(settings: dict[str, Any], change: Any) -> None:
    for keys, value in _items(change.update):
        place = settings
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value


def _on_steps(rows: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    by_hand = not any(STEP in row for row in rows)
    step = 0
    for row in rows:
        step = int(row.get("_step" if by_hand else STEP, step))
        yield step, {key: value for key, value in row.items() if key not in (STEP, "epoch") and key[0] != "_"}
