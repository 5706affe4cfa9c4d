"""Configurations timed at first use, which all other tests turn off (see `conftest.py`)."""

from __future__ import annotations

import pytest
import torch

from amago_kernels import attention, causal_conv1d_step, selective_scan_step
from amago_kernels.testing import assert_close_ratio

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _tune(monkeypatch):
    monkeypatch.setenv("AMAGO_KERNELS_TUNE", "1")


def test_output_and_gradients():
    qkv = torch.randn(2, 90, 3, 2, 16, device="cuda").requires_grad_()
    out, expected = (attention(*qkv.unbind(2), window=20, backend=name) for name in ("triton", "reference"))
    assert_close_ratio(out, expected, 1e-5)
    got, wanted = (torch.autograd.grad(x.square().sum(), qkv)[0] for x in (out, expected))
    assert_close_ratio(got, wanted, 1e-5)


@pytest.mark.parametrize("step", [causal_conv1d_step, selective_scan_step])
def test_a_state_advances_once(step):
    """However often the kernel runs to be timed."""
    if step is causal_conv1d_step:
        shapes, place = [(3, 70), (70, 4), (70,), (3, 70, 3)], 3
    else:
        shapes, place = [(3, 70), (3, 70), (70, 5), (3, 5), (3, 5), (3, 70, 5)], 5
    sides = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        outputs = [step(*inputs) for _ in range(2)]
        sides.append([x.cpu() for x in (*outputs, inputs[place])])
    for one, other in zip(*sides, strict=True):
        assert_close_ratio(other, one, 1e-5)
