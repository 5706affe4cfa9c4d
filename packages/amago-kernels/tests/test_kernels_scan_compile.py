"""Scans and convolution inside of `torch.compile`, and on CUDA devices without a synchronisation."""

from __future__ import annotations

import pytest
import torch

from amago_kernels import causal_conv1d, linear_scan, selective_scan
from amago_kernels.testing import assert_close_ratio


def make_inputs(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (2, 40, 6),
        "weight": (6, 3),
        "delta": (2, 40, 6),
        "A": (6, 4),
        "B": (2, 40, 4),
        "C": (2, 40, 4),
        "a": (3, 2),
    }
    inputs = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs["A"] = -inputs["A"].exp()
    return {name: x.to(device).requires_grad_() for name, x in inputs.items()}


def layer(x, weight, delta, A, B, C, a, reset, backend="auto"):
    """A convolution, a selective scan and a complex linear scan in a row."""
    mixed, _ = causal_conv1d(x, weight, reset=reset, activation="silu")
    y, state = selective_scan(mixed, delta, A, B, C, delta_softplus=True, reset=reset)
    h, last = linear_scan(a, y.unflatten(-1, (3, 2)), reset=reset, pairs=True, backend=backend)
    return h.square().sum() + last.sum() + state.sum()


def make_reset(device="cpu"):
    return (torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.1).to(device)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("resets", [False, True])
def test_compiles_in_one_piece(resets):
    torch._dynamo.reset()
    inputs, reset = make_inputs(), make_reset() if resets else None
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        out = function(**inputs, reset=reset)
        results.append([out, *torch.autograd.grad(out, list(inputs.values()))])
    for one, other in zip(*results, strict=True):
        assert_close_ratio(one, other, 1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("backend", ["auto", "blocked"])
def test_cuda_equals_cpu_and_never_waits(backend):
    inputs, reset = make_inputs(), make_reset()
    expected = layer(**inputs, reset=reset)
    wanted = torch.autograd.grad(expected, list(inputs.values()))
    inputs, reset = make_inputs("cuda"), make_reset("cuda")
    layer(**inputs, reset=reset, backend=backend).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = layer(**inputs, reset=reset, backend=backend)
        got = torch.autograd.grad(out, list(inputs.values()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip([out, *got], [expected, *wanted], strict=True):
        assert_close_ratio(one.cpu(), other, 1e-4)
