"""Settings of a run. Every field has a default that works; wrong values say so at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from amago_core.agents import AgentConfig
from amago_core.errors import AmagoError, ConfigError
from amago_core.exploration import BilevelEpsilonGreedyConfig, EpsilonGreedyConfig
from amago_core.learner import LearnerConfig
from amago_nets.traj_encoders import (
    FFConfig,
    GRUConfig,
    IdentityConfig,
    LRUConfig,
    LSTMConfig,
    MambaConfig,
    MinGRUConfig,
    TransformerConfig,
)
from amago_nets.tstep_encoders import CNNTstepEncoderConfig, DictTstepEncoderConfig, FFTstepEncoderConfig
from amago_offline.datasets import ReplayConfig

_AT_LEAST_ONE = (
    "max_seq_len",
    "parallel_lanes",
    "epochs",
    "batch_size",
    "val_lanes",
    "val_episodes_per_lane",
    "ckpt_interval",
    "log_interval",
)
_AT_LEAST_ZERO = (
    "seed",
    "rollout_steps_per_epoch",
    "batches_per_epoch",
    "start_learning_at",
    "start_collecting_at",
    "val_interval",
)
_OPTIONAL = ("trajectory_limit", "threads")
# Field to examples of what it takes; anything else with `build` is a user's own part.
_PARTS = {
    "tstep_encoder": "FFTstepEncoderConfig(), CNNTstepEncoderConfig() or DictTstepEncoderConfig()",
    "traj_encoder": "TransformerConfig(), GRUConfig(), MambaConfig() or FFConfig()",
    "agent": "AgentConfig()",
    "exploration": "EpsilonGreedyConfig() or BilevelEpsilonGreedyConfig(rollout_horizon=...)",
    "replay": "ReplayConfig()",
}


@contextmanager
def configuration() -> Iterator[None]:
    """Turn a `ValueError` of a configuration or of what it builds into a `ConfigError`, with the same message."""
    try:
        yield
    except AmagoError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Settings of `Experiment`.

    Attributes:
        run_dir: where everything of the run goes; must not hold another run.
        seed: determines initial weights, environments, exploration and sampling.
        max_seq_len: longest context of the policy in timesteps, and training windows in transitions.
        tstep_encoder: embeds one timestep; None chooses one that suits the observations.
        traj_encoder: the sequence model.
        agent: the actor-critic.
        learner: the optimizer.
        exploration: how the collecting policy's actions are perturbed.
        replay: the trajectory store.
        parallel_lanes: environments collected from at once.
        epochs: length of the run.
        rollout_steps_per_epoch: environment steps per lane and epoch.
        batches_per_epoch: optimizer steps per epoch.
        batch_size: windows per optimizer step.
        trajectory_limit: cut stored trajectories after so many transitions; None stores whole episodes.
        stagger_trajectories: where `trajectory_limit` is more than `max_seq_len`, draw the length of every piece from
            `trajectory_limit` +- `max_seq_len`, so that training sees windows across the cuts too.
        start_learning_at: first epoch that trains.
        start_collecting_at: first epoch that collects.
        val_interval: epochs between validations; 0 turns them off.
        val_lanes: environments validated on at once.
        val_episodes_per_lane: episodes of each of them.
        ckpt_interval: epochs between checkpoints.
        log_interval: updates between the metrics that cost something.
        sample_actions_train: collect with sampled actions rather than the most likely ones.
        sample_actions_val: validate with sampled actions.
        env_mode: vectorise single environments in this process or in one process each.
        device: "auto" takes a GPU when there is one.
        threads: of torch on the CPU; None leaves torch's choice.
    """

    run_dir: str = "runs/experiment"
    seed: int = 0
    max_seq_len: int = 128
    tstep_encoder: FFTstepEncoderConfig | CNNTstepEncoderConfig | DictTstepEncoderConfig | None = None
    traj_encoder: (
        TransformerConfig | GRUConfig | LSTMConfig | MambaConfig | MinGRUConfig | LRUConfig | FFConfig | IdentityConfig
    ) = TransformerConfig()
    agent: AgentConfig = AgentConfig()
    learner: LearnerConfig = LearnerConfig()
    exploration: EpsilonGreedyConfig | BilevelEpsilonGreedyConfig = EpsilonGreedyConfig()
    replay: ReplayConfig = ReplayConfig()
    parallel_lanes: int = 12
    epochs: int = 1000
    rollout_steps_per_epoch: int = 1000
    batches_per_epoch: int = 1000
    batch_size: int = 24
    trajectory_limit: int | None = None
    stagger_trajectories: bool = True
    start_learning_at: int = 0
    start_collecting_at: int = 0
    val_interval: int = 20
    val_lanes: int = 12
    val_episodes_per_lane: int = 2
    ckpt_interval: int = 10
    log_interval: int = 100
    sample_actions_train: bool = True
    sample_actions_val: bool = True
    env_mode: Literal["sync", "async"] = "sync"
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that could only fail later."""
        if not isinstance(self.run_dir, str | os.PathLike) or not os.fspath(self.run_dir):
            raise ConfigError(f"run_dir must name a directory; got {self.run_dir!r}")
        object.__setattr__(self, "run_dir", os.fspath(self.run_dir))
        for names, least in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
            for name in names:
                if not _is_int(value := getattr(self, name), least):
                    raise ConfigError(f"{name} must be an integer >= {least}; got {value!r}")
        for name in _OPTIONAL:
            if (value := getattr(self, name)) is not None and not _is_int(value, 1):
                raise ConfigError(f"{name} must be an integer >= 1 or None; got {value!r}")
        if self.trajectory_limit is not None and self.trajectory_limit < self.max_seq_len:
            raise ConfigError(
                f"trajectory_limit must be None or >= max_seq_len={self.max_seq_len}, or windows could never be full; "
                f"got {self.trajectory_limit}"
            )
        if self.env_mode not in ("sync", "async"):
            raise ConfigError(f"env_mode must be 'sync' or 'async'; got {self.env_mode!r}")
        if not isinstance(self.device, str):
            raise ConfigError(f"device must be a name such as 'auto', 'cpu' or 'cuda:0'; got {self.device!r}")
        for name, examples in _PARTS.items():
            value = getattr(self, name)
            if value is None and name == "tstep_encoder":
                continue
            # Parts of networks say what they are part of.
            misplaced = getattr(value, "registry_kind", name) != name
            if misplaced or isinstance(value, type) or not callable(getattr(value, "build", None)):
                raise ConfigError(f"{name} must be a configuration such as {examples}; got {value!r}")
        if not isinstance(self.learner, LearnerConfig):
            raise ConfigError(f"learner must be a LearnerConfig(); got {self.learner!r}")

    def torch_device(self) -> torch.device:
        """The device to train on.

        Raises:
            ConfigError: if torch does not know it, or this machine does not have it.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"device {self.device!r} cannot be used: {reason}") from error
        return device


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
