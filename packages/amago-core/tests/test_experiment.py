"""Whole runs: determinism, schedules, what is logged, and what is refused before anything is written."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from experiment_helpers import WalkVectorEnv, assert_finite, assert_same_end, cartpole, metrics, start, tiny_config

import amago_core
from amago_core import Experiment, Policy
from amago_core.errors import AmagoError, ConfigError, EnvError, RunDirError
from amago_core.trackers import read_jsonl
from amago_nets.traj_encoders import FFConfig, TransformerConfig
from amago_nets.tstep_encoders import FFTstepEncoderConfig
from amago_offline.datasets import ReplayConfig

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize(("kind", "encoder"), [("cartpole", "transformer"), ("walk", "gru"), ("walk", "ff")])
def test_one_seed_one_run(tmp_path, kind, encoder):
    for name in ("one", "two"):
        start(kind, tiny_config(tmp_path / name, encoder=encoder)).learn()
    assert_same_end(tmp_path / "one", tmp_path / "two")


def test_another_seed_another_run(tmp_path):
    start("walk", tiny_config(tmp_path / "one")).learn()
    start("walk", tiny_config(tmp_path / "two", seed=1)).learn()
    assert metrics(tmp_path / "one") != metrics(tmp_path / "two")


def test_environments_in_processes_of_their_own_change_nothing(tmp_path):
    start("cartpole", tiny_config(tmp_path / "one", epochs=1)).learn()
    start("cartpole", tiny_config(tmp_path / "two", epochs=1, env_mode="async")).learn()
    assert_same_end(tmp_path / "one", tmp_path / "two")


def test_metrics_and_summary(tmp_path):
    config = tiny_config(tmp_path / "run", log_interval=1, epochs=4)
    result = start("walk", config).learn()
    records = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert_finite(records)
    validations = [record for record in records if "val/return" in record]
    epochs = [record for record in records if "time/total" in record]
    assert [record["epoch"] for record in validations] == [0, 2, 4]
    assert [record["epoch"] for record in epochs] == [0, 1, 2, 3]
    assert [record["updates"] for record in epochs] == [3, 6, 9, 12]
    assert [record["step"] for record in epochs] == [3, 6, 9, 12]
    assert [record["frames"] for record in epochs] == [80, 160, 240, 320]
    assert validations[0]["val/episodes"] == 2.0 and "val/distance" in validations[0]
    assert result == json.loads((tmp_path / "run" / "summary.json").read_text())
    wanted = {"epochs": 4, "frames": 320, "updates": 12, "seed": 0, "val/return": validations[-1]["val/return"]}
    assert {name: result[name] for name in wanted} == wanted
    assert result["seconds"] > 0 and result["versions"]["packages"]["torch"] == torch.__version__


def test_every_metric_is_documented(tmp_path):
    rows = re.findall(r"^\| (`.*?`) \|", README.read_text(), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    patterns = [re.compile(re.sub("<[a-z]+>", r"[\\w.]+", re.escape(name))) for name in names]
    config = tiny_config(tmp_path / "run", log_interval=1, epochs=1)
    start("walk", config).learn()
    seen = {name for record in read_jsonl(tmp_path / "run" / "metrics.jsonl") for name in record}
    assert [name for name in sorted(seen) if not any(pattern.fullmatch(name) for pattern in patterns)] == []
    assert len(seen) > 40


def test_schedules(tmp_path):
    config = tiny_config(tmp_path / "run", epochs=4, start_collecting_at=1, start_learning_at=2, val_interval=0)
    summary = start("cartpole", config).learn()
    records = metrics(tmp_path / "run")
    assert [("collect/episodes" in r, "train/loss/total" in r) for r in records] == [
        (False, False),
        (True, False),
        (True, True),
        (True, True),
    ]
    assert summary["frames"] == 3 * 80 and summary["updates"] == 2 * 3
    assert not any(name.startswith("val/") for record in (*records, summary) for name in record)


@pytest.mark.parametrize(
    ("changes", "frames", "updates"),
    [
        ({"batches_per_epoch": 0}, 160, 0),
        ({"rollout_steps_per_epoch": 0}, 0, 0),
        ({"replay": ReplayConfig(min_trajectories=1000)}, 160, 0),
        ({"start_collecting_at": 10}, 0, 0),
    ],
)
def test_parts_left_out(tmp_path, changes, frames, updates):
    summary = start("cartpole", tiny_config(tmp_path / "run", epochs=2, **changes)).learn()
    assert (summary["frames"], summary["updates"]) == (frames, updates)
    assert_finite(list(read_jsonl(tmp_path / "run" / "metrics.jsonl")))


def test_snippets(tmp_path):
    config = tiny_config(tmp_path / "run", trajectory_limit=9, epochs=1, batches_per_epoch=0, replay=ReplayConfig())
    start("cartpole", config).learn()
    record = next(record for record in metrics(tmp_path / "run") if "buffer/transitions" in record)
    assert record["buffer/transitions"] / record["buffer/trajectories"] <= 17


def test_threads(tmp_path):
    before = torch.get_num_threads()
    try:
        start("walk", tiny_config(tmp_path / "run", epochs=1, threads=2, batches_per_epoch=1)).close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class ListTracker:
    def __init__(self) -> None:
        self.logged: list[tuple[int, Mapping[str, Any]]] = []
        self.closed = 0

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.logged.append((step, metrics))

    def close(self) -> None:
        self.closed += 1


def test_further_trackers_see_everything(tmp_path):
    tracker = ListTracker()
    start("walk", tiny_config(tmp_path / "run", epochs=2), trackers=[tracker]).learn()
    records = [{"step": step, **metrics} for step, metrics in tracker.logged]
    assert records == list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert tracker.closed == 1


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from amago_core.trackers import TensorBoardTracker

    tracker = TensorBoardTracker(tmp_path / "board")
    start("walk", tiny_config(tmp_path / "run", epochs=1), trackers=[tracker]).learn()
    assert list((tmp_path / "board").iterdir())


def test_console(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", max_seq_len=1000, epochs=1, batches_per_epoch=1)
    Experiment(config, cartpole).learn()
    out = capsys.readouterr().out
    assert re.search(
        r"note: no stored trajectory has more than \d+ transitions yet, .* max_seq_len=1000 is padding", out
    )
    assert "epoch 1 / 1" in out and "return while exploring" in out
    start("walk", tiny_config(tmp_path / "quiet", epochs=1, batches_per_epoch=1)).learn()
    assert capsys.readouterr() == ("", "")


def test_evaluate(tmp_path):
    experiment = start("walk", tiny_config(tmp_path / "run", val_interval=0))
    assert experiment._val_env is None
    one, two, other = experiment.evaluate(), experiment.evaluate(), experiment.evaluate(seed=5)
    assert len(one.returns) == 2
    assert np.array_equal(one.returns, two.returns) and not np.array_equal(one.returns, other.returns)
    experiment.close()
    experiment.close()


def test_continuous_actions(tmp_path):
    config = tiny_config(tmp_path / "run", rollout_steps_per_epoch=210, epochs=1, log_interval=1)
    Experiment(config, lambda: gym.make("Pendulum-v1"), progress=False).learn()
    records = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert_finite(records)
    assert any("train/loss/critic" in record for record in records)


def test_readme_snippet(tmp_path, monkeypatch):
    """As written, except that the run is a thousand times shorter."""
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    small = {"epochs": 1, "rollout_steps_per_epoch": 40, "batches_per_epoch": 1, "val_lanes": 2, "batch_size": 2}
    monkeypatch.setattr(amago_core, "ExperimentConfig", functools.partial(amago_core.ExperimentConfig, **small))
    monkeypatch.chdir(tmp_path)
    env = cartpole()
    namespace: dict[str, Any] = {"observation": env.reset(seed=0)[0], "reward": 0.0}
    exec(snippet, namespace)
    policy = namespace["policy"]
    policy.reset()
    observation, reward, steps, over = namespace["observation"], 0.0, 0, False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(policy.act(observation, reward))
        over, steps = terminated or truncated, steps + 1
    assert steps > 5
    assert isinstance(Policy.load("runs/cartpole", device="auto"), Policy)
    with pytest.raises(ConfigError, match="device 'nowhere' cannot be used"):
        Policy.load("runs/cartpole", device="nowhere")


class Spaces(gym.Env):
    """An environment of any spaces, whose observations are those of another if `lies`."""

    def __init__(self, observation: gym.Space, action: gym.Space, lies: bool = False) -> None:
        self.observation_space, self.action_space, self.lies = observation, action, lies

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return (np.zeros(7, np.float32) if self.lies else self.observation_space.sample()), {}


def _class_of_old_gym() -> type:
    base = type("Env", (), {"__module__": "gym.core"})
    return type("OldEnv", (base,), {"__module__": "old_game.envs"})


BOX, TWO = gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(2)
BAD_ENVS = {
    "no environment": (lambda: 3, EnvError, "must be a gymnasium.Env .*, got builtins.int"),
    "old gym": (_class_of_old_gym(), EnvError, "old gym package: use its Gymnasium version"),
    "vector environment": (lambda: WalkVectorEnv(2), EnvError, "pass vectorised ones as make_vec_env"),
    "text observations": (lambda: Spaces(gym.spaces.Text(5), TWO), EnvError, "observation space is Text"),
    "tuple actions": (lambda: Spaces(BOX, gym.spaces.Tuple([TWO])), EnvError, "action space is Tuple"),
    "unbounded actions": (
        lambda: Spaces(BOX, gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)),
        EnvError,
        "must have finite bounds",
    ),
    "unserved actions": (lambda: Spaces(BOX, gym.spaces.MultiBinary(3)), ConfigError, "MultiBinaryConfig cannot"),
}


@pytest.mark.parametrize("name", BAD_ENVS)
def test_bad_environments(tmp_path, name):
    make_env, error, message = BAD_ENVS[name]
    with pytest.raises(error, match=message) as caught:
        Experiment(tiny_config(tmp_path / "run"), make_env)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_environments_that_break_their_word(tmp_path):
    with pytest.raises(AmagoError, match="needed: pass make_env"):
        Experiment(tiny_config(tmp_path / "run"))
    with pytest.raises(EnvError, match="observation_space of the validation environment is not that of the run"):
        start("walk", tiny_config(tmp_path / "run"), make_val_env=cartpole)
    with pytest.raises(EnvError, match="asked for 2 lanes"):
        Experiment(tiny_config(tmp_path / "run"), make_vec_env=lambda lanes: WalkVectorEnv(3))

    class Liar(WalkVectorEnv):
        def reset(self, **kwargs: Any) -> Any:
            return np.zeros((self.num_envs, 7), np.float32), {}

    with pytest.raises(EnvError, match="its space says"):
        Experiment(tiny_config(tmp_path / "run"), make_vec_env=Liar)
    assert not (tmp_path / "run").exists()


def test_failure_releases_environments(tmp_path):
    closed = []

    class Closing(WalkVectorEnv):
        def close(self, **kwargs: Any) -> None:
            closed.append(self)

    config = tiny_config(tmp_path / "run", tstep_encoder=FFTstepEncoderConfig(obs_keys=("missing",)))
    with pytest.raises(ConfigError, match="obs_keys"):
        Experiment(config, make_vec_env=Closing)
    assert len(closed) == 2 and not (tmp_path / "run").exists()


def test_occupied_directory_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirError, match="already exists and is not empty: resume the run in it, or choose"):
        start("walk", tiny_config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(RunDirError, match="already exists"):
        start("walk", tiny_config(tmp_path / "notes.txt"))


@pytest.mark.parametrize("path", ["file/run", "file/deeper/run", "/proc/run", "/sys/run", "x" * 300])
def test_unwritable_directory(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirError, match="run_dir .* cannot be used: ") as caught:
        start("walk", tiny_config(tmp_path / path))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_positions_must_outlast_the_time_limit(tmp_path):
    encoder = TransformerConfig(d_model=16, n_heads=2, n_layers=1, positions="learnable", max_time_idx=500)
    with pytest.raises(ConfigError, match="max_time_idx of the learnable positions must be >= 501, .* got 500"):
        start("cartpole", tiny_config(tmp_path / "run", traj_encoder=encoder))
    assert not (tmp_path / "run").exists()


class Private(FFConfig):
    """A configuration that JSON does not know."""


def test_config_that_cannot_be_stored(tmp_path):
    with pytest.raises(ConfigError, match="register_config"):
        start("walk", tiny_config(tmp_path / "run", traj_encoder=Private(d_model=16)))
    assert not (tmp_path / "run").exists()
