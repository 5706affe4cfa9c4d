"""MetaFrozenLake through the whole stack: exact resume of a native vector environment, metrics, deployment, CLI."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from experiment_helpers import assert_finite, assert_identical, assert_same_end, metrics, tiny_config
from gymnasium.vector import VectorEnv
from killing import kill_at

from amago_core import Experiment, Policy, evaluate
from amago_core.cli import main
from amago_core.trackers import read_jsonl
from amago_nets.traj_encoders import TransformerConfig
from amago_offline.datasets import ReplayConfig

ENV_ID = "amago_envs:MetaFrozenLake-v1"


def lakes(lanes: int, split: str = "train") -> VectorEnv:
    return gym.make_vec(ENV_ID, num_envs=lanes, size=3, k_attempts=3, hard_mode=True, split=split)


def held_out_lakes(lanes: int) -> VectorEnv:
    return lakes(lanes, "held_out")


def experiment(run_dir: Any, encoder: str, ckpt_interval: int, **changes: Any) -> Experiment:
    config = tiny_config(
        run_dir,
        encoder=encoder,
        ckpt_interval=ckpt_interval,
        max_seq_len=20,
        parallel_lanes=4,
        rollout_steps_per_epoch=30,
        epochs=4,
        replay=ReplayConfig(max_trajectories=8),
        **changes,
    )
    return Experiment(config, make_vec_env=lakes, make_val_vec_env=held_out_lakes, progress=False)


def run(run_dir: str, encoder: str, ckpt_interval: int) -> None:
    experiment(run_dir, encoder, ckpt_interval).learn()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    made: dict[tuple[str, int], Path] = {}

    def get(encoder: str, ckpt_interval: int) -> Path:
        key = (encoder, ckpt_interval)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("lake") / "run"
            run(str(made[key]), *key)
        return made[key]

    return get


# Early in a checkpoint interval, late in it, in the middle of a checkpoint, just after one, and before the end.
MOMENTS = {
    "collecting": 75,
    "training": 7,
    "checkpoint not yet in place": 1,
    "purged": 2,
    "summary not yet written": 0,
}
CASES = [
    *(("transformer", 1, moment) for moment in MOMENTS),
    *(("gru", 2, moment) for moment in MOMENTS),
    *(("transformer", 2, moment) for moment in ("collecting", "checkpoint not yet in place")),
    *(("gru", 1, moment) for moment in ("training", "purged")),
]


@pytest.mark.parametrize(("encoder", "ckpt_interval", "moment"), CASES)
def test_killed_and_resumed_from_the_registry(tmp_path, reference, encoder, ckpt_interval, moment):
    run_dir = tmp_path / "run"
    kill_at(moment, MOMENTS[moment], tmp_path / "marker", run, str(run_dir), encoder, ckpt_interval)
    resumed = Experiment.resume(run_dir, progress=False)
    assert resumed.rollout.exact
    resumed.learn()
    assert_same_end(run_dir, reference(encoder, ckpt_interval))


def test_a_checkpoint_changes_nothing(reference):
    """An environment that saves its state goes on as if nothing had happened, however often it is saved."""
    assert metrics(reference("gru", 1)) == metrics(reference("gru", 2))


def test_metrics_of_attempts(reference):
    records = list(read_jsonl(reference("transformer", 1) / "metrics.jsonl"))
    assert_finite(records)
    validation = next(record for record in records if "val/return" in record)
    for attempt in range(3):
        assert 0 <= validation[f"val/attempt_{attempt}/success"] <= 1
    assert "val/success_rate" in validation
    assert any("collect/attempt_0/success" in record for record in records)


def test_single_lakes_are_remade_too(tmp_path):
    """The same environment vectorised by Gymnasium: it cannot be saved, and is restarted after checkpoints."""

    def one_lake() -> gym.Env:
        return gym.make(ENV_ID, size=3, k_attempts=2)

    config = tiny_config(tmp_path / "run", epochs=2)
    Experiment(config, one_lake, progress=False).learn()
    resumed = Experiment.resume(tmp_path / "run", epochs=3, progress=False)
    assert not resumed.rollout.exact
    resumed.learn()
    assert [record["epoch"] for record in metrics(tmp_path / "run") if "frames" in record][-1] == 3


def test_deployed_policy_is_the_trained_one(reference):
    run_dir = reference("gru", 1)
    env = held_out_lakes(5)
    many = evaluate(Policy.load(run_dir), env, seed=3)
    env.close()
    policy = Policy.load(run_dir)
    returns = []
    for lane in range(5):
        single = gym.make(ENV_ID, size=3, k_attempts=3, hard_mode=True, split="held_out")
        observation, _ = single.reset(seed=3 + lane)
        policy.reset()
        reward, total, over = 0.0, 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = single.step(policy.act(observation, reward))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert sorted(returns) == sorted(many.returns.tolist())
    assert_identical(Policy.load(run_dir).agent.state_dict(), policy.agent.state_dict())


def test_rotary_positions_and_long_context(tmp_path):
    encoder = TransformerConfig(d_model=16, n_heads=2, n_layers=1, positions="rotary", dropout_attn=0.1)
    experiment(tmp_path / "run", "gru", 1, traj_encoder=encoder).learn()
    assert_finite(list(read_jsonl(tmp_path / "run" / "metrics.jsonl")))


def test_command_line(tmp_path, reference, capsys):
    run_dir = shutil.copytree(reference("gru", 1), tmp_path / "run")
    main(["evaluate", str(run_dir), "--episodes", "4"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["episodes"] == "4" and lines["attempt_0/success"].endswith("%")
    main(["resume", str(run_dir), "--epochs", "5"])
    assert "epoch 5 / 5" in capsys.readouterr().out
    options = ["--run-dir", str(tmp_path / "new"), "--max-seq-len", "8", "--epochs", "1", "--parallel-lanes", "2"]
    sizes = ["--rollout-steps-per-epoch", "5", "--batches-per-epoch", "1", "--val-interval", "0"]
    main(["train", ENV_ID, *options, *sizes, "--traj-encoder", "ff", "--traj-encoder.d-model", "16"])
    assert Policy.load(tmp_path / "new").act(np.zeros(4, np.float32)) in range(5)
