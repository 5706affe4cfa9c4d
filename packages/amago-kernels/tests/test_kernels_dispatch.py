"""Backend choice and `amago_kernels.testing`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import amago_kernels
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
    code = "import sys, amago_kernels; print([m for m in ('triton', 'gymnasium', 'flash_attn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
