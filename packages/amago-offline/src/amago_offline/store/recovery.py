"""Taking a store back to a recorded view: exact resume after a crash.

Order of the steps: check everything, bring evicted segments back, then set aside what came later. Each is one rename or
follows a finished copy, so that a process killed in between can simply do it again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from amago_offline.store.directory import EVICTED, SAMPLED_AREAS, SET_ASIDE, StoreDirectory
from amago_offline.store.segment import INDEX_FILE, Segment, committed_records, has_live_writer
from amago_offline.store.writer import SegmentWriter

Counts = Mapping[tuple[str, str], int]


def locate(store: StoreDirectory, counts: Counts) -> dict[tuple[str, str], str]:
    """Find every segment of a recorded view, changing nothing.

    Args:
        store: the store.
        counts: visible trajectories by (area, name).

    Returns:
        The area each segment lies in now: its own, or "evicted".

    Raises:
        ValueError: if a segment is gone or holds fewer trajectories than recorded.
    """
    present = {area: set(store.segments(area)) for area in (*SAMPLED_AREAS, EVICTED)}
    places = {}
    for (area, name), count in counts.items():
        place = next((place for place in (area, EVICTED) if name in present.get(place, ())), None)
        if place is None:
            raise ValueError(
                f"state names segment {area}/{name}, which is neither in the store at {str(store.path)!r} "
                "nor among its evicted segments (deleted by purge?)"
            )
        held = len(_records(store.area(place) / name))
        if held < count:
            raise ValueError(f"state needs {count} trajectories of segment {area}/{name}, the store holds {held}")
        places[area, name] = place
    return places


def _records(directory: Path) -> list[object]:
    try:
        return list(committed_records((directory / INDEX_FILE).read_bytes()))
    except FileNotFoundError:
        return []


def restore(store: StoreDirectory, counts: Counts, *, fsync: bool = False) -> int:
    """Make the sampled areas hold a recorded view and, beyond it, only what live writers are still adding to.

    Args:
        store: the store; no writer of this process may be open on it.
        counts: visible trajectories by (area, name).
        fsync: write copies through to the device before the originals are dropped.

    Returns:
        Number of trajectories set aside.

    Raises:
        ValueError: as `locate`; nothing is changed then.
    """
    for (area, name), place in locate(store, counts).items():
        if place != area:
            store.move(name, place, area)
    moved = 0
    for area in SAMPLED_AREAS:
        for name in store.segments(area):
            directory = store.area(area) / name
            if has_live_writer(directory):
                continue
            held, wanted = len(_records(directory)), counts.get((area, name), 0)
            if (area, name) not in counts:
                store.move(name, area, SET_ASIDE)
            elif held > wanted:
                _split(store, directory, wanted, fsync)
            moved += held - wanted
    return moved


def _split(store: StoreDirectory, directory: Path, keep: int, fsync: bool) -> None:
    """Copy the trajectories after the first `keep` into a segment under `set_aside`, then drop them here."""
    segment, staging = Segment(directory, store.schema), store.area(SET_ASIDE) / ".tmp"
    late = segment.records[keep:]
    writer = SegmentWriter.create(staging, store.schema, int(late["timesteps"].sum()))
    try:
        for position in range(keep, len(segment.records)):
            writer.append(segment.read(position))
        writer.commit(late["sequence"], fsync=fsync)
    finally:
        writer.abandon()
    store.move(writer.name, f"{SET_ASIDE}/{staging.name}", SET_ASIDE)
    shutil.rmtree(staging)
    SegmentWriter.reopen(directory, store.schema, keep).abandon()
