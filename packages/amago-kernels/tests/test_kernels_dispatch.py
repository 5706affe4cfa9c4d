"""Backend choice and `amago_kernels.testing`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import amago_kernels
from amago_kernels import dispatch
from amago_kernels.dispatch import OPERATIONS, choose
from amago_kernels.testing import assert_close_ratio, error_ratio, poisoned


def test_available_lists_what_runs():
    listed = amago_kernels.available()
    assert set(listed) == set(OPERATIONS)
    for operation, backends in listed.items():
        assert "reference" in backends
        assert set(backends) <= set(OPERATIONS[operation])
    listed.clear()
    assert amago_kernels.available()


def test_auto_takes_the_first_that_can():
    table = {"sdpa": lambda call: "no" if call > 1 else None, "reference": lambda call: None}
    assert choose("attention", "auto", 1, table) == "sdpa"
    assert choose("attention", "auto", 2, table) == "reference"
    assert choose("attention", "sdpa", 1, table) == "sdpa"
    with pytest.raises(ValueError, match=r"backend='sdpa' cannot serve this attention call: no.*\['reference'\]"):
        choose("attention", "sdpa", 2, table)
    with pytest.raises(ValueError, match="none of"):
        choose("attention", "auto", 2, {"sdpa": table["sdpa"]})


@pytest.mark.parametrize(
    ("switch", "installed", "taken"), [(True, True, "triton"), (True, False, "sdpa"), (False, True, "sdpa")]
)
def test_auto_and_triton(monkeypatch, switch, installed, taken):
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    monkeypatch.setattr(dispatch, "_AUTO_TRITON", switch)
    monkeypatch.setattr(dispatch, "missing", lambda backend: None if installed else f"no {backend}")
    table = {"triton": lambda call: None, "sdpa": lambda call: None}
    assert choose("attention", "auto", 1, table) == taken


@pytest.mark.parametrize(("variable", "value"), [("AMAGO_KERNELS_TRITON", "0"), ("TRITON_INTERPRET", "1")])
def test_triton_can_be_switched_off(variable, value):
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "from amago_kernels import dispatch; dispatch.missing = lambda name: None; print(dispatch.triton_unasked())"
    for extra, expected in (({}, "True"), ({variable: value}, "False")):
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, env=environment | extra, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == expected


def test_triton_says_what_it_refuses(monkeypatch):
    assert "not torch.float64" in (dispatch.triton_refusal("cuda", torch.float32, torch.float64) or "")
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    assert "run on CUDA devices, and the input is on cpu" in (dispatch.triton_refusal("cpu", torch.float32) or "")


def test_error_ratio():
    ref = torch.tensor([3.0, 4.0])
    assert error_ratio(ref, ref) == 0.0
    assert error_ratio(ref + torch.tensor([0.0, 0.5]), ref) == pytest.approx(0.1)
    assert error_ratio(torch.tensor([1.0]), torch.tensor([0.0])) == 1.0
    assert error_ratio(poisoned((2,)), ref) == float("inf")
    assert error_ratio(poisoned((2,)), poisoned((2,))) == float("inf")
    with pytest.raises(ValueError, match="like ref"):
        error_ratio(ref[:1], ref)
    with pytest.raises(AssertionError, match="keys: relative error"):
        assert_close_ratio(poisoned((2,)), ref, 1e-3, "keys")


def test_import_stays_light():
    code = "import sys, amago_kernels; print([m for m in ('triton', 'numba', 'flash_attn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
