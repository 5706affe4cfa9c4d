"""The selective scan by Triton as operators: what they allocate, and how the scan is differentiated.

Dimensions: `B` batch, `L` timesteps, `D` channels, `N` states per channel, `K` chunks of timesteps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..inputs import mark_written

# Timesteps from one state that the forward pass keeps to the next.
CHUNK = 64

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? state,"
    " Tensor? reset, bool softplus"
)


def outputs(u: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what the forward pass gives.

    Args:
        u: `[B, L, D]`.
        A: `[D, N]`.
        keep: whether there will be a backward pass.

    Returns:
        `y` `[B, L, D]`, the last state `[B, D, N]`, and the state before each chunk `[B, K, N, D]` (empty without
        `keep`).
    """
    batch, length, channels = u.shape
    chunks = (length + CHUNK - 1) // CHUNK if keep else 0
    last, starts = (
        torch.empty(shape, dtype=torch.float32, device=u.device)
        for shape in ((batch, channels, A.shape[1]), (batch, chunks, A.shape[1], channels))
    )
    return u.new_empty(u.shape), last, starts


@torch.library.custom_op(
    "amago_kernels::selective_scan_triton",
    mutates_args=(),
    schema=f"({_INPUTS}, bool keep) -> (Tensor, Tensor, Tensor)",
)
def triton_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`selective_scan` from its inputs as they are.

    Args:
        u: `[B, L, D]`.
        delta: `[B, L, D]`.
        A: `[D, N]`.
        B: `[B, L, N]`.
        C: `[B, L, N]`.
        D: `[D]` or None.
        z: `[B, L, D]` or None.
        delta_bias: `[D]` or None.
        state: `[B, D, N]` or None.
        reset: `[B, L]` bool or None.
        softplus: apply softplus to the step sizes.
        keep: whether there will be a backward pass.

    Returns:
        As `outputs`.
    """
    from .triton_selective import forward

    filled = outputs(u, A, keep)
    if u.numel() > 0:
        forward(u, delta, A, B, C, D, z, delta_bias, state, reset, softplus, *filled)
    return filled


@triton_scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return outputs(u, A, keep)


@torch.library.custom_op(
    "amago_kernels::selective_scan_triton_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_y, Tensor? grad_last, Tensor starts, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _triton_backward(
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, ...]:
    """The gradients of everything from `u` to `state`; without numbers for what is None."""
    from .triton_selective_backward import backward

    if u.numel() == 0:
        return tuple(grad.zero_() for grad in _gradients(u, delta, A, B, C, D, z, delta_bias, state))
    inputs = (u, delta, A, B, C, D, z, delta_bias, reset, softplus)
    *grads, grad_state = backward(grad_y, grad_last, starts, *inputs, from_state=state is not None)
    grads.append(None if state is None or grad_state is None else grad_state.to(state.dtype))
    return tuple(u.new_empty(0) if grad is None else grad for grad in grads)


@_triton_backward.register_fake
def _(
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, ...]:
    return _gradients(u, delta, A, B, C, D, z, delta_bias, state)


def _gradients(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Memory for one gradient per input, without numbers where there is none."""
    first = inputs[0]
    assert first is not None
    return tuple(first.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    # What nobody differentiates needs no zeros.
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    starts, *tensors = ctx.saved_tensors
    if grad_y is None and grad_last is None:
        return (None,) * 12
    *wanted, reset = tensors
    if not ctx.needs_input_grad[8]:
        wanted[8] = None
    grads = _triton_backward(grad_y, grad_last, starts, *wanted, reset, ctx.softplus)
    kept = [grad if x is not None else None for x, grad in zip(wanted, grads, strict=True)]
    return *kept, None, None, None


triton_scan.register_autograd(_differentiate, setup_context=_save)


def launch_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    softplus: bool,
) -> Tensor:
    """`triton_step` without an operator around it.

    Args:
        u: as in `triton_step`, like all that follow.
        delta: see `u`.
        A: see `u`.
        B: see `u`.
        C: see `u`.
        D: see `u`.
        z: see `u`.
        delta_bias: see `u`.
        state: see `u`.
        softplus: see `u`.

    Returns:
        As `triton_step`.
    """
    from .triton_selective_step import step

    y = step(u, delta, A, B, C, D, z, delta_bias, state, softplus)
    mark_written(state)
    return y


@torch.library.custom_op(
    "amago_kernels::selective_scan_step_triton",
    mutates_args=("state",),
    schema="(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
    " Tensor(a!) state, bool softplus) -> Tensor",
)
def triton_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    softplus: bool,
) -> Tensor:
    """`selective_scan_step`.

    Args:
        u: `[B, D]`.
        delta: `[B, D]`.
        A: `[D, N]`.
        B: `[B, N]`.
        C: `[B, N]`.
        D: `[D]` or None.
        z: `[B, D]` or None.
        delta_bias: `[D]` or None.
        state: `[B, D, N]`, updated in place.
        softplus: apply softplus to the step sizes.

    Returns:
        `y` `[B, D]` in the dtype of `u`.
    """
    from .triton_selective_step import step

    return step(u, delta, A, B, C, D, z, delta_bias, state, softplus)


@triton_step.register_fake
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
    softplus: bool,
) -> Tensor:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)
