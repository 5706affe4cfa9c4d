"""The format of one segment, and its reading side.

A segment is a folder: `segment.json` (written once), one flat file per column (preallocated, row after row), `meta.bin`
(JSON bytes of each trajectory) and `index.bin`, the commit log: one 64-byte record per trajectory. Data is written
before its records, so that what a record names is complete. A group of records becomes visible as a whole: each says
how many follow it.
"""

from __future__ import annotations

import fcntl
import json
import os
import weakref
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from amago_offline.sampling import TrajectoryTable, pack_rows
from amago_offline.schema import OBS_PREFIX, PREV_ACTION, PREV_REWARD, Schema, Trajectory

FORMAT = 1
HEADER_FILE = "segment.json"
INDEX_FILE = "index.bin"
META_FILE = "meta.bin"
TERMINATED, TRUNCATED = 1, 2

RECORD = np.dtype(
    [
        ("sequence", "<i8"),  # arrival number over all segments of the store
        ("row", "<i8"),  # first timestep
        ("timesteps", "<i8"),
        ("time_idx", "<i8"),  # of the first timestep
        ("meta_offset", "<i8"),
        ("meta_length", "<u4"),
        ("flags", "<u4"),  # of the last transition
        ("remaining", "<u8"),  # records of the same commit that follow
        ("check", "<u8"),
    ]
)
_WORDS = RECORD.itemsize // 8
# Odd multipliers and a salt: a record of zeros, a torn one or a shifted one does not pass.
_MULTIPLIERS = (np.arange(1, _WORDS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
_SALT = np.uint64(0xA3A6_0FF1_1E50_5EED)


def _checksums(records: np.ndarray) -> np.ndarray:
    """`[N]` uint64 checksums of records."""
    words = records.view("<u8").reshape(-1, _WORDS)
    return (words[:, :-1] * _MULTIPLIERS).sum(axis=1, dtype=np.uint64) + _SALT


def seal_records(records: np.ndarray) -> bytes:
    """One commit: fill `remaining` and `check` of a group of records and return its bytes."""
    records = np.ascontiguousarray(records)
    records["remaining"] = np.arange(len(records) - 1, -1, -1)
    records["check"] = _checksums(records)
    return records.tobytes()


def committed_records(data: bytes) -> np.ndarray:
    """The records of all whole commits at the front of the bytes of an index."""
    records = np.frombuffer(data, RECORD, count=len(data) // RECORD.itemsize)
    if not len(records):
        return records
    wrong = np.flatnonzero((records["check"] != _checksums(records)) | (records["timesteps"] < 2))
    records = records[: wrong[0]] if len(wrong) else records
    ends = np.flatnonzero(records["remaining"] == 0)
    return records[: ends[-1] + 1] if len(ends) else records[:0]


def column_file(column: str) -> str:
    """File name of a column; any observation key gives a valid, unique one."""
    return quote(column, safe="") + ".bin"


def read_header(directory: Path) -> dict[str, Any]:
    """The contents of `segment.json`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not one of this format.
    """
    header: dict[str, Any] = json.loads((directory / HEADER_FILE).read_text())
    if header.get("format") != FORMAT:
        raise ValueError(f"format of segment {directory} must be {FORMAT}, got {header.get('format')!r}")
    return header


def has_live_writer(directory: Path) -> bool:
    """Whether a process holds this segment open for writing."""
    try:
        descriptor = os.open(directory / INDEX_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class Segment:
    """Read access to one segment: its committed records and memory-mapped columns.

    Args:
        directory: folder of the segment.
        schema: the fields of the store.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if its header or its files do not fit.
    """

    def __init__(self, directory: Path, schema: Schema) -> None:
        self.directory = directory
        self.name = directory.name
        self._schema = schema
        self.capacity = int(read_header(directory)["capacity"])
        self.records = np.empty(0, RECORD)
        self.limit: int | None = None
        # Held open, so that a segment that its owner evicts in the meantime can still be read.
        self._meta = os.open(directory / META_FILE, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._meta)
        self._packed: dict[str, np.ndarray] = {}
        self._typed: dict[str, np.ndarray] = {}
        for name, column in schema.columns.items():
            shape = (self.capacity, *column.shape)
            mapped = np.memmap(directory / column_file(name), column.numpy_dtype, mode="r", shape=shape)
            self._typed[name] = np.asarray(mapped)
            self._packed[name] = pack_rows(self._typed[name])
        self.refresh()

    def refresh(self) -> bool:
        """Read commits made since the last call.

        Returns:
            Whether anything changed.

        Raises:
            FileNotFoundError: if the segment was deleted or moved away.
        """
        known = len(self.records)
        start = max(known - 1, 0)
        with open(self.directory / INDEX_FILE, "rb") as file:
            file.seek(start * RECORD.itemsize)
            data = file.read()
            # The last known record is read again: a resumed run may have rewritten the index from an earlier point on.
            if known and data[: RECORD.itemsize] != self.records[-1:].tobytes():
                file.seek(0)
                self.records = committed_records(file.read())
                return True
        fresh = committed_records(data[RECORD.itemsize :] if known else data)
        if len(fresh):
            self.records = np.concatenate([self.records, fresh])
        return bool(len(fresh))

    @property
    def visible(self) -> np.ndarray:
        """`[N]` records that may be sampled: all committed ones, or as many as `limit` says."""
        return self.records[: self.limit]

    def packed(self, column: str) -> np.ndarray:
        """`[capacity]` view of a column in which one item is the bytes of one timestep."""
        return self._packed[column]

    def read(self, position: int) -> Trajectory:
        """A copy of one trajectory.

        Args:
            position: index of its record.

        Returns:
            The trajectory with its metadata.
        """
        record = self.records[position]
        meta = json.loads(os.pread(self._meta, int(record["meta_length"]), int(record["meta_offset"])))
        return self.slice(
            row=int(record["row"]),
            timesteps=int(record["timesteps"]),
            time_idx=int(record["time_idx"]),
            flags=int(record["flags"]),
            meta=meta,
        )

    def slice(self, *, row: int, timesteps: int, time_idx: int, flags: int, meta: dict[str, Any]) -> Trajectory:
        """Rows `row .. row + timesteps` as a trajectory of copies."""
        columns = {
            name: np.array(self._typed[name][row : row + timesteps], dtype=column.dtype)
            for name, column in self._schema.columns.items()
        }
        terminated, truncated = np.zeros((2, timesteps), np.bool_)
        terminated[-1], truncated[-1] = flags & TERMINATED, flags & TRUNCATED
        return Trajectory(
            obs={key: columns[OBS_PREFIX + key] for key in self._schema.obs},
            prev_action=columns[PREV_ACTION],
            prev_reward=columns[PREV_REWARD],
            terminated=terminated,
            truncated=truncated,
            time_idx=np.arange(time_idx, time_idx + timesteps, dtype=np.int64),
            meta=meta,
        )


def build_table(segments: list[Segment]) -> TrajectoryTable:
    """The visible trajectories of segments, in order of arrival; `source` is the position of a segment in the list."""
    visible = [segment.visible for segment in segments]
    records = np.concatenate(visible) if visible else np.empty(0, RECORD)
    source = np.repeat(np.arange(len(segments)), [len(part) for part in visible])
    order = np.argsort(records["sequence"], kind="stable")
    records, source = records[order], source[order]
    return TrajectoryTable(
        sequence=records["sequence"].astype(np.int64),
        source=source.astype(np.int64),
        row=records["row"].astype(np.int64),
        transitions=records["timesteps"].astype(np.int64) - 1,
        time_idx=records["time_idx"].astype(np.int64),
        terminated=(records["flags"] & TERMINATED) != 0,
        truncated=(records["flags"] & TRUNCATED) != 0,
    )
