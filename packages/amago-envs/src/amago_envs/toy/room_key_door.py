"""RoomKeyDoor: find a hidden key, then a hidden door, again and again in the same room.

`S` is the side of the room; cell `(x, y)` has the number `x * S + y`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from amago_envs.toy.base import ToyEnv
from amago_envs.toy.room_rules import NUM_ACTIONS, Location, RoomRules
from amago_envs.toy.room_views import draw_room, room_text
from amago_envs.vector.base import RENDER_MODES, check_options


class RoomKeyDoor(ToyEnv):
    """Room with a key and a door in places drawn at every `reset`; many attempts in a fixed number of steps.

    Stepping on the key pays 1; then stepping on the door pays 1 and ends the attempt, as `max_attempt_steps` does. The
    step after the end of an attempt ignores its action, pays nothing and returns the first observation of the next one
    (at the same start, with the same key and door). The episode terminates after `meta_rollout_horizon` steps.

    Actions: 0 y - 1, 1 x - 1, 2 y + 1, 3 x + 1, 4 no-op; with `randomize_actions` permuted for each task. Observation:
    `[x / S, y / S, has key, attempt steps / max_attempt_steps]`, and in the light `[door x, door y, key x, key y] / S`.

    `info["metrics"]` on the last step: `keys` and `doors` (how often each was reached), `episodes_completed` (attempts
    that ended at the door), `first_door_time` (step of the first door; `meta_rollout_horizon` if none was reached).

    Args:
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

    Source: Dark Key-to-Door of Laskin et al. (2022, arXiv 2210.14215), as used in AMAGO (arXiv 2310.09971).
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 6}
    _state_arrays = ("_order",)
    _state_scalars = (
        "_cell",
        "_start",
        "_key",
        "_goal",
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
        self.rules = RoomRules(
            dark=dark,
            size=size,
            max_attempt_steps=max_attempt_steps,
            meta_rollout_horizon=meta_rollout_horizon,
            start_location=start_location,
            key_location=key_location,
            goal_location=goal_location,
            randomize_actions=randomize_actions,
        )
        super().__init__(self.rules.observation_space(), self.rules.action_space(), render_mode)
        self._moves = self.rules.moves()
        self._features = self.rules.cell_features()
        self._times = self.rules.time_features()
        self._order = np.arange(NUM_ACTIONS)
        self._cell = self._start = self._key = self._goal = 0
        self._time = self._steps = self._keys = self._doors = 0
        self._has_key = self._pending = False
        self._first_door = meta_rollout_horizon

    @property
    def task_name(self) -> str:
        """Name under which results of this variant are collected."""
        return self.rules.task_name

    @property
    def layout(self) -> dict[str, tuple[int, int]]:
        """`(x, y)` of `start`, `key`, `goal` and `agent`."""
        cells = {"start": self._start, "key": self._key, "goal": self._goal, "agent": self._cell}
        return {name: divmod(cell, self.rules.size) for name, cell in cells.items()}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new task.

        Args:
            seed: seed of the environment's generator; None continues it.
            options: none are known.

        Returns:
            The observation `[4]` or `[8]` float32 and an empty info dict.

        Raises:
            ValueError: if an option is given.
        """
        check_options(options, ())
        super().reset(seed=seed)
        self._start, self._key, self._goal = (self._place(location) for location in self.rules.locations)
        if self.rules.randomize_actions:
            self._order = np.argsort(self.np_random.random(NUM_ACTIONS), kind="stable")
        self._time = self._keys = self._doors = 0
        self._first_door = self.rules.meta_rollout_horizon
        self._running = True
        self._start_attempt()
        return self._observe(), {}

    def _place(self, location: Location) -> int:
        size = self.rules.size
        if isinstance(location, str):
            x, y = (int(size * self.np_random.random()) for _ in range(2))
        else:
            x, y = location
        return x * size + y

    def _start_attempt(self) -> None:
        self._cell, self._steps = self._start, 0
        self._has_key = self._pending = False

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Advance by one step.

        Args:
            action: integer in 0..4.

        Returns:
            Observation `[4]` or `[8]` float32, reward, terminated, truncated (never True) and the info dict.

        Raises:
            ResetNeeded: if the episode is over or was never started.
            ValueError: if the action is not allowed.
        """
        action = self._checked_action(action)
        self._time += 1
        reward = 0.0
        if self._pending:
            self._start_attempt()
        else:
            self._cell = int(self._moves[self._order[action], self._cell])
            self._steps += 1
            reward = self._collect()
        self._running = self._time < self.rules.meta_rollout_horizon
        info = {} if self._running else {"metrics": self._metrics()}
        return self._observe(), reward, not self._running, False, info

    def _collect(self) -> float:
        opened = self._has_key and self._cell == self._goal
        picked = not self._has_key and self._cell == self._key
        self._has_key = self._has_key or picked
        self._keys += picked
        if opened and self._doors == 0:
            self._first_door = self._time
        self._doors += opened
        self._pending = opened or self._steps >= self.rules.max_attempt_steps
        return float(opened or picked)

    def _metrics(self) -> dict[str, float]:
        return {
            "keys": float(self._keys),
            "doors": float(self._doors),
            "episodes_completed": float(self._doors),
            "first_door_time": float(self._first_door),
        }

    def _observe(self) -> np.ndarray:
        own = [*self._features[self._cell], self._has_key, self._times[self._steps]]
        hidden = [] if self.rules.dark else [*self._features[self._goal], *self._features[self._key]]
        return np.array([*own, *hidden], dtype=np.float32)

    def render(self) -> Any:
        """Draw the room.

        Returns:
            A text ("ansi"), a `[height, width, 3]` uint8 image ("rgb_array"), or None without render mode.
        """
        if self.render_mode is None:
            return None
        draw = room_text if self.render_mode == "ansi" else draw_room
        return draw(self.rules, self._cell, self._key, self._goal, self._has_key)

    def _settings(self) -> dict[str, Any]:
        return self.rules.as_dict()
