"""Learning to learn on a frozen lake: every lake is new, and the agent gets better inside one lifetime.

An agent is dropped on a lake it has never seen and gets a few attempts to cross it. It cannot see the holes: it must
fall in, remember, and do better. Nothing tells it to; the sequence model finds out because it is rewarded for it.

    python examples/00_meta_frozen_lake.py                       # train, then print and plot success per attempt
    python examples/00_meta_frozen_lake.py --watch runs/...      # see one unseen lake, attempt by attempt
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from amago_core import Experiment, ExperimentConfig, Policy, evaluate
from amago_core.agents import AgentConfig
from amago_core.checkpoint import write_text_atomic
from amago_core.cli import run_command
from amago_core.errors import ConfigError
from amago_core.exploration import EpsilonGreedyConfig
from amago_core.gif import save_gif
from amago_core.learner import LearnerConfig
from amago_core.plots import plot_learning_curve, plot_success_per_attempt
from amago_core.run_dir import RunDir
from amago_core.seeding import child_seed
from amago_core.statistics import bootstrap_ci
from amago_core.trackers import read_jsonl
from amago_envs.toy import FrozenLakePlanner, RandomPolicy
from amago_nets.heads import ActorConfig, NCriticsConfig
from amago_nets.traj_encoders import FFConfig, GRUConfig, TransformerConfig
from amago_nets.tstep_encoders import FFTstepEncoderConfig
from amago_offline.datasets import ReplayConfig

ENV_ID = "amago_envs:MetaFrozenLake-v1"
EVAL_LAKES = 2048
TrajEncoderName = Literal["ff", "gru", "transformer"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train on frozen lakes, or watch a trained agent.

    Attributes:
        preset: "cpu" learns in minutes on two cores; "paper" has the original's settings and wants a GPU.
        traj_encoder: the sequence model; "ff" has no memory at all (its last action and reward are hidden from it too)
            and cannot learn to learn.
        lake_size: tiles along one side of the lake; None takes the preset's (cpu 4, paper 5).
        attempts: attempts on each lake; None takes the preset's (cpu 5, paper 10).
        hard_mode: crumbling ice, noisy positions, sometimes swapped actions.
        epochs: length of the run; None takes the preset's.
        seed: determines everything.
        threads: CPU threads of torch; None leaves torch's choice.
        out: directory of the run; None makes a new one under runs/.
        resume: go on with the run in this directory.
        watch: replay one unseen lake with the policy of the run in this directory.
    """

    preset: Literal["cpu", "paper"] = "cpu"
    traj_encoder: TrajEncoderName = "transformer"
    lake_size: int | None = None
    attempts: int | None = None
    hard_mode: bool = False
    epochs: int | None = None
    seed: int = 0
    threads: int | None = None
    out: str | None = None
    resume: str | None = None
    watch: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no lake can be made of."""
        defaults = {"cpu": (4, 5), "paper": (5, 10)}[self.preset]
        for name, default in zip(("lake_size", "attempts"), defaults, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name, least in (("lake_size", 3), ("attempts", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be >= {least}; got {getattr(self, name)}")
        if self.resume and self.out:
            raise ConfigError("--resume and --out exclude each other: a resumed run stays in its directory")


def lake_kwargs(options: Options) -> dict[str, object]:
    """Arguments of the environment, without its split."""
    return {"size": options.lake_size, "k_attempts": options.attempts, "hard_mode": options.hard_mode}


def make_lakes(lanes: int, *, split: str, **kwargs: object) -> VectorEnv:
    """Many lakes at once; the splits "train" and "held_out" share no lake."""
    return gym.make_vec(ENV_ID, num_envs=lanes, split=split, **kwargs)


def traj_encoder_config(name: TrajEncoderName, width: int, layers: int, heads: int):
    """The sequence model by its short name."""
    match name:
        case "transformer":
            return TransformerConfig(d_model=width, n_layers=layers, n_heads=heads, dropout_ff=0.0, dropout_emb=0.0)
        case "gru":
            return GRUConfig(d_hidden=width, d_output=width, n_layers=layers)
        case "ff":
            return FFConfig(d_model=width, n_layers=layers)


def tstep_encoder_config(options: Options, width: int) -> FFTstepEncoderConfig:
    """Embeds one timestep.

    Its last action and reward are a memory of one timestep, enough for "win, stay; lose, shift" at the start of an
    attempt: a policy that is to have no memory must not see them.
    """
    memoryless = options.traj_encoder == "ff"
    return FFTstepEncoderConfig(
        n_layers=1,
        d_hidden=width,
        d_output=64,
        normalize_inputs=False,
        hide_prev_action=memoryless,
        hide_prev_reward=memoryless,
    )


def lifetime(options: Options) -> int:
    """Steps of the longest possible rollout: all attempts run into their time limit."""
    return options.attempts * options.lake_size**2 * (2 if options.hard_mode else 1)


def cpu_preset(options: Options) -> ExperimentConfig:
    """Small networks, many lanes, few discounts: minutes on two cores."""
    steps = lifetime(options)
    return ExperimentConfig(
        run_dir=run_dir(options),
        seed=options.seed,
        max_seq_len=steps,
        tstep_encoder=tstep_encoder_config(options, width=64),
        traj_encoder=traj_encoder_config(options.traj_encoder, width=64, layers=2, heads=4),
        agent=AgentConfig(
            gamma=0.98,
            gammas=(0.9,),
            tau=0.01,
            actor=ActorConfig(d_hidden=128),
            critics=NCriticsConfig(num_critics=4, d_hidden=128),
        ),
        learner=LearnerConfig(lr=1e-3, warmup_updates=200, lr_schedule="cosine"),
        exploration=EpsilonGreedyConfig(steps_anneal=2_000),
        replay=ReplayConfig(max_trajectories=20_000),
        parallel_lanes=32,
        epochs=options.epochs or 80,
        rollout_steps_per_epoch=steps,
        batches_per_epoch=100,
        batch_size=32,
        val_interval=2,
        val_lanes=256,
        val_episodes_per_lane=1,
        ckpt_interval=1,
        threads=options.threads,
    )


def paper_preset(options: Options) -> ExperimentConfig:
    """The original's settings for this task."""
    steps = lifetime(options)
    encoder = traj_encoder_config(options.traj_encoder, width=128, layers=3, heads=8)
    if isinstance(encoder, TransformerConfig):
        encoder = dataclasses.replace(encoder, dropout_ff=0.05, dropout_emb=0.05)
    return ExperimentConfig(
        run_dir=run_dir(options),
        seed=options.seed,
        max_seq_len=steps,
        tstep_encoder=tstep_encoder_config(options, width=128),
        traj_encoder=encoder,
        agent=AgentConfig(tau=0.004),
        replay=ReplayConfig(max_trajectories=12_500),
        parallel_lanes=32,
        epochs=options.epochs or (900 if options.hard_mode else 700),
        rollout_steps_per_epoch=steps,
        batches_per_epoch=1000,
        batch_size=24,
        val_interval=20,
        val_lanes=32,
        val_episodes_per_lane=2,
        threads=options.threads,
    )


