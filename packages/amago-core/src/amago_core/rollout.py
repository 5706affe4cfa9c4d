"""Acting in a vector environment: policy, exploration, environment, recorder, for all lanes at once.

Dimensions: N lanes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from amago_core import interrupts
from amago_core.errors import CheckpointError
from amago_core.exploration import Exploration
from amago_core.lane_env import LaneEnv, LaneStep
from amago_core.policy import Policy
from amago_core.recorder import Recorder
from amago_core.spaces import SpaceAdapter


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
        self.lane_env = LaneEnv(env)
        self.policy = policy
        self.adapter: SpaceAdapter = policy.adapter
        self.exploration = exploration
        self.recorder = recorder
        self.lanes = self.lane_env.lanes
        self._everyone = np.arange(self.lanes)
        self._obs: dict[str, np.ndarray] = {}
        self._clear_sums()

    @property
    def exact(self) -> bool:
        """Whether episodes in progress can go on after `load_state_dict`."""
        return self.lane_env.exact

    def restart(self, seed: int) -> None:
        """Reset every lane; unfinished trajectories are stored as cut-off snippets first.

        Args:
            seed: of the environment's reset; lane i gets `seed + i`.
        """
        if self.recorder is not None:
            self.recorder.flush()
        obs = self.lane_env.reset(seed)
        self.policy.reset(self.lanes)
        self._clear_sums()
        self._obs = self.adapter.to_obs(obs, self.lanes)
        self._open(np.ones(self.lanes, bool))

    def _clear_sums(self) -> None:
        # Rewards of the last step, and what the episodes in progress add up to.
        self._reward = np.zeros(self.lanes, np.float32)
        self._return = np.zeros(self.lanes, np.float64)
        self._length = np.zeros(self.lanes, np.int64)

    def collect(self, steps: int) -> RolloutStats:
        """Take `steps` steps in every lane.

        Returns:
            Statistics of these steps.

        Raises:
            EnvError: if the environment breaks its own autoreset mode.
        """
        stats = RolloutStats()
        for _ in range(steps):
            interrupts.check()
            self._step(stats)
        return stats

    def _step(self, stats: RolloutStats) -> None:
        actions = self.policy.step(self._obs, self._reward)
        if self.exploration is not None:
            actions = self.exploration.apply(actions, self.lane_env.stepping)
            self.policy.set_executed(actions)
        step = self.lane_env.step(self.adapter.to_env_actions(actions))
        obs = self.adapter.to_obs(step.obs, self.lanes)
        self._account(stats, step)
        if self.recorder is not None:
            self._record(self.recorder, obs, actions, step)
        self._obs, self._reward = obs, step.reward
        if step.started.any():
            self._reward[step.started] = 0.0
            self.policy.reset(step.started)
            self._open(step.started)

    def _record(self, recorder: Recorder, obs: dict[str, np.ndarray], actions: np.ndarray, step: LaneStep) -> None:
        if step.final_obs is not None:
            ended = np.flatnonzero(step.done)
            obs = {key: value.copy() for key, value in obs.items()}
            for key, value in self.adapter.final_obs(step.final_obs, ended).items():
                obs[key][ended] = value
        arrays = (actions, step.reward, step.terminated, step.truncated)
        if step.stepped.all():
            recorder.add(self._everyone, obs, *arrays)
        else:
            lanes = np.flatnonzero(step.stepped)
            recorder.add(lanes, {key: value[lanes] for key, value in obs.items()}, *(array[lanes] for array in arrays))

    def _account(self, stats: RolloutStats, step: LaneStep) -> None:
        stats.frames += int(step.stepped.sum())
        self._return += step.reward
        self._length += step.stepped
        done = step.done
        if done.any():
            stats.returns.extend(self._return[done].tolist())
            stats.lengths.extend(self._length[done].tolist())
            self._return[done] = 0.0
            self._length[done] = 0
        for name, lanes, values in step.metrics:
            stats.metrics[name].extend(values[lanes].tolist())

    def _open(self, lanes: np.ndarray) -> None:
        """Begin episodes whose first observation is at hand."""
        if self.exploration is not None:
            self.exploration.start_episode(lanes)
        if self.recorder is not None:
            index = np.flatnonzero(lanes)
            first = {key: value[index] for key, value in self._obs.items()}
            self.recorder.begin(index, first, self.adapter.zero_action(len(index)))

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: nested dicts of arrays, tensors and JSON values.

        If the environment cannot be saved (`exact` is False), its episodes in progress cannot go on, and `restart`
        must follow `load_state_dict`; what the recorder holds of them is stored then.
        """
        state: dict[str, Any] = {
            "policy": self.policy.state_dict(),
            "exploration": None if self.exploration is None else self.exploration.state_dict(),
            "recorder": None if self.recorder is None else self.recorder.state_dict(),
        }
        if self.exact:
            state["env"] = self.lane_env.state_dict()
            state["lanes"] = {
                "obs": {key: value.copy() for key, value in self._obs.items()},
                "reward": self._reward.copy(),
                "return": self._return.copy(),
                "length": self._length.copy(),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, into a rollout over the same environment and as many lanes.

        Raises:
            CheckpointError: if the state is of a rollout that records or explores and this one does not, of another
                number of lanes, or of an environment that can be saved while this one cannot.
        """
        for name, part in (("exploration", self.exploration), ("recorder", self.recorder)):
            if name in state and (state[name] is None) is not (part is None):
                has, had = ("no", "one") if part is None else ("one", "none")
                raise CheckpointError(f"{name}: this rollout has {has}, the saved one had {had}")
        if ("env" in state) is not self.exact:
            has, had = ("can", "could not") if self.exact else ("cannot", "could")
            raise CheckpointError(f"this environment {has} be saved in the middle of episodes, the saved one {had}")
        self.policy.reset(self.lanes)
        self.policy.load_state_dict(state["policy"])
        if self.exploration is not None:
            self.exploration.load_state_dict(state["exploration"])
        if self.recorder is not None:
            self.recorder.load_state_dict(state["recorder"])
        if not self.exact:
            return
        lanes = state["lanes"]
        if len(lanes["reward"]) != self.lanes:
            raise CheckpointError(f"the rollout has {self.lanes} lanes, its saved state {len(lanes['reward'])}")
        self.lane_env.load_state_dict(state["env"])
        self._obs = {key: np.array(value) for key, value in lanes["obs"].items()}
        self._reward, self._return = np.array(lanes["reward"], np.float32), np.array(lanes["return"], np.float64)
        self._length = np.array(lanes["length"], np.int64)
