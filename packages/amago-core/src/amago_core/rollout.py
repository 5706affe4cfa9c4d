"""Acting in a vector environment: policy, exploration, environment, recorder, for all lanes at once.

Dimensions: N lanes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from amago_core.errors import EnvError
from amago_core.exploration import Exploration
from amago_core.policy import Policy
from amago_core.recorder import Recorder
from amago_core.spaces import SpaceAdapter
from amago_core.vector_envs import autoreset_mode, metrics_of, supports_state


@dataclass
class RolloutStats:
    """What happened while collecting.

    Attributes:
        frames: environment steps, all lanes together; a step that only resets does not count.
        returns: of the episodes that ended, in the order in which they ended.
        lengths: of the same episodes.
        metrics: name to the values that environments reported.
    """

    frames: int = 0
    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def summary(self) -> dict[str, float]:
        """Means over ended episodes and reported metrics; a key is absent when nothing was reported."""
        result = {"episodes": float(len(self.returns))}
        if self.returns:
            result["return"] = float(np.mean(self.returns))
            result["length"] = float(np.mean(self.lengths))
        result.update({name: float(np.mean(values)) for name, values in self.metrics.items()})
        return result


class Rollout:
    """A policy living in a vector environment; it goes on where the last `collect` stopped.

    Args:
        env: any Gymnasium vector environment; its autoreset mode is read from its metadata.
        policy: acts in all lanes.
        exploration: replaces or perturbs actions; None leaves them alone.
        recorder: takes every timestep; None records nothing.
    """

    def __init__(
        self,
        env: VectorEnv,
        policy: Policy,
        *,
        exploration: Exploration | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.env = env
        self.policy = policy
        self.adapter: SpaceAdapter = policy.adapter
        self.exploration = exploration
        self.recorder = recorder
        self.mode = autoreset_mode(env)
        self.lanes: int = env.num_envs
        self.exact = supports_state(env)
        self._everyone = np.arange(self.lanes)
        self._obs: dict[str, np.ndarray] = {}

    def restart(self, seed: int) -> None:
        """Reset every lane; unfinished trajectories are stored as cut-off snippets first.

        Args:
            seed: of the environment's reset; lane i gets `seed + i`.
        """
        if self.recorder is not None:
            self.recorder.flush()
        obs, _ = self.env.reset(seed=seed)
        self.policy.reset(self.lanes)
        self._reward = np.zeros(self.lanes, np.float32)
        self._return = np.zeros(self.lanes, np.float64)
        self._length = np.zeros(self.lanes, np.int64)
        # Lanes whose next environment step only resets (NEXT_STEP mode).
        self._resetting = np.zeros(self.lanes, bool)
        self._obs = self.adapter.to_obs(obs, self.lanes)
        self._open(np.ones(self.lanes, bool), fresh_policy=False)

    def collect(self, steps: int) -> RolloutStats:
        """Take `steps` steps in every lane.

        Returns:
            Statistics of these steps.

        Raises:
            EnvError: if the environment breaks its own autoreset mode.
        """
        stats = RolloutStats()
        for _ in range(steps):
            self._step(stats)
        return stats

    def _step(self, stats: RolloutStats) -> None:
        actions = self.policy.step(self._obs, self._reward)
        if self.exploration is not None:
            actions = self.exploration.apply(actions, ~self._resetting)
            self.policy.set_executed(actions)
        raw_obs, reward, terminated, truncated, info = self.env.step(self.adapter.to_env_actions(actions))
        # Vector environments may return the same arrays again at the next step.
        reward = np.array(reward, np.float32)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        done = terminated | truncated
        obs = {key: np.array(value) for key, value in self.adapter.to_obs(raw_obs, self.lanes).items()}
        stepped = ~self._resetting
        self._account(stats, stepped, reward, done, info)
        last_obs = self._last_obs(obs, done, info)
        if self.recorder is not None:
            lanes = self._everyone[stepped]
            self.recorder.add(
                lanes,
                {key: value[lanes] for key, value in last_obs.items()},
                actions[lanes],
                reward[lanes],
                terminated[lanes],
                truncated[lanes],
            )
        started = self._started(done)
        if self.mode is AutoresetMode.DISABLED and done.any():
            raw_obs, _ = self.env.reset(options={"reset_mask": done})
            fresh = self.adapter.to_obs(raw_obs, self.lanes)
            for key, value in obs.items():
                value[done] = fresh[key][done]
        self._obs, self._reward = obs, reward
        if started.any():
            self._open(started, fresh_policy=True)

    def _started(self, done: np.ndarray) -> np.ndarray:
        """Lanes whose current observation is the first one of an episode."""
        if self.mode is not AutoresetMode.NEXT_STEP:
            return done
        started = self._resetting
        self._resetting = done & ~started
        return started

    def _last_obs(self, obs: dict[str, np.ndarray], done: np.ndarray, info: dict[str, Any]) -> dict[str, np.ndarray]:
        """Observations that the actions led to, also where `obs` already belongs to the next episode."""
        if self.mode is not AutoresetMode.SAME_STEP or not done.any():
            return obs
        if "final_obs" not in info:
            raise EnvError(f"{type(self.env).__name__} resets in the same step but reports no info['final_obs']")
        lanes = np.flatnonzero(done)
        final = self.adapter.final_obs(info["final_obs"], lanes)
        result = {key: value.copy() for key, value in obs.items()}
        for key, value in final.items():
            result[key][lanes] = value
        return result

    def _account(
        self, stats: RolloutStats, stepped: np.ndarray, reward: np.ndarray, done: np.ndarray, info: dict[str, Any]
    ) -> None:
        stats.frames += int(stepped.sum())
        self._return += np.where(stepped, reward, 0.0)
        self._length += stepped
        ended = done & stepped
        if ended.any():
            stats.returns.extend(self._return[ended].tolist())
            stats.lengths.extend(self._length[ended].tolist())
            self._return[ended] = 0.0
            self._length[ended] = 0
        for name, _, values in metrics_of(info):
            stats.metrics[name].extend(values.tolist())

    def _open(self, lanes: np.ndarray, *, fresh_policy: bool) -> None:
        """Begin episodes whose first observation is at hand."""
        self._reward[lanes] = 0.0
        if fresh_policy:
            self.policy.reset(lanes)
        if self.exploration is not None:
            self.exploration.start_episode(lanes)
        if self.recorder is not None:
            index = np.flatnonzero(lanes)
            first = {key: value[index] for key, value in self._obs.items()}
            self.recorder.begin(index, first, self.adapter.zero_action(len(index)))

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: nested dicts of arrays, tensors and JSON values.

        If the environment cannot be saved (`exact` is False), episodes in progress are not part of it, and `restart`
        must follow `load_state_dict`.
        """
        state: dict[str, Any] = {
            "policy": self.policy.state_dict(),
            "exploration": None if self.exploration is None else self.exploration.state_dict(),
        }
        if self.exact:
            inner: Any = self.env.unwrapped
            state["env"] = inner.state_dict()
            state["recorder"] = None if self.recorder is None else self.recorder.state_dict()
            state["lanes"] = {name: getattr(self, f"_{name}") for name in self._LANE_STATE}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, into a rollout over the same environment and as many lanes."""
        self.policy.reset(self.lanes)
        self.policy.load_state_dict(state["policy"])
        if self.exploration is not None:
            self.exploration.load_state_dict(state["exploration"])
        if "env" not in state:
            return
        self.env.reset(seed=0)
        inner: Any = self.env.unwrapped
        inner.load_state_dict(state["env"])
        if self.recorder is not None:
            self.recorder.load_state_dict(state["recorder"])
        for name in self._LANE_STATE:
            setattr(self, f"_{name}", state["lanes"][name])

    _LANE_STATE = ("obs", "reward", "return", "length", "resetting")
