"""A run killed at any moment and resumed ends as if it had never been killed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from experiment_helpers import WalkVectorEnv, assert_same_end, cartpole, go_on, metrics, start, summary, tiny_config
from killing import begin, kill, kill_at

from amago_core import Experiment
from amago_core.checkpoint import checkpoint_names
from amago_core.errors import CheckpointError, EnvError, RunDirError
from amago_core.learner import Learner

SMALL = {"rollout_steps_per_epoch": 24, "batches_per_epoch": 2}


def run(kind: str, run_dir: str, settings: dict[str, Any]) -> None:
    start(kind, tiny_config(run_dir, **SMALL, **settings)).learn()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    """Finished runs that nobody disturbed, made once for each setting."""
    made: dict[str, Path] = {}

    def get(kind: str, **settings: Any) -> Path:
        key = f"{kind} {settings}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("reference") / "run"
            run(kind, str(made[key]), settings)
        return made[key]

    return get


def kill_and_resume(tmp_path: Path, moment: str, occurrence: int, kind: str, **settings: Any) -> Path:
    run_dir = tmp_path / "run"
    kill_at(moment, occurrence, tmp_path / "marker", run, kind, str(run_dir), settings)
    assert not (run_dir / "summary.json").exists()
    go_on(kind, run_dir).learn()
    return run_dir


# Epoch 1 begins with update 2, epoch 2 with update 4.
@pytest.mark.parametrize(
    ("moment", "occurrence"),
    [
        ("before the first checkpoint", 0),
        ("checkpoint written", 0),
        ("collecting", 55),
        ("collected", 1),
        ("evicting", 1),
        ("training", 3),
        ("validating", 1),
        ("epoch logged", 2),
        ("checkpoint half written", 2),
        ("checkpoint not yet in place", 2),
        ("checkpoint just in place", 2),
        ("purged", 2),
        ("checkpoint written", 3),
        ("validating", 2),
        ("summary not yet written", 0),
    ],
)
def test_killed_at_every_moment(tmp_path, reference, moment, occurrence):
    kind = "walk" if moment in ("collecting", "purged", "training", "validating") else "cartpole"
    run_dir = kill_and_resume(tmp_path, moment, occurrence, kind)
    assert_same_end(run_dir, reference(kind))


@pytest.mark.parametrize("kind", ["cartpole", "walk"])
@pytest.mark.parametrize(("moment", "occurrence"), [("training", 5), ("checkpoint not yet in place", 1)])
def test_killed_between_rare_checkpoints(tmp_path, reference, kind, moment, occurrence):
    settings = {"ckpt_interval": 2, "encoder": "transformer"}
    run_dir = kill_and_resume(tmp_path, moment, occurrence, kind, **settings)
    assert_same_end(run_dir, reference(kind, **settings))


def test_killed_again_and_again_at_arbitrary_times(tmp_path, reference):
    run_dir, settings = tmp_path / "run", {"epochs": 6}
    process = begin(run, "walk", str(run_dir), settings)
    for delay in (0.02, 0.1, 0.2):
        while not checkpoint_names(run_dir / "checkpoints"):
            time.sleep(0.005)
        time.sleep(delay)
        if not process.is_alive():  # a fast machine
            break
        kill(process)
        process = begin(_learn_on, "walk", str(run_dir))
    process.join(60)
    assert process.exitcode == 0
    assert_same_end(run_dir, reference("walk", **settings))


def _learn_on(kind: str, run_dir: str) -> None:
    go_on(kind, run_dir).learn()


def test_ctrl_c_leaves_a_run_that_can_be_resumed(tmp_path, reference, monkeypatch):
    update, seen = Learner.update, []

    def interrupted(self: Learner, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    monkeypatch.setattr(Learner, "update", interrupted)
    experiment = start("cartpole", tiny_config(tmp_path / "run", **SMALL))
    with pytest.raises(KeyboardInterrupt):
        experiment.learn()
    with pytest.raises(RunDirError, match=r"closed: Experiment.resume\('.*run'\) goes on"):
        experiment.learn()
    go_on("cartpole", tmp_path / "run").learn()
    assert_same_end(tmp_path / "run", reference("cartpole"))


@pytest.mark.parametrize("kind", ["cartpole", "walk"])
def test_damaged_newest_checkpoint_falls_back(tmp_path, reference, kind):
    """Also where the older state needs trajectories that were evicted since."""
    run_dir = tmp_path / "run"
    kill_at("training", 4, tmp_path / "marker", run, kind, str(run_dir), {})
    newest, older = checkpoint_names(run_dir / "checkpoints")
    tensors = run_dir / "checkpoints" / newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=f"{newest} is damaged"):
        experiment = go_on(kind, run_dir)
    assert older == "epoch_000001" and experiment.epoch == 1
    experiment.learn()
    assert_same_end(run_dir, reference(kind))


def test_all_checkpoints_damaged(tmp_path, reference):
    run_dir = shutil.copytree(reference("cartpole"), tmp_path / "run")
    for name in checkpoint_names(run_dir / "checkpoints"):
        (run_dir / "checkpoints" / name / "state.json").write_text("{}")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="all 2 checkpoints .* are damaged"):
        go_on("cartpole", run_dir, epochs=5)
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        go_on("cartpole", run_dir, epochs=5)


def test_more_epochs_extend_a_finished_run(tmp_path):
    long, run_dir = tmp_path / "long", tmp_path / "run"
    run("walk", str(long), {"epochs": 4})
    run("walk", str(run_dir), {"epochs": 2})
    short = summary(run_dir)
    with pytest.raises(RunDirError, match="holds a finished run: .* more epochs than 2"):
        go_on("walk", run_dir)
    with pytest.raises(RunDirError, match="holds a finished run"):
        go_on("walk", run_dir, epochs=1)
    with pytest.raises(ValueError, match="epochs must be an integer >= 1; got 0"):
        go_on("walk", run_dir, epochs=0)
    assert summary(run_dir) == short
    kill_at("training", 1, tmp_path / "marker", _extend, str(run_dir))
    assert json.loads((run_dir / "summary.old-0.json").read_text())["epochs"] == 2
    go_on("walk", run_dir).learn()
    assert_same_end(run_dir, long)


def _extend(run_dir: str) -> None:
    go_on("walk", run_dir, epochs=4).learn()


def test_a_run_in_use_is_left_alone(tmp_path, reference):
    run_dir, marker = tmp_path / "run", tmp_path / "marker"
    process = begin(run, "cartpole", str(run_dir), {}, moment="training", occurrence=3, marker=marker)
    while not marker.exists():
        time.sleep(0.005)
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(RunDirError, match="in use: another process is training in it"):
        go_on("cartpole", run_dir)
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    kill(process)
    go_on("cartpole", run_dir).learn()
    assert_same_end(run_dir, reference("cartpole"))


def test_directories_without_a_run(tmp_path, reference):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(RunDirError, match="holds no run"):
            Experiment.resume(path)
    run_dir = shutil.copytree(reference("cartpole"), tmp_path / "run")
    for text in ("[]", "{", '{"config": {"type": "amago_core:Policy"}}', '{"config": 3}'):
        (run_dir / "config.json").write_text(text)
        with pytest.raises(RunDirError, match="foreign or damaged run") as caught:
            Experiment.resume(run_dir, epochs=5)
        assert "\n" not in str(caught.value)


def test_state_that_does_not_fit(tmp_path, reference):
    original = reference("walk")
    run_dir = tmp_path / "run"

    def fresh() -> None:
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(original, run_dir)

    fresh()
    text = (run_dir / "config.json").read_text()
    (run_dir / "config.json").write_text(text.replace('"d_output": 16', '"d_output": 24'))
    with pytest.raises(CheckpointError, match="made by another agent: [0-9]+ tensors differ, first 'actor"):
        go_on("walk", run_dir, epochs=5)
    fresh()
    with pytest.raises(EnvError, match="observation_space of the environment is not that of the run"):
        Experiment.resume(run_dir, cartpole, epochs=5, progress=False)
    with pytest.raises(EnvError, match="cannot be made from Gymnasium's registry: pass make_env"):
        Experiment.resume(run_dir, epochs=5)
    shutil.rmtree(run_dir / "buffer")
    with pytest.raises(CheckpointError, match="does not fit this run: .* neither in the store"):
        go_on("walk", run_dir, epochs=5)
    fresh()
    (run_dir / "metrics.jsonl").write_text("")
    with pytest.raises(RunDirError, match="0 bytes, fewer than the"):
        go_on("walk", run_dir, epochs=5)
    assert (run_dir / "summary.json").exists()


def test_validation_environment_is_remembered(tmp_path):
    from gymnasium import make

    def short() -> Any:
        return make("CartPole-v1", max_episode_steps=5)

    config = tiny_config(tmp_path / "run", val_interval=1, epochs=1)
    start("cartpole", config, make_val_env=short).learn()
    go_on("cartpole", tmp_path / "run", epochs=2).learn()
    go_on("cartpole", tmp_path / "run", epochs=3, make_env=cartpole).learn()
    lengths = [record["val/length"] for record in metrics(tmp_path / "run") if "val/length" in record]
    assert lengths == [5.0] * 4


def test_unregistered_validation_environment_must_be_given(tmp_path):
    config = tiny_config(tmp_path / "run", epochs=1)
    start("walk", config, make_val_vec_env=WalkVectorEnv).learn()
    with pytest.raises(EnvError, match="pass make_val_env or make_val_vec_env"):
        go_on("walk", tmp_path / "run", epochs=2)
    go_on("walk", tmp_path / "run", epochs=2, make_val_vec_env=WalkVectorEnv).close()
