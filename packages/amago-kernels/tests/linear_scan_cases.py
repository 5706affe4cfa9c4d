"""Inputs of `linear_scan`, and a loop over complex or real numbers in float64 to compare with."""

from __future__ import annotations

import torch

from amago_kernels import linear_scan
from amago_kernels.testing import assert_close_ratio


def make_inputs(batch, length, channels, pairs, constant=False):
    """`a`, `b` and an initial state in float64; factors reach from 0 over tiny ones to beyond 1."""
    generator = torch.Generator().manual_seed(0)
    tail = (channels, 2) if pairs else (channels,)
    a = torch.randn(tail if constant else (batch, length, *tail), generator=generator, dtype=torch.float64) * 0.6
    if constant:
        a.clamp_(-0.7, 0.7)
    flat = a.view(-1)
    flat[::7], flat[1::11] = 0.0, 1e-30
    b = torch.randn(batch, length, *tail, generator=generator, dtype=torch.float64)
    return a, b, torch.randn(batch, *tail, generator=generator, dtype=torch.float64)


def loop(a, b, state, reset, pairs):
    """Lane by lane, timestep by timestep, in Python's `if`s and torch's complex numbers."""
    if pairs:
        a, b, state = (torch.view_as_complex(x.contiguous()) for x in (a, b, state))
    lanes = []
    for lane, (factors, terms, h) in enumerate(zip(a.expand(b.shape), b, state, strict=True)):
        states = []
        for t, (factor, term) in enumerate(zip(factors, terms, strict=True)):
            if reset is not None and reset[lane, t]:
                h = torch.zeros_like(h)
            h = factor * h + term
            states.append(h)
        lanes.append(torch.stack(states))
    out = torch.stack(lanes)
    return torch.view_as_real(out) if pairs else out


def scalar(h, last):
    """A number that depends on everything."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (h, last)]
    return (h.double().cpu() * weights[0]).sum() + (last.double().cpu() * weights[1]).sum()


def compare(inputs, reset, pairs, backend, dtype, tolerance, resume=True, device="cpu"):
    """Outputs and gradients of a backend against the loop in float64."""
    exact = [x.requires_grad_() for x in inputs]
    cast = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    start = exact[2] if resume else torch.zeros_like(exact[2])
    expected = loop(exact[0], exact[1], start, reset, pairs)
    h, last = linear_scan(
        cast[0],
        cast[1],
        initial_state=cast[2] if resume else None,
        reset=None if reset is None else reset.to(device),
        pairs=pairs,
        backend=backend,
    )
    assert h.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close_ratio(h, expected, tolerance, "h")
    assert_close_ratio(last, expected[:, -1], tolerance, "final state")
    count = 3 if resume else 2
    wanted = torch.autograd.grad(scalar(expected, expected[:, -1]), exact[:count], materialize_grads=True)
    got = torch.autograd.grad(scalar(h, last), cast[:count])
    for name, one, other in zip(("a", "b", "initial_state"), got, wanted, strict=False):
        assert_close_ratio(one, other, tolerance, f"gradient of {name}")
