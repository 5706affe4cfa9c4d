"""A dataset in memory, for tests and small offline sets."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np

from amago_offline.datasets.base import ArraySource, TableDataset, trajectory_columns
from amago_offline.relabel import Relabeler
from amago_offline.sampling import TrajectoryTable
from amago_offline.schema import OBS_PREFIX, PREV_ACTION, PREV_REWARD, Schema, Trajectory


class InMemoryDataset(TableDataset):
    """Trajectories held in memory; same batches as `ReplayDataset` for the same trajectories and generator.

    Args:
        schema: the fields of every trajectory.
        trajectories: the first ones.
        padding: see `TableDataset`.
        weighting: see `TableDataset`.
        min_trajectories: `ready` from this many on.
        relabeler: see `TableDataset`.
    """

    def __init__(
        self,
        schema: Schema,
        trajectories: Iterable[Trajectory] = (),
        *,
        padding: str = "none",
        weighting: str = "trajectory",
        min_trajectories: int = 1,
        relabeler: Relabeler | None = None,
    ) -> None:
        super().__init__(
            schema, padding=padding, weighting=weighting, min_trajectories=min_trajectories, relabeler=relabeler
        )
        self._rows = 0
        self._columns = {name: np.empty((0, *f.shape), f.dtype) for name, f in schema.columns.items()}
        self._entries: list[tuple[int, int, int, bool, bool]] = []
        self._metas: list[dict[str, Any]] = []
        self._table: TrajectoryTable | None = None
        self._source: ArraySource | None = None
        for trajectory in trajectories:
            self.append(trajectory)

    @property
    def sources(self) -> list[ArraySource]:
        """The arrays."""
        if self._source is None:
            self._source = ArraySource(self.schema, self._columns)
        return [self._source]

    @property
    def table(self) -> TrajectoryTable:
        """The trajectories in order of arrival."""
        if self._table is None:
            numbers = np.array([entry[:3] for entry in self._entries], np.int64).reshape(-1, 3)
            flags = np.array([entry[3:] for entry in self._entries], np.bool_).reshape(-1, 2)
            self._table = TrajectoryTable(
                sequence=np.arange(len(numbers)),
                source=np.zeros(len(numbers), np.int64),
                row=numbers[:, 0],
                transitions=numbers[:, 1],
                time_idx=numbers[:, 2],
                terminated=flags[:, 0],
                truncated=flags[:, 1],
            )
        return self._table

    def append(self, trajectory: Trajectory) -> None:
        """Add a copy of a trajectory; visible at once.

        Raises:
            ValueError: if it does not fit the schema.
        """
        trajectory = trajectory.conform(self.schema)
        start, stop = self._rows, self._rows + len(trajectory)
        self._reserve(stop)
        for name, values in trajectory_columns(trajectory).items():
            self._columns[name][start:stop] = values
        ends = bool(trajectory.terminated[-1]), bool(trajectory.truncated[-1])
        self._entries.append((start, trajectory.transitions, int(trajectory.time_idx[0]), *ends))
        self._metas.append(copy.deepcopy(trajectory.meta))
        self._rows, self._table = stop, None

    def _reserve(self, rows: int) -> None:
        """Grow the arrays by doubling."""
        capacity = len(self._columns[PREV_REWARD])
        if rows <= capacity:
            return
        for name, old in self._columns.items():
            self._columns[name] = np.zeros((max(rows, 2 * capacity, 1024), *old.shape[1:]), old.dtype)
            self._columns[name][: self._rows] = old[: self._rows]
        self._source = None

    def trajectory(self, index: int) -> Trajectory:
        """A copy of the trajectory at `index` in order of arrival."""
        start, transitions, time_idx, *ends = self._entries[index]
        rows = slice(start, start + transitions + 1)
        terminated, truncated = np.zeros((2, transitions + 1), np.bool_)
        terminated[-1], truncated[-1] = ends
        return Trajectory(
            obs={key: self._columns[OBS_PREFIX + key][rows].copy() for key in self.schema.obs},
            prev_action=self._columns[PREV_ACTION][rows].copy(),
            prev_reward=self._columns[PREV_REWARD][rows].copy(),
            terminated=terminated,
            truncated=truncated,
            time_idx=np.arange(time_idx, time_idx + transitions + 1),
            meta=copy.deepcopy(self._metas[index]),
        )

    def commit(self) -> None:
        """Nothing to do: trajectories are visible when appended."""

    def end_of_collection(self, epoch: int) -> dict[str, float]:
        """Metrics: numbers of trajectories, timesteps and transitions."""
        table = self.table
        return {
            "trajectories": len(table),
            "timesteps": table.total_transitions + len(table),
            "transitions": table.total_transitions,
        }

    def describe(self) -> dict[str, Any]:
        """What this dataset is and holds, JSON-able."""
        return self._describe("in_memory")

    def state_dict(self) -> dict[str, Any]:
        """The number of trajectories: the data itself lives as long as the process."""
        return {"kind": "in_memory", "trajectories": len(self._entries)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Drop the trajectories appended after `state_dict`.

        Raises:
            ValueError: if the state is of another kind, or of more trajectories than there are.
        """
        count = state.get("trajectories")
        if state.get("kind") != "in_memory" or not isinstance(count, int) or not 0 <= count <= len(self._entries):
            raise ValueError(
                f"state must be of kind 'in_memory' with at most {len(self._entries)} trajectories, got {state}"
            )
        del self._entries[count:], self._metas[count:]
        self._rows = sum(self._entries[-1][:2]) + 1 if self._entries else 0
        self._table = None
