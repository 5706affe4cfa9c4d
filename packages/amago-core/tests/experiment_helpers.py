"""Tiny runs, environments and comparisons for the tests of whole experiments."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from amago_core import Experiment, ExperimentConfig
from amago_core.agents import AgentConfig
from amago_core.checkpoint import load_checkpoint
from amago_core.trackers import read_jsonl
from amago_nets.heads import ActorConfig, NCriticsConfig
from amago_nets.traj_encoders import FFConfig, GRUConfig, TransformerConfig
from amago_nets.tstep_encoders import FFTstepEncoderConfig
from amago_offline.datasets import ReplayConfig

# Dropout, so that the state of torch's global generator matters.
ENCODERS = {
    "transformer": TransformerConfig(d_model=16, n_layers=1, n_heads=2, dropout_ff=0.1, dropout_emb=0.1),
    "gru": GRUConfig(d_hidden=16, d_output=16, n_layers=1),
    "ff": FFConfig(d_model=16, dropout=0.1),
}


def tiny_config(run_dir: Any, *, encoder: str = "gru", **changes: Any) -> ExperimentConfig:
    """A run of about a second whose buffer is so small that it evicts."""
    settings: dict[str, Any] = {
        "max_seq_len": 8,
        "tstep_encoder": FFTstepEncoderConfig(n_layers=1, d_hidden=16, d_output=16),
        "traj_encoder": ENCODERS[encoder],
        "agent": AgentConfig(
            gammas=(0.9,), actor=ActorConfig(d_hidden=16), critics=NCriticsConfig(d_hidden=16, num_critics=2)
        ),
        "replay": ReplayConfig(max_trajectories=5),
        "parallel_lanes": 2,
        "epochs": 3,
        "rollout_steps_per_epoch": 40,
        "batches_per_epoch": 3,
        "batch_size": 4,
        "val_interval": 2,
        "val_lanes": 2,
        "val_episodes_per_lane": 1,
        "ckpt_interval": 1,
        "log_interval": 2,
        "device": "cpu",
    }
    return ExperimentConfig(run_dir=str(run_dir), **{**settings, **changes})


def cartpole() -> gym.Env:
    """An environment that cannot save its state."""
    return gym.make("CartPole-v1")


class WalkVectorEnv(VectorEnv):
    """Random walks that end at random, natively vectorised; can save its state, generators included."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(-1e3, 1e3, (3,), np.float32)
        self.single_action_space = gym.spaces.Discrete(4)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.position = np.zeros((num_envs, 3), np.float32)
        self.generator = np.random.default_rng(0)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.generator = np.random.default_rng(seed)
        self.position = self.generator.normal(size=(self.num_envs, 3)).astype(np.float32)
        return self.position.copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.position[np.arange(self.num_envs), np.minimum(actions, 2)] += 0.1
        self.position += 0.1 * self.generator.normal(size=self.position.shape).astype(np.float32)
        reward = -np.abs(self.position).sum(1)
        done = self.generator.random(self.num_envs) < 0.1
        info: dict[str, Any] = {}
        if done.any():
            final = np.full(self.num_envs, None, object)
            for lane in np.flatnonzero(done):
                final[lane] = self.position[lane].copy()
            distance = np.linalg.norm(self.position, axis=1)
            metrics = {"distance": distance, "_distance": done}
            info = {"final_obs": final, "_final_obs": done, "final_info": {"metrics": metrics, "_metrics": done}}
            self.position[done] = self.generator.normal(size=(int(done.sum()), 3))
        return self.position.copy(), reward, done, np.zeros(self.num_envs, bool), info

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position.copy(), "generator": self.generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = np.array(state["position"])
        self.generator.bit_generator.state = state["generator"]


def start(kind: str, config: ExperimentConfig, **options: Any) -> Experiment:
    """A quiet experiment in "cartpole" (cannot be saved) or "walk" (can)."""
    makers = {"make_env": cartpole} if kind == "cartpole" else {"make_vec_env": WalkVectorEnv}
    return Experiment(config, progress=False, **{**makers, **options})


def go_on(kind: str, run_dir: Any, **options: Any) -> Experiment:
    """Resume what `start` began."""
    makers: dict[str, Any] = {} if kind == "cartpole" else {"make_vec_env": WalkVectorEnv}
    return Experiment.resume(run_dir, progress=False, **{**makers, **options})


def metrics(run_dir: Any) -> list[dict[str, Any]]:
    """All records without what depends on the clock."""
    records = read_jsonl(Path(run_dir) / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]


def summary(run_dir: Any) -> dict[str, Any]:
    """The summary without what depends on the clock or the process."""
    data = json.loads((Path(run_dir) / "summary.json").read_text())
    return {k: v for k, v in data.items() if k not in ("seconds", "versions")}


def trajectory_counts(state: dict[str, Any]) -> list[int]:
    """Visible trajectories of every segment, without the segments' random names."""
    return [segment["trajectories"] for segment in state["dataset"]["segments"]]


def assert_identical(left: Any, right: Any, path: str = "state") -> None:
    """Compare nested values, arrays and tensors to the last bit."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_identical(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_identical(one, other, f"{path}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert_identical(left.numpy(), right.numpy(), path)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype and left.shape == right.shape, path
        assert left.tobytes() == right.tobytes(), path
    else:
        assert left == right, path


def assert_same_end(one: Any, other: Any) -> None:
    """Two finished runs have the same metrics, summary and final state, but for clocks and random names."""
    assert metrics(one) == metrics(other)
    assert summary(one) == summary(other)
    first, second = (load_checkpoint(Path(run) / "checkpoints") for run in (one, other))
    assert first.name == second.name
    assert_identical(first.tensors, second.tensors)
    assert trajectory_counts(first.state) == trajectory_counts(second.state)
    unlike = {"dataset", "seconds", "metrics_offset"}
    assert_identical(*({k: v for k, v in c.state.items() if k not in unlike} for c in (first, second)))


def assert_finite(records: list[dict[str, Any]]) -> None:
    """Every value of every record is a finite number."""
    for record in records:
        for name, value in record.items():
            assert isinstance(value, int | float) and math.isfinite(value), (name, value)
