"""Reading: the committed trajectories of all segments, in order of arrival."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from amago_offline.sampling import TrajectoryTable
from amago_offline.schema import Trajectory
from amago_offline.store.directory import SAMPLED_AREAS, StoreDirectory
from amago_offline.store.segment import Segment, build_table


class StoreReader:
    """A view of a store that changes only when asked to.

    Args:
        store: the store.
        areas: which areas to read.
    """

    def __init__(self, store: StoreDirectory, areas: Sequence[str] = SAMPLED_AREAS) -> None:
        self._store = store
        self.areas = tuple(areas)
        self._segments: dict[tuple[str, str], Segment] = {}
        self._broken: set[tuple[str, str]] = set()
        self._noted: dict[tuple[str, str], None] = {}
        self._view: tuple[list[Segment], TrajectoryTable] | None = None
        self.refresh()

    def refresh(self) -> None:
        """See what all writers have committed since, and forget segments that were moved away."""
        found = {(area, name) for area in self.areas for name in self._store.segments(area)}
        for key in set(self._segments) - found:
            self.forget(*key)
        self._noted.clear()
        for key in sorted(found - self._broken):
            self._load(*key)
        for segment in self._segments.values():
            if segment.limit is not None:
                segment.limit, self._view = None, None

    def note(self, area: str, name: str) -> None:
        """See the new commits of one segment from the next access on, without listing anything."""
        self._noted[area, name] = None

    def _settle(self) -> None:
        """Load the noted segments: once, however many commits they saw."""
        while self._noted:
            key = next(iter(self._noted))
            self._load(*key)
            self._noted.pop(key, None)

    def _load(self, area: str, name: str) -> None:
        key = (area, name)
        try:
            if key not in self._segments:
                self._segments[key] = Segment(self._store.area(area) / name, self._store.schema)
                self._view = None
            elif self._segments[key].refresh():
                self._view = None
        except FileNotFoundError:
            # Evicted by its owner between the listing and now, or unreadable for good; either way nothing to sample.
            self.forget(area, name)
        except ValueError as error:
            self._broken.add(key)
            warnings.warn(f"segment {area}/{name} is damaged and is left out: {error}", RuntimeWarning, stacklevel=4)

    def forget(self, area: str, name: str) -> None:
        """Leave a segment out of the view."""
        self._noted.pop((area, name), None)
        if self._segments.pop((area, name), None) is not None:
            self._view = None

    def limit(self, counts: dict[tuple[str, str], int]) -> None:
        """Show exactly the first `counts[area, name]` trajectories of each segment, none of others, until `refresh`.

        A segment shown in full stays open for commits noted by `note`.
        """
        for key, segment in self._segments.items():
            count = counts.get(key, 0)
            segment.limit = None if count == len(segment.records) else count
        self._view = None

    def counts(self) -> dict[tuple[str, str], int]:
        """Visible trajectories of each segment by (area, name), in order of arrival; empty segments are left out."""
        order = sorted(self.items(), key=lambda item: int(item[1].visible["sequence"][0]))
        return {key: len(segment.visible) for key, segment in order}

    def items(self) -> list[tuple[tuple[str, str], Segment]]:
        """Segments that show at least one trajectory, by (area, name)."""
        self._settle()
        return [(key, segment) for key, segment in self._segments.items() if len(segment.visible)]

    @property
    def sources(self) -> list[Segment]:
        """The segments that `table.source` indexes."""
        return self._current()[0]

    @property
    def table(self) -> TrajectoryTable:
        """The visible trajectories in order of arrival."""
        return self._current()[1]

    def _current(self) -> tuple[list[Segment], TrajectoryTable]:
        self._settle()
        if self._view is None:
            segments = list(self._segments.values())
            self._view = segments, build_table(segments)
        return self._view

    @property
    def last_sequence(self) -> int:
        """Highest arrival number seen, visible or not; -1 if there is none."""
        return max((int(s.records["sequence"][-1]) for s in self._segments.values() if len(s.records)), default=-1)

    def read(self, index: int) -> Trajectory:
        """A copy of one trajectory.

        Args:
            index: position in `table`.

        Returns:
            The trajectory with its metadata.
        """
        segments, table = self._current()
        segment = segments[int(table.source[index])]
        return segment.read(int(np.searchsorted(segment.records["sequence"], table.sequence[index])))