def run_dir(options: Options) -> str:
    """Where the run goes."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return options.out or f"runs/meta_frozen_lake/{options.traj_encoder}-seed{options.seed}-{stamp}"


def this_script() -> str:
    """How to start this script again from here, with the Python that runs it."""
    python = Path(sys.executable)
    here = Path.cwd()
    return f"{python.relative_to(here) if python.is_relative_to(here) else python.name} {sys.argv[0]}"


def train(options: Options, resume_hint: dict[str, str]) -> None:
    """Train (or go on training), then report."""
    if options.resume:
        resume_hint["dir"] = options.resume
        experiment = Experiment.resume(options.resume, epochs=options.epochs)
    else:
        config = cpu_preset(options) if options.preset == "cpu" else paper_preset(options)
        kwargs = lake_kwargs(options)
        experiment = Experiment(
            config,
            make_vec_env=lambda lanes: make_lakes(lanes, split="train", **kwargs),
            make_val_vec_env=lambda lanes: make_lakes(lanes, split="held_out", **kwargs),
        )
        resume_hint["dir"] = config.run_dir
    summary = experiment.learn()
    report(experiment.run, summary)


def env_kwargs_of(run: RunDir) -> dict[str, object]:
    """Arguments of the environment that a run was trained in, without its split."""
    kwargs = json.loads(run.env.read_text())["factory"]["spec"]["kwargs"]
    return {name: kwargs[name] for name in ("size", "k_attempts", "hard_mode")}


def success_table(run: RunDir, config: ExperimentConfig) -> dict[str, list[tuple[float, float, float]]]:
    """Success per attempt, `(mean, low, high)`, of three policies on the same held-out lakes."""
    kwargs = env_kwargs_of(run)
    size, attempts = int(kwargs["size"]), int(kwargs["k_attempts"])
    seed = child_seed(config.seed, "report")
    policies = {
        "agent": Policy.load(run.path, sample=config.sample_actions_val, seed=seed),
        "random": RandomPolicy(num_actions=5, seed=seed),
        "planner": FrozenLakePlanner(size),
    }
    table = {}
    for name, policy in policies.items():
        env = make_lakes(EVAL_LAKES, split="held_out", **kwargs)
        metrics = evaluate(policy, env, seed=seed).metrics
        env.close()
        rows = []
        for attempt in range(attempts):
            success = metrics[f"attempt_{attempt}/success"]
            interval = bootstrap_ci(success, seed=seed)
            rows.append((float(success.mean()), float(interval.low), float(interval.high)))
        table[name] = rows
    return table


def report(run: RunDir, summary: dict[str, object]) -> None:
    """Print and save the result: table, plots, `summary.json`, and how to use the policy."""
    _, config, _ = RunDir.open(run.path)
    table = success_table(run, config)
    summary = {
        **summary,
        "success_per_attempt": [row[0] for row in table["agent"]],
        "success_intervals": [[row[1], row[2]] for row in table["agent"]],
        "n_eval": EVAL_LAKES,
        "baselines": {name: [row[0] for row in rows] for name, rows in table.items() if name != "agent"},
    }
    write_text_atomic(run.summary, json.dumps(summary, indent=2))
    print(f"\nSuccess per attempt on {EVAL_LAKES:,} lakes never trained on (95 % bootstrap intervals)")
    print_table(table)
    run.plots.mkdir(exist_ok=True)
    curves = {name: tuple(np.array(column) for column in zip(*rows, strict=True)) for name, rows in table.items()}
    plot_success_per_attempt(run.plots / "success_per_attempt.png", curves)
    records = list(read_jsonl(run.metrics))
    plot_learning_curve(run.plots / "learning_curve.png", records)
    print(f"\nplots    {run.plots}/success_per_attempt.png, {run.plots}/learning_curve.png")
    print(f"run      {run.path}")
    print(f"watch    {this_script()} --watch {run.path}")
    print("\nUse the policy:\n")
    print("    from amago_core import Policy")
    print(f'    policy = Policy.load("{run.path}")')
    print("    action = policy.act(observation, reward)   # remembers; policy.reset() at a new lake")


def print_table(table: dict[str, list[tuple[float, float, float]]]) -> None:
    """One row per attempt, one column per policy."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    view = Table("attempt", *table, box=SIMPLE_HEAD)
    for attempt, cells in enumerate(zip(*table.values(), strict=True)):
        view.add_row(str(attempt + 1), *(f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in cells))
    view.add_section()
    view.add_row("sum", *(f"{sum(row[0] for row in rows):.3f}" for rows in table.values()))
    Console().print(view)


