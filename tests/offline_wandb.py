"""Read an offline W&B run back from disk: what was logged, row by row, and the run's configuration."""

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7


def payloads(data: bytes) -> Any:
    """The whole payloads of a LevelDB-style log: chunks in blocks of 32 KiB, each with checksum, length and kind."""
    position, parts = FILE_HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        if kind == 0:
            position += left
            continue
        if position + HEADER + length > len(data):  # a chunk that is being written right now
            return
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            yield parts
            parts = b""


def _finished(folder: Path, patience: float = 60.0) -> list[wandb_internal_pb2.Record]:
    """All records of a run, once its last is there: W&B writes them from another process, the file itself too."""
    end = time.monotonic() + patience
    while True:
        records = []
        for payload in (payload for path in folder.glob("*.wandb") for payload in payloads(path.read_bytes())):
            records.append(wandb_internal_pb2.Record())
            records[-1].ParseFromString(payload)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < end, f"the run was not finished: {folder}"
        time.sleep(0.05)


def read_run(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows in the order they were logged, and the configuration."""
    rows, config = [], {}
    for record in _finished(folder):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
        update = record.config.update if kind == "config" else record.run.config.update if kind == "run" else []
        config.update({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in update})
    return rows, config


def read_metrics(folder: Path) -> dict[str, Any]:
    """What was said of metrics, by their names."""
    records = [record.metric for record in _finished(folder) if record.WhichOneof("record_type") == "metric"]
    return {record.name or record.glob_name: record for record in records}


def read_alerts(folder: Path) -> list[tuple[str, str, str]]:
    """Title, text and level of each alert."""
    alerts = [record.alert for record in _finished(folder) if record.WhichOneof("record_type") == "alert"]
    return [(alert.title, alert.text, alert.level) for alert in alerts]


def runs(folder: Path) -> list[Path]:
    """The folders of the offline runs below a folder."""
    return sorted(path for path in folder.rglob("offline-run-*") if path.is_dir() and not path.is_symlink())
