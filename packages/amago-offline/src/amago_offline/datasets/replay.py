"""The replay buffer: a dataset on disk that many processes may write and read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amago_offline.datasets.base import TableDataset
from amago_offline.relabel import Relabeler
from amago_offline.sampling import TrajectoryTable, check_padding, check_weighting
from amago_offline.schema import Schema, Trajectory
from amago_offline.store.directory import EVICTED, FIFO, PROTECTED, StoreDirectory
from amago_offline.store.reader import StoreReader
from amago_offline.store.recovery import locate, restore
from amago_offline.store.segment import Segment, has_live_writer
from amago_offline.store.writer import StoreWriter

# A limit is cut into about this many segments, so that evicting one removes a small part.
SEGMENTS_PER_LIMIT = 16
SEGMENT_BYTES = 1 << 30
MAX_SEGMENT_TIMESTEPS = 1 << 20
STATE_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Settings of a `ReplayDataset`.

    Attributes:
        max_trajectories: evict the oldest segments while more unprotected trajectories are visible; None: no limit.
        max_timesteps: the same for timesteps.
        padding: "none", "left", "right" or "both"; only "both" draws every transition equally often.
        weighting: "trajectory" draws trajectories uniformly, "transition" in proportion to their length.
        min_trajectories: `ready` from this many on, protected ones included.
        segment_timesteps: rows of a segment; None: a sixteenth of `max_timesteps`, or about 1 GiB. Eviction
            removes whole segments.
        commit_every: commit by itself after this many appended trajectories.
        fsync: make commits survive a power cut, and reach other machines on a network file system; without it they
            survive the death of any process.
        can_delete: this process owns the store: it evicts, sets aside and purges. One owner at a time.
    """

    max_trajectories: int | None = None
    max_timesteps: int | None = None
    padding: str = "none"
    weighting: str = "trajectory"
    min_trajectories: int = 1
    segment_timesteps: int | None = None
    commit_every: int = 1
    fsync: bool = False
    can_delete: bool = True

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: if a number is below 1, a mode is unknown, or a segment is larger than the buffer.
        """
        for name in ("max_trajectories", "max_timesteps", "min_trajectories", "segment_timesteps", "commit_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        check_padding(self.padding)
        check_weighting(self.weighting)
        if self.max_timesteps and self.segment_timesteps and self.segment_timesteps > self.max_timesteps:
            raise ValueError(
                f"segment_timesteps must be at most max_timesteps ({self.max_timesteps}), got {self.segment_timesteps}"
            )
        if self.max_trajectories is not None and self.min_trajectories > self.max_trajectories:
            raise ValueError(
                f"min_trajectories must be at most max_trajectories ({self.max_trajectories}), "
                f"got {self.min_trajectories}"
            )

    def build(
        self, path: str | os.PathLike[str], schema: Schema | None = None, *, relabeler: Relabeler | None = None
    ) -> ReplayDataset:
        """Open or create the dataset at `path`; see `ReplayDataset`."""
        return ReplayDataset(path, schema, relabeler=relabeler, **asdict(self))


class ReplayDataset(TableDataset):
    """Trajectories in memory-mapped segments on disk.

    Own trajectories are visible as soon as they are committed, those of other processes from the next `refresh` on.
    Sampling gathers from memory maps and never lists a folder.

    Args:
        path: folder of the store; created if it does not exist.
        schema: the fields; None takes those of an existing store.
        relabeler: rewrites each drawn trajectory before its window is cut.
        **settings: see `ReplayConfig`.

    Raises:
        ValueError: if a setting is out of range, or the store holds another schema.
        OSError: if the folder cannot be made or written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        schema: Schema | None = None,
        *,
        relabeler: Relabeler | None = None,
        **settings: Any,
    ) -> None:
        self.config = ReplayConfig(**settings)
        self._store = StoreDirectory(path, schema)
        super().__init__(
            self._store.schema,
            padding=self.config.padding,
            weighting=self.config.weighting,
            min_trajectories=self.config.min_trajectories,
            relabeler=relabeler,
        )
        self.path = self._store.path
        self._reader = StoreReader(self._store)
        # The sequence file may be older than the segments after a power cut.
        self._store.reserve(0, at_least=self._reader.last_sequence + 1)
        self._writers = {area: self._new_writer(area) for area in (FIFO, PROTECTED)}
        self._purgeable: set[str] | None = None

    def _new_writer(self, area: str) -> StoreWriter:
        config = self.config
        rows = config.segment_timesteps
        if rows is None:
            rows = max(1, min(SEGMENT_BYTES // self.schema.row_bytes, MAX_SEGMENT_TIMESTEPS))
            if config.max_timesteps is not None:
                rows = min(rows, -(-config.max_timesteps // SEGMENTS_PER_LIMIT))
        count = config.max_trajectories
        return StoreWriter(
            self._store,
            area=area,
            segment_timesteps=rows,
            segment_trajectories=None if count is None else -(-count // SEGMENTS_PER_LIMIT),
            commit_every=config.commit_every,
            fsync=config.fsync,
        )

    @property
    def table(self) -> TrajectoryTable:
        """The visible trajectories in order of arrival."""
        return self._reader.table

    @property
    def sources(self) -> list[Segment]:
        """The segments that hold them."""
        return self._reader.sources

    def trajectory(self, index: int) -> Trajectory:
        """A copy of the visible trajectory at `index` in order of arrival, with its metadata."""
        return self._reader.read(index)

    def append(self, trajectory: Trajectory, *, protected: bool = False) -> None:
        """Write a trajectory; visible after the next commit, which comes by itself every `commit_every` of them.

        Args:
            trajectory: anything that conforms to the schema.
            protected: put it where eviction never reaches and limits do not count (demonstrations, earlier runs).

        Raises:
            ValueError: if it does not fit the schema.
            OSError: if it cannot be written; what was appended before is unharmed.
        """
        area = PROTECTED if protected else FIFO
        try:
            self._writers[area].append(trajectory)
        finally:
            self._note(area)

    def commit(self) -> None:
        """Make everything appended visible, here and to other processes.

        Raises:
            OSError: if it cannot be written; it may be tried again.
        """
        for area, writer in self._writers.items():
            writer.commit()
            self._note(area)

    def _note(self, area: str) -> None:
        for name in self._writers[area].take_touched():
            self._reader.note(area, name)

    def refresh(self) -> None:
        """See what other processes have committed."""
        self._reader.refresh()

    def end_of_collection(self, epoch: int) -> dict[str, float]:
        """Commit, refresh and, if `can_delete`, evict.

        Args:
            epoch: the epoch that collected; only a name here.

        Returns:
            Metrics: visible `trajectories`, `timesteps`, `transitions`, `protected_trajectories`, `segments`, and
            `evicted_trajectories` of this call.
        """
        self.commit()
        self.refresh()
        evicted = self.evict() if self.config.can_delete else 0
        table, items = self.table, self._reader.items()
        return {
            "trajectories": len(table),
            "timesteps": table.total_transitions + len(table),
            "transitions": table.total_transitions,
            "protected_trajectories": sum(len(segment.visible) for (area, _), segment in items if area == PROTECTED),
            "segments": len(items),
            "evicted_trajectories": evicted,
        }

    def evict(self) -> int:
        """Take the oldest segments out of sampling while the buffer is over a limit.

        Segments being written, here or elsewhere, and protected ones stay. Nothing is deleted before `purge`.

        Returns:
            Number of trajectories evicted.
        """
        segments = {name: segment for (area, name), segment in self._reader.items() if area == FIFO}
        trajectories = sum(len(segment.visible) for segment in segments.values())
        timesteps = sum(int(segment.visible["timesteps"].sum()) for segment in segments.values())
        evicted = 0
        for name, segment in sorted(segments.items(), key=lambda item: int(item[1].visible["sequence"][0])):
            if not (_over(trajectories, self.config.max_trajectories) or _over(timesteps, self.config.max_timesteps)):
                break
            if has_live_writer(segment.directory):
                continue
            count, rows = len(segment.visible), int(segment.visible["timesteps"].sum())
            self._store.move(name, FIFO, EVICTED)
            self._reader.forget(FIFO, name)
            trajectories, timesteps, evicted = trajectories - count, timesteps - rows, evicted + count
        return evicted

    def purge(self, keep: Sequence[dict[str, Any]] = ()) -> int:
        """Delete evicted segments that the last `state_dict` does not need: call it once that state is safely written.

        Segments evicted after the last `state_dict` are kept until the next one; without any, all are deleted.

        Args:
            keep: older states that must stay loadable too.

        Returns:
            Number of segments deleted.
        """
        if not self.config.can_delete:
            return 0
        names = set(self._store.segments(EVICTED)) if self._purgeable is None else self._purgeable
        return self._store.delete_evicted(names - {entry["name"] for state in keep for entry in state["segments"]})

    def describe(self) -> dict[str, Any]:
        """What this dataset is and holds, JSON-able."""
        return {**self._describe("replay"), "path": str(self.path), "config": asdict(self.config)}

    def state_dict(self) -> dict[str, Any]:
        """Commit, and record exactly which trajectories are visible and where writing goes on.

        Returns:
            A JSON-able dict for `load_state_dict`; it holds no data, only segment names and counts.
        """
        self.commit()
        self._purgeable = set(self._store.segments(EVICTED))
        counts = self._reader.counts()
        return {
            "kind": "replay",
            "format": STATE_FORMAT,
            "schema": self.schema.to_json(),
            "segments": [{"area": area, "name": name, "trajectories": n} for (area, name), n in counts.items()],
            "open": {area: writer.open_segment for area, writer in self._writers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a recorded view, and continue writing where that one did.

        Evicted segments of the view come back. Trajectories committed after it by processes that have ended are moved
        to `set_aside/`; those of processes that are still writing stay and become visible with the next `refresh`. What
        is appended here and not committed is lost. With `can_delete=False` only this process's view changes.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: if the state is not one of this store or part of it was purged; nothing is changed then.
        """
        if state.get("kind") != "replay" or state.get("format") != STATE_FORMAT:
            raise ValueError(
                f"state must be of kind 'replay' and format {STATE_FORMAT}, "
                f"got {state.get('kind')!r} and {state.get('format')!r}"
            )
        if Schema.from_json(state["schema"]) != self.schema:
            raise ValueError(f"state must be of schema {self.schema.to_json()}, got {state['schema']}")
        counts = {(entry["area"], entry["name"]): int(entry["trajectories"]) for entry in state["segments"]}
        places = locate(self._store, counts)
        if not self.config.can_delete:
            lost = sorted(f"{area}/{name}" for (area, name), place in places.items() if place != area)
            if lost:
                raise ValueError(f"state needs segments that were evicted, and can_delete is False: {lost}")
            self._reader.refresh()
            self._reader.limit(counts)
            return
        for writer in self._writers.values():
            writer.abandon()
        restore(self._store, counts, fsync=self.config.fsync)
        for area, writer in self._writers.items():
            name = state["open"].get(area)
            writer.resume(name if (area, name) in counts else None, counts.get((area, name), 0))
        self._reader = StoreReader(self._store)
        self._reader.limit(counts)
        self._purgeable = set(self._store.segments(EVICTED))

    def close(self) -> None:
        """Commit and stop writing; the dataset can still be sampled."""
        self.commit()
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> ReplayDataset:
        """The dataset itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def _over(value: int, limit: int | None) -> bool:
    return limit is not None and value > limit
