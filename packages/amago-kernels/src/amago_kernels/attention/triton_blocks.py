"""What the Triton kernels of attention share: which keys a block of queries needs, masks, scores, loads.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size; a block holds `M` queries or `N` keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(base, first, stride, BLOCK: tl.constexpr, HEAD: tl.constexpr):
    """Addresses `[BLOCK, HEAD]`: what lies in front may be far, the rows of a block are not."""
    start = base + first * stride.to(tl.int64)
    return start + (tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, HEAD)[None, :])


@triton.jit
def load_block(base, first, stride, L, E: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr):
    """`[BLOCK, HEAD]`: rows from `first` on, zeros beyond `E`; with CHECKED rows beyond `L` are zeros too."""
    pointers = _rows(base, first, stride, BLOCK, HEAD)
    row = (first + tl.arange(0, BLOCK))[:, None]
    channel = tl.arange(0, HEAD)[None, :]
    if CHECKED:
        block = tl.load(pointers, mask=(row < L) & (channel < E), other=0.0)
    elif E != HEAD:
        block = tl.load(pointers, mask=channel < E, other=0.0)
    else:
        block = tl.load(pointers)
    return block


@triton.jit
def store_block(base, first, stride, block, L, E: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the rows and channels of `[BLOCK, HEAD]` that the tensor has."""
    inside = ((first + tl.arange(0, BLOCK))[:, None] < L) & (tl.arange(0, HEAD)[None, :] < E)
    tl.store(_rows(base, first, stride, BLOCK, HEAD), block.to(base.dtype.element_ty), mask=inside)


@triton.jit
def step_of(stride):
    """A stride, from its eighth: that is how the compiler learns that rows begin where wide loads may."""
    return stride * 8


@triton.jit
def locate(base, b, h, stride_b, stride_h):
    """Where a head of a lane begins; `b` and `h` are int64."""
    return base + b * step_of(stride_b.to(tl.int64)) + h * step_of(stride_h.to(tl.int64))


@triton.jit
def visible(
    row,
    column,
    other,
    start,
    stop,
    window,
    sink,
    CAUSAL: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    """Which (query, key) pairs attend; `[start, stop)` is the segment of one side, `other` the indices of the other."""
    keep = other < stop
    if HAS_RESET:
        keep = keep & (other >= start)
    if CAUSAL:
        keep = keep & (column <= row)
    if HAS_WINDOW:
        near = row <= column + window
        if HAS_SINK:
            near = near | (column < start + sink)
        keep = keep & near
    return keep


@triton.jit
def biased(raw, is_sink, scale, sink_bias, FOLD: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scores before the clamp. With FOLD they are used as they are: the scale waits for the exponential."""
    if not FOLD:
        raw = raw * scale
        if HAS_BIAS:
            raw = tl.where(is_sink, raw + sink_bias, raw)
    return raw


@triton.jit
def clamped(scores, clip, HAS_CLIP: tl.constexpr):
    """The clamp; NaN stays NaN."""
    if HAS_CLIP:
        scores = tl.minimum(
            tl.maximum(scores, -clip, propagate_nan=tl.PropagateNan.ALL), clip, propagate_nan=tl.PropagateNan.ALL
        )
    return scores


@triton.jit
def inner_blocks(lo, full_lo, full_hi, BLOCK: tl.constexpr):
    """The whole blocks, counted from `lo`, that lie in `[full_lo, full_hi)`."""
    inner_lo = lo + (tl.maximum(full_lo - lo, 0) + BLOCK - 1) // BLOCK * BLOCK
    inner_hi = inner_lo + tl.maximum(full_hi - inner_lo, 0) // BLOCK * BLOCK
    return inner_lo, inner_hi


@triton.jit
def keys_of_queries(
    first,
    last,
    earliest,
    latest,
    stop,
    window,
    sink,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The keys that queries first..last need.

    `earliest` and `latest` are where the segments of the first and the last of them start, `stop` is where that of the
    last ends. Returns the end of the sinks that the window cuts off (they begin at `earliest`: all other segments start
    inside the block), and lo <= inner_lo <= inner_hi <= hi: in the inner blocks every query sees every key, and none
    needs a bias.
    """
    lo = earliest
    full_lo = latest
    if CAUSAL:
        hi = last + 1
        full_hi = first + 1
    else:
        hi = stop
        full_hi = tl.where(latest <= first, stop, lo)
    if HAS_WINDOW:
        lo = tl.maximum(lo, first - window)
        full_lo = tl.maximum(full_lo, last - window)
    far = lo
    if HAS_WINDOW and HAS_SINK:
        far = tl.minimum(earliest + sink, lo)
    if HAS_BIAS:
        full_lo = tl.maximum(full_lo, latest + sink)
    inner_lo, inner_hi = inner_blocks(lo, full_lo, full_hi, BLOCK)
    return far, lo, inner_lo, inner_hi, hi


@triton.jit
def queries_of_keys(
    first,
    last,
    earliest,
    latest,
    first_stop,
    stop,
    window,
    sink,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The queries that need keys first..last.

    As `keys_of_queries`, seen from the keys: `first_stop` is where the segment of the first of them ends. Returns lo,
    inner_lo, inner_hi, hi, and the end of the queries from hi on that see nothing but sinks among these keys.
    """
    if CAUSAL:
        lo = first
        full_lo = last
        full_hi = first_stop
    else:
        lo = earliest
        full_lo = earliest
        full_hi = tl.where(latest <= first, stop, lo)
    hi = stop
    has_sinks = latest + sink > first
    if HAS_WINDOW:
        hi = tl.minimum(hi, last + window + 1)
        full_hi = tl.minimum(full_hi, first + window + 1)
    far = hi
    if HAS_WINDOW and HAS_SINK:
        far = tl.where(has_sinks, stop, hi)
    if HAS_BIAS:
        full_hi = tl.where(has_sinks, lo, full_hi)
    inner_lo, inner_hi = inner_blocks(lo, full_lo, full_hi, BLOCK)
    return lo, inner_lo, inner_hi, hi, far


@triton.jit
def slopes(
    raw,
    slope,
    lse,
    delta,
    row,
    column,
    other,
    start,
    stop,
    scale,
    factor,
    window,
    sink,
    sink_bias,
    clip,
    CAUSAL: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Weights, and the gradient of the scaled scores, from products `raw` = q·k and `slope` = dout·v."""
    free = biased(raw, column < start + sink, scale, sink_bias, FOLD, HAS_BIAS and MASKED)
    weights = tl.exp2(clamped(free, clip, HAS_CLIP) * factor - lse)
    if MASKED:
        keep = visible(row, column, other, start, stop, window, sink, CAUSAL, HAS_RESET, HAS_WINDOW, HAS_SINK)
        weights = tl.where(keep, weights, 0.0)
    grad = weights * (slope - delta)
    if HAS_CLIP:
        grad = tl.where(tl.abs(free) <= clip, grad, 0.0)
    return weights, grad
