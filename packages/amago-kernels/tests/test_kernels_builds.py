"""Every Triton kernel and configuration compiles for the GPUs we name, within their limits, with none at hand."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from amago_kernels.builds import SHARED_LIMIT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

Line = dict[str, Any]

# What there is to build: every tuned kernel of every module, and those that no build of a known module has.
INVENTORY = """
import importlib, json, pathlib
import amago_kernels
from amago_kernels import builds
from amago_kernels.tuning import TunedKernel

root = pathlib.Path(amago_kernels.__file__).parent
kernels = {}
for path in sorted(root.rglob("*.py")):
    if "@tuned(" in path.read_text():
        name = ".".join(["amago_kernels", *path.relative_to(root).with_suffix("").parts])
        for variable, value in vars(importlib.import_module(name)).items():
            if isinstance(value, TunedKernel) and value.fn.fn.__module__ == name:
                kernels[f"{name}.{variable}"] = value
listed = builds.all_builds()
print(json.dumps({
    "kernels": sorted(kernels),
    "unbuilt": [name for name, kernel in kernels.items() if all(kernel is not build.kernel for build in listed)],
    "configurations": [[build.name, len(build.kernel.configs)] for build in listed],
}))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python in which Triton compiles: it decides when it is imported whether it interprets instead."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=900)


def told(line: Line, key: str) -> str:
    return f"{line['name']}, sm_{line['arch']}, {line['config']}: {line[key]} bytes {key}"


@pytest.fixture(scope="module")
def inventory() -> dict[str, Any]:
    done = run("-c", INVENTORY)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def built() -> list[Line]:
    done = run("-m", "amago_kernels.builds", "--json", "--workers", "2", "--arch", *map(str, SHARED_LIMIT))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "nothing"), "no build has 'nothing' in its name"),
        (("--arch", "75"), "75 is not allowed; give 80 or more"),
        (("--workers", "0"), "0 is not allowed; give 1 or more"),
    ],
)
def test_bad_options_are_refused(options: tuple[str, str], message: str) -> None:
    done = run("-m", "amago_kernels.builds", *options)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_every_kernel_has_a_build(inventory: dict[str, Any]) -> None:
    assert inventory["kernels"]
    assert inventory["unbuilt"] == [], "add a build, and the module with it to amago_kernels.builds.MODULES"


def test_everything_compiles(inventory: dict[str, Any], built: list[Line]) -> None:
    names = [name for name, _ in inventory["configurations"]]
    assert len(set(names)) == len(names), "two builds bear one name"
    assert Counter((line["name"], line["arch"]) for line in built) == {
        (name, arch): count for name, count in inventory["configurations"] for arch in SHARED_LIMIT
    }


def test_shared_memory_fits(built: list[Line]) -> None:
    assert [told(line, "shared") for line in built if line["shared"] > SHARED_LIMIT[line["arch"]]] == []


def test_first_configurations_spill_nothing(built: list[Line]) -> None:
    assert [told(line, "spilled") for line in built if line["first"] and line["spilled"] > 0] == []
