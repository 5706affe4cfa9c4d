"""Settings of a run. Every field has a default that works; wrong values say so at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from amago_nets.traj_encoders import FFConfig, GRUConfig, TransformerConfig
from amago_nets.tstep_encoders import FFTstepEncoderConfig
from amago_offline.datasets import ReplayConfig

from amago_core.agents import AgentConfig
from amago_core.errors import ConfigError
from amago_core.exploration import BilevelEpsilonGreedyConfig, EpsilonGreedyConfig
from amago_core.learner import LearnerConfig


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Settings of `Experiment`.

    Attributes:
        run_dir: where everything of the run goes; must not hold another run.
        seed: determines initial weights, environments, exploration and sampling.
        max_seq_len: longest context of the policy in timesteps, and training windows in transitions.
        tstep_encoder: embeds one timestep.
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
    tstep_encoder: FFTstepEncoderConfig = FFTstepEncoderConfig()
    traj_encoder: TransformerConfig | GRUConfig | FFConfig = TransformerConfig()
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
        at_least_one = (
            "max_seq_len",
            "parallel_lanes",
            "epochs",
            "batch_size",
            "val_lanes",
            "val_episodes_per_lane",
            "ckpt_interval",
            "log_interval",
        )
        at_least_zero = (
            "seed",
            "rollout_steps_per_epoch",
            "batches_per_epoch",
            "start_learning_at",
            "start_collecting_at",
            "val_interval",
        )
        for names, least in ((at_least_one, 1), (at_least_zero, 0)):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, int) or value < least:
                    raise ConfigError(f"{name} must be an integer >= {least}; got {value!r}")
        for name in ("trajectory_limit", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1 or None; got {value!r}")
        if self.trajectory_limit is not None and self.trajectory_limit < self.max_seq_len:
            raise ConfigError(
                f"trajectory_limit must be None or >= max_seq_len={self.max_seq_len}, or windows could never be full; "
                f"got {self.trajectory_limit}"
            )
        if self.env_mode not in ("sync", "async"):
            raise ConfigError(f"env_mode must be 'sync' or 'async'; got {self.env_mode!r}")
        if not self.run_dir:
            raise ConfigError("run_dir must name a directory; got ''")
