"""RoomKeyDoor with all lanes stepped at once in NumPy.

`N` is the number of lanes, `M` the number of lanes one call is about, `S` the side of the room.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from amago_envs.toy.room_rules import NUM_ACTIONS, Location, RoomRules
from amago_envs.toy.room_views import draw_room, room_text
from amago_envs.vector.base import LaneVectorEnv
from amago_envs.vector.infos import InfoBuilder
from amago_envs.vector.streams import IntArray


class RoomKeyDoorVector(LaneVectorEnv):
    """Many independent `RoomKeyDoor` tasks, one per lane; see that class for the rules.

    Lane i seeded with s equals the single environment seeded with s + i, number for number, also across automatic
    resets (`AutoresetMode.SAME_STEP`).

    Args:
        num_envs: number of lanes `N`, >= 1.
        dark: whether key and door are missing from the observation.
        size: side of the room `S`, >= 1.
        max_attempt_steps: step limit of an attempt, >= 1.
        meta_rollout_horizon: steps of an episode, >= 1.
        start_location: "random", or `(x, y)`.
        key_location: "random", or `(x, y)`.
        goal_location: "random", or `(x, y)`.
        randomize_actions: whether the meanings of the actions are permuted for each task.
        render_mode: None, "ansi" or "rgb_array".

    Raises:
        ValueError: if a value is not allowed.
    """

    _state_arrays = (
        "_cell",
        "_start",
        "_key",
        "_goal",
        "_order",
        "_time",
        "_steps",
        "_has_key",
        "_pending",
        "_keys",
        "_doors",
        "_first_door",
    )

    def __init__(
        self,
        num_envs: int,
        dark: bool = True,
        size: int = 9,
        max_attempt_steps: int = 50,
        meta_rollout_horizon: int = 500,
        start_location: Location = "random",
        key_location: Location = "random",
        goal_location: Location = "random",
        randomize_actions: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.rules = rules = RoomRules(
            dark=dark,
            size=size,
            max_attempt_steps=max_attempt_steps,
            meta_rollout_horizon=meta_rollout_horizon,
            start_location=start_location,
            key_location=key_location,
            goal_location=goal_location,
            randomize_actions=randomize_actions,
        )
        super().__init__(
            num_envs,
            rules.observation_space(),
            rules.action_space(),
            largest_request=NUM_ACTIONS,
            render_mode=render_mode,
        )
        self._moves = rules.moves()
        self._features = rules.cell_features()
        self._times = rules.time_features()
        zeros = np.zeros(num_envs, dtype=np.int64)
        self._start, self._key, self._goal = zeros.copy(), zeros.copy(), zeros.copy()
        self._cell, self._time, self._steps = zeros.copy(), zeros.copy(), zeros.copy()
        self._keys, self._doors, self._first_door = zeros.copy(), zeros.copy(), zeros.copy()
        self._order = np.tile(np.arange(NUM_ACTIONS), (num_envs, 1))
        self._has_key = np.zeros(num_envs, dtype=np.bool_)
        self._pending = np.zeros(num_envs, dtype=np.bool_)

    @property
    def task_name(self) -> str:
        """Name under which results of this variant are collected."""
        return self.rules.task_name

    @property
    def layouts(self) -> dict[str, np.ndarray]:
        """`[N, 2]` coordinates `(x, y)` of `start`, `key`, `goal` and `agent` in every lane."""
        cells = {"start": self._start, "key": self._key, "goal": self._goal, "agent": self._cell}
        return {name: np.stack(np.divmod(cell, self.rules.size), axis=1) for name, cell in cells.items()}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance every lane by one step.

        Args:
            actions: `[N]` integers in 0..4.

        Returns:
            Observations `[N, 4]` or `[N, 8]` float32, rewards `[N]` float64, terminated `[N]`, truncated `[N]` (never
            True) and the info dict.

        Raises:
            ResetNeeded: if `reset` was never called.
            ValueError: if the actions have the wrong form.
        """
        actions = self._checked_actions(actions)
        self._time += 1
        playing = ~self._pending
        moved = self._moves[self._order[self._lanes, actions], self._cell]
        self._cell = np.where(playing, moved, self._start)
        self._steps = (self._steps + 1) * playing
        had_key = self._has_key & playing
        opened = had_key & (self._cell == self._goal)
        picked = playing & ~had_key & (self._cell == self._key)
        self._has_key = had_key | picked
        self._first_door = np.where(opened & (self._doors == 0), self._time, self._first_door)
        self._keys += picked
        self._doors += opened
        self._pending = opened | (self._steps >= self.rules.max_attempt_steps)
        rewards = (opened | picked).astype(np.float64)
        terminated = self._time >= self.rules.meta_rollout_horizon
        return self._finish(rewards, terminated)

    def _finish(
        self, rewards: np.ndarray, terminated: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        observations = self._observe(self._lanes)
        info = InfoBuilder(self.num_envs)
        done = np.flatnonzero(terminated)
        if done.size:
            metrics = {
                "keys": self._keys[done],
                "doors": self._doors[done],
                "episodes_completed": self._doors[done],
                "first_door_time": self._first_door[done],
            }
            info.add_metrics(done, metrics, final=True)
            info.add_final_observations(done, observations[done])
            self._begin(done, {})
            observations[done] = self._observe(done)
        self._last_observations = observations.copy()
        return observations, rewards, terminated, np.zeros(self.num_envs, dtype=np.bool_), info.info

    def _begin(self, lanes: IntArray, options: dict[str, Any]) -> None:
        rules = self.rules
        for array, location in zip((self._start, self._key, self._goal), rules.locations, strict=True):
            if isinstance(location, str):
                pairs = (rules.size * self.streams.take(lanes, 2)).astype(np.int64)
                array[lanes] = pairs[:, 0] * rules.size + pairs[:, 1]
            else:
                array[lanes] = location[0] * rules.size + location[1]
        if rules.randomize_actions:
            self._order[lanes] = np.argsort(self.streams.take(lanes, NUM_ACTIONS), axis=1, kind="stable")
        self._first_door[lanes] = rules.meta_rollout_horizon
        for array in (self._time, self._steps, self._keys, self._doors):
            array[lanes] = 0
        self._cell[lanes] = self._start[lanes]
        self._has_key[lanes] = False
        self._pending[lanes] = False

    def _observe(self, lanes: IntArray) -> np.ndarray:
        observations = np.empty((lanes.size, 4 if self.rules.dark else 8), dtype=np.float32)
        observations[:, :2] = self._features[self._cell[lanes]]
        observations[:, 2] = self._has_key[lanes]
        observations[:, 3] = self._times[self._steps[lanes]]
        if not self.rules.dark:
            observations[:, 4:6] = self._features[self._goal[lanes]]
            observations[:, 6:] = self._features[self._key[lanes]]
        return observations

    def _settings(self) -> dict[str, Any]:
        return {"num_envs": self.num_envs, **self.rules.as_dict()}

    def render(self) -> tuple[Any, ...] | None:
        """Draw every lane.

        Returns:
            One text ("ansi") or one `[height, width, 3]` uint8 image ("rgb_array") per lane; None without render mode.
        """
        if self.render_mode is None:
            return None
        draw = room_text if self.render_mode == "ansi" else draw_room
        columns = (self._cell, self._key, self._goal, self._has_key)
        return tuple(draw(self.rules, *view) for view in zip(*(column.tolist() for column in columns), strict=True))
