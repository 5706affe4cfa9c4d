"""The selective scan on the CPU, compiled by Numba.

A piece of work is a lane and some of its parts, a part being up to `W` channels. It goes through the window chunk by
chunk, and through a chunk state by state: what belongs to one state of a chunk stays in the first cache. Innermost are
the channels of a part, which fill vectors.

Dimensions: `B` batch, `L` timesteps, `D` channels, `N` states per channel, `K` chunks of `T` timesteps, `G` pieces of a
lane, `W` channels of a part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..numba_jit import array, in_threads, jit
from .numba_selective_rows import (
    CHANNEL_COLUMNS,
    DELTA,
    GRAD_BIAS,
    GRAD_RATE,
    GRAD_SKIP,
    GRAD_STATE,
    GRAD_Y,
    STATE,
    STATE_COLUMNS,
    TIMESTEP_COLUMNS,
    WIDTH,
    U,
    Y,
    Z,
    advance,
    begin,
    clear,
    cut,
    differentiate,
    filled_up,
    finish,
    finish_gradients,
    prepare,
    prepare_gradients,
    put,
    repeat,
    take,
)
from .selective_ops import NUMBA_CHUNK

# As many pieces at least where lanes are few. They depend on the shape alone: sums over channels come out alike with
# any number of threads.
_PIECES = 8


def forward(
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
    y: Tensor,
    last: Tensor,
    starts: Tensor,
) -> None:
    """Fills what the forward pass hands out.

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
        y: filled, `[B, L, D]`.
        last: filled with the last state, `[B, D, N]`.
        starts: filled with the state before each chunk, `[B, K, N, D]`; nothing is kept where it has no numbers.
    """
    before = torch.zeros_like(last) if state is None else state
    inputs, options = _given((u, delta, A, B, C, before), D, z, delta_bias, reset, softplus)
    outputs = [array(x) for x in (y, last, starts)]
    pieces = _pieces(u)

    def run(first: int, end: int) -> None:
        _forward(first, end, pieces, *_scratch(A), *inputs, *options, *outputs)

    in_threads(run, u.shape[0] * pieces, u.numel() * A.shape[1])


def backward(
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
    reset: Tensor | None,
    softplus: bool,
    grads: tuple[Tensor, ...],
) -> None:
    """Fills the gradients.

    Args:
        grad_y: `[B, L, D]` or None.
        grad_last: `[B, D, N]` or None.
        starts: `[B, K, N, D]`.
        u: `[B, L, D]`.
        delta: `[B, L, D]`.
        A: `[D, N]`.
        B: `[B, L, N]`.
        C: `[B, L, N]`.
        D: `[D]` or None.
        z: `[B, L, D]` or None.
        delta_bias: `[D]` or None.
        reset: `[B, L]` bool or None.
        softplus: whether softplus was applied to the step sizes.
        grads: filled, those of `u`, `delta`, `A`, `B`, `C`, `D`, `z`, `delta_bias` and the initial state; without
            numbers for what is None.
    """
    grad_u, grad_delta, grad_a, grad_b, grad_c, grad_skip, grad_z, grad_bias, grad_state = grads
    of_y = torch.zeros_like(u) if grad_y is None else grad_y
    of_last = u.new_zeros(u.shape[0], *A.shape) if grad_last is None else grad_last
    inputs, options = _given((of_y, of_last, starts, u, delta, A, B, C), D, z, delta_bias, reset, softplus)
    # Kernels write all gradients; what nobody asked for goes to memory of its own.
    of_z = u.new_empty(1, 1, 1) if z is None else grad_z
    of_state = torch.empty_like(of_last) if grad_state.numel() == 0 else grad_state
    outputs = [array(x) for x in (grad_u, grad_delta, of_z, of_state)]
    pieces, lanes = _pieces(u), u.shape[0]
    # One per lane, or per piece of a lane, to be added up in an order that does not depend on threads.
    partial = [array(u.new_empty(lanes, *shape)) for shape in (A.shape, A.shape[:1], A.shape[:1])]
    maps = [array(u.new_empty(pieces, *B.shape)) for _ in range(2)]
    for parts in maps:
        parts.fill(0.0)
    partial += maps

    def run(first: int, end: int) -> None:
        _backward(first, end, pieces, *_scratch(A), *inputs, *options, *outputs, *partial)

    in_threads(run, lanes * pieces, u.numel() * A.shape[1])
    # By NumPy: threads of PyTorch stay awake for a while, in the way of those of the next kernel.
    for grad, parts in zip((grad_a, grad_skip, grad_bias, grad_b, grad_c), partial, strict=True):
        if grad.numel() > 0:
            np.sum(parts, axis=0, out=array(grad))


def _given(
    inputs: tuple[Tensor, ...],
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    reset: Tensor | None,
    softplus: bool,
) -> tuple[list[np.ndarray[Any, Any]], tuple[Any, ...]]:
    """Inputs as arrays; what may be None as arrays that exist in any case, and whether they mean something."""
    first = inputs[0]
    channels = [first.new_zeros(first.shape[2]) if x is None else x for x in (D, bias)]
    z_or_none = first.new_zeros(1, 1, 1) if z is None else z
    reset_or_none = torch.zeros(1, 1, dtype=torch.bool) if reset is None else reset
    options = [array(x.contiguous()) for x in (*channels, z_or_none, reset_or_none)]
    flags = (D is not None, z is not None, reset is not None, softplus)
    return [array(x.contiguous()) for x in inputs], (*options, *flags)


def _pieces(u: Tensor) -> int:
    """`G`."""
    parts = (u.shape[2] + WIDTH - 1) // WIDTH
    return max(1, min(parts, _PIECES // max(1, u.shape[0])))


def _scratch(A: Tensor) -> list[np.ndarray[Any, Any]]:
    """Rows of timesteps, rows of states, and the row of channels."""
    shapes = ((NUMBA_CHUNK, TIMESTEP_COLUMNS), (A.shape[1], STATE_COLUMNS), (CHANNEL_COLUMNS,))
    return [array(A.new_empty(shape)) for shape in shapes]


@jit(allocates=False)
def _forward(
    first, end, pieces, rows, states, channel, u, delta, A, B, C, state,
    skip, bias, z, reset, skips, gated, resets, soft, y, last, starts,
):  # fmt: skip
    """The pieces from `first` to `end`; flags say what of `skip`, `z` and `reset` means something."""
    parts, width = cut(u.shape[2])
    for piece in range(first, end):
        lane, group = piece // pieces, piece % pieces
        for part in range(group * parts // pieces, (group + 1) * parts // pieces):
            left = part * width
            right = min(left + width, u.shape[2])
            given = A[left:right], skip[left:right], bias[left:right]
            begin(states, channel, *given, state[lane, left:right], STATE)
            _forward_part(
                left, right, rows, states, channel, u[lane], delta[lane], B[lane], C[lane], z[lane % z.shape[0]],
                reset[lane % reset.shape[0]], skips, gated, resets, soft, y[lane], starts[lane],
            )  # fmt: skip
            for n in range(A.shape[1]):
                take(states[n], STATE, last[lane, left:right, n])


@jit(allocates=False)
def _forward_part(left, right, rows, states, channel, u, delta, B, C, z, reset, skips, gated, resets, soft, y, starts):
    """A part of a lane, forwards; `starts` may be empty."""
    chunk, length = rows.shape[0], u.shape[0]
    vectors = filled_up(right - left)
    for start in range(0, length, chunk):
        steps = min(chunk, length - start)
        for t in range(steps):
            put(u[start + t, left:right], rows[t], U, vectors)
            put(delta[start + t, left:right], rows[t], DELTA, vectors)
            if gated:
                put(z[start + t, left:right], rows[t], Z, vectors)
            prepare(rows[t], channel, vectors, soft)
        for n in range(states.shape[0]):
            if starts.shape[0] > 0:
                take(states[n], STATE, starts[start // chunk, n, left:right])
            for t in range(steps):
                if resets and reset[start + t]:
                    clear(states[n], STATE, vectors)
                advance(rows[t], states[n], vectors, B[start + t, n], C[start + t, n])
        for t in range(steps):
            finish(rows[t], channel, vectors, skips, gated)
            take(rows[t], Y, y[start + t, left:right])


@jit(allocates=False)
def _backward(
    first, end, pieces, rows, states, channel, grad_y, grad_last, starts, u, delta, A, B, C,
    skip, bias, z, reset, skips, gated, resets, soft,
    grad_u, grad_delta, grad_z, grad_state, grad_rates, grad_skip, grad_bias, grad_b, grad_c,
):  # fmt: skip
    """The pieces from `first` to `end`; gradients of what lanes share come out one per lane."""
    parts, width = cut(u.shape[2])
    for piece in range(first, end):
        lane, group = piece // pieces, piece % pieces
        for part in range(group * parts // pieces, (group + 1) * parts // pieces):
            left = part * width
            right = min(left + width, u.shape[2])
            given = A[left:right], skip[left:right], bias[left:right]
            begin(states, channel, *given, grad_last[lane, left:right], GRAD_STATE)
            _backward_part(
                left, right, rows, states, channel, grad_y[lane], starts[lane], u[lane], delta[lane], B[lane], C[lane],
                z[lane % z.shape[0]], reset[lane % reset.shape[0]], gated, resets, soft,
                grad_u[lane], grad_delta[lane], grad_z[lane % z.shape[0]], grad_b[group, lane], grad_c[group, lane],
            )  # fmt: skip
            take(channel, GRAD_SKIP, grad_skip[lane, left:right])
            take(channel, GRAD_BIAS, grad_bias[lane, left:right])
            for n in range(A.shape[1]):
                take(states[n], GRAD_RATE, grad_rates[lane, left:right, n])
                take(states[n], GRAD_STATE, grad_state[lane, left:right, n])


@jit(allocates=False)
def _backward_part(
    left, right, rows, states, channel, grad_y, starts, u, delta, B, C, z, reset, gated, resets, soft,
    grad_u, grad_delta, grad_z, grad_b, grad_c,
):  # fmt: skip
    """A part of a lane, backwards: chunk by chunk the states once more, then their gradients."""
    chunk, length = rows.shape[0], u.shape[0]
    vectors = filled_up(right - left)
    for k in range(starts.shape[0] - 1, -1, -1):
        start = k * chunk
        steps = min(chunk, length - start)
        for t in range(steps):
            put(u[start + t, left:right], rows[t], U, vectors)
            put(delta[start + t, left:right], rows[t], DELTA, vectors)
            put(grad_y[start + t, left:right], rows[t], GRAD_Y, vectors)
            if gated:
                put(z[start + t, left:right], rows[t], Z, vectors)
            prepare(rows[t], channel, vectors, soft)
            prepare_gradients(rows[t], vectors, gated)
        for n in range(states.shape[0]):
            put(starts[k, n, left:right], states[n], STATE, vectors)
            for t in range(steps):
                if resets and reset[start + t]:
                    clear(states[n], STATE, vectors)
                grad_c[start + t, n] += repeat(rows[t], states[n], vectors, B[start + t, n], C[start + t, n])
            for t in range(steps - 1, -1, -1):
                grad_b[start + t, n] += differentiate(rows[t], states[n], vectors, B[start + t, n], C[start + t, n])
                if resets and reset[start + t]:
                    clear(states[n], GRAD_STATE, vectors)
        for t in range(steps):
            finish_gradients(rows[t], channel, vectors, soft, gated)
            take(rows[t], U, grad_u[start + t, left:right])
            take(rows[t], DELTA, grad_delta[start + t, left:right])
            if gated:
                take(rows[t], Z, grad_z[start + t, left:right])
