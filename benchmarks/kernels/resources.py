"""Registers and spills of our Triton kernels, compiled for named GPUs, whether one is at hand or not."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from amago_kernels import builds


def compile_all(archs: list[int], workers: int, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Compiles every build and configuration in a process of its own.

    Args:
        archs: compute capabilities times 10.
        workers: processes.
        seconds: after which it is given up.

    Returns:
        One dictionary per build and configuration, with the module it is from; and what went wrong, if anything.
    """
    source = str(Path(builds.__file__).parent.parent)
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "amago_kernels.builds", "--json", "--workers", str(workers)]
    command += ["--arch", *map(str, archs)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [], f"not done after {seconds:.0f} s"
    problem = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
    module_of = {build.name: name for name in builds.MODULES for build in importlib.import_module(name).builds()}
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [{"module": module_of.get(line["name"], "?"), **line} for line in lines], problem


def print_builds(built: list[dict[str, Any]]) -> None:
    """One line per build: the first configuration, and the range of all.

    Args:
        built: from `compile_all`.
    """
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in built:
        groups.setdefault((line["arch"], line["name"]), []).append(line)
    for (arch, name), lines in groups.items():
        first = next((line for line in lines if line["first"]), lines[0])
        most = {key: max(line[key] for line in lines) for key in ("registers", "spilled", "shared")}
        print(
            f"sm_{arch}  {name}: {first['registers']} registers (at most {most['registers']} in {len(lines)} "
            f"configurations), {first['spilled']} bytes spilled (at most {most['spilled']}), "
            f"{first['shared'] / 1024:.0f} KiB shared (at most {most['shared'] / 1024:.0f})"
        )
