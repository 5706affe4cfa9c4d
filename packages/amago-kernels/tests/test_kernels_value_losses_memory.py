"""Two-hot and HL-Gauss cross-entropy: the memory of all backends beside that of the reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton_devices import without_triton

from amago_kernels import hl_gauss_cross_entropy, two_hot_cross_entropy

SUPPORT = torch.linspace(-math.log1p(1e5), math.log1p(1e5), 128, dtype=torch.float64)
LEAN = tuple(backend for backend in without_triton("two_hot_cross_entropy") if backend != "reference")


def peak_memory(call: Callable[[], object]) -> int:
    """The most bytes that are held at one time during a call, beyond what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma", [None, 0.11])
@pytest.mark.parametrize("lean", LEAN)
def test_memory(lean: str, sigma: float | None, dtype: torch.dtype) -> None:
    """Forward and backward: a label for every prediction costs three times as much, the gradient itself included."""
    logits = torch.randn(8, 128, 4, 7, 128, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    target = 10 * torch.randn(8, 128, 4, 7, generator=torch.Generator().manual_seed(1))

    def step(backend: str) -> Tensor:
        if sigma is None:
            loss = two_hot_cross_entropy(logits, target, SUPPORT, backend=backend)
        else:
            loss = hl_gauss_cross_entropy(logits, target, SUPPORT, sigma, backend=backend)
        return torch.autograd.grad(loss.mean(), logits)[0]

    step(lean)
    ours, reference = (peak_memory(lambda b=backend: step(b)) for backend in (lean, "reference"))
    assert reference > 3 * ours > 0
