"""The folder of a store: layout, schema file, arrival numbers, and moving segments between areas.

```
<path>/store.json              format and schema, written once
<path>/sequence                next arrival number, changed under a lock
<path>/fifo/<segment>/         what actors write; evicted first in, first out
<path>/protected/<segment>/    sampled too, never evicted
<path>/evicted/<segment>/      out of sampling, kept until `purge`
<path>/set_aside/<segment>/    appended after the state a run was resumed from; never deleted
```
Moving a segment is one rename: a process killed at any point leaves it in exactly one area.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from amago_offline.schema import Schema

FORMAT = 1
FIFO, PROTECTED, EVICTED, SET_ASIDE = "fifo", "protected", "evicted", "set_aside"
SAMPLED_AREAS = (FIFO, PROTECTED)
STORE_FILE = "store.json"
SEQUENCE_FILE = "sequence"
_NAME = re.compile(r"\d{16,20}-[0-9a-f]{16}")
_DELETING = ".deleting-"


def new_segment_name() -> str:
    """A fresh `<created in ns>-<16 hex>`; nothing is ever read out of it."""
    return f"{time.time_ns():016d}-{secrets.token_hex(8)}"


def fsync_directory(path: Path) -> None:
    """Make the entries of a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StoreDirectory:
    """Opens a store, or creates it.

    Args:
        path: folder of the store; made with its parents if it does not exist.
        schema: the fields of its trajectories; `None` takes those of an existing store.

    Raises:
        ValueError: if the store holds another schema (nothing is changed), or does not exist and `schema` is None.
        OSError: if the folder cannot be made or written.
    """

    def __init__(self, path: str | os.PathLike[str], schema: Schema | None = None) -> None:
        self.path = Path(path)
        stored = self._read_schema()
        if stored is None:
            if schema is None:
                raise ValueError(f"path must hold a trajectory store when no schema is given, got {str(self.path)!r}")
            stored = self._create(schema)
        if schema is not None and schema != stored:
            raise ValueError(
                f"schema must equal that of the existing store at {str(self.path)!r}: "
                f"got {json.dumps(schema.to_json())}, the store holds {json.dumps(stored.to_json())}"
            )
        self.schema = stored

    def _read_schema(self) -> Schema | None:
        try:
            data = json.loads((self.path / STORE_FILE).read_text())
        except FileNotFoundError:
            return None
        if data.get("format") != FORMAT:
            raise ValueError(f"format of the store at {str(self.path)!r} must be {FORMAT}, got {data.get('format')!r}")
        return Schema.from_json(data["schema"])

    def _create(self, schema: Schema) -> Schema:
        """Write the schema unless another process did so first; returns what is on disk."""
        for area in (FIFO, PROTECTED, EVICTED, SET_ASIDE):
            (self.path / area).mkdir(parents=True, exist_ok=True)
        with self._lock():
            stored = self._read_schema()
            if stored is not None:
                return stored
            temporary = self.path / f".tmp-{secrets.token_hex(8)}"
            with open(temporary, "w") as file:
                json.dump({"format": FORMAT, "schema": schema.to_json()}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / STORE_FILE)
        fsync_directory(self.path)
        return schema

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int]:
        """Hold the lock of the store; yields a descriptor of the sequence file."""
        descriptor = os.open(self.path / SEQUENCE_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def reserve(self, count: int, *, at_least: int = 0) -> int:
        """Take arrival numbers.

        Args:
            count: how many, >= 0.
            at_least: the first is no smaller; repairs a lost sequence file.

        Returns:
            The first of `count` consecutive numbers that no one else gets.
        """
        with self._lock() as descriptor:
            first = max(int.from_bytes(os.pread(descriptor, 8, 0), "little"), at_least)
            os.pwrite(descriptor, (first + count).to_bytes(8, "little"), 0)
        return first

    def area(self, area: str) -> Path:
        """Folder of an area."""
        return self.path / area

    def segments(self, area: str) -> list[str]:
        """Names of the segments in an area, sorted; unknown and temporary names are ignored."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self.path / area) if _NAME.fullmatch(name))
        return []

    def move(self, name: str, source: str, target: str) -> None:
        """Move a segment to another area, atomically."""
        (self.path / target).mkdir(exist_ok=True)
        os.rename(self.path / source / name, self.path / target / name)

    def delete_evicted(self, names: set[str]) -> int:
        """Delete evicted segments, and what an earlier deletion left behind.

        Args:
            names: which ones; those not there are ignored.

        Returns:
            Number of segments deleted.
        """
        area, doomed = self.path / EVICTED, names.intersection(self.segments(EVICTED))
        for name in doomed:
            # Renamed first: a deletion cut short must not leave a half segment under a valid name.
            os.rename(area / name, area / (_DELETING + name))
        with contextlib.suppress(FileNotFoundError):
            for entry in os.listdir(area):
                if entry.startswith(_DELETING):
                    shutil.rmtree(area / entry)
        return len(doomed)
