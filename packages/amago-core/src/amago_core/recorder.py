"""From vectorised steps to stored trajectories.

Every lane has one unfinished trajectory; rows are written for all lanes at once into one growing block of arrays.

Dimensions: N lanes, L timesteps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from amago_core.errors import CheckpointError
from amago_core.seeding import numpy_generator
from amago_offline.schema import Schema, Trajectory

_START_ROWS = 64
_UNLIMITED = np.iinfo(np.int64).max


class Recorder:
    """Builds trajectories from the steps of all lanes.

    Episodes longer than a limit are stored as snippets. The timestep of a cut belongs to both snippets, so that every
    transition is stored once and none is lost. Cuts at fixed places would never show training a window across them,
    which is why the lengths of snippets can vary.

    The `meta` of a trajectory says where it comes from: `lane`, `episode` (of the lane, from 0), `snippet` (of the
    episode, from 0) and `policy_version`.

    Args:
        schema: columns of a timestep.
        lanes: N.
        sink: called with every finished trajectory.
        max_transitions: S, the length of a snippet in transitions; None stores whole episodes.
        stagger: W, usually the length of training windows; if S is more than W, the length of every snippet is drawn
            uniformly from the integers `S - W` to `S + W`. 0 always takes S.
        seed: of these draws.

    Attributes:
        policy_version: updates behind the policy that acts, stored with what it collects; set by whoever changes it.
    """

    def __init__(
        self,
        schema: Schema,
        lanes: int,
        sink: Callable[[Trajectory], Any],
        *,
        max_transitions: int | None = None,
        stagger: int = 0,
        seed: int = 0,
    ) -> None:
        if max_transitions is not None and max_transitions < 1:
            raise ValueError(f"max_transitions must be >= 1 or None; got {max_transitions}")
        if stagger < 0:
            raise ValueError(f"stagger must be >= 0; got {stagger}")
        self.schema = schema
        self.lanes = lanes
        self.sink = sink
        self.max_transitions = max_transitions
        self.stagger = stagger if max_transitions is not None and max_transitions > stagger else 0
        self._rng = numpy_generator(seed, "recorder")
        # 0 rows: the lane awaits `begin`.
        self._rows = np.zeros(lanes, np.int64)
        self._limit = np.full(lanes, _UNLIMITED)
        self._episode = np.full(lanes, -1, np.int64)
        self._snippet = np.zeros(lanes, np.int64)
        self._columns = self._allocate(_START_ROWS)
        self.policy_version = 0

    def begin(self, lanes: np.ndarray, obs: dict[str, np.ndarray], none_action: np.ndarray) -> None:
        """First timestep of an episode; what the lanes held before is forgotten.

        Args:
            lanes: `[n]` indices.
            obs: name to `[n, ...]`.
            none_action: `[n]` or `[n, A]`, the "no previous action" value.
        """
        self._rows[lanes] = 0
        self._limit[lanes] = self._draw_limits(len(lanes))
        self._episode[lanes] += 1
        self._snippet[lanes] = 0
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

        Raises:
            ValueError: if a lane has no first timestep.
        """
        if len(lanes) == 0:
            return
        rows = self._rows[lanes]
        if not rows.all():
            raise ValueError(f"lanes must have begun an episode; {lanes[rows == 0].tolist()} have not")
        time_idx = self._columns["time_idx"][lanes, rows - 1] + 1
        self._write(lanes, obs, action, reward, terminated, truncated & ~terminated, time_idx)
        done = terminated | truncated
        full = rows >= self._limit[lanes]
        closing = done | full
        if not closing.any():
            return
        for lane in lanes[closing]:
            self._emit(int(lane))
        self._rows[lanes[done]] = 0
        for lane in lanes[full & ~done]:
            self._continue_snippet(int(lane))

    def flush(self) -> None:
        """Store what every lane has so far as a cut-off snippet and forget it."""
        for lane in np.flatnonzero(self._rows >= 2):
            self._emit(int(lane))
        self._rows[:] = 0

    def state_dict(self) -> dict[str, Any]:
        """Unfinished trajectories and the generator: nested dicts of arrays and JSON values."""
        longest = int(self._rows.max(initial=0))
        columns = {name: column[:, :longest].copy() for name, column in self._columns.items()}
        # What earlier trajectories left behind a lane's rows would make equal states look different.
        for lane, rows in enumerate(self._rows):
            for column in columns.values():
                column[lane, rows:] = 0
        return {
            "rows": self._rows.copy(),
            "limit": self._limit.copy(),
            "episode": self._episode.copy(),
            "snippet": self._snippet.copy(),
            "generator": copy.deepcopy(dict(self._rng.bit_generator.state)),
            "columns": columns,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: if it is of another schema or number of lanes.
        """
        if len(state["rows"]) != self.lanes or set(state["columns"]) != set(self._columns):
            raise CheckpointError(
                f"recorder state has {len(state['rows'])} lanes with the columns {sorted(state['columns'])}; "
                f"needed are {self.lanes} lanes with {sorted(self._columns)}"
            )
        self._rows = np.array(state["rows"], np.int64)
        self._limit = np.array(state["limit"], np.int64)
        self._episode = np.array(state["episode"], np.int64)
        self._snippet = np.array(state["snippet"], np.int64)
        self._rng.bit_generator.state = copy.deepcopy(dict(state["generator"]))
        longest = int(self._rows.max(initial=0))
        self._columns = self._allocate(max(_START_ROWS, longest))
        for name, column in self._columns.items():
            column[:, :longest] = state["columns"][name]

    def _draw_limits(self, count: int) -> np.ndarray:
        if self.max_transitions is None:
            return np.full(count, _UNLIMITED)
        if not self.stagger:
            return np.full(count, self.max_transitions)
        low, high = self.max_transitions - self.stagger, self.max_transitions + self.stagger
        return self._rng.integers(low, high, size=count, endpoint=True)

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
        for key in self.schema.obs:
            self._columns[f"obs/{key}"][lanes, rows] = obs[key]
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
        meta = {
            "lane": lane,
            "episode": int(self._episode[lane]),
            "snippet": int(self._snippet[lane]),
            "policy_version": self.policy_version,
        }
        self.sink(Trajectory(obs=obs, meta=meta, **part))

    def _continue_snippet(self, lane: int) -> None:
        """The last timestep of a snippet is the first one of the next."""
        last = int(self._rows[lane]) - 1
        for column in self._columns.values():
            column[lane, 0] = column[lane, last]
        self._rows[lane] = 1
        self._snippet[lane] += 1
        self._limit[lane] = self._draw_limits(1)[0]
