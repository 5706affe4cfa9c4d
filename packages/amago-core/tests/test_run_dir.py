"""Claiming, opening, locking and reopening the directory of a run; making its environments again."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from experiment_helpers import WalkVectorEnv, assert_identical, cartpole, start, tiny_config
from killing import begin, kill

from amago_core.config import ExperimentConfig
from amago_core.errors import CheckpointError, ConfigError, EnvError, RunDirError
from amago_core.run_dir import RunDir, build_agent, load_agent, load_agent_tensors
from amago_core.run_env import describe_env, require_room_for_positions, require_same_spaces, restore_factories
from amago_core.spaces import SpaceAdapter
from amago_core.vector_envs import EnvFactory
from amago_nets.traj_encoders import TransformerConfig
from amago_nets.tstep_encoders import FFTstepEncoderConfig


def described(make_env: Any = cartpole, make_val_env: Any = None) -> dict[str, Any]:
    factory = EnvFactory(make_env)
    val_factory = factory if make_val_env is None else EnvFactory(make_val_env)
    env = factory.build(1)
    try:
        return describe_env(env, factory, val_factory)
    finally:
        env.close()


def short_cartpole() -> gym.Env:
    return gym.make("CartPole-v1", max_episode_steps=7)


def unregistered() -> gym.Env:
    return gym.wrappers.TransformReward(gym.make("CartPole-v1"), lambda reward: reward)


def test_create_and_open(tmp_path):
    config = tiny_config(tmp_path / "a" / "run")
    run = RunDir.create(config, described())
    assert {path.name for path in run.path.iterdir()} == {"config.json", "env.json"}
    opened, stored, env_json = RunDir.open(run.path)
    assert opened == run and stored == config and env_json == described()
    assert "packages" in json.loads(run.config.read_text())["provenance"]
    os.rename(run.path, tmp_path / "moved")
    assert RunDir.open(tmp_path / "moved")[1].run_dir == str(tmp_path / "moved")


def test_create_takes_an_empty_directory_and_no_other(tmp_path):
    RunDir.create(tiny_config(tmp_path), described())
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(RunDirError, match="already exists and is not empty"):
        RunDir.create(tiny_config(tmp_path, seed=9), described())
    assert (tmp_path / "config.json").read_text() == before


def test_open_refuses_env_json_without_its_keys(tmp_path):
    run = RunDir.create(tiny_config(tmp_path / "run"), described())
    run.env.write_text("{}")
    with pytest.raises(RunDirError, match="foreign or damaged run: 'observation_space'"):
        RunDir.open(run.path)


def _hold(path: str, marker: str) -> None:
    import time

    RunDir(Path(path)).lock()
    Path(marker).touch()
    time.sleep(600)


def test_lock(tmp_path):
    run, marker = RunDir(tmp_path), tmp_path / "marker"
    process = begin(_hold, str(tmp_path), str(marker))
    while not marker.exists():
        process.join(0.01)
    with pytest.raises(RunDirError, match="in use: another process"):
        run.lock()
    kill(process)
    release = run.lock()
    release()
    with pytest.raises(RunDirError, match="cannot be used: No such file"):
        RunDir(tmp_path / "missing").lock()


def test_reopen(tmp_path):
    config = tiny_config(tmp_path / "run", epochs=2)
    run = RunDir.create(config, described())
    before = run.config.read_text()
    run.reopen(config)
    assert run.config.read_text() == before
    for number in range(2):
        run.write_summary({"number": number})
        run.reopen(dataclasses.replace(config, epochs=3))
        assert json.loads((run.path / f"summary.old-{number}.json").read_text())["number"] == number
    assert not run.summary.exists()
    stored = json.loads(run.config.read_text())
    assert stored["config"]["epochs"] == 3 and stored["provenance"] == json.loads(before)["provenance"]


def test_has_begun(tmp_path):
    run = RunDir(tmp_path)
    assert not run.has_begun()
    run.metrics.touch()
    assert not run.has_begun()
    run.metrics.write_text("{}\n")
    assert run.has_begun()


def test_buffer_of_another_schema(tmp_path):
    start("walk", tiny_config(tmp_path / "run")).close()
    run = RunDir(tmp_path / "run")
    other = SpaceAdapter(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)).schema
    with pytest.raises(ConfigError, match="schema must equal that of the existing store"):
        run.open_buffer(tiny_config(tmp_path), other)


def test_parts_that_do_not_fit_the_spaces(tmp_path):
    adapter = SpaceAdapter(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2))
    config = tiny_config(tmp_path, tstep_encoder=FFTstepEncoderConfig(obs_keys=("image",)))
    with pytest.raises(ConfigError, match="obs_keys"):
        build_agent(config, adapter)


def test_load_agent(tmp_path):
    config = tiny_config(tmp_path / "run")
    experiment = start("walk", config)
    experiment.close()
    agent, adapter = load_agent(tmp_path / "run")
    assert adapter.schema == experiment.adapter.schema and not agent.training
    assert_identical(dict(agent.state_dict()), dict(experiment.agent.state_dict()))
    tensors = dict(agent.state_dict())
    del tensors["actor." + next(iter(agent.actor.state_dict()))]
    with pytest.raises(CheckpointError, match="made by another agent: 1 tensors differ, first 'actor"):
        load_agent_tensors(agent, tensors, "here")


def test_factories_are_restored():
    one, two = restore_factories(described(), (None, None), (None, None), "sync")
    assert one is two
    env = one.build(2)
    require_same_spaces(env, described())
    env.close()
    one, two = restore_factories(described(cartpole, short_cartpole), (None, None), (None, None), "sync")
    assert one is not two
    one, two = restore_factories(described(cartpole, short_cartpole), (cartpole, None), (None, None), "sync")
    assert one.make_env is cartpole and two.make_env is not cartpole
    one, two = restore_factories(described(), (None, None), (None, WalkVectorEnv), "sync")
    assert two.make_vec_env is WalkVectorEnv


def test_factories_that_cannot_be_restored():
    with pytest.raises(EnvError, match="pass make_env or make_vec_env"):
        restore_factories(described(unregistered), (None, None), (None, None), "sync")
    with pytest.raises(EnvError, match="pass make_val_env or make_val_vec_env"):
        restore_factories(described(cartpole, unregistered), (cartpole, None), (None, None), "sync")
    stored = described()
    stored["factory"]["module"] = "a_package_that_is_gone"
    with pytest.raises(EnvError, match="a_package_that_is_gone.*: pass make_env or make_vec_env"):
        restore_factories(stored, (None, None), (None, None), "sync")


def test_same_spaces():
    env = EnvFactory(lambda: gym.make("Acrobot-v1")).build(1)
    with pytest.raises(EnvError, match="observation_space of my environment is not that of the run: .*instead of"):
        require_same_spaces(env, described(), "my environment")
    env.close()


@pytest.mark.parametrize(("rows", "fits"), [(7, False), (8, False), (500, False), (501, True)])
def test_room_for_positions(rows, fits):
    encoder = TransformerConfig(d_model=16, n_heads=2, positions="learnable", max_time_idx=rows)
    config = ExperimentConfig(traj_encoder=encoder)
    stored = described(short_cartpole, cartpole)
    if fits:
        require_room_for_positions(config, stored)
    else:
        with pytest.raises(ConfigError, match=f"must be >= 501, .* got {rows}"):
            require_room_for_positions(config, stored)
    require_room_for_positions(ExperimentConfig(), stored)
    require_room_for_positions(config, {**stored, "factory": None, "val_factory": None})
