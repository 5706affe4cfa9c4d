"""Frames per second of the natively vectorised environments of amago-envs against `gymnasium.vector.SyncVectorEnv`.

Both sides play the same random actions from the same seeds; before anything is timed, their observations, rewards and
end flags are compared, and a difference stops the script.

    python benchmarks/envs_throughput.py --out results.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from _report import report
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from amago_envs import MetaFrozenLake, MetaFrozenLakeVector, RoomKeyDoor, RoomKeyDoorVector

CASES: dict[str, tuple[Callable[..., Any], Callable[..., VectorEnv], dict[str, Any]]] = {
    "MetaFrozenLake 4x4, 5 attempts": (MetaFrozenLake, MetaFrozenLakeVector, {"size": 4, "k_attempts": 5}),
    "MetaFrozenLake 5x5 hard, 10 attempts": (MetaFrozenLake, MetaFrozenLakeVector, {"size": 5, "hard_mode": True}),
    "RoomKeyDoor 9x9 dark": (RoomKeyDoor, RoomKeyDoorVector, {}),
}


def build(case: str, lanes: int) -> tuple[VectorEnv, VectorEnv]:
    """The native and the synchronous vector environment of one case."""
    single, vector, settings = CASES[case]
    sync = SyncVectorEnv([lambda: single(**settings)] * lanes, autoreset_mode=AutoresetMode.SAME_STEP)
    return vector(lanes, **settings), sync


def assert_equal(native: VectorEnv, sync: VectorEnv, actions: np.ndarray) -> None:
    """Stop the benchmark if the two sides do not do the same thing."""
    np.testing.assert_array_equal(native.reset(seed=0)[0], sync.reset(seed=0)[0])
    for row in actions:
        for ours, theirs in zip(native.step(row)[:4], sync.step(row)[:4], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def frames_per_second(env: VectorEnv, actions: np.ndarray, seconds: float) -> float:
    """Play for about `seconds`, resets included, and count frames."""
    env.reset(seed=1)
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for row in actions:
            env.step(row)
        steps += len(actions)
    return steps * env.num_envs / elapsed


def measure(case: str, lanes: int, *, seconds: float, repeats: int) -> dict[str, Any]:
    """Median frames per second of both sides of one case."""
    native, sync = build(case, lanes)
    actions = np.random.default_rng(0).integers(5, size=(100, lanes))
    assert_equal(native, sync, np.tile(actions, (6, 1)))
    rates = {"native": [], "sync": []}
    for _ in range(repeats):
        rates["native"].append(frames_per_second(native, actions, seconds))
        rates["sync"].append(frames_per_second(sync, actions, seconds))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "case": case,
        "lanes": lanes,
        "native_frames_per_second": round(medians["native"]),
        "sync_frames_per_second": round(medians["sync"]),
        "speed_up": round(medians["native"] / medians["sync"], 1),
    }


def main() -> None:
    """Measure every case; print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write, or a directory for it")
    parser.add_argument("--lanes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one run")
    parser.add_argument("--repeats", type=int, default=5, help="runs per number; the median counts")
    args = parser.parse_args()
    rows = [measure(case, lanes, seconds=args.seconds, repeats=args.repeats) for case in CASES for lanes in args.lanes]
    settings = {
        "compared": "native vector environment against SyncVectorEnv, same-step autoreset, random actions",
        "seconds": args.seconds,
        "repeats": args.repeats,
        "numpy": np.__version__,
        "gymnasium": gymnasium.__version__,
    }
    report("envs_throughput", rows, args.out, settings=settings)


if __name__ == "__main__":
    main()
