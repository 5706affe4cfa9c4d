"""Datasets: where a learner's batches come from."""

from amago_offline.datasets.base import Dataset, EmptyDatasetError, TableDataset
from amago_offline.datasets.in_memory import InMemoryDataset
from amago_offline.datasets.replay import ReplayConfig, ReplayDataset

__all__ = ["Dataset", "EmptyDatasetError", "InMemoryDataset", "ReplayConfig", "ReplayDataset", "TableDataset"]
