"""Append-only trajectory store of memory-mapped segments, shared by any number of processes."""

from amago_offline.store.directory import StoreDirectory
from amago_offline.store.reader import StoreReader
from amago_offline.store.segment import Segment
from amago_offline.store.writer import StoreWriter

__all__ = ["Segment", "StoreDirectory", "StoreReader", "StoreWriter"]