def watch(options: Options) -> None:
    """Replay one unseen lake in the terminal and save it as a GIF."""
    run, _, _ = RunDir.open(options.watch)
    kwargs = env_kwargs_of(run)
    policy = Policy.load(run.path, seed=options.seed)
    text_env = gym.make(ENV_ID, render_mode="ansi", split="held_out", **kwargs)
    image_env = gym.make(ENV_ID, render_mode="rgb_array", split="held_out", **kwargs)
    seed = child_seed(options.seed, "watch")
    observation, _ = text_env.reset(seed=seed)
    image_env.reset(seed=seed)
    frames = [image_env.render()]
    policy.reset()
    reward, attempt, done = 0.0, 1, False
    print(f"attempt 1\n{text_env.render()}")
    while not done:
        action = policy.act(observation, reward)
        observation, reward, terminated, truncated, info = text_env.step(action)
        image_env.step(action)
        done = terminated or truncated
        frames.append(image_env.render())
        ended = [value for name, value in info.get("metrics", {}).items() if name.endswith("/success")]
        if ended:
            print(f"--> {'reached the goal' if ended[0] else 'failed'}\n")
            attempt += 1
        if not done:
            print(f"attempt {attempt}\n{text_env.render()}" if ended else text_env.render())
    path = save_gif(run.path / "plots" / f"lake_seed{options.seed}.gif", frames, fps=4)
    print(f"saved    {path}")


def main() -> None:
    """Command line."""
    import tyro

    resume_hint: dict[str, str] = {}

    def run() -> None:
        options = tyro.cli(Options, description=__doc__)
        if options.watch:
            watch(options)
        else:
            train(options, resume_hint)

    def how_to_resume() -> str | None:
        path = resume_hint.get("dir")
        return f"{this_script()} --resume {path}" if path else None

    run_command(run, how_to_resume=how_to_resume)


if __name__ == "__main__":
    main()
