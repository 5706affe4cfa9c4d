"""The command line: options, parts chosen by name, one line for what cannot work, Ctrl-C."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from experiment_helpers import start, tiny_config

from amago_core.cli import main, run_command
from amago_core.cli_choices import choices_of, narrow, take_choices, widen
from amago_core.config import ExperimentConfig
from amago_core.errors import ConfigError
from amago_core.exploration import BilevelEpsilonGreedyConfig, EpsilonGreedyConfig
from amago_core.losses.filters import BinaryFilterConfig, ExpFilterConfig
from amago_core.run_dir import RunDir
from amago_core.trackers import read_jsonl
from amago_nets.cnn import ImpalaCNNConfig
from amago_nets.distributions import TanhGaussianConfig
from amago_nets.traj_encoders import FFConfig, GRUConfig, TransformerConfig
from amago_nets.tstep_encoders import DictTstepEncoderConfig, ImageEncoderConfig

TINY = [
    *("--max-seq-len", "8", "--parallel-lanes", "2", "--rollout-steps-per-epoch", "40", "--batches-per-epoch", "2"),
    *("--batch-size", "2", "--val-interval", "0", "--tstep-encoder", "ff", "--tstep-encoder.d-hidden", "16"),
    *(
        "--agent.actor.d-hidden",
        "16",
        "--agent.critics.d-hidden",
        "16",
        "--traj-encoder",
        "gru",
        "--traj-encoder.d-hidden",
        "16",
        "--device",
        "cpu",
    ),
    *("--ckpt-interval", "1"),
]


def ends(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == code


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refused command."""
    ends(arguments, 2)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
    return err


