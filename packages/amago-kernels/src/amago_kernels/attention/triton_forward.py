"""Attention forward in Triton: blocks of queries pass over the keys they need, with a running softmax.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size; a block holds `M` queries or `N` keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import config, on_device, tuned
from .triton_blocks import (
    LOG2E,
    biased,
    clamped,
    keys_of_queries,
    load_block,
    locate,
    step_of,
    store_block,
    visible,
)
from .triton_launch import (
    KEY,
    UNSPECIALIZED,
    built_variants,
    kind_of,
    options_of,
    rows_of,
    segment_bounds,
    segments_kernel,
    strides_of,
)

if TYPE_CHECKING:
    from ..builds import Build


@triton.jit
def _attend(
    total,
    norm,
    peak,
    query,
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
    """Adds keys lo..hi to the running sums; without MASKED every query sees all of them, and none is biased."""
    for first in range(lo, hi, BLOCK_N):
        column = (first + tl.arange(0, BLOCK_N))[None, :]
        key = load_block(k, first, k_l, L, E, HEAD, BLOCK_N, MASKED)
        if WIDE:
            key = key.to(tl.float32)
        raw = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores = biased(raw, column < start + sink, scale, sink_bias, FOLD, HAS_BIAS and MASKED)
        scores = clamped(scores, clip, HAS_CLIP)
        if MASKED:
            keep = visible(row, column, column, start, stop, window, sink, CAUSAL, HAS_RESET, HAS_WINDOW, HAS_SINK)
            scores = tl.where(keep, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1) * factor)
        level = higher
        if MASKED:
            # A query may see no key of the first blocks.
            level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * factor - level[:, None])
        shrink = tl.exp2(peak - level)
        norm = norm * shrink + tl.sum(weights, axis=1)
        value = load_block(v, first, v_l, L, E, HEAD, BLOCK_N, MASKED)
        if WIDE:
            value = value.to(tl.float32)
        total = tl.dot(weights.to(value.dtype), value, total * shrink[:, None], input_precision=PRECISION)
        peak = higher
    return total, norm, peak


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    starts,
    stops,
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
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

    k_head = locate(k, b, h, k_b, k_h)
    v_head = locate(v, b, h, v_b, v_h)
    k_step = step_of(k_l)
    v_step = step_of(v_l)
    query = load_block(locate(q, b, h, q_b, q_h), first, step_of(q_l), L, E, HEAD, BLOCK_M, True)
    if WIDE:
        query = query.to(tl.float32)
    factor = LOG2E
    if FOLD:
        factor = scale * LOG2E
    total = tl.zeros([BLOCK_M, HEAD], tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
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
            total, norm, peak = _attend(
                total, norm, peak, query, k_head, v_head, k_step, v_step, row, start, limit, begin, finish, L,
                scale, factor, window, sink, sink_bias, clip, E, HEAD, CAUSAL, HAS_RESET, HAS_WINDOW, HAS_SINK,
                HAS_BIAS, HAS_CLIP, FOLD, part != 2, WIDE, PRECISION, BLOCK_N,
            )  # fmt: skip

    # Rows beyond the end have seen nothing.
    norm = tl.where(index < L, norm, 1.0)
    step = H * E
    store_block(out + b * L * step + h * E, first, step, total / norm[:, None], L, E, HEAD, BLOCK_M)
    tl.store(lse + pair * L + index, peak + tl.log2(norm), mask=index < L)


forward_kernels = {
    "half": tuned(
        [
            config(4, 3, BLOCK_M=64, BLOCK_N=64),
            config(4, 3, BLOCK_M=128, BLOCK_N=64),
            config(8, 3, BLOCK_M=128, BLOCK_N=128),
        ],
        key=KEY,
    )(_forward_kernel),
    "long": tuned([config(8, 2, BLOCK_M=128, BLOCK_N=64), config(4, 2, BLOCK_M=64, BLOCK_N=64)], key=KEY)(
        _forward_kernel
    ),
    "single": tuned([config(4, 2, BLOCK_M=32, BLOCK_N=32), config(8, 2, BLOCK_M=64, BLOCK_N=32)], key=KEY)(
        _forward_kernel
    ),
    "wide": tuned([config(4, 2, BLOCK_M=16, BLOCK_N=16), config(4, 2, BLOCK_M=32, BLOCK_N=32)], key=KEY)(
        _forward_kernel
    ),
}


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reset: Tensor | None,
    causal: bool,
    window: int | None,
    sink: int,
    sink_bias: float,
    logit_clip: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward kernel.

    Args:
        q: `[B, L, H, E]`.
        k: like `q`.
        v: like `q`.
        reset: as in `attention`.
        causal: as in `attention`.
        window: as in `attention`.
        sink: as in `attention`.
        sink_bias: as in `attention`.
        logit_clip: as in `attention`.
        scale: as in `attention`.

    Returns:
        Output `[B, L, H, E]`; the binary logarithm of each softmax's denominator, `[B, H, L]` float32; bounds of the
        segments, `[2, B, L]` int32, or `[0, B, L]` without resets.
    """
    batch, length, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    if reset is None:
        bounds = torch.empty(0, batch, length, dtype=torch.int32, device=q.device)
        starts = stops = None
    else:
        bounds = segment_bounds(reset)
        starts, stops = bounds[0], bounds[1]
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    strides = [step for x in (q, k, v) for step in strides_of(x)]
    options = options_of(q, reset is not None, causal, window, sink, sink_bias, logit_clip, scale)
    with on_device(q):
        forward_kernels[kind_of(q)][lambda meta: (triton.cdiv(length, meta["BLOCK_M"]) * batch * heads,)](
            q, k, v, out, lse, starts, stops, *strides, **options
        )
    return out, lse, bounds


def builds() -> list[Build]:
    """What `amago_kernels.builds` compiles."""
    from ..builds import Build

    lanes = {"reset": "*u8", "starts": "*i32", "stops": "*i32", "reset_b": 1024, "reset_l": 1, "L": 1024}
    result = [Build("attention segments", segments_kernel, lanes)]
    for name, q, arguments in built_variants(("q", "k", "v")):
        half = "*fp32" if q.dtype == torch.float32 else "*bf16"
        arguments |= {**dict.fromkeys(("q", "k", "v", "out"), half), "lse": "*fp32"}
        result.append(Build(f"attention forward {name}", forward_kernels[kind_of(q)], arguments))
    return result
