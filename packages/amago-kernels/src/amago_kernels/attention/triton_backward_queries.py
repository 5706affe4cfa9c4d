"""Attention backward in Triton: the gradient of the queries; blocks of queries pass over the keys they need.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size; a block holds `M` queries or `N` keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tuning import config, tuned
from .triton_blocks import LOG2E, keys_of_queries, load_block, locate, slopes, step_of, store_block
from .triton_launch import KEY, UNSPECIALIZED


@triton.jit
def _pull_queries(
    grad_q,
    query,
    grad,
    lse,
    delta,
    k,
    v,
    k_l,
    v_l,
    row,
    start,
    stop,
    lo,
    hi,
    L,
    scale,
    factor,
    window,
    sink,
    sink_bias,
    clip,
    E: tl.constexpr,
    HEAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds what keys lo..hi contribute to the gradient of a block of queries."""
    for first in range(lo, hi, BLOCK_N):
        column = (first + tl.arange(0, BLOCK_N))[None, :]
        key = load_block(k, first, k_l, L, E, HEAD, BLOCK_N, MASKED)
        value = load_block(v, first, v_l, L, E, HEAD, BLOCK_N, MASKED)
        if WIDE:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        raw = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        slope = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        _, scores = slopes(
            raw, slope, lse, delta, row, column, column, start, stop, scale, factor, window, sink, sink_bias, clip,
            CAUSAL, HAS_RESET, HAS_WINDOW, HAS_SINK, HAS_BIAS, HAS_CLIP, FOLD, MASKED,
        )  # fmt: skip
        grad_q = tl.dot(scores.to(key.dtype), key, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _query_kernel(
    q,
    k,
    v,
    out,
    grad,
    lse,
    delta,
    starts,
    stops,
    grad_q,
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    grad_b,
    grad_l,
    grad_h,
    L,
    H,
    scale,
    window,
    sink,
    sink_bias,
    clip,
    bucket,
    E: tl.constexpr,
    HEAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    FOLD: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of the queries; also writes `delta`, the rowwise product of output and its gradient."""
    blocks = tl.cdiv(L, BLOCK_M)
    block = tl.program_id(0) % blocks
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    if CAUSAL:
        # The last queries see the most keys: they begin first.
        block = blocks - 1 - block
    b = pair // H
    h = pair % H
    first = block * BLOCK_M
    last = tl.minimum(first + BLOCK_M, L) - 1
    index = first + tl.arange(0, BLOCK_M)
    row = index[:, None]
    if HAS_RESET:
        starts += b * L
        stops += b * L
        earliest = tl.load(starts + first)
        latest = tl.load(starts + last)
        end = tl.load(stops + last)
        start = tl.load(starts + index, mask=index < L, other=0)[:, None]
        stop = tl.load(stops + index, mask=index < L, other=0)[:, None]
    else:
        earliest = first * 0
        latest = earliest
        end = L
        start = earliest
        stop = L
    far, lo, inner_lo, inner_hi, hi = keys_of_queries(
        first, last, earliest, latest, end, window, sink, CAUSAL, HAS_WINDOW, HAS_SINK, HAS_BIAS, BLOCK_N
    )

    step = H * E
    offset = b * L * step + h * E
    query = load_block(locate(q, b, h, q_b, q_h), first, step_of(q_l), L, E, HEAD, BLOCK_M, True)
    slope = load_block(locate(grad, b, h, grad_b, grad_h), first, step_of(grad_l), L, E, HEAD, BLOCK_M, True)
    result = load_block(out + offset, first, step, L, E, HEAD, BLOCK_M, True)
    share = tl.sum(result.to(tl.float32) * slope.to(tl.float32), axis=1)
    tl.store(delta + pair * L + index, share, mask=index < L)
    level = tl.load(lse + pair * L + index, mask=index < L, other=0.0)[:, None]
    share = share[:, None]
    if WIDE:
        query = query.to(tl.float32)
        slope = slope.to(tl.float32)
    k_head = locate(k, b, h, k_b, k_h)
    v_head = locate(v, b, h, v_b, v_h)
    k_step = step_of(k_l)
    v_step = step_of(v_l)
    factor = LOG2E
    if FOLD:
        factor = scale * LOG2E
    total = tl.zeros([BLOCK_M, HEAD], tl.float32)
    for part in tl.static_range(4):
        # The sinks that the window cuts off, the left border, the inner blocks, the right border.
        limit = stop
        if part == 0:
            begin, finish = earliest, far
            # Keys from `lo` on are not counted twice.
            limit = tl.minimum(stop, far)
        elif part == 1:
            begin, finish = lo, tl.minimum(inner_lo, hi)
        elif part == 2:
            begin, finish = inner_lo, inner_hi
        else:
            begin, finish = inner_hi, hi
        if (part >= 2 or (HAS_WINDOW and HAS_SINK)) or (part == 1 and (HAS_WINDOW or (HAS_RESET or HAS_BIAS))):
            total = _pull_queries(
                total, query, slope, level, share, k_head, v_head, k_step, v_step, row, start, limit, begin, finish, L,
                scale, factor, window, sink, sink_bias, clip, E, HEAD, CAUSAL, HAS_RESET, HAS_WINDOW, HAS_SINK,
                HAS_BIAS, HAS_CLIP, FOLD, part != 2, WIDE, PRECISION, BLOCK_N,
            )  # fmt: skip
    store_block(grad_q + offset, first, step, total * scale, L, E, HEAD, BLOCK_M)


query_kernels = {
    "half": tuned(
        [
            config(4, 3, BLOCK_M=64, BLOCK_N=32),
            config(4, 3, BLOCK_M=64, BLOCK_N=64),
            config(8, 3, BLOCK_M=128, BLOCK_N=64),
        ],
        key=KEY,
    )(_query_kernel),
    "long": tuned([config(4, 2, BLOCK_M=64, BLOCK_N=32), config(8, 2, BLOCK_M=128, BLOCK_N=64)], key=KEY)(
        _query_kernel
    ),
    "single": tuned([config(8, 2, BLOCK_M=32, BLOCK_N=32), config(4, 2, BLOCK_M=32, BLOCK_N=16)], key=KEY)(
        _query_kernel
    ),
    "wide": tuned([config(8, 2, BLOCK_M=32, BLOCK_N=16), config(4, 2, BLOCK_M=16, BLOCK_N=16)], key=KEY)(_query_kernel),
}
