"""Stepping a vector environment without minding when it resets itself.

Dimensions: N lanes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from amago_core.errors import CheckpointError, EnvError
from amago_core.vector_envs import Metric, autoreset_mode, metrics_of, supports_state


@dataclass(frozen=True)
class LaneStep:
    """What one step did in all lanes, in the same terms for every autoreset mode.

    Attributes:
        obs: `[N, ...]` observations to act on next, in the environment's own form.
        final_obs: holds the last observations of the lanes that are done, as `SpaceAdapter.final_obs` takes them;
            None if `obs` still holds them.
        reward: `[N]` float32, a new array; 0 in lanes that did not step.
        terminated: `[N]` bool.
        truncated: `[N]` bool.
        stepped: `[N]` bool; False in lanes that only reset themselves and ignored their action.
        started: `[N]` bool; `obs` is the first observation of an episode.
        metrics: what the environment reported about this step.
    """

    obs: Any
    final_obs: Any
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    stepped: np.ndarray
    started: np.ndarray
    metrics: list[Metric]

    @property
    def done(self) -> np.ndarray:
        """`[N]` bool: this step ended an episode."""
        return self.terminated | self.truncated


class LaneEnv:
    """A vector environment that always has an observation to act on; episodes follow each other by themselves.

    Args:
        env: any Gymnasium vector environment that names its autoreset mode.

    Attributes:
        lanes: N.
        exact: whether the environment can be saved in the middle of episodes.
        stepping: `[N]` bool; False in lanes whose next step will only reset them.

    Raises:
        EnvError: if the environment does not name its autoreset mode.
    """

    def __init__(self, env: VectorEnv) -> None:
        self.env = env
        self.mode = autoreset_mode(env)
        self.lanes: int = env.num_envs
        self.exact = supports_state(env)
        self.stepping = np.ones(self.lanes, bool)

    def reset(self, seed: int) -> Any:
        """Begin an episode in every lane.

        Args:
            seed: lane i gets `seed + i`.

        Returns:
            `[N, ...]` first observations.
        """
        obs, _ = self.env.reset(seed=seed)
        self.stepping = np.ones(self.lanes, bool)
        return obs

    def step(self, actions: Any) -> LaneStep:
        """Take one step in every lane.

        Args:
            actions: `[N, ...]`, as the environment takes them.

        Returns:
            What happened.

        Raises:
            EnvError: if the environment breaks its autoreset mode, or a reward is missing or not finite.
        """
        obs, raw_reward, terminated, truncated, info = self.env.step(actions)
        stepped = self.stepping
        reward = np.array(raw_reward, np.float32)
        if reward.shape != (self.lanes,) or not np.isfinite(reward[stepped]).all():
            name = type(self.env).__name__
            raise EnvError(f"{name} must return one finite reward for each of {self.lanes} lanes; got {raw_reward}")
        reward[~stepped] = 0.0
        terminated = np.asarray(terminated, bool) & stepped
        truncated = np.asarray(truncated, bool) & stepped
        done = terminated | truncated
        started, final_obs = done, None
        if self.mode is AutoresetMode.NEXT_STEP:
            started, self.stepping = ~stepped, ~done
        elif done.any():
            if self.mode is AutoresetMode.SAME_STEP:
                final_obs = info.get("final_obs")
                if final_obs is None:
                    name = type(self.env).__name__
                    raise EnvError(f"{name} resets in the same step but reports no info['final_obs']")
            else:
                # The environment may write the new observations into the same arrays.
                final_obs = copy.deepcopy(obs)
                obs, _ = self.env.reset(options={"reset_mask": done.copy()})
        metrics = self._metrics(info, stepped, done)
        return LaneStep(obs, final_obs, reward, terminated, truncated, stepped, started, metrics)

    def _metrics(self, info: dict[str, Any], stepped: np.ndarray, done: np.ndarray) -> list[Metric]:
        """Metrics of the step; those of resets are left out, so that all autoreset modes report the same."""
        final = info.get("final_info")
        if not isinstance(final, dict):
            return list(metrics_of(info, stepped))
        return [*metrics_of(info, stepped & ~done), *metrics_of(final, done)]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on in the middle of episodes; only if `exact`."""
        env: Any = self.env
        return {"env": env.state_dict(), "stepping": self.stepping.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: if this environment cannot be restored.
        """
        if not self.exact:
            raise CheckpointError(f"{type(self.env).__name__} has no load_state_dict, but its state was saved")
        env: Any = self.env
        env.load_state_dict(state["env"])
        self.stepping = np.array(state["stepping"], bool)
