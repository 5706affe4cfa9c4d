"""One timestep of attention over a ring buffer in one Triton launch: write, attend, advance.

Dimensions: `B` lanes, `H` heads, `M` slots, `S` pinned slots, `R = M - S` slots of the ring, `E` head size, `P`
programs per head of a lane, `U` keys and values that one thread has on their way at a time.

The kernel is bound by memory: it reads the visible keys and values once, 16 bytes per thread and load, and nothing else
of any size. Timesteps are numbered in the order they are read: pinned sinks, sinks that the ring still holds, the
window. Each row of threads keeps a softmax of its own, so that nothing in the loop waits for another warp; they are put
together at the end. The new key and value never leave the registers before they are used, so no program waits for the
one that stores them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import config, on_device, tuned

if TYPE_CHECKING:
    from ..builds import Build

_LOG2_E = math.log2(math.e)


@lru_cache
def _constants(head_dim: int, dtype: torch.dtype, splits: int) -> dict[str, int]:
    padded = triton.next_power_of_2(head_dim)
    return {"E": head_dim, "E_PADDED": padded, "VECTOR": 16 // dtype.itemsize, "SPLITS": splits}


@triton.jit
def _read_new(x, lane, head, lane_stride, head_stride, take, column, like, E: tl.constexpr):
    """A row of `q`, `k` or `v`, rounded as the cache rounds it."""
    row = tl.load(x + lane * lane_stride + head * head_stride + column, mask=(column < E) & take, other=0.0)
    return row.to(tl.float32).to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _timeline(seen, slots, pinned, window, sink):
    """Numbers the visible timesteps but the present one: pinned sinks, sinks that the ring still holds, the window.

    Returns the slot of the present timestep, the slot below which slots begin again at the top of the ring, the ends of
    the three parts, the age beyond which a timestep is a sink, and the age plus the number of any in the second part.
    """
    ring = slots - pinned
    # Until timestep `M` no slot is used twice.
    wrapped = seen >= slots
    present = tl.where(wrapped, pinned + (seen - pinned) % ring, seen).to(tl.int32)
    lowest = tl.where(wrapped, pinned, 0)
    near = tl.minimum(seen, tl.minimum(window, ring - 1)).to(tl.int32)
    before = seen - near
    pinned_sinks = tl.minimum(tl.minimum(sink, pinned), before).to(tl.int32)
    oldest = tl.maximum(seen - ring + 1, pinned)
    sinks = pinned_sinks + tl.maximum(tl.minimum(sink, before) - oldest, 0).to(tl.int32)
    sink_age = tl.minimum(seen - sink, slots).to(tl.int32)
    return present, lowest, pinned_sinks, sinks, sinks + near, sink_age, (seen - oldest).to(tl.int32) + pinned_sinks


@triton.jit
def _finite_or_zero(top):
    """What to subtract from scores: of rows without any, 0, since the difference of infinities is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _finish_score(score, is_sink, sink_bias, logit_clip, BIASED: tl.constexpr, CLIPPED: tl.constexpr):
    if BIASED:
        score += tl.where(is_sink, sink_bias, 0.0)
    if CLIPPED:
        # Minimum and maximum would make a number of NaN.
        score = tl.where(score == score, tl.minimum(tl.maximum(score, -logit_clip), logit_clip), score)
    return score


@triton.jit
def _advance(counter, length_at, length, arrivals):
    """Counts a timestep once everybody has read the length: the last of them to arrive is the one to do it."""
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == arrivals - 1:
        tl.store(counter, 0)
        tl.store(length_at, length + 1)


