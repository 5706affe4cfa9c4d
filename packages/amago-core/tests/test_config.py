"""Settings of a run: what is refused, and with which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_helpers import ENCODERS, tiny_config

from amago_core import ExperimentConfig
from amago_core.config import configuration
from amago_core.config_json import from_json, to_json
from amago_core.errors import ConfigError, EnvError
from amago_nets.traj_encoders import GRUConfig
from amago_nets.tstep_encoders import FFTstepEncoderConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1; got 0"),
        ({"batch_size": 2.0}, "batch_size must be an integer >= 1; got 2.0"),
        ({"epochs": True}, "epochs must be an integer >= 1; got True"),
        ({"epochs": "3"}, "epochs must be an integer >= 1; got '3'"),
        ({"max_seq_len": -1}, "max_seq_len must be an integer >= 1; got -1"),
        ({"seed": -1}, "seed must be an integer >= 0; got -1"),
        ({"val_interval": None}, "val_interval must be an integer >= 0; got None"),
        ({"threads": 0}, "threads must be an integer >= 1 or None; got 0"),
        ({"trajectory_limit": 4.5}, "trajectory_limit must be an integer >= 1 or None; got 4.5"),
        ({"trajectory_limit": 7}, "trajectory_limit must be None or >= max_seq_len=8, .* got 7"),
        ({"env_mode": "threads"}, "env_mode must be 'sync' or 'async'; got 'threads'"),
        ({"device": 0}, "device must be a name such as 'auto', 'cpu' or 'cuda:0'; got 0"),
        ({"run_dir": ""}, "run_dir must name a directory; got ''"),
        ({"run_dir": 5}, "run_dir must name a directory; got 5"),
        (
            {"traj_encoder": "lstm"},
            r"traj_encoder must be a configuration such as TransformerConfig\(\), .* got 'lstm'",
        ),
        ({"traj_encoder": FFTstepEncoderConfig()}, "traj_encoder must be a configuration such as .* got FFTstep"),
        ({"tstep_encoder": GRUConfig()}, "tstep_encoder must be a configuration such as .* got GRU"),
        ({"traj_encoder": GRUConfig}, "traj_encoder must be a configuration such as .* got <class"),
        ({"exploration": None}, "exploration must be a configuration such as EpsilonGreedyConfig"),
        ({"learner": 1e-3}, r"learner must be a LearnerConfig\(\); got 0.001"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    settings = {"max_seq_len": 8, **changes}
    with pytest.raises(ConfigError, match=message) as caught:
        ExperimentConfig(**settings)
    assert "\n" not in str(caught.value)


def test_defaults_are_allowed() -> None:
    config = ExperimentConfig()
    assert config == from_json(to_json(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_json_round_trip(encoder: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, encoder=encoder, trajectory_limit=20, threads=2)
    assert from_json(to_json(config)) == config


def test_run_dir_may_be_a_path() -> None:
    assert ExperimentConfig(run_dir=Path("a") / "b").run_dir == "a/b"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "device 'gpu' cannot be used: Expected one of cpu, cuda"),
        ("cuda:99", "device 'cuda:99' cannot be used: "),
    ],
)
def test_devices_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ExperimentConfig(device=name).torch_device()
    assert "\n" not in str(caught.value)


def test_devices() -> None:
    assert ExperimentConfig(device="cpu").torch_device() == torch.device("cpu")
    assert ExperimentConfig().torch_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_plain_value_errors_of_parts_are_configuration_errors() -> None:
    with pytest.raises(ConfigError, match="d_hidden=0 is not allowed"), configuration():
        GRUConfig(d_hidden=0)
    with pytest.raises(EnvError), configuration():
        raise EnvError("kept as it is")
