"""The command line: `amago train`, `amago resume`, and what examples share.

Anything a user can mend ends as one line on stderr and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import gymnasium as gym
import tyro

from amago_core.config import ExperimentConfig
from amago_core.errors import AmagoError, EnvError
from amago_core.experiment import Experiment

INTERRUPTED = 130


def run_command(main: Callable[[], None], *, how_to_resume: Callable[[], str | None] | None = None) -> None:
    """Run a command and end the process as a command should.

    Args:
        main: what to do.
        how_to_resume: the command that goes on with a run that Ctrl-C has stopped; None if there is no run yet.

    Raises:
        SystemExit: code 2 after an `AmagoError` (one line on stderr), 130 after Ctrl-C.
    """
    try:
        main()
    except AmagoError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        command = how_to_resume() if how_to_resume is not None else None
        print(f"\nstopped; go on with:\n  {command}" if command else "\nstopped", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


@dataclass(frozen=True)
class Train:
    """Train an agent on a registered Gymnasium environment.

    Attributes:
        env: id of the environment, such as CartPole-v1 or amago_envs:MetaFrozenLake-v1.
        config: settings of the run.
    """

    env: Annotated[str, tyro.conf.Positional]
    config: Annotated[ExperimentConfig, tyro.conf.arg(name="")]

    def __call__(self) -> None:
        """Run to the end."""
        env_id = self.env

        def make_env() -> gym.Env:
            try:
                return gym.make(env_id)
            except (gym.error.Error, ImportError) as error:
                raise EnvError(f"env {env_id!r} cannot be made: {error}") from error

        Experiment(self.config, make_env).learn()


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


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `amago` command.

    Args:
        arguments: of the command line; None takes the process's own.
    """
    command = {}

    def run() -> None:
        command["run"] = tyro.extras.subcommand_cli_from_dict({"train": Train, "resume": Resume}, args=arguments)
        command["run"]()

    def resume() -> str | None:
        chosen = command.get("run")
        if chosen is None:
            return None
        return f"amago resume {chosen.run_dir if isinstance(chosen, Resume) else chosen.config.run_dir}"

    run_command(run, how_to_resume=resume)
