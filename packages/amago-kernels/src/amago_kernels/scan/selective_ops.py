"""The selective scan by compiled kernels as operators: what they allocate, and how the scan is differentiated.

The kernels are Triton's, or Numba's on the CPU; nothing here imports either before it is called.

Dimensions: `B` batch, `L` timesteps, `D` channels, `N` states per channel, `K` chunks of timesteps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..inputs import accumulation_dtype, drop_idle, mark_written

# Timesteps from one state that the forward pass keeps to the next, by Triton and by Numba.
CHUNK = 64
NUMBA_CHUNK = 32

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? state,"
    " Tensor? reset, bool softplus, bool by_numba"
)


def outputs(u: Tensor, A: Tensor, by_numba: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what the forward pass gives.

    Args:
        u: `[B, L, D]`.
        A: `[D, N]`.
        by_numba: whose kernels it is for.
        keep: whether there will be a backward pass.

    Returns:
        `y` `[B, L, D]`, the last state `[B, D, N]`, and the state before each chunk `[B, K, N, D]` (empty without
        `keep`).
    """
    batch, length, channels = u.shape
    chunk = NUMBA_CHUNK if by_numba else CHUNK
    chunks = (length + chunk - 1) // chunk if keep else 0
    last, starts = (
        torch.empty(shape, dtype=accumulation_dtype(u), device=u.device)
        for shape in ((batch, channels, A.shape[1]), (batch, chunks, A.shape[1], channels))
    )
    return u.new_empty(u.shape), last, starts


@torch.library.custom_op(
    "amago_kernels::selective_scan",
    mutates_args=(),
    schema=f"({_INPUTS}, bool keep) -> (Tensor, Tensor, Tensor)",
)
def compiled_scan(
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
    by_numba: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`selective_scan` from its inputs as they are; for Numba, all float32 or all float64.

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
        by_numba: take Numba's kernels, else Triton's.
        keep: whether there will be a backward pass.

    Returns:
        As `outputs`.
    """
    filled = outputs(u, A, by_numba, keep)
    if u.numel() == 0:
        return filled
    inputs = (u, delta, A, B, C, D, z, delta_bias, state)
    if by_numba:
        from . import numba_selective

        numba_selective.forward(*inputs, drop_idle(reset), softplus, *filled)
    else:
        from . import triton_selective

        triton_selective.forward(*inputs, reset, softplus, *filled)
    return filled


@compiled_scan.register_fake
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
    by_numba: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return outputs(u, A, by_numba, keep)


@torch.library.custom_op(
    "amago_kernels::selective_scan_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_y, Tensor? grad_last, Tensor starts, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
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
    by_numba: bool,
) -> tuple[Tensor, ...]:
    """The gradients of everything from `u` to `state`; without numbers for what is None."""
    grads = _gradients(u, delta, A, B, C, D, z, delta_bias, state)
    if u.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    if by_numba:
        from . import numba_selective

        options = (D, z, delta_bias, drop_idle(reset), softplus)
        numba_selective.backward(grad_y, grad_last, starts, u, delta, A, B, C, *options, grads)
        return grads
    from .triton_selective_backward import backward

    inputs = (u, delta, A, B, C, D, z, delta_bias, reset, softplus)
    *found, grad_state = backward(grad_y, grad_last, starts, *inputs, from_state=state is not None)
    found.append(None if state is None or grad_state is None else grad_state.to(state.dtype))
    return tuple(u.new_empty(0) if grad is None else grad for grad in found)


@_backward.register_fake
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
    by_numba: bool,
) -> tuple[Tensor, ...]:
    return _gradients(u, delta, A, B, C, D, z, delta_bias, state)


def _gradients(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Memory for one gradient per input, without numbers where there is none."""
    first = inputs[0]
    assert first is not None
    return tuple(first.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, ctx.by_numba, ctx.keep = inputs
    ctx.save_for_backward(output[2], *tensors)
    # What nobody differentiates needs no zeros.
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    starts, *tensors = ctx.saved_tensors
    if grad_y is None and grad_last is None:
        return (None,) * 13
    if not ctx.keep:
        # An exported program has decided before anyone asked for gradients.
        starts = compiled_scan(*tensors, ctx.softplus, ctx.by_numba, True)[2]
    *wanted, reset = tensors
    if not ctx.needs_input_grad[8]:
        wanted[8] = None
    grads = _backward(grad_y, grad_last, starts, *wanted, reset, ctx.softplus, ctx.by_numba)
    kept = [grad if x is not None else None for x, grad in zip(wanted, grads, strict=True)]
    return *kept, None, None, None, None


compiled_scan.register_autograd(_differentiate, setup_context=_save)


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
