"""What lies in the directory of a run, and how to open one.

`config.json`, `env.json` (spaces and how to make the environment), `metrics.jsonl`, `summary.json`, `checkpoints/`,
`buffer/`, `plots/`.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amago_core import config_json
from amago_core.agents import Agent
from amago_core.checkpoint import checkpoint_names, load_checkpoint, write_text_atomic
from amago_core.config import ExperimentConfig, configuration
from amago_core.errors import CheckpointError, ConfigError, RunDirError
from amago_core.provenance import provenance
from amago_core.spaces import SpaceAdapter
from amago_core.spaces_json import space_from_json
from amago_offline.datasets import ReplayDataset
from amago_offline.schema import Schema

_ENV_KEYS = ("observation_space", "action_space", "factory", "val_factory", "validates_in_training_env")


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
        """Spaces of the environments and how to make them."""
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per line: of each epoch, and of each validation."""
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

    def require_free(self) -> None:
        """Refuse a path that holds anything already.

        Raises:
            RunDirError: saying what to do instead.
        """
        try:
            in_use = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        except OSError as error:
            raise self._unwritable(error) from error
        if in_use:
            raise RunDirError(
                f"run_dir {str(self.path)!r} already exists and is not empty: resume the run in it, "
                "or choose another directory"
            )

    @classmethod
    def create(cls, config: ExperimentConfig, env_json: dict[str, Any]) -> RunDir:
        """Claim a new directory for a run.

        Raises:
            ConfigError: if the configuration cannot be written as JSON.
            RunDirError: if the directory already holds anything, or cannot be written.
        """
        run = cls(Path(config.run_dir))
        env_text = json.dumps(env_json, indent=2)
        config_text = json.dumps({"config": config_json.to_json(config), "provenance": provenance()}, indent=2)
        run.require_free()
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            write_text_atomic(run.env, env_text)
            write_text_atomic(run.config, config_text)
        except OSError as error:
            raise run._unwritable(error) from error
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
            _ = [env_json[name] for name in _ENV_KEYS]
        except (OSError, ConfigError, ValueError, KeyError, TypeError) as error:
            raise RunDirError(f"run_dir {str(run.path)!r} holds a foreign or damaged run: {error}") from error
        if not isinstance(config, ExperimentConfig):
            raise RunDirError(f"run_dir {str(run.path)!r} holds a foreign run: {type(config).__name__}")
        return run, dataclasses.replace(config, run_dir=str(path)), env_json

    def lock(self) -> Callable[[], None]:
        """Keep other processes from training here; the lock ends with this process, however that ends.

        Returns:
            Gives the lock back.

        Raises:
            RunDirError: if another process trains here, or the directory cannot be written.
        """
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            # A record lock, because worker processes do not inherit it: they may outlive this process for a while.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise RunDirError(f"run_dir {str(self.path)!r} is in use: another process is training in it") from None
            # Some network file systems have no locks; then nothing guards the directory.
        return lambda: os.close(descriptor)

    def open_buffer(self, config: ExperimentConfig, schema: Schema) -> ReplayDataset:
        """The run's trajectory store.

        Raises:
            ConfigError: if the store there holds something else.
            RunDirError: if it cannot be written.
        """
        try:
            with configuration():
                return config.replay.build(self.buffer, schema)
        except OSError as error:
            raise self._unwritable(error) from error

    def require_unfinished(self, done: int, epochs: int) -> None:
        """Refuse to go on with a run that has reached its end and said so.

        Args:
            done: epochs of its checkpoint.
            epochs: its length.

        Raises:
            RunDirError: saying how to make it longer.
        """
        if done > epochs or (done == epochs and self.summary.exists()):
            raise RunDirError(
                f"run_dir {str(self.path)!r} holds a finished run: there is nothing to resume, "
                f"unless you give it more epochs than {done}"
            )

    def has_begun(self) -> bool:
        """Whether there is anything to go on from; a run killed before its first checkpoint has not begun."""
        return bool(checkpoint_names(self.checkpoints)) or (self.metrics.exists() and self.metrics.stat().st_size > 0)

    def reopen(self, config: ExperimentConfig) -> None:
        """Make a run that was finished, or is to have another length, an unfinished one of this configuration.

        An old summary is renamed, not deleted.

        Raises:
            RunDirError: if the directory cannot be written.
        """
        try:
            stored = json.loads(self.config.read_text())
            encoded = config_json.to_json(config)
            if stored["config"]["epochs"] != encoded["epochs"]:
                stored["config"] = encoded
                write_text_atomic(self.config, json.dumps(stored, indent=2))
            if self.summary.exists():
                number = 0
                while (old := self.path / f"summary.old-{number}.json").exists():
                    number += 1
                os.rename(self.summary, old)
        except OSError as error:
            raise self._unwritable(error) from error

    def write_summary(self, totals: dict[str, Any]) -> dict[str, Any]:
        """Write `summary.json`.

        Args:
            totals: what the run has come to.

        Returns:
            The totals, with the versions that made them.
        """
        summary = {**totals, "versions": provenance()}
        write_text_atomic(self.summary, json.dumps(summary, indent=2))
        return summary

    def _unwritable(self, error: OSError) -> RunDirError:
        return RunDirError(f"run_dir {str(self.path)!r} cannot be used: {error.strerror or error}")


def adapter_of(env_json: dict[str, Any]) -> SpaceAdapter:
    """The adapter of the spaces stored in `env.json`."""
    return SpaceAdapter(space_from_json(env_json["observation_space"]), space_from_json(env_json["action_space"]))


def build_agent(config: ExperimentConfig, adapter: SpaceAdapter) -> Agent:
    """The agent a configuration describes, with initial weights from torch's global generator.

    Raises:
        ConfigError: if its parts do not fit each other or the spaces.
    """
    with configuration():
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
        ConfigError: if the device cannot be used.
    """
    run, config, env_json = RunDir.open(path)
    adapter = adapter_of(env_json)
    target = dataclasses.replace(config, device=device).torch_device()
    agent = build_agent(config, adapter)
    load_agent_tensors(agent, load_checkpoint(run.checkpoints).tensors, str(run.checkpoints))
    return agent.to(target).eval(), adapter


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
