"""Attention backward in Triton: gradients of keys and values; blocks of keys pass over the queries that see them.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size; a block holds `M` queries or `N` keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tuning import config, tuned
from .triton_blocks import LOG2E, load_block, locate, queries_of_keys, slopes, step_of, store_block
from .triton_launch import KEY, UNSPECIALIZED


@triton.jit
def _pull_keys(
    grad_k,
    grad_v,
    key,
    value,
    q,
    grad,
    q_l,
    grad_l,
    lse,
    delta,
    column,
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
    BLOCK_M: tl.constexpr,
):
    """Adds what queries lo..hi contribute to the gradients of a block of keys and values; scores are `[N, M]`."""
    for first in range(lo, hi, BLOCK_M):
        index = first + tl.arange(0, BLOCK_M)
        row = index[None, :]
        query = load_block(q, first, q_l, L, E, HEAD, BLOCK_M, MASKED)
        slope = load_block(grad, first, grad_l, L, E, HEAD, BLOCK_M, MASKED)
        if MASKED:
            level = tl.load(lse + index, mask=index < L, other=0.0)[None, :]
            share = tl.load(delta + index, mask=index < L, other=0.0)[None, :]
        else:
            level = tl.load(lse + index)[None, :]
            share = tl.load(delta + index)[None, :]
        if WIDE:
            query = query.to(tl.float32)
            slope = slope.to(tl.float32)
        raw = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        pull = tl.dot(value, tl.trans(slope), input_precision=PRECISION)
        weights, scores = slopes(
            raw, pull, level, share, row, column, row, start, stop, scale, factor, window, sink, sink_bias, clip,
            CAUSAL, HAS_RESET, HAS_WINDOW, HAS_SINK, HAS_BIAS, HAS_CLIP, FOLD, MASKED,
        )  # fmt: skip
        grad_v = tl.dot(weights.to(slope.dtype), slope, grad_v, input_precision=PRECISION)
        grad_k = tl.dot(scores.to(query.dtype), query, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_kernel(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    starts,
    stops,
    grad_k,
    grad_v,
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
    """The gradients of keys and values."""
    blocks = tl.cdiv(L, BLOCK_N)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    b = pair // H
    h = pair % H
    first = (tl.program_id(0) % blocks) * BLOCK_N
    last = tl.minimum(first + BLOCK_N, L) - 1
    index = first + tl.arange(0, BLOCK_N)
    column = index[:, None]
    if HAS_RESET:
        starts += b * L
        stops += b * L
        earliest = tl.load(starts + first)
        latest = tl.load(starts + last)
        first_end = tl.load(stops + first)
        end = tl.load(stops + last)
        start = tl.load(starts + index, mask=index < L, other=0)[:, None]
        stop = tl.load(stops + index, mask=index < L, other=0)[:, None]
    else:
        earliest = first * 0
        latest = earliest
        first_end = L
        end = L
        start = earliest
        stop = L
    lo, inner_lo, inner_hi, hi, far = queries_of_keys(
        first, last, earliest, latest, first_end, end, window, sink, CAUSAL, HAS_WINDOW, HAS_SINK, HAS_BIAS, BLOCK_M
    )

    key = load_block(locate(k, b, h, k_b, k_h), first, step_of(k_l), L, E, HEAD, BLOCK_N, True)
    value = load_block(locate(v, b, h, v_b, v_h), first, step_of(v_l), L, E, HEAD, BLOCK_N, True)
    if WIDE:
        key = key.to(tl.float32)
        value = value.to(tl.float32)
    q_head = locate(q, b, h, q_b, q_h)
    grad_head = locate(grad, b, h, grad_b, grad_h)
    q_step = step_of(q_l)
    grad_step = step_of(grad_l)
    lse += pair * L
    delta += pair * L
    factor = LOG2E
    if FOLD:
        factor = scale * LOG2E
    total_k = tl.zeros([BLOCK_N, HEAD], tl.float32)
    total_v = tl.zeros([BLOCK_N, HEAD], tl.float32)
    for part in tl.static_range(4):
        # The left border, the inner blocks, the right border; then queries that see nothing but sinks among these keys,
        # which are not counted twice.
        limit = tl.minimum(stop, hi) if part < 3 else stop
        if part == 0:
            begin, finish = lo, tl.minimum(inner_lo, hi)
        elif part == 1:
            begin, finish = inner_lo, inner_hi
        elif part == 2:
            begin, finish = inner_hi, hi
        else:
            begin, finish = hi, far
        if part < 3 or (HAS_WINDOW and HAS_SINK):
            total_k, total_v = _pull_keys(
                total_k, total_v, key, value, q_head, grad_head, q_step, grad_step, lse, delta, column, start, limit,
                begin, finish, L, scale, factor, window, sink, sink_bias, clip, E, HEAD, CAUSAL, HAS_RESET,
                HAS_WINDOW, HAS_SINK, HAS_BIAS, HAS_CLIP, FOLD, part != 1, WIDE, PRECISION, BLOCK_M,
            )  # fmt: skip
    step = H * E
    offset = b * L * step + h * E
    store_block(grad_k + offset, first, step, total_k * scale, L, E, HEAD, BLOCK_N)
    store_block(grad_v + offset, first, step, total_v, L, E, HEAD, BLOCK_N)


key_kernels = {
    "half": tuned(
        [
            config(4, 3, BLOCK_M=32, BLOCK_N=64),
            config(4, 3, BLOCK_M=64, BLOCK_N=64),
            config(8, 3, BLOCK_M=64, BLOCK_N=128),
        ],
        key=KEY,
    )(_key_kernel),
    "long": tuned([config(8, 2, BLOCK_M=32, BLOCK_N=64), config(8, 2, BLOCK_M=64, BLOCK_N=64)], key=KEY)(_key_kernel),
    "single": tuned([config(4, 1, BLOCK_M=32, BLOCK_N=32), config(8, 2, BLOCK_M=32, BLOCK_N=32)], key=KEY)(_key_kernel),
    "wide": tuned([config(8, 1, BLOCK_M=32, BLOCK_N=16), config(4, 1, BLOCK_M=16, BLOCK_N=16)], key=KEY)(_key_kernel),
}
