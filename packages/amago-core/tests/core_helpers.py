"""Small agents, batches and environments for the tests of this package."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from tensordict import TensorDict

from amago_core.agents import Agent, AgentConfig
from amago_core.policy import Policy
from amago_core.spaces import SpaceAdapter
from amago_nets.heads import ActorConfig, NCriticsConfig
from amago_nets.specs import ActionSpec, ArraySpec
from amago_nets.traj_encoders import FFConfig, GRUConfig, MambaConfig, TransformerConfig
from amago_nets.tstep_encoders import FFTstepEncoderConfig
from amago_offline.batch import Batch

ENCODERS = {
    "transformer": TransformerConfig(d_model=16, n_layers=2, n_heads=2, dropout_ff=0.0, dropout_emb=0.0),
    "gru": GRUConfig(d_hidden=16, d_output=16, n_layers=1),
    "ff": FFConfig(d_model=16),
    "mamba": MambaConfig(d_model=16, d_state=4, n_layers=1),
}


def make_agent(kind: str = "discrete", encoder: str = "gru", seed: int = 0, **settings: Any) -> Agent:
    """A tiny agent for observations `[3]` and 4 actions or 2 action dimensions."""
    torch.manual_seed(seed)
    config = AgentConfig(
        **{"actor": ActorConfig(d_hidden=16), "critics": NCriticsConfig(d_hidden=16), "gammas": (0.5,), **settings}
    )
    return config.build(
        obs_specs={"observation": ArraySpec(shape=(3,), dtype="float32")},
        action_spec=ActionSpec(kind=kind, size=4 if kind == "discrete" else 2),
        tstep_encoder=FFTstepEncoderConfig(n_layers=1, d_hidden=16, d_output=16),
        traj_encoder=ENCODERS[encoder],
        max_seq_len=16,
    )


def make_batch(kind: str = "discrete", lengths: tuple[int, ...] = (6, 4, 1), seed: int = 0) -> Batch:
    """Random windows with the given numbers of transitions; padding holds zeros."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = len(lengths), max(lengths) + 1
    mask = torch.arange(columns - 1) < torch.tensor(lengths)[:, None]
    steps = torch.cat([torch.ones(rows, 1, dtype=torch.bool), mask], 1)
    if kind == "discrete":
        prev_action = torch.randint(0, 4, (rows, columns), generator=generator)
        prev_action[:, 0] = -1
        prev_action = prev_action * steps
    else:
        prev_action = (2 * torch.rand(rows, columns, 2, generator=generator) - 1) * steps[..., None]
    terminated = torch.zeros(rows, columns, dtype=torch.bool)
    terminated[0, lengths[0]] = True
    reset = torch.zeros(rows, columns, dtype=torch.bool)
    reset[:, 0] = True
    obs = torch.randn(rows, columns, 3, generator=generator) * steps[..., None]
    return Batch(
        obs=TensorDict({"observation": obs}, batch_size=[rows]),
        prev_action=prev_action,
        prev_reward=torch.randn(rows, columns, generator=generator) * steps,
        terminated=terminated,
        truncated=torch.zeros_like(terminated),
        time_idx=torch.arange(columns).expand(rows, -1).clone(),
        reset=reset,
        mask=mask,
        batch_size=[rows],
    )


class CountingEnv(gym.Env):
    """Observation `[task, t, 0]`; ends after `limit` steps, by truncation unless `terminates`."""

    def __init__(self, limit: int = 3, terminates: bool = False) -> None:
        self.observation_space = gym.spaces.Box(-1e4, 1e4, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(4)
        self.limit, self.terminates = limit, terminates
        self.task = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.task += 100
        self.t = 0
        return self._obs(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        over = self.t >= self.limit
        info = {"metrics": {"steps": float(self.t)}} if over else {}
        return self._obs(), float(self.t), over and self.terminates, over and not self.terminates, info

    def _obs(self) -> np.ndarray:
        return np.array([self.task, self.t, 0], np.float32)


class TraceEnv(gym.Env):
    """Deterministic and easy to read off: the observation names its lane, episode and time, and the last action.

    Observation `[100 * episode + t, lane, action]` (episodes count from 1), reward `t + lane / 10`; episode `e` lasts
    `limits[(e - 1) % len(limits)]` steps and ends by termination if that is odd, otherwise by truncation.

    Args:
        limits: lengths of the episodes.
        lane: any number, to tell environments apart.
        dict_obs: give the observation in two parts, one of them inside a nested dictionary.
        continuous: two action dimensions in [-2, 2] x [0, 10] instead of 4 actions that count from 7.
        reuse: write every observation into the same array.
    """

    def __init__(
        self,
        limits: tuple[int, ...] = (3,),
        lane: int = 0,
        *,
        dict_obs: bool = False,
        continuous: bool = False,
        reuse: bool = False,
    ) -> None:
        box = gym.spaces.Box(-1e4, 1e4, (3,), np.float32)
        parts = {"where": box, "more": gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (2, 2, 1), np.uint8)})}
        self.observation_space = gym.spaces.Dict(parts) if dict_obs else box
        self.action_space = gym.spaces.Discrete(4, start=7)
        if continuous:
            self.action_space = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))
        self.limits, self.lane, self.reuse = limits, lane, reuse
        self._shared = np.zeros(3, np.float32)
        self.episode, self.t = 0, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.episode += 1
        self.t = 0
        return self._obs(0.0), {"metrics": {"of_reset": 1.0}}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.t += 1
        limit = self.limits[(self.episode - 1) % len(self.limits)]
        over = self.t >= limit
        info: dict[str, Any] = {"AMAGO_LOG_METRIC Time": float(self.t)}
        if over:
            info["metrics"] = {"length": self.t, "episode": float(self.episode)}
        obs = self._obs(float(np.sum(action)))
        return obs, self.t + self.lane / 10, over and limit % 2 == 1, over and limit % 2 == 0, info

    def _obs(self, action: float) -> Any:
        where = self._shared if self.reuse else np.zeros(3, np.float32)
        where[:] = [100 * self.episode + self.t, self.lane, action]
        if isinstance(self.observation_space, gym.spaces.Dict):
            return {"where": where, "more": {"image": np.full((2, 2, 1), self.t, np.uint8)}}
        return where


def trace_envs(limits: list[tuple[int, ...]], mode: AutoresetMode, **settings: Any) -> SyncVectorEnv:
    """One `TraceEnv` per entry of `limits`, the lane's number its own."""
    makers = [partial(TraceEnv, lane_limits, lane, **settings) for lane, lane_limits in enumerate(limits)]
    return SyncVectorEnv(makers, autoreset_mode=mode)


def make_agent_for(adapter: SpaceAdapter, encoder: str = "gru", seed: int = 0, max_seq_len: int = 16) -> Agent:
    """A tiny agent for any environment."""
    torch.manual_seed(seed)
    config = AgentConfig(actor=ActorConfig(d_hidden=16), critics=NCriticsConfig(d_hidden=16), gammas=(0.5,))
    return config.build(
        obs_specs=adapter.obs_specs,
        action_spec=adapter.action_spec,
        tstep_encoder=FFTstepEncoderConfig(n_layers=1, d_hidden=16, d_output=16),
        traj_encoder=ENCODERS[encoder],
        max_seq_len=max_seq_len,
    )


def make_policy(env: VectorEnv, encoder: str = "gru", **settings: Any) -> Policy:
    """A tiny policy for an environment."""
    adapter = SpaceAdapter(env.single_observation_space, env.single_action_space)
    return Policy(make_agent_for(adapter, encoder), adapter, **settings)
