"""The script behind `make gpu`: what it leaves out, how it groups tests, what it says without a device."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parent / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_session", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_session"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_session"]


def test_groups_hold_tests_of_one_file_and_the_slow_ones_come_first(gpu):
    tests = [f"a.py::test[{i}]" for i in range(5)] + ["b_triton.py::one"] + [f"c.py::C::t[{i}::triton]" for i in (1, 2)]
    groups = gpu.chunks(tests, 3)
    assert [(group[0][0], len(group)) for group in groups] == [("b", 1), ("a", 3), ("a", 2), ("c", 2)]
    assert sorted(sum(groups, [])) == sorted(tests)
    assert all(len({test.split("::")[0] for test in group}) == 1 for group in groups)


def test_missing_dependencies(gpu, monkeypatch):
    assert gpu.missing("amago-kernels") == []
    monkeypatch.setattr(gpu, "_installed", lambda name: name == "torch")
    assert gpu.missing("amago-nets") == []
    assert "gymnasium" in gpu.missing("amago-core")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_that_there_is_no_device():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("no CUDA device found by torch")
