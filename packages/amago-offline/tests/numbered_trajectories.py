"""Trajectories whose every value follows from a number."""

from __future__ import annotations

import numpy as np

from amago_offline import Trajectory


def numbered(number: int, length: int, start: int = 0) -> Trajectory:
    """Trajectory `number`: a reader can tell from any row which one it is and whether the row is right."""
    steps = np.arange(start, start + length)
    action = ((number + steps) % 3).astype(np.int8)
    action[0] = -1
    terminated = np.zeros(length, bool)
    terminated[-1] = number % 3 == 0
    truncated = np.zeros(length, bool)
    truncated[-1] = number % 3 == 1
    return Trajectory(
        obs={
            "image": ((number * 7 + steps)[:, None, None] % 256 * np.ones((1, 2, 3))).astype(np.uint8),
            "state": np.stack([np.full(length, number), steps], axis=1).astype(np.float32),
        },
        prev_action=action,
        prev_reward=(number + steps / 1000).astype(np.float32),
        terminated=terminated,
        truncated=truncated,
        time_idx=steps,
        meta={"number": number},
    )
