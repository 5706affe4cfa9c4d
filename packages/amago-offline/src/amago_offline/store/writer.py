"""Writing: one segment at a time, one writer per segment.

Writes go through `pwrite`, not through the memory map: a full disk or a lost mount is then an `OSError` in the caller's
hands instead of a signal that kills the process. Readers on the same machine see them through the page cache at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from amago_offline.schema import OBS_PREFIX, PREV_ACTION, PREV_REWARD, Schema, Trajectory
from amago_offline.store.directory import FIFO, StoreDirectory, fsync_directory, new_segment_name
from amago_offline.store.segment import (
    FORMAT,
    HEADER_FILE,
    INDEX_FILE,
    META_FILE,
    RECORD,
    TERMINATED,
    TRUNCATED,
    column_file,
    committed_records,
    read_header,
    seal_records,
)

_open_writers: weakref.WeakSet[SegmentWriter] = weakref.WeakSet()
_fork_hook_set = False


def _close_in_child() -> None:
    """After a fork: drop inherited descriptors, or the child would keep the segment locked after its writer's death."""
    for writer in list(_open_writers):
        writer.abandon()


def _close_all(files: dict[str, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def _write_all(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """`pwrite` until everything is written."""
    view = memoryview(data).cast("B")
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


class SegmentWriter:
    """Appends trajectories to one segment and holds its lock.

    Use `create` or `reopen`.
    """

    def __init__(self, directory: Path, schema: Schema, records: int) -> None:
        global _fork_hook_set
        if not _fork_hook_set:
            os.register_at_fork(after_in_child=_close_in_child)
            _fork_hook_set = True
        self.directory = directory
        self.name = directory.name
        self._schema = schema
        self.capacity = int(read_header(directory)["capacity"])
        self._files: dict[str, int] = {}
        weakref.finalize(self, _close_all, self._files)
        try:
            self._files[INDEX_FILE] = self._open(INDEX_FILE)
            try:
                fcntl.flock(self._files[INDEX_FILE], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(error.errno, f"another process is writing segment {directory}") from error
            for name in (META_FILE, *map(column_file, schema.columns)):
                self._files[name] = self._open(name)
            self._rewind(records)
        except BaseException:
            self.abandon()
            raise
        _open_writers.add(self)

    def _open(self, name: str) -> int:
        return os.open(self.directory / name, os.O_RDWR | os.O_CLOEXEC)

    def _rewind(self, records: int) -> None:
        """Continue after the first `records` committed records; later ones must have been copied elsewhere."""
        index = self._files[INDEX_FILE]
        kept = committed_records(os.pread(index, os.fstat(index).st_size, 0))[:records]
        if len(kept) != records:
            raise ValueError(f"records must be at most {len(kept)}, those committed to {self.directory}, got {records}")
        os.ftruncate(index, records * RECORD.itemsize)
        self.records = records
        self.rows = int(kept["row"][-1] + kept["timesteps"][-1]) if records else 0
        self._meta_bytes = int(kept["meta_offset"][-1] + kept["meta_length"][-1]) if records else 0
        self._pending: list[tuple[int, ...]] = []

    @classmethod
    def create(cls, area: Path, schema: Schema, capacity: int, *, name: str | None = None) -> SegmentWriter:
        """Make a new segment.

        Args:
            area: folder to make it in.
            schema: the fields of the store.
            capacity: rows to preallocate (sparse: they take no disk space until written).
            name: name of the segment; a fresh one by default.

        Returns:
            Its writer.

        Raises:
            OSError: if it cannot be written.
        """
        target = area / (name or new_segment_name())
        temporary = area / f".tmp-{target.name}"
        temporary.mkdir(parents=True)
        try:
            sizes = {column_file(key): value.row_bytes * capacity for key, value in schema.columns.items()}
            for file_name, size in {**sizes, INDEX_FILE: 0, META_FILE: 0}.items():
                with open(temporary / file_name, "wb") as file:
                    file.truncate(size)
            header = {"format": FORMAT, "capacity": capacity}
            (temporary / HEADER_FILE).write_text(json.dumps(header))
            writer = cls(temporary, schema, 0)
            try:
                os.rename(temporary, target)
            except BaseException:
                writer.abandon()
                raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        writer.directory, writer.name = target, target.name
        return writer

    @classmethod
    def reopen(cls, directory: Path, schema: Schema, records: int) -> SegmentWriter:
        """Continue a segment after its first `records` records.

        Raises:
            BlockingIOError: if another process is writing it.
            ValueError: if it holds fewer records.
        """
        return cls(directory, schema, records)

    @property
    def pending(self) -> int:
        """Trajectories appended and not yet committed."""
        return len(self._pending)

    def append(self, trajectory: Trajectory) -> None:
        """Write a trajectory that already conforms to the schema; invisible until `commit`.

        Raises:
            OSError: if it cannot be written; the segment is as it was before.
        """
        row, length = self.rows, len(trajectory)
        columns = {OBS_PREFIX + key: value for key, value in trajectory.obs.items()}
        columns.update({PREV_ACTION: trajectory.prev_action, PREV_REWARD: trajectory.prev_reward})
        meta = trajectory.encoded_meta()
        for name, column in self._schema.columns.items():
            data = np.ascontiguousarray(columns[name], column.numpy_dtype)
            _write_all(self._descriptor(column_file(name)), data.data, row * column.row_bytes)
        _write_all(self._descriptor(META_FILE), meta, self._meta_bytes)
        flags = TERMINATED * bool(trajectory.terminated[-1]) | TRUNCATED * bool(trajectory.truncated[-1])
        self._pending.append((0, row, length, int(trajectory.time_idx[0]), self._meta_bytes, len(meta), flags, 0, 0))
        self.rows += length
        self._meta_bytes += len(meta)

    def commit(self, sequences: Sequence[int] | np.ndarray, *, fsync: bool = False) -> None:
        """Make the pending trajectories visible, all at once.

        Args:
            sequences: their arrival numbers.
            fsync: write everything through to the device, in the order that survives a power cut.

        Raises:
            OSError: if it cannot be written; nothing became visible and `commit` may be tried again.
        """
        if not self._pending:
            return
        records = np.array(self._pending, RECORD)
        records["sequence"] = sequences
        if fsync:
            for name, descriptor in self._files.items():
                if name != INDEX_FILE:
                    os.fsync(descriptor)
        index = self._descriptor(INDEX_FILE)
        _write_all(index, seal_records(records), self.records * RECORD.itemsize)
        if fsync:
            os.fsync(index)
            if not self.records:
                fsync_directory(self.directory)
                fsync_directory(self.directory.parent)
        self.records += len(self._pending)
        self._pending = []

    def _descriptor(self, name: str) -> int:
        if not self._files:
            raise RuntimeError(f"the writer of segment {self.name} is closed (after a fork, open the store again)")
        return self._files[name]

    def abandon(self) -> None:
        """Close without committing; what is pending is lost."""
        _close_all(self._files)


class StoreWriter:
    """Appends trajectories to an area of a store, beginning a new segment when one is full.

    Args:
        store: the store.
        area: "fifo" or "protected".
        segment_timesteps: rows of a segment; a longer trajectory gets a segment of its own.
        segment_trajectories: most trajectories of a segment, if limited.
        commit_every: commit by itself after this many appended trajectories.
        fsync: make each commit survive a power cut, not only the death of the process.

    Raises:
        ValueError: if one of the numbers is below 1.
    """

    def __init__(
        self,
        store: StoreDirectory,
        *,
        area: str = FIFO,
        segment_timesteps: int,
        segment_trajectories: int | None = None,
        commit_every: int = 1,
        fsync: bool = False,
    ) -> None:
        for name, value in (
            ("segment_timesteps", segment_timesteps),
            ("segment_trajectories", segment_trajectories),
            ("commit_every", commit_every),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self._store = store
        self.area = area
        self._segment_timesteps = segment_timesteps
        self._segment_trajectories = segment_trajectories
        self._commit_every = commit_every
        self._fsync = fsync
        self._segment: SegmentWriter | None = None
        self._appended = 0
        self._touched: list[str] = []

    @property
    def open_segment(self) -> str | None:
        """Name of the segment being written."""
        return self._segment.name if self._segment else None

    def append(self, trajectory: Trajectory) -> None:
        """Write one trajectory; visible to samplers after the next commit, or earlier if that fills a segment.

        Args:
            trajectory: anything that conforms to the schema.

        Raises:
            ValueError: if it does not fit the schema.
            OSError: if it cannot be written, or was written and cannot be committed: then it waits for the next commit.
        """
        trajectory = trajectory.conform(self._store.schema)
        segment = self._with_room(len(trajectory))
        segment.append(trajectory)
        self._appended += 1
        if self._appended >= self._commit_every:
            self.commit()

    def _with_room(self, length: int) -> SegmentWriter:
        """The open segment, or a new one if that is full."""
        segment = self._segment
        if segment is not None:
            limit = self._segment_trajectories
            counted = segment.records + segment.pending
            if segment.rows + length <= segment.capacity and (limit is None or counted < limit):
                return segment
            self._publish()
            self._segment = None
            segment.abandon()
        capacity = max(self._segment_timesteps, length)
        self._segment = SegmentWriter.create(self._store.area(self.area), self._store.schema, capacity)
        return self._segment

    def commit(self) -> None:
        """Publish everything appended so far.

        Raises:
            OSError: if it cannot be written; nothing became visible and it may be tried again.
        """
        self._publish()
        self._appended = 0

    def _publish(self) -> None:
        """Commit the open segment."""
        segment = self._segment
        if segment is None or not segment.pending:
            return
        count = segment.pending
        first = self._store.reserve(count)
        segment.commit(np.arange(first, first + count), fsync=self._fsync)
        if segment.name not in self._touched:
            self._touched.append(segment.name)

    def take_touched(self) -> list[str]:
        """Names of the segments committed to since the last call."""
        touched, self._touched = self._touched, []
        return touched

    def resume(self, name: str | None, records: int = 0) -> None:
        """Drop what is pending and continue a segment at a recorded position.

        Args:
            name: the segment, or None to begin a new one with the next append.
            records: committed records to continue after.
        """
        self.abandon()
        if name is not None:
            self._segment = SegmentWriter.reopen(self._store.area(self.area) / name, self._store.schema, records)

    def abandon(self) -> None:
        """Close without committing; what is pending is lost."""
        segment, self._segment = self._segment, None
        self._touched, self._appended = [], 0
        if segment is not None:
            segment.abandon()

    def close(self) -> None:
        """Commit and close."""
        self.commit()
        self.abandon()
