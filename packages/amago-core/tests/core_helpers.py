"""Small agents, batches and environments for the tests of this package."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from amago_core.agents import Agent, AgentConfig
from amago_nets.heads import ActorConfig, NCriticsConfig
from amago_nets.specs import ActionSpec, ArraySpec
from amago_nets.traj_encoders import FFConfig, GRUConfig, TransformerConfig
from amago_nets.tstep_encoders import FFTstepEncoderConfig
from amago_offline.batch import Batch
from tensordict import TensorDict

ENCODERS = {
    "transformer": TransformerConfig(d_model=16, n_layers=2, n_heads=2, dropout_ff=0.0, dropout_emb=0.0),
    "gru": GRUConfig(d_hidden=16, d_output=16, n_layers=1),
    "ff": FFConfig(d_model=16),
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
