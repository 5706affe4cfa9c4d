"""Settings and lookup tables that the single and the vectorised MetaFrozenLake share.

`S` is the side of the lake in tiles; cells are numbered row by row from 0 to `S * S - 1`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np

from amago_envs.toy import lakes

NUM_ACTIONS = 5
SPLITS = ("all", "train", "held_out")
DISPLACEMENTS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
RECOVER_PENALTY = -0.1
SWAP_PROBABILITY = 0.5
CRUMBLE_PROBABILITY = 0.33
NOISE_PROBABILITY = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class LakeRules:
    """Checked settings of a MetaFrozenLake.

    Args:
        size: side of the lake in tiles, >= 2.
        k_attempts: attempts per task, >= 1.
        hard_mode: swapped actions, crumbling ice and noisy positions.
        recover_mode: a hole costs 0.1 and the attempt goes on.
        max_attempt_steps: step limit of an attempt, >= 1; None for `size ** 2` (twice that in hard mode), divided by
            `1 - slip_chance`.
        show_k_progress: whether the observation tells how many attempts are over.
        slip_chance: probability that a move does nothing, in [0, 1).
        split: "all" maps, or one of two parts that share none: "held_out", about a fifth, and "train", the others.

    Raises:
        ValueError: if a value is not allowed.
    """

    size: int
    k_attempts: int = 10
    hard_mode: bool = False
    recover_mode: bool = False
    max_attempt_steps: int | None = None
    show_k_progress: bool = True
    slip_chance: float = 0.0
    split: str = "all"

    def __post_init__(self) -> None:
        """Check every value."""
        for name, least in (("size", 2), ("k_attempts", 1), ("max_attempt_steps", 1)):
            value = getattr(self, name)
            if value is None and name == "max_attempt_steps":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"{name}: {value!r}, allowed: integers >= {least}")
            # NumPy integers would make the settings no longer JSON-able.
            object.__setattr__(self, name, int(value))
        if not 0.0 <= self.slip_chance < 1.0:
            raise ValueError(f"slip_chance: {self.slip_chance!r}, allowed: 0 <= slip_chance < 1")
        if self.split not in SPLITS:
            raise ValueError(f"split: {self.split!r}, allowed: one of {SPLITS}")
        if self.split != "all" and self.size < 3:
            raise ValueError(f'split: {self.split!r} with size {self.size}, allowed: "all" for so few maps')

    @property
    def step_limit(self) -> int:
        """Steps after which an attempt times out."""
        if self.max_attempt_steps is not None:
            return self.max_attempt_steps
        base = self.size**2 * (2 if self.hard_mode else 1)
        return int(base / (1.0 - self.slip_chance)) if self.slip_chance > 0 else base

    @property
    def task_name(self) -> str:
        """Name under which results of this variant are collected."""
        hard, recover = "-hard" if self.hard_mode else "", "-recover" if self.recover_mode else ""
        return f"MetaFrozenLake-{self.size}x{self.size}{hard}{recover}"

    def observation_space(self) -> gymnasium.spaces.Box:
        """Space of `[row / S, column / S, reset flag, attempts over / k_attempts]`."""
        return gymnasium.spaces.Box(0.0, 1.0, (4,), np.float32)

    def action_space(self) -> gymnasium.spaces.Discrete:
        """Space of no-op, down, up, right, left."""
        return gymnasium.spaces.Discrete(NUM_ACTIONS)

    def moves(self) -> np.ndarray:
        """Where each action leads, walls included.

        Returns:
            `[2, 5, S * S]` int64 cell numbers; the first axis is 1 when the meanings of down and right are swapped.
        """
        rows, columns = np.divmod(np.arange(self.size**2), self.size)
        table = np.empty((2, NUM_ACTIONS, self.size**2), dtype=np.int64)
        for action, (down, right) in enumerate(DISPLACEMENTS):
            row = np.clip(rows + down, 0, self.size - 1)
            table[0, action] = row * self.size + np.clip(columns + right, 0, self.size - 1)
        table[1] = table[0][[0, 3, 2, 1, 4]]
        return table

    def coordinates(self) -> np.ndarray:
        """Observed coordinate of each row or column number, `[S]` float32."""
        return (np.arange(self.size) / self.size).astype(np.float32)

    def progress(self) -> np.ndarray:
        """Observed progress feature by number of attempts that are over, `[k_attempts + 1]` float32."""
        if not self.show_k_progress:
            return np.zeros(self.k_attempts + 1, dtype=np.float32)
        return (np.arange(self.k_attempts + 1) / self.k_attempts).astype(np.float32)

    def accepts(self, passable: lakes.BoolArray) -> lakes.BoolArray:
        """Which maps may become tasks: they can be solved and belong to the split.

        Args:
            passable: `[M, S * S]` bool.

        Returns:
            `[M]` bool.
        """
        accepted = lakes.have_path(passable, self.size)
        if self.split != "all":
            accepted &= lakes.held_out(passable) == (self.split == "held_out")
        return accepted

    def as_dict(self) -> dict[str, Any]:
        """The settings as a JSON-able dict, with the step limit in place of None."""
        return {**dataclasses.asdict(self), "max_attempt_steps": self.step_limit}
