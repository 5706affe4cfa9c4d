"""The command line: `amago train`, `amago resume`, `amago evaluate`, and what examples share.

Anything a user can mend ends as one line on stderr and exit code 2.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, TypeVar

import gymnasium as gym
import tyro

from amago_core.cli_choices import choices_of, narrow, take_choices, widen
from amago_core.config import ExperimentConfig
from amago_core.errors import AmagoError, ConfigError, EnvError
from amago_core.evaluation import evaluate
from amago_core.experiment import Experiment
from amago_core.policy import Policy
from amago_core.progress import format_value
from amago_core.run_dir import RunDir
from amago_core.run_env import restore_factories

INTERRUPTED = 130
_BOX = str.maketrans("", "", "│╭╮╰╯─")
_Result = TypeVar("_Result")


def run_command(main: Callable[[], None], *, how_to_resume: Callable[[], str | None] | None = None) -> None:
    """Run a command and end the process as a command should; warnings become one line each.

    Args:
        main: what to do.
        how_to_resume: the command that goes on with a run that Ctrl-C has stopped; None if there is no run yet.

    Raises:
        SystemExit: code 2 after an `AmagoError` (one line on stderr), 130 after Ctrl-C.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            main()
    except AmagoError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        command = how_to_resume() if how_to_resume is not None else None
        print(f"\nstopped; go on with:\n  {command}" if command else "\nstopped", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def parse(parser: Callable[[], _Result]) -> _Result:
    """Parse a command line with tyro, whose boxed complaints become one line.

    Args:
        parser: calls tyro.

    Returns:
        What it returns.

    Raises:
        ConfigError: for a command line or a configuration that is refused.
        SystemExit: code 0 after `--help`.
    """
    complaint = StringIO()
    try:
        with redirect_stderr(complaint):
            return parser()
    except SystemExit as end:
        if not end.code:
            raise
        raise ConfigError(_first_part(complaint.getvalue())) from None
    except AmagoError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _first_part(box: str) -> str:
    """The text of a box below its title and up to the next rule, on one line."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.translate(_BOX).strip()
        if line.startswith("╭") or not text.strip("-"):
            parts.append([])
        else:
            parts[-1].append(text)
    # Where the output is not UTF-8 there is no frame, and the title is a part of its own.
    filled = [part for part in parts if part]
    below = filled[1:] if "╭" not in box and len(filled) > 1 else filled
    return " ".join(below[0] if below else []).replace("__tyro-dummy-inner__.", "").replace("config.", "")


@dataclass(frozen=True)
class Train:
    """Train an agent on a registered Gymnasium environment.

    Attributes:
        env: id of the environment, such as CartPole-v1 or amago_envs:MetaFrozenLake-v1.
        config: settings of the run.
    """

    env: Annotated[str, tyro.conf.Positional]
    config: Annotated[ExperimentConfig, tyro.conf.arg(name="")]

    @property
    def run_dir(self) -> str:
        """Where the run goes."""
        return self.config.run_dir

    def __call__(self) -> None:
        """Run to the end."""
        env_id = self.env

        def make_env() -> gym.Env:
            try:
                return gym.make(env_id)
            except (gym.error.Error, ImportError) as error:
                raise EnvError(f"env {env_id!r} cannot be made: {error}") from error

        Experiment(widen(self.config), make_env).learn()


@dataclass(frozen=True)
class Resume:
    """Go on with a run that was stopped.

    Attributes:
        run_dir: directory of the run.
        epochs: new length of the run; None keeps the old one.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    epochs: int | None = None

    def __call__(self) -> None:
        """Run to the end."""
        Experiment.resume(self.run_dir, epochs=self.epochs).learn()


@dataclass(frozen=True)
class Evaluate:
    """Evaluate the newest policy of a run where the run validates, and print means over episodes.

    Attributes:
        run_dir: directory of the run.
        episodes: at least so many, as many in each lane.
        lanes: environments at once; None takes those of the run's validation.
        seed: of the environments and of sampled actions.
        sample: draw actions from the policy; None does as the run's validation.
        device: where the policy computes.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    episodes: int = 100
    lanes: int | None = None
    seed: int = 0
    sample: bool | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated."""
        for name, least in (("episodes", 1), ("lanes", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be >= {least}; got {value}")

    def __call__(self) -> None:
        """Evaluate and print."""
        run, config, stored = RunDir.open(self.run_dir)
        sample = config.sample_actions_val if self.sample is None else self.sample
        policy = Policy.load(run.path, device=self.device, sample=sample, seed=self.seed)
        _, factory = restore_factories(stored, (None, None), (None, None), config.env_mode)
        lanes = min(self.episodes, self.lanes or config.val_lanes)
        env = factory.build(lanes)
        result = evaluate(policy, env, seed=self.seed, episodes_per_lane=-(-self.episodes // lanes))
        env.close()
        summary = result.summary()
        width = max(map(len, summary))
        for name, value in summary.items():
            print(f"{name:{width}}  {format_value(name.rpartition('/')[2], value)}")


def _train_command(arguments: Sequence[str]) -> tuple[type[Train], list[str]]:
    """`Train` with the parts chosen on the command line, and the rest of the command line."""
    if arguments[:1] != ["train"]:
        return Train, list(arguments)
    chosen, rest = take_choices(arguments, ExperimentConfig)
    choices = choices_of(ExperimentConfig, chosen)
    config: Any = Annotated[narrow(ExperimentConfig, chosen), tyro.conf.arg(name="")]
    command = dataclasses.make_dataclass("Train", [("config", config)], bases=(Train,), frozen=True)
    summary, _, attributes = inspect.cleandoc(Train.__doc__ or "").partition("\n\n")
    listed = ", ".join(f"--{option} {{{','.join(names)}}}" for option, names in choices.items())
    command.__doc__ = (
        f"{summary}\n\nParts are chosen by name, and then have options of their own, listed below (the default comes "
        f"first): {listed}.\n\n{attributes}"
    )
    return command, rest


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `amago` command.

    Args:
        arguments: of the command line; None takes the process's own.
    """
    command: dict[str, Any] = {}

    def run() -> None:
        train, rest = _train_command(sys.argv[1:] if arguments is None else arguments)
        commands: dict[str, Callable[..., Any]] = {"train": train, "resume": Resume, "evaluate": Evaluate}
        command["run"] = parse(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="amago", args=rest))
        command["run"]()

    def resume() -> str | None:
        directory = getattr(command.get("run"), "run_dir", None)
        begun = directory is not None and RunDir(Path(directory)).config.exists()
        return f"amago resume {directory}" if begun and not isinstance(command["run"], Evaluate) else None

    run_command(run, how_to_resume=resume)
