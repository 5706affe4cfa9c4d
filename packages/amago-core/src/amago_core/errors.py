"""Errors that a user can fix.

The command line turns every [`AmagoError`][amago_core.errors.AmagoError] into one line on stderr and exit code 2;
anything else is a bug of ours and keeps its traceback. All of them are `ValueError`s, so that code which uses the
package as a library needs no special import to catch them.
"""

from __future__ import annotations

__all__ = ["AmagoError", "CheckpointError", "ConfigError", "EnvError", "MissingDependencyError", "RunDirError"]


class AmagoError(ValueError):
    """Base of all errors that the user can fix; the message says what was seen and what is allowed."""


class ConfigError(AmagoError):
    """A configuration value, field or file that cannot be used."""


class EnvError(AmagoError):
    """An environment, observation space, action space or environment output that cannot be used."""


class CheckpointError(AmagoError):
    """A checkpoint that is missing, damaged, or made for something else."""


class RunDirError(AmagoError):
    """A run directory that is not writable, is already in use, is finished, or belongs to another run."""


class MissingDependencyError(AmagoError, ImportError):
    """An optional package is not installed; the message holds the `pip install` command.

    Args:
        feature: what needs the package, for example `"plots"`.
        package: the package that cannot be imported.
        extra: the extra of `amago-core` that installs it.
    """

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f'{feature} needs {package}, which is not installed: pip install "amago-core[{extra}]"')
