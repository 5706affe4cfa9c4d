"""Settings and lookup tables that the single and the vectorised RoomKeyDoor share.

`S` is the side of the room; cell `(x, y)` has the number `x * S + y`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np

NUM_ACTIONS = 5
DISPLACEMENTS = ((0, -1), (-1, 0), (0, 1), (1, 0), (0, 0))

Location = str | tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoomRules:
    """Checked settings of a RoomKeyDoor.

    Args:
        dark: whether key and door are missing from the observation.
        size: side of the room, >= 1.
        max_attempt_steps: step limit of an attempt, >= 1.
        meta_rollout_horizon: steps of an episode, >= 1.
        start_location: "random", or `(x, y)`.
        key_location: "random", or `(x, y)`.
        goal_location: "random", or `(x, y)`.
        randomize_actions: whether the meanings of the actions are permuted for each task.

    Raises:
        ValueError: if a value is not allowed.
    """

    dark: bool = True
    size: int = 9
    max_attempt_steps: int = 50
    meta_rollout_horizon: int = 500
    start_location: Location = "random"
    key_location: Location = "random"
    goal_location: Location = "random"
    randomize_actions: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("size", "max_attempt_steps", "meta_rollout_horizon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name}: {value!r}, allowed: integers >= 1")
            # NumPy integers would make the settings no longer JSON-able.
            object.__setattr__(self, name, int(value))
        for name in ("start_location", "key_location", "goal_location"):
            value = getattr(self, name)
            if isinstance(value, str) and value == "random":
                continue
            pair = np.asarray(value)
            if pair.shape != (2,) or pair.dtype.kind not in "iu" or pair.min() < 0 or pair.max() >= self.size:
                raise ValueError(f"{name}: {value!r}, allowed: 'random' or two integers from 0 to {self.size - 1}")
            # A list from a config file and a tuple must give equal settings.
            object.__setattr__(self, name, (int(pair[0]), int(pair[1])))

    @property
    def locations(self) -> tuple[Location, Location, Location]:
        """Start, key and door: "random", or `(x, y)`."""
        return self.start_location, self.key_location, self.goal_location

    @property
    def task_name(self) -> str:
        """Name under which results of this variant are collected."""
        return f"RoomKeyDoor-{'dark' if self.dark else 'light'}-{self.size}x{self.size}"

    def observation_space(self) -> gymnasium.spaces.Box:
        """Space of the observations: 4 numbers in the dark, 8 in the light."""
        return gymnasium.spaces.Box(0.0, 1.0, (4 if self.dark else 8,), np.float32)

    def action_space(self) -> gymnasium.spaces.Discrete:
        """Space of y - 1, x - 1, y + 1, x + 1, no-op."""
        return gymnasium.spaces.Discrete(NUM_ACTIONS)

    def moves(self) -> np.ndarray:
        """Where each displacement leads, walls included: `[5, S * S]` int64 cell numbers."""
        x, y = np.divmod(np.arange(self.size**2), self.size)
        last = self.size - 1
        cells = [np.clip(x + dx, 0, last) * self.size + np.clip(y + dy, 0, last) for dx, dy in DISPLACEMENTS]
        return np.stack(cells).astype(np.int64)

    def cell_features(self) -> np.ndarray:
        """Observed coordinates of each cell, `[S * S, 2]` float32."""
        cells = np.stack(np.divmod(np.arange(self.size**2), self.size), axis=1)
        return (cells / self.size).astype(np.float32)

    def time_features(self) -> np.ndarray:
        """Observed time feature by steps of the attempt, `[max_attempt_steps + 1]` float32."""
        return (np.arange(self.max_attempt_steps + 1) / self.max_attempt_steps).astype(np.float32)

    def as_dict(self) -> dict[str, Any]:
        """The settings as a JSON-able dict."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
