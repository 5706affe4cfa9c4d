"""From vectorised steps to stored trajectories.

Every lane has one unfinished trajectory; rows are written for all lanes at once into one growing block of arrays.

Dimensions: N lanes, L timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from amago_offline.schema import Schema, Trajectory

_START_ROWS = 64


class Recorder:
    """Builds trajectories from the steps of all lanes.

    Args:
        schema: columns of a timestep.
        lanes: N.
        sink: called with every finished trajectory.
        max_transitions: cut trajectories into snippets of this many transitions; None stores whole episodes.
    """

    def __init__(
        self, schema: Schema, lanes: int, sink: Callable[[Trajectory], Any], *, max_transitions: int | None = None
    ) -> None:
        if max_transitions is not None and max_transitions < 1:
            raise ValueError(f"max_transitions must be >= 1 or None; got {max_transitions}")
        self.schema = schema
        self.lanes = lanes
        self.sink = sink
        self.max_transitions = max_transitions
        self._rows = np.zeros(lanes, np.int64)
        self._columns = self._allocate(_START_ROWS)

    def begin(self, lanes: np.ndarray, obs: dict[str, np.ndarray], none_action: np.ndarray) -> None:
        """First timestep of an episode.

        Args:
            lanes: `[n]` indices.
            obs: name to `[n, ...]`.
            none_action: `[n]` or `[n, A]`, the "no previous action" value.
        """
        self._rows[lanes] = 0
        zeros = np.zeros(len(lanes), np.float32)
        false = np.zeros(len(lanes), bool)
        self._write(lanes, obs, none_action, zeros, false, false, np.zeros(len(lanes), np.int64))

    def add(
        self,
        lanes: np.ndarray,
        obs: dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
    ) -> None:
        """The timestep that an action led to; ends the trajectory where a flag is set.

        Args:
            lanes: `[n]` indices.
            obs: name to `[n, ...]`, the true last observation where the episode ended.
            action: `[n]` or `[n, A]`, as executed.
            reward: `[n]` float32.
            terminated: `[n]` bool.
            truncated: `[n]` bool; ignored where `terminated`.
        """
        if len(lanes) == 0:
            return
        time_idx = self._columns["time_idx"][lanes, self._rows[lanes] - 1] + 1
        self._write(lanes, obs, action, reward, terminated, truncated & ~terminated, time_idx)
        done = terminated | truncated
        for lane in lanes[done]:
            self._emit(int(lane))
        if self.max_transitions is not None:
            for lane in lanes[~done & (self._rows[lanes] > self.max_transitions)]:
                self._emit(int(lane))
                self._continue_snippet(int(lane))

    def flush(self) -> None:
        """Store what every lane has so far as a cut-off snippet and forget it."""
        for lane in np.flatnonzero(self._rows >= 2):
            self._emit(int(lane))
        self._rows[:] = 0

    def state_dict(self) -> dict[str, Any]:
        """Unfinished trajectories, as arrays."""
        longest = int(self._rows.max(initial=0))
        return {"rows": self._rows.copy(), **{name: c[:, :longest].copy() for name, c in self._columns.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._rows = np.array(state["rows"], np.int64)
        longest = int(self._rows.max(initial=0))
        self._columns = self._allocate(max(_START_ROWS, longest))
        for name, column in self._columns.items():
            column[:, :longest] = state[name]

    def _allocate(self, capacity: int) -> dict[str, np.ndarray]:
        shape = (self.lanes, capacity)
        columns = {f"obs/{k}": np.zeros((*shape, *f.shape), f.dtype) for k, f in self.schema.obs.items()}
        action = self.schema.action
        columns["prev_action"] = np.zeros((*shape, *action.shape), action.dtype)
        columns["prev_reward"] = np.zeros(shape, np.float32)
        columns["terminated"] = np.zeros(shape, bool)
        columns["truncated"] = np.zeros(shape, bool)
        columns["time_idx"] = np.zeros(shape, np.int64)
        return columns

    def _write(
        self,
        lanes: np.ndarray,
        obs: dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        time_idx: np.ndarray,
    ) -> None:
        rows = self._rows[lanes]
        if rows.max() >= self._columns["time_idx"].shape[1]:
            self._grow()
        for key, value in obs.items():
            self._columns[f"obs/{key}"][lanes, rows] = value
        self._columns["prev_action"][lanes, rows] = action
        self._columns["prev_reward"][lanes, rows] = reward
        self._columns["terminated"][lanes, rows] = terminated
        self._columns["truncated"][lanes, rows] = truncated
        self._columns["time_idx"][lanes, rows] = time_idx
        self._rows[lanes] += 1

    def _grow(self) -> None:
        old = self._columns
        capacity = old["time_idx"].shape[1]
        self._columns = self._allocate(2 * capacity)
        for name, column in self._columns.items():
            column[:, :capacity] = old[name]

    def _emit(self, lane: int) -> None:
        rows = int(self._rows[lane])
        part = {name: column[lane, :rows].copy() for name, column in self._columns.items()}
        obs = {key: part.pop(f"obs/{key}") for key in self.schema.obs}
        self.sink(Trajectory(obs=obs, meta={}, **part))

    def _continue_snippet(self, lane: int) -> None:
        """The last timestep of a snippet is the first one of the next."""
        last = int(self._rows[lane]) - 1
        for column in self._columns.values():
            column[lane, 0] = column[lane, last]
        self._rows[lane] = 1
