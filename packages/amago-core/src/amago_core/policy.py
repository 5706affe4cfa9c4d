"""The policy: what the rollout acts with, and what a user deploys.

It keeps everything that depends on the past, for all lanes at once: the sequence model's state, the last action, the
time since the episode began.

Dimensions: N lanes, A action.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amago_core.agents.base import BaseAgent
from amago_core.errors import EnvError
from amago_core.seeding import torch_generator
from amago_core.spaces import SpaceAdapter


class Policy:
    """An agent with a memory of the episodes it is in.

    Use `reset` and `act` in your own loop; the training loop uses `step` and `set_executed`, which speak in arrays over
    lanes and integers from 0 instead of the environment's own observations and actions.

    Args:
        agent: the networks.
        adapter: of the environment's spaces.
        sample: draw actions from the policy; False takes the most likely one.
        seed: of the draws.
    """

    def __init__(self, agent: BaseAgent, adapter: SpaceAdapter, *, sample: bool = True, seed: int = 0) -> None:
        self.agent = agent
        self.adapter = adapter
        self.sample = sample
        self._generator = torch_generator(seed, "policy", device=agent.device)
        self._lanes: int | None = None
        self._batched = True

    @classmethod
    def load(cls, run_dir: str | Path, *, device: str = "cpu", sample: bool = False, seed: int = 0) -> Policy:
        """Load the newest policy of a run.

        Args:
            run_dir: of an `Experiment`.
            device: where to run it, whatever it was trained on.
            sample: see `Policy`.
            seed: see `Policy`.

        Returns:
            A policy for one environment; `reset(lanes)` makes room for more.

        Raises:
            RunDirError: if there is no run in `run_dir`.
            CheckpointError: if it holds no intact checkpoint.
        """
        from amago_core.run_dir import load_agent

        agent, adapter = load_agent(run_dir, device=device)
        policy = cls(agent, adapter, sample=sample, seed=seed)
        policy.reset()
        return policy

    def reset(self, lanes: int | np.ndarray | None = None) -> None:
        """Begin new episodes.

        Args:
            lanes: number of parallel environments; None for one environment without a lane dimension; a bool array
                `[N]` begins a new episode in those lanes and leaves the others as they are.

        Raises:
            ValueError: if `lanes` is no positive number, or a mask that does not fit the lanes there are.
        """
        if isinstance(lanes, np.ndarray | list | tuple):
            mask = np.asarray(lanes)
            if self._lanes is None or mask.shape != (self._lanes,) or mask.dtype != bool:
                needed = "a number at first" if self._lanes is None else f"a number or bool [{self._lanes}]"
                raise ValueError(f"lanes must be {needed}; got {mask.dtype} {list(mask.shape)}")
            self._start_episodes(mask)
            return
        if lanes is not None and lanes < 1:
            raise ValueError(f"lanes must be >= 1; got {lanes}")
        self._batched = lanes is not None
        self._allocate(1 if lanes is None else int(lanes))

    def act(self, obs: Any, reward: Any = None, *, executed: Any = None) -> Any:
        """Choose the next action.

        Args:
            obs: the environment's observation, `[N, ...]` if `reset` was given a number of lanes.
            reward: of the last step, `[N]` or a number; None is 0. Ignored where an episode begins.
            executed: the environment's last action, if it ran another one than this policy chose. Ignored where an
                episode begins.

        Returns:
            An action of the environment's space, `[N, ...]` if there are lanes.

        Raises:
            EnvError: if an argument does not fit the environment's spaces or the number of lanes.
        """
        if self._lanes is None:
            self.reset()
        lanes = self._lanes
        assert lanes is not None
        # Loops hand over the last reward and action at every step; the first timestep of an episode has neither.
        begun = self._time_idx.numpy() > 0
        if executed is not None:
            actions = self._from_env(executed, lanes)
            self.set_executed(np.where(begun.reshape(-1, *(1,) * (actions.ndim - 1)), actions, self._prev_action))
        rewards = np.zeros(lanes, np.float32) if reward is None else np.asarray(reward, np.float32)
        if rewards.shape != ((lanes,) if self._batched else ()) and rewards.size != lanes:
            raise EnvError(f"reward must be one number for each of the {lanes} lanes; got shape {list(rewards.shape)}")
        rewards = np.where(begun, rewards.reshape(lanes), np.float32(0))
        chosen = self.step(self.adapter.to_obs(obs, lanes if self._batched else None), rewards)
        env_actions = self.adapter.to_env_actions(chosen)
        return env_actions if self._batched else _single(env_actions[0])

    def _from_env(self, executed: Any, lanes: int) -> np.ndarray:
        """Actions that the environment ran, `[N]` or `[N, A]` in the policy's terms."""
        env_actions = np.asarray(executed) if self._batched else np.asarray(executed)[None]
        spec = self.adapter.action_spec
        try:
            actions = self.adapter.from_env_actions(env_actions)
            fits = actions.shape == ((lanes,) if spec.kind == "discrete" else (lanes, spec.size))
            if spec.kind == "discrete":
                fits = fits and np.array_equal(self.adapter.to_env_actions(actions), env_actions)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise EnvError(f"executed must hold {lanes} actions of the environment's space; got {executed!r}")
        return actions

    def step(self, obs: dict[str, np.ndarray], reward: np.ndarray) -> np.ndarray:
        """Advance all lanes by one timestep.

        Args:
            obs: name to `[N, ...]`, as `SpaceAdapter.to_obs` gives.
            reward: `[N]` float32 of the last step; 0 at the start of an episode.

        Returns:
            `[N]` int64 or `[N, A]` float32 in [-1, 1]; remembered as executed until `set_executed` says otherwise.
        """
        device = self.agent.device
        # Setting the mode of every module takes as long as a small network.
        if self.agent.training:
            self.agent.eval()
        with torch.no_grad():
            distribution = self.agent.policy_step(
                {key: _tensor(value).to(device) for key, value in obs.items()},
                self._prev_action.to(device),
                _tensor(reward).to(device),
                self._time_idx.to(device),
                self._state,
            )
            action = distribution.sample(generator=self._generator) if self.sample else distribution.mode
        self._time_idx += 1
        action = action.cpu()
        self._prev_action.copy_(action)
        return action.numpy()

    def set_executed(self, action: np.ndarray) -> None:
        """Replace the remembered last actions by those that were really executed, `[N]` or `[N, A]`."""
        self._prev_action.copy_(_tensor(action))

    def _allocate(self, lanes: int) -> None:
        self._lanes = lanes
        self._state = self.agent.traj_encoder.initial_state(lanes, device=self.agent.device)
        self._time_idx = torch.zeros(lanes, dtype=torch.int64)
        none = torch.from_numpy(self.adapter.zero_action(lanes))
        self._none_action = none.to(torch.int64) if self.adapter.action_spec.kind == "discrete" else none.float()
        self._prev_action = self._none_action.clone()

    def _start_episodes(self, lanes: np.ndarray) -> None:
        mask = _tensor(lanes)
        self.agent.traj_encoder.reset_state(self._state, mask.to(self.agent.device))
        self._time_idx[mask] = 0
        self._prev_action[mask] = self._none_action[mask]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on in the middle of episodes."""
        memory = {f"memory/{key}": value for key, value in self._state.state_dict().items()}
        own = {"time_idx": self._time_idx.clone(), "prev_action": self._prev_action.clone()}
        return {**memory, **own, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned; the number of lanes must be set already."""
        memory = {key.removeprefix("memory/"): v for key, v in state.items() if key.startswith("memory/")}
        self._state.load_state_dict(memory)
        self._time_idx.copy_(state["time_idx"])
        self._prev_action.copy_(state["prev_action"])
        self._generator.set_state(state["generator"].cpu())


def _tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor, without a copy if torch can share its memory."""
    shareable = array.flags.writeable and array.flags.c_contiguous
    return torch.from_numpy(array if shareable else array.copy())


def _single(action: Any) -> Any:
    return action.item() if getattr(action, "ndim", 1) == 0 else action
