"""One timestep of attention per lane over a ring buffer of keys and values.

Dimensions: `B` lanes, `H` heads, `M` slots, `E` head size, `K` slots that are looked at (`K <= M`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import choose, triton_refusal
from ..inputs import check_count, without_autocast
from .decode_ops import decode_op
from .ring import RingCache

_NEG = float("-inf")


@dataclass(slots=True)
class DecodeMasks:
    """Slots and visibility of one timestep, as tensors.

    Attributes:
        place: index of the slot each lane writes, into `[B, H, M, E]`.
        looked: `K`; later slots have never been written by any lane.
        hidden: `[B, K]` bool, slots that must not be used; None if the host knows that there are none.
        sinks: `[B, K]` additive bias of sink timesteps, or None.
        bias: what is added to the scores, `[B*H, 1, K]` or broadcasting to it: `sinks`, and -inf where hidden.
        windowed: True if `hidden` may hold timesteps of the present episode.
    """

    place: tuple[slice | Tensor, slice, int | Tensor]
    looked: int
    hidden: Tensor | None
    sinks: Tensor | None
    bias: Tensor
    windowed: bool


@dataclass(slots=True)
class DecodePlan:
    """What one timestep of decoding needs besides keys and values; layers that step together can share it.

    Attributes:
        cache: whose timestep it is, before it is written.
        window: as in `decode_attention`.
        sink: as in `decode_attention`.
        sink_bias: as in `decode_attention`.
    """

    cache: RingCache
    window: int | None
    sink: int
    sink_bias: float
    _masks: DecodeMasks | None = None

    @property
    def masks(self) -> DecodeMasks:
        """Worked out when the first layer asks, before the length changes; the "triton" backend never asks."""
        if self._masks is None:
            self._masks = _make_masks(self.cache, self.window, self.sink, self.sink_bias)
        return self._masks


def plan_decode(cache: RingCache, *, window: int | None = None, sink: int = 0, sink_bias: float = 0.0) -> DecodePlan:
    """Settles slots and visibility for the next timestep of a cache.

    Several layers that step together hold caches that share one `length` tensor: plan once on the first, pass the
    plan to every `decode_attention`, then call `advance()` on the first.

    With `cache.sink` pinned slots and `window` None or at least `cache.ring - 1`, whatever is stored is visible:
    hiding slots then costs nothing once every lane has filled them.

    Args:
        cache: the cache, before the timestep is written.
        window: as in `decode_attention`.
        sink: as in `decode_attention`.
        sink_bias: as in `decode_attention`.

    Returns:
        The plan, valid until `length` changes.

    Raises:
        ValueError: if an option is out of range.
    """
    check_count("window", window, "None or an integer >= 0")
    check_count("sink", sink)
    return DecodePlan(cache, window, sink, sink_bias)


def _make_masks(cache: RingCache, window: int | None, sink: int, sink_bias: float) -> DecodeMasks:
    batch, heads, slots, _ = cache.keys.shape
    device, dtype = cache.length.device, cache.keys.dtype
    looked, has_stale, shortest, longest = slots, True, 0, -1
    if device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling():
        shortest, longest = (int(end) for end in cache.length.aminmax())
        if cache.steps is not None and longest <= cache.steps:
            looked = min(cache.steps + 1, slots)
        has_stale = shortest + 1 < looked
    # Pinned timesteps beyond `sink` are seen like any other: within the ring's reach.
    near = cache.ring - 1 if window is None else min(window, cache.ring - 1)
    # The oldest timestep that may have to be hidden: what the ring holds, and pinned ones that are no sinks.
    windowed = near < min(looked, slots if sink < cache.sink else cache.ring) - 1
    place: tuple[slice | Tensor, slice, int | Tensor]
    if shortest == longest:
        pinned = cache.sink
        place = (slice(None), slice(None), shortest if shortest < pinned else pinned + (shortest - pinned) % cache.ring)
    else:
        place = (torch.arange(batch, device=device), slice(None), cache.slot_of(cache.length))
    biased = sink > 0 and sink_bias != 0.0
    if not (has_stale or windowed or biased):
        bias = torch.zeros(1, 1, 1, dtype=dtype, device=device)
        return DecodeMasks(place, looked, None, None, bias, False)
    hidden, is_sink = _visibility(cache, looked, near if windowed else None, sink if windowed or biased else 0)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
    sinks = None
    if biased and is_sink is not None:
        bias.masked_fill_(is_sink, sink_bias)
        sinks = bias.clone()
    bias = bias.masked_fill_(hidden, _NEG)[:, None].expand(batch, heads, looked).reshape(batch * heads, 1, looked)
    return DecodeMasks(place, looked, hidden, sinks, bias, windowed)


def _visibility(cache: RingCache, looked: int, window: int | None, sink: int) -> tuple[Tensor, Tensor | None]:
    """Which slots are hidden, and which hold sinks, both `[B, K]`, once the present timestep is written."""
    length = cache.length[:, None]
    hidden = torch.arange(looked, device=length.device) > length
    if window is None and sink == 0:
        return hidden, None
    timestep = cache.held_timesteps(cache.length)[:, :looked]
    is_sink = timestep < sink
    if window is not None:
        hidden = hidden | ((length - timestep > window) & ~is_sink)
    return hidden, is_sink


class _DecodeCall(NamedTuple):
    """What a backend may look at: where tensors are, their dtypes, `E`, and whether scores are clipped."""

    device_type: str
    cache: torch.dtype
    q: torch.dtype
    k: torch.dtype
    v: torch.dtype
    head_dim: int
    clipped: bool


def _triton_refusal(call: _DecodeCall) -> str | None:
    reason = triton_refusal(call.device_type, call.cache, call.q, call.k, call.v)
    if reason is None and (call.head_dim % 8 or not 16 <= call.head_dim <= 128):
        reason = f"it takes head sizes that are multiples of 8 from 16 to 128, not {call.head_dim}"
    return reason


def _matmul_refusal(call: _DecodeCall) -> str | None:
    return None if call.cache in (torch.float32, torch.float64) else f"it would accumulate in {call.cache}"


def _sdpa_refusal(call: _DecodeCall) -> str | None:
    return "logit_clip is not something SDPA can do" if call.clipped else None


_CANDIDATES: dict[str, Callable[[_DecodeCall], str | None]] = {
    "triton": _triton_refusal,
    "matmul": _matmul_refusal,
    "sdpa": _sdpa_refusal,
    "reference": lambda call: None,
}


@lru_cache
def _choose(backend: str, call: _DecodeCall) -> str:
    return choose("decode_attention", backend, call, _CANDIDATES)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: RingCache,
    *,
    window: int | None = None,
    sink: int = 0,
    sink_bias: float = 0.0,
    logit_clip: float | None = None,
    scale: float | None = None,
    plan: DecodePlan | None = None,
    backend: str = "auto",
) -> Tensor:
    """Writes one timestep per lane and attends to what the lane remembers of its episode.

    It sees its last `R = cache.ring` timesteps, the present one included, and its first `sink` ones, if the cache
    pins as many: equal to the last row of `attention` over the lane's history since its reset with the same `sink`
    and `window=min(window, R - 1)`, however often the ring has wrapped. Rotary rotation, if any, is the caller's, at
    absolute times, before the call. For inference: no gradient is recorded.

    Args:
        q: queries `[B, H, E]`.
        k: keys `[B, H, E]`, stored in the dtype of the cache.
        v: values `[B, H, E]`, stored in the dtype of the cache.
        cache: updated in place; nothing is shifted or cloned.
        window: only timesteps of age `<= window` are visible (age 0 is the present one).
        sink: the first `sink` timesteps since the reset stay visible beyond the window: for good if
            `sink <= cache.sink`; the rest of them only as long as the ring still holds them.
        sink_bias: added to the scaled scores of sink timesteps.
        logit_clip: scores are clamped to `[-logit_clip, logit_clip]` after the sink bias; None is no clamp.
        scale: factor on the scores; by default `E ** -0.5`.
        plan: result of `plan_decode`, for layers that share one `length`; then `window`, `sink` and `sink_bias` are
            those of the plan and the caller advances the length.
        backend: "auto", "reference", "matmul", "sdpa" or "triton" (CUDA devices: one launch that reads what is visible
            and nothing else; head sizes that are multiples of 8 from 16 to 128, float32, bfloat16 and float16).

    Returns:
        `[B, H, E]` in the dtype of `q`.

    Raises:
        ValueError: if shapes or devices disagree, one is no float, an option is out of range, or the backend cannot
            serve the call.
    """
    _check(q, k, v, cache, logit_clip, plan)
    scale = cache.keys.shape[3] ** -0.5 if scale is None else scale
    dtype = cache.keys.dtype
    call = _DecodeCall(q.device.type, dtype, q.dtype, k.dtype, v.dtype, cache.keys.shape[3], logit_clip is not None)
    chosen = _choose(backend, call)
    used = plan_decode(cache, window=window, sink=sink, sink_bias=sink_bias) if plan is None else plan
    with torch.no_grad():
        if chosen == "triton":
            return _triton(q, k, v, cache, used, scale, logit_clip, advance=plan is None)
        masks = used.masks
        cache.keys[masks.place] = k.to(dtype)
        cache.values[masks.place] = v.to(dtype)
        # Autocast would cast the whole cache, at every timestep.
        with without_autocast(q.device):
            out = _ATTEND[chosen](q.to(dtype), cache, masks, scale, logit_clip).to(q.dtype)
        if plan is None:
            cache.advance()
    return out


def _check(
    q: Tensor, k: Tensor, v: Tensor, cache: RingCache, logit_clip: float | None, plan: DecodePlan | None
) -> None:
    batch, heads, slots, head_dim = cache.keys.shape
    if q.shape != (batch, heads, head_dim) or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be {(batch, heads, head_dim)}: "
            "the lanes, heads and head size of the cache"
        )
    device = cache.keys.device
    if q.device != device or k.device != device or v.device != device:
        raise ValueError(f"q on {q.device}, k on {k.device} and v on {v.device} must be on {device}, like the cache")
    if not (q.is_floating_point() and k.is_floating_point() and v.is_floating_point()):
        raise ValueError(f"q is {q.dtype}, k is {k.dtype} and v is {v.dtype}; give floating dtypes")
    if logit_clip is not None and not logit_clip > 0.0:
        raise ValueError(f"logit_clip={logit_clip} is not allowed; give None or a number > 0")
    if plan is not None and plan.cache is not cache:
        planned = plan.cache.keys.shape
        if planned[0] != batch or planned[2] != slots:
            raise ValueError(
                f"plan is for {planned[0]} lanes of {planned[2]} slots; "
                f"give one for {batch} of {slots}, like those of the cache"
            )


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: RingCache,
    plan: DecodePlan,
    scale: float,
    logit_clip: float | None,
    *,
    advance: bool,
) -> Tensor:
    # Outside of graphs the operator is passed by: acting waits for the host, and it takes as long as the launch.
    launch = decode_op if torch.compiler.is_compiling() else _launcher()
    scratch, clock = cache.scratch, plan.cache
    out = launch(
        q,
        k,
        v,
        cache.keys,
        cache.values,
        clock.length,
        scratch.counters,
        scratch.partials,
        clock.sink,
        plan.window,
        plan.sink,
        plan.sink_bias,
        logit_clip,
        scale,
        advance,
        scratch.splits,
    )
    if advance and cache.steps is not None:
        cache.steps += 1
    return out


@lru_cache
def _launcher() -> Callable[..., Tensor]:
    """The launch itself; importing it imports Triton."""
    from .triton_decode import launch_decode

    return launch_decode


def _reference(q: Tensor, cache: RingCache, masks: DecodeMasks, scale: float, logit_clip: float | None) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = cache.keys[:, :, : masks.looked].to(wide)
    values = cache.values[:, :, : masks.looked].to(wide)
    if masks.hidden is not None:
        keys = keys.masked_fill(masks.hidden[:, None, :, None], 0.0)
        values = values.masked_fill(masks.hidden[:, None, :, None], 0.0)
    scores = torch.einsum("bhe,bhme->bhm", q.to(wide), keys) * scale
    weights = _clip_and_hide(scores, masks, logit_clip).softmax(dim=-1)
    return torch.einsum("bhm,bhme->bhe", weights, values)


def _clip_and_hide(scores: Tensor, masks: DecodeMasks, logit_clip: float | None) -> Tensor:
    """The options one after the other, on scores `[B, H, S]`, in the order that clipping needs."""
    if masks.sinks is not None:
        scores = scores + masks.sinks[:, None].to(scores.dtype)
    if logit_clip is not None:
        scores = scores.clamp(-logit_clip, logit_clip)
    return scores if masks.hidden is None else scores.masked_fill(masks.hidden[:, None], _NEG)


def _matmul(q: Tensor, cache: RingCache, masks: DecodeMasks, scale: float, logit_clip: float | None) -> Tensor:
    batch, heads, slots, head_dim = cache.keys.shape
    query = q.reshape(batch * heads, 1, head_dim)

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
        if masks.looked < slots:
            keys, values = keys[:, :, : masks.looked], values[:, : masks.looked]
        if logit_clip is None:
            scores = torch.baddbmm(masks.bias, query, keys, alpha=scale)
        else:
            scores = torch.bmm(query, keys).mul_(scale).view(batch, heads, masks.looked)
            scores = _clip_and_hide(scores, masks, logit_clip).view(batch * heads, 1, masks.looked)
        return torch.bmm(scores.softmax(dim=-1), values).view(batch, heads, head_dim)

    return _without_leaks(attend, cache, masks)


def _sdpa(q: Tensor, cache: RingCache, masks: DecodeMasks, scale: float, logit_clip: float | None) -> Tensor:
    batch, heads, _, head_dim = cache.keys.shape
    mask = None
    if masks.sinks is not None:
        mask = masks.bias.view(batch, heads, 1, masks.looked)
    elif masks.hidden is not None:
        mask = ~masks.hidden[:, None, None]

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys[:, :, : masks.looked], values[:, :, : masks.looked]
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask, scale=scale)
        return out.view(batch, heads, head_dim)

    return _without_leaks(attend, cache, masks)


def _without_leaks(attend: Callable[[Tensor, Tensor], Tensor], cache: RingCache, masks: DecodeMasks) -> Tensor:
    """Keeps NaN in hidden slots out of the result, although their weight, exactly 0, times NaN is NaN.

    Hidden slots hold finite leftovers in all but odd cases. On the CPU the result shows cheaply whether this is one;
    elsewhere looking would stall the device, and the slots are cleared beforehand.
    """
    if masks.hidden is None:
        return attend(cache.keys, cache.values)
    if cache.keys.device.type == "cpu" and not torch.compiler.is_compiling():
        out = attend(cache.keys, cache.values)
        if not math.isnan(out.sum().item()):
            return out
    # Whatever lies beyond `length` was never written since the reset: overwriting it in place is free of copies, and
    # spares the next timesteps the detour. Timesteps that are merely out of the window are not ours to overwrite.
    index = torch.arange(cache.slots, device=cache.length.device)
    stale = (index > cache.length[:, None])[:, None, :, None]
    keys, values = cache.keys.masked_fill_(stale, 0.0), cache.values.masked_fill_(stale, 0.0)
    if masks.windowed:
        hidden = F.pad(masks.hidden, (0, cache.slots - masks.looked))[:, None, :, None]
        keys, values = keys.masked_fill(hidden, 0.0), values.masked_fill(hidden, 0.0)
    return attend(keys, values)


_ATTEND = {"reference": _reference, "matmul": _matmul, "sdpa": _sdpa}