@triton.jit
def _combine(partials, working, column, E: tl.constexpr, SPLITS: tl.constexpr):
    """The output of a head from what its programs left. Past the first-level cache, where older numbers may lie."""
    part = tl.arange(0, SPLITS)
    there = part < working
    partials += part * (E + 4)
    top = tl.load(partials + E, mask=there, other=float("-inf"), cache_modifier=".cg")
    weight = tl.load(partials + E + 1, mask=there, other=0.0, cache_modifier=".cg")
    mask = there[:, None] & (column < E)[None, :]
    mix = tl.load(partials[:, None] + column[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    keep = tl.exp2(top - _finite_or_zero(tl.max(top)))
    return tl.sum(mix * keep[:, None], axis=0) / tl.sum(weight * keep)


# No timing at first use: lanes are empty then, and whatever is measured says nothing about full ones. The launcher
# takes the first configuration; the others are there to be compared.
@tuned(
    [
        config(4, 1, UNROLL=4, THREADS=128),
        config(4, 1, UNROLL=2, THREADS=128),
        config(8, 1, UNROLL=2, THREADS=256),
    ]
)
@triton.jit
def decode_kernel(
    q,
    k,
    v,
    keys,
    values,
    length,
    counters,
    partials,
    out,
    q_lane,
    q_head,
    k_lane,
    k_head,
    v_lane,
    v_head,
    keys_lane,
    keys_head,
    keys_slot,
    keys_column,
    values_lane,
    values_head,
    values_slot,
    values_column,
    heads,
    slots,
    pinned,
    window,
    sink,
    sink_bias,
    logit_clip,
    scale,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    VECTOR: tl.constexpr,
    SPLITS: tl.constexpr,
    PACKED: tl.constexpr,
    BIASED: tl.constexpr,
    CLIPPED: tl.constexpr,
    ADVANCE: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
):
    """One program per lane, head and share of the visible timesteps; `scale`, bias and clip are in units of log 2."""
    ROWS: tl.constexpr = THREADS * VECTOR // E_PADDED
    split = tl.program_id(0) % SPLITS
    pair = tl.program_id(0) // SPLITS
    head = pair % heads
    lane = (pair // heads).to(tl.int64)
    pair = pair.to(tl.int64)
    if PACKED:
        # Multiples of `E`, which tells the compiler that 16 bytes may be read at once.
        keys += pair * slots * E
        values += pair * slots * E
    else:
        keys += lane * keys_lane + head * keys_head
        values += lane * values_lane + head * values_head
    counters += lane * (heads + 1)
    partials += (pair * SPLITS + split) * (E + 4)
    out += pair * E

    seen = tl.load(length + lane)
    ring = slots - pinned
    present, lowest, pinned_sinks, sinks, total, sink_age, age_in_sinks = _timeline(seen, slots, pinned, window, sink)
    column = tl.arange(0, E_PADDED)
    query = _read_new(q, lane, head, q_lane, q_head, True, column, keys, E) * scale
    # The first program of a head takes the present timestep on, the others see none.
    mine = split == 0
    new_key = _read_new(k, lane, head, k_lane, k_head, mine, column, keys, E)
    new_value = _read_new(v, lane, head, v_lane, v_head, mine, column, keys, E)
    if PACKED:
        key_at, value_at = keys + present * E + column, values + present * E + column
    else:
        key_at = keys + present.to(tl.int64) * keys_slot + column * keys_column
        value_at = values + present.to(tl.int64) * values_slot + column * values_column
    tl.store(key_at, new_key.to(keys.dtype.element_ty), mask=(column < E) & mine)
    tl.store(value_at, new_value.to(values.dtype.element_ty), mask=(column < E) & mine)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    mix = tl.zeros([ROWS, E_PADDED], tl.float32)
    share = tl.cdiv(tl.cdiv(total, UNROLL * ROWS), SPLITS) * UNROLL * ROWS
    first = split * share
    for start in range(first, tl.minimum(first + share, total), UNROLL * ROWS):
        number = start + tl.arange(0, UNROLL)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        # `[U, rows of threads]`; right for all but pinned sinks, which lie where their number says.
        age = tl.where(number < sinks, age_in_sinks, total) - number
        slot = present - age
        slot = tl.where(slot < lowest, slot + ring, slot)
        slot = tl.where(number < pinned_sinks, number, slot)
        there = number < total
        mask = there[:, :, None]
        if E < E_PADDED:
            mask = mask & (column < E)[None, None, :]
        if PACKED:
            at = slot[:, :, None] * E + column[None, None, :]
            key = tl.load(keys + at, mask=mask, other=0.0)
            value = tl.load(values + at, mask=mask, other=0.0)
        else:
            far, wide = slot.to(tl.int64)[:, :, None], column.to(tl.int64)[None, None, :]
            key = tl.load(keys + far * keys_slot + wide * keys_column, mask=mask, other=0.0)
            value = tl.load(values + far * values_slot + wide * values_column, mask=mask, other=0.0)
        score = tl.sum(key.to(tl.float32) * query[None, None, :], axis=2)
        is_sink = (age > sink_age) | (number < pinned_sinks)
        score = _finish_score(score, is_sink, sink_bias, logit_clip, BIASED, CLIPPED)
        score = tl.where(there, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=0))
        base = _finite_or_zero(new_top)
        keep = tl.exp2(top - base)
        term = tl.exp2(score - base[None, :])
        weight = weight * keep + tl.sum(term, axis=0)
        mix = mix * keep[:, None] + tl.sum(term[:, :, None] * value.to(tl.float32), axis=0)
        top = new_top

    score = _finish_score(tl.sum(query * new_key), sink_age < 0, sink_bias, logit_clip, BIASED, CLIPPED)
    score = tl.where(mine, score, float("-inf"))
    all_top = tl.maximum(tl.max(top), score)
    base = _finite_or_zero(all_top)
    keep = tl.exp2(top - base)
    new_weight = tl.exp2(score - base)
    all_weight = tl.sum(weight * keep) + new_weight
    all_mix = tl.sum(mix * keep[:, None], axis=0) + new_weight * new_value

    if SPLITS == 1:
        tl.store(out + column, (all_mix / all_weight).to(out.dtype.element_ty), mask=column < E)
        if ADVANCE:
            _advance(counters + heads, length + lane, seen, heads)
    else:
        working = tl.maximum(tl.cdiv(total, tl.maximum(share, 1)), 1)
        if split < working:
            tl.store(partials + column, all_mix, mask=column < E)
            tl.store(partials + E, all_top)
            tl.store(partials + E + 1, all_weight)
        tl.debug_barrier()
        if tl.atomic_add(counters + head, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.store(counters + head, 0)
            tl.debug_barrier()
            result = _combine(partials - split * (E + 4), working, column, E, SPLITS)
            tl.store(out + column, result.to(out.dtype.element_ty), mask=column < E)
            if ADVANCE:
                _advance(counters + heads, length + lane, seen, heads)


def launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    counters: Tensor,
    partials: Tensor,
    pinned: int,
    window: int | None,
    sink: int,
    sink_bias: float,
    logit_clip: float | None,
    scale: float,
    advance: bool,
    splits: int,
    configuration: int = 0,
) -> Tensor:
    """Decodes one timestep of all lanes; checks nothing.

    Args:
        q: `[B, H, E]`, any strides.
        k: like `q`.
        v: like `q`.
        keys: `[B, H, M, E]`, updated in place.
        values: `[B, H, M, E]`, updated in place.
        length: `[B]` int64, read on the device; updated in place if `advance`.
        counters: see `DecodeScratch`.
        partials: see `DecodeScratch`.
        pinned: `S`.
        window: as in `decode_attention`.
        sink: as in `decode_attention`.
        sink_bias: as in `decode_attention`.
        logit_clip: as in `decode_attention`.
        scale: factor on the scores.
        advance: whether to add 1 to every length.
        splits: `P`.
        configuration: index into `decode_kernel.configs`.

    Returns:
        `[B, H, E]` in the dtype of `q`.
    """
    batch, heads, slots, head_dim = keys.shape
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    with on_device(keys):
        decode_kernel.fn[(batch * heads * splits,)](
            q,
            k,
            v,
            keys,
            values,
            length,
            counters,
            partials,
            out,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *keys.stride(),
            *values.stride(),
            heads,
            slots,
            pinned,
            slots if window is None else min(window, slots),
            min(sink, 1 << 30),
            sink_bias * _LOG2_E,
            0.0 if logit_clip is None else logit_clip * _LOG2_E,
            scale * _LOG2_E,
            **_constants(head_dim, keys.dtype, splits),
            PACKED=keys.is_contiguous() and values.is_contiguous(),
            BIASED=sink > 0 and sink_bias != 0.0,
            CLIPPED=logit_clip is not None,
            ADVANCE=advance,
            **decode_kernel.configs[configuration].all_kwargs(),
        )
    return out


def builds() -> list[Build]:
    """Half and single precision, one program per head and several, and all options at once."""
    return [
        _build(head_dim, dtype, splits, options)
        for head_dim in (32, 64)
        for dtype in (torch.bfloat16, torch.float32)
        for splits, options in ((1, False), (4, False), (1, True))
        if not options or head_dim == 32
    ]


def _build(head_dim: int, dtype: torch.dtype, splits: int, options: bool) -> Build:
    from ..builds import Build

    kind = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    heads, slots = 8, 1024
    row, lane = slots * head_dim, heads * slots * head_dim
    arguments: dict[str, Any] = {name: kind for name in ("q", "k", "v", "keys", "values", "out")}
    arguments |= {"length": "*i64", "counters": "*i32", "partials": "*fp32"}
    arguments |= {f"{name}_lane": 3 * heads * head_dim for name in "qkv"} | {f"{name}_head": head_dim for name in "qkv"}
    for name in ("keys", "values"):
        arguments |= {f"{name}_lane": lane, f"{name}_head": row, f"{name}_slot": head_dim, f"{name}_column": 1}
    arguments |= {"heads": heads, "slots": slots, "pinned": 4 * options, "window": 256 if options else slots}
    arguments |= {"sink": 4 * options, "sink_bias": 0.5, "logit_clip": 10.0, "scale": 0.25}
    arguments |= {"PACKED": True, "BIASED": options, "CLIPPED": options, "ADVANCE": True}
    name = f"decode_attention {kind[1:]} E={head_dim} splits={splits}{' all options' if options else ''}"
    return Build(name, decode_kernel, arguments | _constants(head_dim, dtype, splits))
