"""What a learner needs of a dataset, and the sampling that all datasets of trajectory tables share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from amago_offline.relabel import Relabeler
from amago_offline.sampling import (
    Source,
    TrajectoryTable,
    Windows,
    check_padding,
    check_request,
    check_weighting,
    draw_trajectories,
    draw_windows,
    gather,
    pack_rows,
    table_windows,
)
from amago_offline.schema import OBS_PREFIX, PREV_ACTION, PREV_REWARD, Schema, Trajectory

if TYPE_CHECKING:
    from amago_offline.batch import Batch


class EmptyDatasetError(RuntimeError):
    """A batch was asked of a dataset that holds no trajectory."""


@runtime_checkable
class Dataset(Protocol):
    """Source of batches; knows nothing of the experiment. Implement this to train from data of your own."""

    @property
    def ready(self) -> bool:
        """Whether there is enough to train on."""
        ...

    def sample(self, batch_size: int, length: int, rng: np.random.Generator) -> Batch:
        """Draw a batch.

        Args:
            batch_size: `B` windows.
            length: `W`, most transitions of a window; the batch has `L = W + 1` timesteps.
            rng: the only source of randomness.

        Returns:
            A batch on the CPU.
        """
        ...

    def append(self, trajectory: Trajectory) -> None:
        """Add a trajectory."""
        ...

    def commit(self) -> None:
        """Make everything appended visible and safe."""
        ...

    def end_of_collection(self, epoch: int) -> dict[str, float]:
        """Called once per epoch, after collection: take in what other processes wrote, evict; returns metrics."""
        ...

    def describe(self) -> dict[str, Any]:
        """What this dataset is and holds, JSON-able."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is needed to continue exactly here, JSON-able."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was called."""
        ...


class ArraySource:
    """Rows in memory as a `Source`.

    Args:
        schema: the fields.
        columns: arrays `[N, ...]` by column name, contiguous, in the dtypes of the schema.
    """

    def __init__(self, schema: Schema, columns: dict[str, np.ndarray]) -> None:
        self.columns = columns
        self._packed = {name: pack_rows(columns[name]) for name in schema.columns}

    def packed(self, column: str) -> np.ndarray:
        """`[N]` view of a column in which one item is the bytes of one timestep."""
        return self._packed[column]


def trajectory_columns(trajectory: Trajectory) -> dict[str, np.ndarray]:
    """The arrays of a trajectory by column name."""
    named = {OBS_PREFIX + key: value for key, value in trajectory.obs.items()}
    return {**named, PREV_ACTION: trajectory.prev_action, PREV_REWARD: trajectory.prev_reward}


class TableDataset(ABC):
    """Sampling from a table of trajectories; subclasses say where the rows are.

    Args:
        schema: the fields of every trajectory.
        padding: "none", "left", "right" or "both": how far windows may reach over the ends of a trajectory.
        weighting: "trajectory" draws trajectories uniformly, "transition" in proportion to their length.
        min_trajectories: `ready` from this many on, >= 1.
        relabeler: rewrites each drawn trajectory before its window is cut.

    Raises:
        ValueError: for an unknown padding or weighting, or `min_trajectories < 1`.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        padding: str = "none",
        weighting: str = "trajectory",
        min_trajectories: int = 1,
        relabeler: Relabeler | None = None,
    ) -> None:
        if min_trajectories < 1:
            raise ValueError(f"min_trajectories must be >= 1, got {min_trajectories}")
        self.schema = schema
        self.padding = check_padding(padding)
        self.weighting = check_weighting(weighting)
        self.min_trajectories = min_trajectories
        self.relabeler = relabeler

    @property
    @abstractmethod
    def table(self) -> TrajectoryTable:
        """The visible trajectories in order of arrival."""

    @property
    @abstractmethod
    def sources(self) -> Sequence[Source]:
        """What `table.source` indexes."""

    @abstractmethod
    def trajectory(self, index: int) -> Trajectory:
        """A copy of the visible trajectory at `index` in order of arrival."""

    def __len__(self) -> int:
        """Visible trajectories."""
        return len(self.table)

    @property
    def ready(self) -> bool:
        """Whether at least `min_trajectories` are visible."""
        return len(self.table) >= self.min_trajectories

    def sample(self, batch_size: int, length: int, rng: np.random.Generator) -> Batch:
        """Draw a batch of windows.

        The result depends on `rng` and on the visible trajectories in order of arrival, on nothing else.

        Args:
            batch_size: `B` windows, drawn with replacement.
            length: `W`, most transitions of a window. May exceed every trajectory: the rest is padding.
            rng: the only source of randomness.

        Returns:
            A `Batch` of `L = W + 1` timesteps, padded on the right with zeros.

        Raises:
            ValueError: if `batch_size < 1` or `length < 1`.
            EmptyDatasetError: if there is no trajectory.
        """
        from amago_offline.batch import Batch

        return Batch.from_arrays(self.sample_arrays(batch_size, length, rng))

    def sample_arrays(self, batch_size: int, length: int, rng: np.random.Generator) -> dict[str, Any]:
        """As `sample`, as a dict of NumPy arrays and without torch."""
        check_request(batch_size, length)
        table = self.table
        if not len(table):
            raise EmptyDatasetError(
                f"cannot sample: the dataset holds 0 trajectories, at least {self.min_trajectories} are needed "
                "(min_trajectories); append and commit some, or wait until `ready`"
            )
        picks = draw_trajectories(table, batch_size, rng, self.weighting)
        if self.relabeler is None:
            first, count = draw_windows(table.transitions[picks], length, self.padding, rng)
            return gather(self.sources, self.schema, table_windows(table, picks, first, count), length)
        drawn = [self.relabeler(self.trajectory(index), rng).conform(self.schema) for index in picks.tolist()]
        return self._relabeled(drawn, length, rng)

    def _relabeled(self, drawn: list[Trajectory], length: int, rng: np.random.Generator) -> dict[str, Any]:
        """Windows of trajectories that are in memory, one of each."""
        transitions = np.array([trajectory.transitions for trajectory in drawn])
        first, count = draw_windows(transitions, length, self.padding, rng)
        at_end = first + count == transitions
        pieces = [trajectory_columns(trajectory) for trajectory in drawn]
        # Only the windows are laid out in memory, one after the other; whole trajectories can be much longer.
        spans = [slice(int(start), int(start + n) + 1) for start, n in zip(first, count, strict=True)]
        columns = {
            name: np.concatenate([piece[name][span] for piece, span in zip(pieces, spans, strict=True)])
            for name in self.schema.columns
        }
        windows = Windows(
            source=np.zeros(len(drawn), np.int64),
            row=np.concatenate([[0], np.cumsum(count + 1)[:-1]]),
            transitions=count,
            time_idx=np.array([trajectory.time_idx[0] for trajectory in drawn]) + first,
            terminated=np.array([trajectory.terminated[-1] for trajectory in drawn]) & at_end,
            truncated=np.array([trajectory.truncated[-1] for trajectory in drawn]) & at_end,
        )
        return gather([ArraySource(self.schema, columns)], self.schema, windows, length)

    def _describe(self, kind: str) -> dict[str, Any]:
        """The part of `describe` that all have."""
        return {
            "kind": kind,
            "trajectories": len(self.table),
            "transitions": self.table.total_transitions,
            "timesteps": self.table.total_transitions + len(self.table),
            "min_trajectories": self.min_trajectories,
            "padding": self.padding,
            "weighting": self.weighting,
            "relabeler": None if self.relabeler is None else type(self.relabeler).__name__,
            "schema": self.schema.to_json(),
        }
