"""Shared fixtures: a small schema, and trajectories of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from amago_offline import Field, Schema, Trajectory, discrete_action_field

# Helper modules are importable whatever pytest's import mode.
sys.path.insert(0, str(Path(__file__).parent))

from numbered_trajectories import numbered  # noqa: E402


@pytest.fixture
def schema() -> Schema:
    """Schema of `make`."""
    obs = {"image": Field((2, 3), "uint8"), "state": Field((2,), "float32")}
    return Schema(obs, discrete_action_field(3))


@pytest.fixture
def make() -> Callable[..., Trajectory]:
    """`make(number, length, start=0)`."""
    return numbered


@pytest.fixture
def same() -> Callable[[Trajectory, Trajectory], bool]:
    """Whether two trajectories are equal, dtypes included."""

    def compare(left: Trajectory, right: Trajectory) -> bool:
        pairs = [(left.obs[key], right.obs[key]) for key in left.obs]
        for name in ("prev_action", "prev_reward", "terminated", "truncated", "time_idx"):
            pairs.append((getattr(left, name), getattr(right, name)))
        equal = all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
        return equal and left.obs.keys() == right.obs.keys() and left.meta == right.meta

    return compare


@pytest.fixture
def python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a script in another interpreter that can import the helper modules here."""
    started = []

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
