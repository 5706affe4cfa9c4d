"""The selective scan by Numba's kernels as operators; nothing here imports Numba before it is called.

Dimensions: `B` batch, `L` timesteps, `D` channels, `N` states per channel, `K` chunks of timesteps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..inputs import drop_idle

# Timesteps from one state that the forward pass keeps to the next.
_CHUNK = 32

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor state,"
    " Tensor? reset, bool softplus"
)


@torch.library.custom_op(
    "amago_kernels::selective_scan_numba",
    mutates_args=(),
    schema=f"({_INPUTS}, bool keep) -> (Tensor, Tensor, Tensor)",
)
def numba_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`selective_scan` of inputs that are all float32, or all float64.

    Args:
        u: `[B, L, D]`.
        delta: `[B, L, D]`.
        A: `[D, N]`.
        B: `[B, L, N]`.
        C: `[B, L, N]`.
        D: `[D]` or None.
        z: `[B, L, D]` or None.
        delta_bias: `[D]` or None.
        state: `[B, D, N]`.
        reset: `[B, L]` bool or None.
        softplus: apply softplus to the step sizes.
        keep: whether there will be a backward pass.

    Returns:
        `y` `[B, L, D]`, the last state `[B, D, N]`, and the state before each chunk `[B, K, N, D]` (empty without
        `keep`).
    """
    from .numba_selective import forward

    filled = _outputs(u, A, keep)
    if u.numel() > 0:
        forward(u, delta, A, B, C, D, z, delta_bias, state, drop_idle(reset), softplus, *filled, _CHUNK)
    return filled


@numba_scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(u, A, keep)


@torch.library.custom_op(
    "amago_kernels::selective_scan_numba_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor grad_last, Tensor starts, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _numba_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, ...]:
    """The gradients of everything from `u` to `state`; without numbers for what is None."""
    from .numba_selective import backward

    grads = _gradients(u, delta, A, B, C, D, z, delta_bias, state)
    if u.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    options = (D, z, delta_bias, drop_idle(reset), softplus)
    backward(grad_y, grad_last, starts, u, delta, A, B, C, *options, grads, _CHUNK)
    return grads


@_numba_backward.register_fake
def _(
    grad_y: Tensor,
    grad_last: Tensor,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, ...]:
    return _gradients(u, delta, A, B, C, D, z, delta_bias, state)


def _outputs(u: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    states = A.shape[1]
    chunks = (length + _CHUNK - 1) // _CHUNK if keep else 0
    y, last = u.new_empty(u.shape), u.new_empty(batch, channels, states)
    return y, last, u.new_empty(batch, chunks, states, channels)


def _gradients(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Memory for one gradient per input, without numbers where there is none."""
    first = inputs[0]
    assert first is not None
    return tuple(first.new_empty(0 if x is None else x.shape) for x in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, _ = inputs
    ctx.save_for_backward(output[2], *tensors)


def _differentiate(ctx: Any, grad_y: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    starts, *tensors = ctx.saved_tensors
    grads = _numba_backward(grad_y, grad_last, starts, *tensors, ctx.softplus)
    return *(None if x is None else grad for x, grad in zip(tensors[:9], grads, strict=True)), None, None, None


numba_scan.register_autograd(_differentiate, setup_context=_save)
