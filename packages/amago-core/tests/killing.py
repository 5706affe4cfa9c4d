"""Runs in processes of their own that stop at a named moment and are then killed from outside."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Moment to (module, object in it, "before" or "after"): the process sleeps there until it is killed.
MOMENTS = {
    "before the first checkpoint": ("amago_core.experiment", "save_checkpoint", "before"),
    "collecting": ("amago_core.experiment", "Policy.step", "before"),
    "collected": ("amago_core.experiment", "Rollout.collect", "after"),
    "evicting": ("amago_offline.datasets.replay", "ReplayDataset.evict", "after"),
    "training": ("amago_core.experiment", "Learner.update", "after"),
    "validating": ("amago_core.experiment", "evaluate", "after"),
    "epoch logged": ("amago_core.trackers", "JSONLTracker.sync", "before"),
    "checkpoint half written": ("amago_core.checkpoint", "save_file", "after"),
    "checkpoint not yet in place": ("amago_core.checkpoint", "_publish", "before"),
    "checkpoint just in place": ("amago_core.checkpoint", "_publish", "after"),
    "checkpoint written": ("amago_core.experiment", "save_checkpoint", "after"),
    "purged": ("amago_offline.datasets.replay", "ReplayDataset.purge", "after"),
    "summary not yet written": ("amago_core.run_dir", "RunDir.write_summary", "before"),
}


def _stop(marker: str) -> None:
    Path(marker).touch()
    time.sleep(600)


def install(moment: str, occurrence: int, marker: str) -> None:
    """Make this process stop at the given occurrence (0 is the first) of a moment, after touching `marker`."""
    module_name, dotted, when = MOMENTS[moment]
    owner: Any = importlib.import_module(module_name)
    *owners, name = dotted.split(".")
    for part in owners:
        owner = getattr(owner, part)
    original, seen = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        mine = seen[0] == occurrence
        seen[0] += 1
        if mine and when == "before":
            _stop(marker)
        result = original(*args, **kwargs)
        if mine:
            _stop(marker)
        return result

    setattr(owner, name, wrapped)


def _child(moment: str | None, occurrence: int, marker: str, work: Callable[..., Any], arguments: tuple) -> None:
    if moment is not None:
        install(moment, occurrence, marker)
    work(*arguments)


def begin(work: Callable[..., Any], *arguments: Any, moment: str | None = None, occurrence: int = 0, marker: Any = ""):
    """Start `work(*arguments)` in a new process that stops at a moment, if one is named.

    The processes are forked from a server that has imported everything already: each starts at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["amago_core.cli"])
    process = context.Process(target=_child, args=(moment, occurrence, str(marker), work, arguments))
    process.start()
    return process


def kill(process: Any) -> None:
    """SIGKILL, and wait until it has taken effect."""
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    process.close()


def kill_at(moment: str, occurrence: int, marker: Path, work: Callable[..., Any], *arguments: Any) -> None:
    """Run `work(*arguments)` in a process of its own and kill it at the given occurrence of a moment."""
    process = begin(work, *arguments, moment=moment, occurrence=occurrence, marker=marker)
    deadline = time.monotonic() + 120
    while not marker.exists():
        assert process.is_alive(), f"the run ended before {moment!r} happened {occurrence + 1} times"
        assert time.monotonic() < deadline, f"{moment!r} did not happen"
        time.sleep(0.005)
    kill(process)
    marker.unlink()
