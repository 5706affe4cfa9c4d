"""Info dicts of vector environments, in the layout of `gymnasium.vector.SyncVectorEnv`."""

from __future__ import annotations

from typing import Any

import numpy as np

Info = dict[str, Any]


class InfoBuilder:
    """Collects per-lane metrics and final observations of one vector step.

    The result is what `SyncVectorEnv` with `AutoresetMode.SAME_STEP` builds from single environments: every key has a
    value array over the lanes and a mask `_key`; metrics of a step that ended the episode are found under
    `info["final_info"]["metrics"]` only.

    Args:
        num_lanes: number of lanes `N`.
    """

    def __init__(self, num_lanes: int) -> None:
        self._num_lanes = num_lanes
        self.info: Info = {}

    def add_metrics(self, lanes: np.ndarray, metrics: dict[str, np.ndarray], *, final: bool) -> None:
        """Record metrics of some lanes.

        Args:
            lanes: `[M]` lane indices, at least one.
            metrics: name to `[M]` values.
            final: whether these lanes end their episode in this step.
        """
        parent = self._child(self.info, "final_info", lanes) if final else self.info
        table = self._child(parent, "metrics", lanes)
        for name, values in metrics.items():
            if name not in table:
                table[name] = np.zeros(self._num_lanes, dtype=np.float64)
                table[f"_{name}"] = np.zeros(self._num_lanes, dtype=np.bool_)
            table[name][lanes] = values
            table[f"_{name}"][lanes] = True

    def add_final_observations(self, lanes: np.ndarray, observations: np.ndarray) -> None:
        """Record the last observation of the lanes that end their episode in this step.

        Args:
            lanes: `[M]` lane indices, at least one.
            observations: `[M, ...]` their last observations.
        """
        final_obs = np.full(self._num_lanes, None, dtype=object)
        mask = np.zeros(self._num_lanes, dtype=np.bool_)
        for row, lane in enumerate(lanes.tolist()):
            final_obs[lane] = observations[row].copy()
        mask[lanes] = True
        self.info["final_obs"], self.info["_final_obs"] = final_obs, mask
        self._child(self.info, "final_info", lanes)

    def _child(self, parent: Info, key: str, lanes: np.ndarray) -> Info:
        if key not in parent:
            parent[key] = {}
            parent[f"_{key}"] = np.zeros(self._num_lanes, dtype=np.bool_)
        parent[f"_{key}"][lanes] = True
        child: Info = parent[key]
        return child
