"""What lies in the directory of a run, and how to open one.

`config.json`, `env.json` (spaces and how to make the environment), `metrics.jsonl`, `summary.json`, `checkpoints/`,
`buffer/`, `plots/`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gymnasium.vector import VectorEnv

from amago_core import config_json
from amago_core.agents import Agent
from amago_core.checkpoint import load_checkpoint, write_text_atomic
from amago_core.config import ExperimentConfig
from amago_core.errors import CheckpointError, ConfigError, EnvError, RunDirError
from amago_core.provenance import provenance
from amago_core.spaces import SpaceAdapter
from amago_core.spaces_json import space_from_json, space_to_json
from amago_core.vector_envs import EnvFactory


@dataclass(frozen=True)
class RunDir:
    """Paths inside the directory of a run.

    Attributes:
        path: the directory.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The exact configuration, with versions, seed and commit."""
        return self.path / "config.json"

    @property
    def env(self) -> Path:
        """Spaces of the environment and how to make it."""
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per epoch."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """Written once, when the run has finished."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """Full training states."""
        return self.path / "checkpoints"

    @property
    def buffer(self) -> Path:
        """The trajectory store."""
        return self.path / "buffer"

    @property
    def plots(self) -> Path:
        """Pictures."""
        return self.path / "plots"

    @classmethod
    def create(cls, config: ExperimentConfig, env_json: dict[str, Any]) -> RunDir:
        """Claim a new directory for a run.

        Raises:
            RunDirError: if it already holds anything, or cannot be written.
        """
        run = cls(Path(config.run_dir))
        try:
            if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
                raise RunDirError(
                    f"run_dir {str(run.path)!r} already exists and is not empty: resume the run in it, "
                    "or choose another directory"
                )
            run.path.mkdir(parents=True, exist_ok=True)
            write_text_atomic(run.env, json.dumps(env_json, indent=2))
            text = {"config": config_json.to_json(config), "provenance": provenance()}
            write_text_atomic(run.config, json.dumps(text, indent=2))
        except OSError as error:
            raise RunDirError(f"run_dir {str(run.path)!r} cannot be written: {error.strerror or error}") from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> tuple[RunDir, ExperimentConfig, dict[str, Any]]:
        """Open the directory of a run.

        Returns:
            The directory, the configuration of its run, and the content of `env.json`.

        Raises:
            RunDirError: if there is no run of ours in it.
        """
        run = cls(Path(path))
        if not run.config.is_file() or not run.env.is_file():
            raise RunDirError(f"run_dir {str(run.path)!r} holds no run: config.json or env.json is missing")
        try:
            config = config_json.from_json(json.loads(run.config.read_text())["config"])
            env_json = json.loads(run.env.read_text())
            _ = env_json["observation_space"], env_json["action_space"], env_json["factory"], env_json["val_factory"]
        except (ConfigError, ValueError, KeyError, TypeError) as error:
            raise RunDirError(f"run_dir {str(run.path)!r} holds a foreign or damaged run: {error}") from error
        if not isinstance(config, ExperimentConfig):
            raise RunDirError(f"run_dir {str(run.path)!r} holds a foreign run: {type(config).__name__}")
        return run, dataclasses.replace(config, run_dir=str(path)), env_json

    def require_writable(self) -> None:
        """Raise `RunDirError` if the directory cannot be written."""
        if not os.access(self.path, os.W_OK):
            raise RunDirError(f"run_dir {str(self.path)!r} cannot be written: permission denied")


def describe_env(env: VectorEnv, factory: EnvFactory, val_factory: EnvFactory) -> dict[str, Any]:
    """Content of `env.json`: both spaces, and how to make the environments again (None where JSON cannot say)."""
    return {
        "observation_space": space_to_json(env.single_observation_space),
        "action_space": space_to_json(env.single_action_space),
        "factory": factory.to_json(),
        "val_factory": val_factory.to_json(),
    }


def require_same_spaces(env: VectorEnv, stored: dict[str, Any]) -> None:
    """Refuse an environment whose spaces are not those of the run.

    Raises:
        EnvError: naming the space that differs.
    """
    for name in ("observation_space", "action_space"):
        now = space_to_json(getattr(env, f"single_{name}"))
        if now != stored[name]:
            raise EnvError(f"{name} is not the one of the run to resume: {now} instead of {stored[name]}")


def adapter_of(env_json: dict[str, Any]) -> SpaceAdapter:
    """The adapter of the spaces stored in `env.json`."""
    return SpaceAdapter(space_from_json(env_json["observation_space"]), space_from_json(env_json["action_space"]))


def build_agent(config: ExperimentConfig, adapter: SpaceAdapter) -> Agent:
    """The agent a configuration describes, with initial weights from torch's global generator."""
    return config.agent.build(
        obs_specs=adapter.obs_specs,
        action_spec=adapter.action_spec,
        tstep_encoder=config.tstep_encoder,
        traj_encoder=config.traj_encoder,
        max_seq_len=config.max_seq_len,
    )


def load_agent(path: str | Path, *, device: str = "cpu") -> tuple[Agent, SpaceAdapter]:
    """The agent of a run's newest intact checkpoint.

    Raises:
        RunDirError: if there is no run in `path`.
        CheckpointError: if no checkpoint is intact, or it belongs to another agent.
    """
    run, config, env_json = RunDir.open(path)
    adapter = adapter_of(env_json)
    agent = build_agent(config, adapter)
    load_agent_tensors(agent, load_checkpoint(run.checkpoints).tensors, str(run.checkpoints))
    return agent.to(device).eval(), adapter


def load_agent_tensors(agent: Agent, tensors: dict[str, Any], where: str) -> None:
    """Load weights, all of them or none.

    Raises:
        CheckpointError: if names or shapes are another agent's.
    """
    own = agent.state_dict()
    wrong = sorted(set(own) ^ set(tensors)) or sorted(k for k, v in own.items() if v.shape != tensors[k].shape)
    if wrong:
        raise CheckpointError(
            f"the checkpoint in {where} was made by another agent: {len(wrong)} tensors differ, first {wrong[0]!r}"
        )
    agent.load_state_dict(tensors, strict=True)
