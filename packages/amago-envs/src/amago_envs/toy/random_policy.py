"""The policy that every other one has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np


class RandomPolicy:
    """Uniformly random actions.

    Args:
        num_actions: number of discrete actions, >= 1.
        seed: seed of the generator.
    """

    def __init__(self, num_actions: int, seed: int | None = None) -> None:
        if num_actions < 1:
            raise ValueError(f"num_actions: {num_actions}, allowed: integers >= 1")
        self._num_actions = num_actions
        self._generator = np.random.default_rng(seed)

    def reset(self, lanes: Any = None) -> None:
        """Nothing to forget; here so that policies can be exchanged.

        Args:
            lanes: not used.
        """

    def act(self, obs: np.ndarray, reward: Any = None) -> np.ndarray:
        """Draw one action per lane.

        Args:
            obs: `[N, ...]` observations.
            reward: not used.

        Returns:
            `[N]` int64 actions.
        """
        return self._generator.integers(self._num_actions, size=len(obs))
