"""What all natively vectorised environments share: seeds, reset masks, action checks, exact save and load.

`N` is the number of lanes, `M` the number of lanes one call is about.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from amago_envs.vector.streams import IntArray, LaneStreams

RENDER_MODES = ("ansi", "rgb_array")


class LaneVectorEnv(VectorEnv, abc.ABC):
    """Base of environments whose lanes live in NumPy arrays (autoreset in the same step).

    A lane that ends its episode returns the first observation of the next one; the last observation and the metrics
    of the ended episode are in `info["final_obs"]` and `info["final_info"]`. Subclasses keep their state in arrays with
    a leading lane axis, name these arrays in `_state_arrays`, and draw every random number from `self.streams`.

    Args:
        num_envs: number of lanes `N`, >= 1.
        observation_space: of one lane.
        action_space: of one lane.
        largest_request: the largest number of draws a lane takes at once.
        render_mode: None, "ansi" or "rgb_array".

    Raises:
        ValueError: if `num_envs` or `render_mode` is not allowed.
    """

    _state_arrays: tuple[str, ...] = ()
    _option_names: tuple[str, ...] = ()

    def __init__(
        self,
        num_envs: int,
        observation_space: gymnasium.spaces.Box,
        action_space: gymnasium.spaces.Discrete,
        *,
        largest_request: int,
        render_mode: str | None,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs: {num_envs}, allowed: integers >= 1")
        check_render_mode(render_mode)
        self.metadata = {
            "render_modes": list(RENDER_MODES),
            "render_fps": 6,
            "autoreset_mode": AutoresetMode.SAME_STEP,
        }
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self._lanes: IntArray = np.arange(num_envs, dtype=np.int64)
        self._largest_request = largest_request
        self._num_actions = int(action_space.n)
        self._streams: LaneStreams | None = None
        self._started = False
        self._last_observations: np.ndarray = np.zeros((num_envs, *observation_space.shape), dtype=np.float32)

    @abc.abstractmethod
    def _begin(self, lanes: IntArray, options: dict[str, Any]) -> None:
        """Start a new episode in some lanes.

        Args:
            lanes: `[M]` lane indices.
            options: of the call to `reset`; empty in an automatic reset.
        """

    @abc.abstractmethod
    def _observe(self, lanes: IntArray) -> np.ndarray:
        """Build the present observations of some lanes.

        Args:
            lanes: `[M]` lane indices.

        Returns:
            `[M, ...]` float32.
        """

    @property
    def streams(self) -> LaneStreams:
        """The random streams, one per lane."""
        if self._streams is None:
            self._streams = LaneStreams(self.num_envs, self._largest_request)
        return self._streams

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed each lane's stream started from."""
        return self.streams.seeds

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new episode in every lane, or in those of `options["reset_mask"]`.

        Args:
            seed: an integer s gives lane i the seed s + i; a sequence gives one per lane (None keeps the lane's
                stream); None continues all streams.
            options: `{"reset_mask": [N] bool}` restricts the reset; the other keys are those of the environment.

        Returns:
            Observations `[N, ...]` and an empty info dict.

        Raises:
            ValueError: if a seed or an option has the wrong form.
        """
        options = check_options(options, ("reset_mask", *self._option_names))
        lanes = self._lanes_to_reset(options.pop("reset_mask", None))
        self._seed(lanes, seed)
        self._begin(lanes, options)
        observations = self._observe(lanes)
        if lanes.size < self.num_envs:
            fresh, observations = observations, self._last_observations.copy()
            observations[lanes] = fresh
        self._last_observations = observations.copy()
        self._started = True
        return observations, {}

    def _lanes_to_reset(self, mask: Any) -> IntArray:
        if mask is None:
            return self._lanes
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(
                f"options['reset_mask']: {mask.dtype} array of shape {mask.shape}, "
                f"allowed: bool array of shape ({self.num_envs},) with at least one True"
            )
        if not self._started and not mask.all():
            raise ValueError("options['reset_mask']: some lanes left out, allowed: all lanes in the first reset")
        return np.flatnonzero(mask)

    def _seed(self, lanes: IntArray, seed: int | Sequence[int | None] | None) -> None:
        if seed is None:
            return
        if isinstance(seed, (int, np.integer)):
            seed = [int(seed) + lane for lane in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed: {len(seed)} seeds, allowed: one per lane, {self.num_envs}")
        for lane in lanes.tolist():
            lane_seed = seed[lane]
            if lane_seed is not None:
                self.streams.reseed(lane, int(lane_seed))

    def _checked_actions(self, actions: Any) -> IntArray:
        if not self._started:
            raise gymnasium.error.ResetNeeded("step was called before reset")
        array = np.asarray(actions)
        if array.shape != (self.num_envs,) or array.dtype.kind not in "iu":
            raise ValueError(
                f"actions: {array.dtype} array of shape {array.shape}, "
                f"allowed: integer array of shape ({self.num_envs},)"
            )
        array = array.astype(np.int64, copy=False)
        if array.min() < 0 or array.max() >= self._num_actions:
            raise ValueError(
                f"actions: values from {array.min()} to {array.max()}, allowed: 0 to {self._num_actions - 1}"
            )
        return array

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The constructor arguments that the dynamics depend on, JSON-able."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly from here, random streams included.

        Returns:
            Nested dict of JSON-able values and NumPy arrays, independent of this object.
        """
        arrays = {name: getattr(self, name).copy() for name in self._state_arrays}
        return {
            "settings": self._settings(),
            "started": self._started,
            "streams": self.streams.state_dict(),
            "arrays": arrays,
            "observations": self._last_observations.copy() if self._started else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state taken with `state_dict` in an environment with the same settings.

        Args:
            state: what `state_dict` returned; arrays may have become nested lists.

        Raises:
            ValueError: if the state is of an environment with other settings.
        """
        if state["settings"] != self._settings():
            raise ValueError(f"state: settings {state['settings']}, allowed: {self._settings()}")
        self.streams.load_state_dict(state["streams"])
        for name in self._state_arrays:
            setattr(self, name, np.array(state["arrays"][name], dtype=getattr(self, name).dtype))
        self._started = bool(state["started"])
        if self._started:
            self._last_observations = np.array(state["observations"], dtype=np.float32)


def check_options(options: dict[str, Any] | None, allowed: tuple[str, ...]) -> dict[str, Any]:
    """Refuse options of `reset` that the environment does not know.

    Args:
        options: argument of `reset`.
        allowed: keys the environment knows.

    Returns:
        A copy of the options; empty for None.

    Raises:
        ValueError: if there is an unknown key.
    """
    options = dict(options) if options is not None else {}
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(f"options: unknown keys {unknown}, allowed: {sorted(allowed)}")
    return options


def check_render_mode(render_mode: str | None) -> None:
    """Refuse render modes the environments do not have.

    Args:
        render_mode: value to check.

    Raises:
        ValueError: if it is neither None nor one of `RENDER_MODES`.
    """
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode: {render_mode!r}, allowed: None or one of {RENDER_MODES}")
