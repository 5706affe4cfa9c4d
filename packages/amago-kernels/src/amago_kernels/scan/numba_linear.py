"""Linear recurrences on the CPU in one walk through memory, compiled by Numba.

Dimensions: `B` batch, `L` timesteps, `D` channels; `W` numbers of a row, `D` or, for pairs, twice as many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..numba_jit import array, in_threads, jit

# Timesteps that the backward pass walks twice, so that the second walk finds them in the cache and runs upwards:
# processors fetch ahead of many streams only in that direction.
_CHUNK = 16
_Array = np.ndarray[Any, Any]


def scan(a: Tensor, b: Tensor, state: Tensor, reset: Tensor | None, pairs: bool, out: Tensor) -> None:
    """Writes all states.

    Args:
        a: `[B, L, D]`, or `[B, L, D, 2]` with `pairs`; copied if neither contiguous nor repeated along `B` or `L`.
        b: like `a`, and of its dtype; copied if it is not contiguous.
        state: `[B, D]`, or `[B, D, 2]`.
        reset: `[B, L]` bool or None.
        pairs: the last axis holds (real, imaginary).
        out: like `b`, contiguous.
    """
    if out.numel() == 0:
        return
    kernel, factors = _scan_pairs if pairs else _scan, _factors(a, pairs)
    terms, before, states, resets = _rows(b, pairs), _rows(state, pairs), _rows(out, pairs), _resets(reset)

    def run(first: int, end: int) -> None:
        kernel(*factors, terms, before, resets, states, first, end)

    in_threads(run, out.shape[0], 3 * out.numel())


def scan_backward(
    grad: Tensor, a: Tensor, h: Tensor, state: Tensor, reset: Tensor | None, pairs: bool, out: tuple[Tensor, ...]
) -> None:
    """Writes the gradients of factors, terms and the state before the first timestep.

    Args:
        grad: that of the states, like `h`.
        a: as in `scan`.
        h: what `scan` wrote.
        state: as in `scan`.
        reset: as in `scan`.
        pairs: as in `scan`.
        out: like `h`, `h` and `state`, contiguous; the last holds what the state after the last timestep gets.
    """
    if h.numel() == 0:
        return
    kernel, factors = _backward_pairs if pairs else _backward, _factors(a, pairs)
    upstream, before, states, resets = _rows(grad, pairs), _rows(state, pairs), _rows(h, pairs), _resets(reset)
    written = [_rows(x, pairs) for x in out]

    def run(first: int, end: int) -> None:
        kernel(*factors, upstream, before, resets, states, *written, first, end)

    in_threads(run, h.shape[0], 5 * h.numel())


def _rows(x: Tensor, pairs: bool) -> _Array:
    """Contiguous memory, pairs as two numbers of a row."""
    return array((x.flatten(-2) if pairs else x).contiguous())


def _factors(a: Tensor, pairs: bool) -> tuple[_Array, int, int]:
    """Rows `[1 or B, 1 or L, W]`, and by how much one moves with the lane and with the timestep: 0 or 1."""
    lane, step = (int(a.stride(axis) != 0) for axis in (0, 1))
    return _rows(a[: None if lane else 1, : None if step else 1], pairs), lane, step


def _resets(reset: Tensor | None) -> _Array:
    """One flag per timestep, or none at all."""
    return array(torch.zeros(0, 0, dtype=torch.bool) if reset is None else reset.contiguous())


@jit(allocates=False)
def _scan(
    a: _Array,
    a_lane: int,
    a_step: int,
    b: _Array,
    before: _Array,
    reset: _Array,
    h: _Array,
    first: int,
    end: int,
) -> None:
    length, width = h.shape[1], h.shape[2]
    for lane in range(first, end):
        for t in range(length):
            factor, term, state = a[lane * a_lane, t * a_step], b[lane, t], h[lane, t]
            previous = h[lane, t - 1] if t > 0 else before[lane]
            if reset.size > 0 and reset[lane, t]:
                for d in range(width):
                    state[d] = term[d]
            else:
                for d in range(width):
                    state[d] = factor[d] * previous[d] + term[d]


@jit(allocates=False)
def _scan_pairs(
    a: _Array,
    a_lane: int,
    a_step: int,
    b: _Array,
    before: _Array,
    reset: _Array,
    h: _Array,
    first: int,
    end: int,
) -> None:
    length, width = h.shape[1], h.shape[2]
    for lane in range(first, end):
        for t in range(length):
            factor, term, state = a[lane * a_lane, t * a_step], b[lane, t], h[lane, t]
            previous = h[lane, t - 1] if t > 0 else before[lane]
            if reset.size > 0 and reset[lane, t]:
                for d in range(width):
                    state[d] = term[d]
            else:
                for d in range(width // 2):
                    real, imaginary = 2 * d, 2 * d + 1
                    x, y = previous[real], previous[imaginary]
                    state[real] = factor[real] * x - factor[imaginary] * y + term[real]
                    state[imaginary] = factor[real] * y + factor[imaginary] * x + term[imaginary]


@jit(allocates=False)
def _backward(
    a: _Array,
    a_lane: int,
    a_step: int,
    grad: _Array,
    before: _Array,
    reset: _Array,
    h: _Array,
    grad_a: _Array,
    grad_b: _Array,
    carried: _Array,
    first: int,
    end: int,
) -> None:
    length, width = h.shape[1], h.shape[2]
    for lane in range(first, end):
        for start in range((length - 1) // _CHUNK * _CHUNK, -1, -_CHUNK):
            stop = min(start + _CHUNK, length)
            for t in range(stop - 1, start - 1, -1):
                factor, upstream, total = a[lane * a_lane, t * a_step], grad[lane, t], grad_b[lane, t]
                carry = carried[lane]
                if reset.size > 0 and reset[lane, t]:
                    for d in range(width):
                        total[d] = upstream[d] + carry[d]
                        carry[d] = 0.0
                else:
                    for d in range(width):
                        x = upstream[d] + carry[d]
                        total[d] = x
                        carry[d] = factor[d] * x
            for t in range(start, stop):
                previous = h[lane, t - 1] if t > 0 else before[lane]
                total, of_factor = grad_b[lane, t], grad_a[lane, t]
                if reset.size > 0 and reset[lane, t]:
                    for d in range(width):
                        of_factor[d] = 0.0
                else:
                    for d in range(width):
                        of_factor[d] = total[d] * previous[d]


@jit(allocates=False)
def _backward_pairs(
    a: _Array,
    a_lane: int,
    a_step: int,
    grad: _Array,
    before: _Array,
    reset: _Array,
    h: _Array,
    grad_a: _Array,
    grad_b: _Array,
    carried: _Array,
    first: int,
    end: int,
) -> None:
    length, width = h.shape[1], h.shape[2]
    for lane in range(first, end):
        for start in range((length - 1) // _CHUNK * _CHUNK, -1, -_CHUNK):
            stop = min(start + _CHUNK, length)
            for t in range(stop - 1, start - 1, -1):
                factor, upstream, total = a[lane * a_lane, t * a_step], grad[lane, t], grad_b[lane, t]
                carry = carried[lane]
                if reset.size > 0 and reset[lane, t]:
                    for d in range(width):
                        total[d] = upstream[d] + carry[d]
                        carry[d] = 0.0
                else:
                    # The gradient of a product is the other factor's conjugate.
                    for d in range(width // 2):
                        real, imaginary = 2 * d, 2 * d + 1
                        x, y = upstream[real] + carry[real], upstream[imaginary] + carry[imaginary]
                        total[real], total[imaginary] = x, y
                        carry[real] = factor[real] * x + factor[imaginary] * y
                        carry[imaginary] = factor[real] * y - factor[imaginary] * x
            for t in range(start, stop):
                previous = h[lane, t - 1] if t > 0 else before[lane]
                total, of_factor = grad_b[lane, t], grad_a[lane, t]
                if reset.size > 0 and reset[lane, t]:
                    for d in range(width):
                        of_factor[d] = 0.0
                else:
                    for d in range(width // 2):
                        real, imaginary = 2 * d, 2 * d + 1
                        x, y = total[real], total[imaginary]
                        of_factor[real] = previous[real] * x + previous[imaginary] * y
                        of_factor[imaginary] = previous[real] * y - previous[imaginary] * x
