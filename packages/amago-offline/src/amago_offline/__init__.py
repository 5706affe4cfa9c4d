"""Experience for sequence-model RL: a crash-safe trajectory store, window sampling and datasets.

Names are loaded on first use, so `import amago_offline` does not import torch; only `Batch`, and therefore `sample`,
needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amago_offline.batch import Batch
    from amago_offline.datasets.base import Dataset, EmptyDatasetError
    from amago_offline.datasets.in_memory import InMemoryDataset
    from amago_offline.datasets.replay import ReplayConfig, ReplayDataset
    from amago_offline.relabel import Relabeler
    from amago_offline.schema import Field, Schema, Trajectory, discrete_action_field

__all__ = [
    "Batch",
    "Dataset",
    "EmptyDatasetError",
    "Field",
    "InMemoryDataset",
    "Relabeler",
    "ReplayConfig",
    "ReplayDataset",
    "Schema",
    "Trajectory",
    "discrete_action_field",
]

_HOMES = {
    "Batch": "batch",
    "Dataset": "datasets.base",
    "EmptyDatasetError": "datasets.base",
    "Field": "schema",
    "InMemoryDataset": "datasets.in_memory",
    "Relabeler": "relabel",
    "ReplayConfig": "datasets.replay",
    "ReplayDataset": "datasets.replay",
    "Schema": "schema",
    "Trajectory": "schema",
    "discrete_action_field": "schema",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that holds it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Public names, also those not loaded yet."""
    return sorted({*globals(), *__all__})
