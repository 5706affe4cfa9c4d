"""What the single toy environments share: action checks, exact save and load."""

from __future__ import annotations

import abc
from typing import Any

import gymnasium
import numpy as np

from amago_envs.vector.base import check_render_mode
from amago_envs.vector.streams import generator_from_state


class ToyEnv(gymnasium.Env[np.ndarray, int], abc.ABC):
    """Base of single environments whose state is a few arrays and numbers, named in `_state_arrays`, `_state_scalars`.

    Args:
        observation_space: space of the observations.
        action_space: space of the actions.
        render_mode: None, "ansi" or "rgb_array".

    Raises:
        ValueError: if the render mode is not allowed.
    """

    _state_arrays: tuple[str, ...] = ()
    _state_scalars: tuple[str, ...] = ()

    def __init__(
        self,
        observation_space: gymnasium.spaces.Box,
        action_space: gymnasium.spaces.Discrete,
        render_mode: str | None,
    ) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self.observation_space = observation_space
        self.action_space = action_space
        self._num_actions = int(action_space.n)
        self._running = False

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The constructor arguments that the dynamics depend on, JSON-able."""

    def _checked_action(self, action: Any) -> int:
        if not self._running:
            raise gymnasium.error.ResetNeeded("step was called before reset or after the end of the episode")
        array = np.asarray(action)
        if array.shape != () or array.dtype.kind not in "iu" or not 0 <= array < self._num_actions:
            raise ValueError(f"action: {action!r}, allowed: integers from 0 to {self._num_actions - 1}")
        return int(array)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly from here, generator included.

        Returns:
            Nested dict of JSON-able values and NumPy arrays, independent of this object.
        """
        return {
            "settings": self._settings(),
            "running": self._running,
            "generator": self.np_random.bit_generator.state,
            "seed": self.np_random_seed,
            "arrays": {name: getattr(self, name).copy() for name in self._state_arrays},
            "scalars": {name: getattr(self, name) for name in self._state_scalars},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state taken with `state_dict` in an environment with the same settings.

        Args:
            state: what `state_dict` returned; arrays may have become lists.

        Raises:
            ValueError: if the state is of an environment with other settings.
        """
        if state["settings"] != self._settings():
            raise ValueError(f"state: settings {state['settings']}, allowed: {self._settings()}")
        self._running = bool(state["running"])
        self._np_random = generator_from_state(state["generator"])
        self._np_random_seed = state["seed"]
        for name in self._state_arrays:
            setattr(self, name, np.array(state["arrays"][name], dtype=getattr(self, name).dtype))
        for name in self._state_scalars:
            setattr(self, name, state["scalars"][name])
