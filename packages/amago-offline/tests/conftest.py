"""Shared fixtures: a small schema, and trajectories whose every value follows from a number."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from amago_offline import Field, Schema, Trajectory, discrete_action_field


def numbered(number: int, length: int, start: int = 0) -> Trajectory:
    """Trajectory `number`: a reader can tell from any row which one it is and whether the row is right."""
    steps = np.arange(start, start + length)
    action = ((number + steps) % 3).astype(np.int8)
    action[0] = -1
    terminated = np.zeros(length, bool)
    terminated[-1] = number % 3 == 0
    truncated = np.zeros(length, bool)
    truncated[-1] = number % 3 == 1
    return Trajectory(
        obs={
            "image": ((number * 7 + steps)[:, None, None] % 256 * np.ones((1, 2, 3))).astype(np.uint8),
            "state": np.stack([np.full(length, number), steps], axis=1).astype(np.float32),
        },
        prev_action=action,
        prev_reward=(number + steps / 1000).astype(np.float32),
        terminated=terminated,
        truncated=truncated,
        time_idx=steps,
        meta={"number": number},
    )


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
def python() -> Callable[..., subprocess.Popen[str]]:
    """Start a script in another interpreter that can import this file as `conftest`."""
    started = []

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        here = str(Path(__file__).parent)
        path = os.pathsep.join([here, *(entry for entry in sys.path if entry)])
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
