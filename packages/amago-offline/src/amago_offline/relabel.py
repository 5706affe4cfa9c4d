"""The hook that rewrites trajectories between the store and the windows."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from amago_offline.schema import Trajectory


class Relabeler(ABC):
    """Rewrites a whole stored trajectory each time it is drawn, before its window is cut.

    Actions and rewards are stored once (`prev_action`, `prev_reward`), so an edit needs one array. The result is
    validated as a trajectory and against the schema; it may be shorter than the original.
    """

    @abstractmethod
    def relabel(self, trajectory: Trajectory, rng: np.random.Generator) -> Trajectory:
        """Return the relabeled trajectory.

        Args:
            trajectory: a copy that may be edited in place.
            rng: the only source of randomness, so that the result is pure given it.

        Returns:
            A trajectory of the same schema.
        """

    def __call__(self, trajectory: Trajectory, rng: np.random.Generator) -> Trajectory:
        """Same as `relabel`."""
        return self.relabel(trajectory, rng)