def test_train_resume_evaluate(tmp_path, capsys):
    run_dir = tmp_path / "run"
    main(["train", "CartPole-v1", "--run-dir", str(run_dir), "--epochs", "1", "--agent.gamma", "0.9", *TINY])
    assert "epoch 1 / 1" in capsys.readouterr().out
    _, config, _ = RunDir.open(run_dir)
    assert type(config) is ExperimentConfig and config.traj_encoder == GRUConfig(d_hidden=16)
    assert type(config.agent).__name__ == "AgentConfig" and config.agent.gamma == 0.9
    assert "finished run" in complaint(["resume", str(run_dir)], capsys)
    main(["resume", str(run_dir), "--epochs", "2"])
    assert "epoch 2 / 2" in capsys.readouterr().out
    assert [record["epoch"] for record in read_jsonl(run_dir / "metrics.jsonl")] == [0, 1]
    main(["evaluate", str(run_dir), "--episodes", "5", "--lanes", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["episodes", "return", "length"]
    assert lines[0].split()[1] == "6" and float(lines[1].split()[1]) >= 8
    assert "episodes must be >= 1; got 0" in complaint(["evaluate", str(run_dir), "--episodes", "0"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "batch_size must be an integer >= 1; got 0"),
        (["--batch-size", "many"], "--batch-size: invalid literal for int"),
        (["--batch-sise", "4"], "Unrecognized options: --batch-sise"),
        (["--agent.gamma", "1.5"], "gamma and gammas must lie in [0, 1); got 1.5"),
        (
            ["--traj-encoder", "rnn"],
            "--traj-encoder must be one of transformer, gru, lstm, mamba, min-gru, lru, ff, identity; got rnn",
        ),
        (
            ["--traj-encoder"],
            "--traj-encoder must be one of transformer, gru, lstm, mamba, min-gru, lru, ff, identity; got nothing",
        ),
        (["--traj-encoder", "gru", "--traj-encoder.d-hidden", "0"], "d_hidden=0 is not allowed; give an integer >= 1"),
        (["--traj-encoder.d-hidden", "4"], "Unrecognized options: --traj-encoder.d-hidden"),
        (["--traj-encoder.d-model", "30"], "d_model=30 is not allowed with n_heads=8; give a multiple"),
        (["--exploration", "bilevel-epsilon-greedy"], "--exploration.rollout-horizon"),
        (["--replay.padding", "top"], "padding must be one of"),
        (["--agent.policy", "tanh-gaussian"], "TanhGaussianConfig is for continuous actions"),
        (["--tstep-encoder", "ff", "--tstep-encoder.obs-keys", "image"], "obs_keys"),
        (["--tstep-encoder.obs-keys", "image"], "--tstep-encoder.obs-keys"),
        (["--trajectory-limit", "3"], "trajectory_limit must be None or >= max_seq_len=128"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--run-dir", "/proc/run"], "run_dir '/proc/run' cannot be used"),
        (["--run-dir", "."], "run_dir '.' already exists and is not empty"),
    ],
)
def test_refused_options(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "mine").touch()
    monkeypatch.chdir(tmp_path)
    assert message in complaint(["train", "CartPole-v1", *arguments], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_refused_where_the_output_is_not_utf8(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        ends(["train", "CartPole-v1", "--batch-size", "0"], 2)
        ends(["train", "CartPole-v1", "--batch-sise", "4"], 2)
    value, option = capsys.readouterr().err.splitlines()
    assert value == "error: batch_size must be an integer >= 1; got 0"
    assert option == "error: Unrecognized options: --batch-sise, 4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "evaluate}"),
        (["learn"], "learn"),
        (["train"], "STR"),
        (["train", "NoSuchEnv-v1"], "env 'NoSuchEnv-v1' cannot be made: Environment `NoSuchEnv` doesn't exist"),
        (["train", "no_such_package:Env-v1"], "No module named 'no_such_package'"),
        (["resume", "nowhere"], "run_dir 'nowhere' holds no run"),
        (["evaluate", "nowhere"], "run_dir 'nowhere' holds no run"),
    ],
)
def test_refused_commands(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in complaint(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_help(capsys):
    ends(["--help"], 0)
    out = capsys.readouterr().out
    assert all(command in out for command in ("train", "resume", "evaluate"))
    ends(["train", "--help", "--traj-encoder", "gru", "--agent.policy=discrete"], 0)
    out = capsys.readouterr().out
    for option in ("--batch-size INT", "--traj-encoder.d-output", "--agent.policy.clip-prob-low", "--agent.filter {"):
        assert option in out
    assert "--traj-encoder.d-model" not in out


def test_choices():
    choices = choices_of(ExperimentConfig)
    assert {option: list(names) for option, names in choices.items()} == {
        "tstep-encoder": ["none", "ff", "cnn", "dict"],
        "traj-encoder": ["transformer", "gru", "lstm", "mamba", "min-gru", "lru", "ff", "identity"],
        "agent.filter": ["binary", "exp", "leaky"],
        "agent.policy": ["none", "discrete", "tanh-gaussian", "beta", "gmm", "multi-binary"],
        "agent.actor": ["mlp", "residual"],
        "exploration": ["epsilon-greedy", "bilevel-epsilon-greedy"],
    }
    arguments = ["train", "--traj_encoder=ff", "x", "--agent.filter", "exp", "--agent.filter.beta", "2"]
    chosen, rest = take_choices(arguments, ExperimentConfig)
    assert chosen == {"traj-encoder": FFConfig, "agent.filter": ExpFilterConfig}
    assert rest == ["train", "x", "--agent.filter.beta", "2"]


def test_a_chosen_part_has_choices_of_its_own():
    arguments = ["--tstep-encoder.image.cnn", "impala", "--tstep-encoder", "dict"]
    chosen, rest = take_choices(arguments, ExperimentConfig)
    assert chosen == {"tstep-encoder": DictTstepEncoderConfig, "tstep-encoder.image.cnn": ImpalaCNNConfig} and not rest
    config = widen(narrow(ExperimentConfig, chosen)())
    assert config.tstep_encoder == DictTstepEncoderConfig(image=ImageEncoderConfig(cnn=ImpalaCNNConfig()))
    # Without the part the option does not exist, and is left for tyro to refuse.
    assert take_choices(arguments[:2], ExperimentConfig) == ({}, arguments[:2])


def test_narrowed_configurations_are_widened_again():
    narrowed = narrow(ExperimentConfig, {"agent.policy": TanhGaussianConfig, "traj-encoder": GRUConfig})
    config = widen(narrowed(seed=3))
    assert type(config) is ExperimentConfig and config.seed == 3
    assert config.agent.policy == TanhGaussianConfig() and config.agent.filter == BinaryFilterConfig()
    assert widen(narrow(ExperimentConfig, {})()) == ExperimentConfig()
    assert ExperimentConfig().traj_encoder == TransformerConfig()
    exploring = narrow(ExperimentConfig, {"exploration": BilevelEpsilonGreedyConfig})
    with pytest.raises(TypeError, match="exploration"):
        exploring()
    assert widen(EpsilonGreedyConfig()) == EpsilonGreedyConfig()
    assert {field.name for field in dataclasses.fields(exploring)} == {
        field.name for field in dataclasses.fields(ExperimentConfig)
    }


def test_run_command(capsys):
    def warn() -> None:
        warnings.simplefilter("always")
        warnings.warn("checkpoint\nis damaged", stacklevel=1)

    run_command(warn)
    assert capsys.readouterr().err == "warning: checkpoint is damaged\n"

    def refuse() -> None:
        raise ConfigError("two\n  lines")

    with pytest.raises(SystemExit) as caught:
        run_command(refuse)
    assert caught.value.code == 2 and capsys.readouterr().err == "error: two lines\n"

    def bug() -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        run_command(bug)

    def interrupt() -> None:
        raise KeyboardInterrupt

    for hint, text in (("go on", "\nstopped; go on with:\n  go on\n"), (None, "\nstopped\n")):
        with pytest.raises(SystemExit) as caught:
            run_command(interrupt, how_to_resume=lambda hint=hint: hint)
        assert caught.value.code == 130 and capsys.readouterr().err == text


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_ctrl_c(tmp_path, capsys, mode):
    run_dir = tmp_path / "run"
    code = "import sys; from amago_core.cli import main; main(sys.argv[1:])"
    options = ["--run-dir", str(run_dir), "--epochs", "100000", "--env-mode", mode]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, "train", "CartPole-v1", *options, *TINY],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 1):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    # Like a terminal, to all processes of the group.
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.endswith(f"stopped; go on with:\n  amago resume {run_dir}\n") and "Traceback" not in err
    done = len(list(read_jsonl(metrics)))
    assert not (run_dir / "summary.json").exists()
    main(["resume", str(run_dir), "--epochs", str(done + 1)])
    assert (run_dir / "summary.json").exists()


def test_evaluate_needs_an_environment(tmp_path, capsys):
    start("walk", tiny_config(tmp_path / "run")).close()
    assert "registry" in complaint(["evaluate", str(tmp_path / "run")], capsys)
    assert Path(tmp_path / "run").exists()
