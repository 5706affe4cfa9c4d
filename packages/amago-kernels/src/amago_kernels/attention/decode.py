"""One timestep of attention per lane over a ring buffer of keys and values.

Dimensions: `B` lanes, `H` heads, `M` slots, `E` head size, `K` slots that are looked at (`K <= M`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import choose
from ..inputs import without_autocast
from .ring import RingCache

_NEG = float("-inf")


@dataclass(slots=True)
class DecodePlan:
    """What one timestep of decoding needs besides keys and values; layers that step together can share it.

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


def plan_decode(cache: RingCache, *, window: int | None = None, sink: int = 0, sink_bias: float = 0.0) -> DecodePlan:
    """Works out slots and visibility for the next timestep of a cache.

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
    if window is not None and window < 0:
        raise ValueError(f"window={window} is not allowed; give None or an integer >= 0")
    if sink < 0:
        raise ValueError(f"sink={sink} is not allowed; give an integer >= 0")
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
        return DecodePlan(place, looked, None, None, bias, False)
    hidden, is_sink = _visibility(cache, looked, near if windowed else None, sink if windowed or biased else 0)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
    sinks = None
    if biased and is_sink is not None:
        bias.masked_fill_(is_sink, sink_bias)
        sinks = bias.clone()
    bias = bias.masked_fill_(hidden, _NEG)[:, None].expand(batch, heads, looked).reshape(batch * heads, 1, looked)
    return DecodePlan(place, looked, hidden, sinks, bias, windowed)


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


# What a backend may look at: the dtype of the cache, and whether scores are clipped.
_DecodeCall = tuple[torch.dtype, bool]


def _matmul_refusal(call: _DecodeCall) -> str | None:
    return None if call[0] in (torch.float32, torch.float64) else f"it would accumulate in {call[0]}"


def _sdpa_refusal(call: _DecodeCall) -> str | None:
    return "logit_clip is not something SDPA can do" if call[1] else None


_CANDIDATES: dict[str, Callable[[_DecodeCall], str | None]] = {
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
        backend: "auto", "reference", "matmul" or "sdpa".

    Returns:
        `[B, H, E]` in the dtype of `q`.

    Raises:
        ValueError: if shapes disagree, an option is out of range, or the backend cannot serve the call.
    """
    batch, heads, _, head_dim = cache.keys.shape
    if q.shape != (batch, heads, head_dim) or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be {(batch, heads, head_dim)}: "
            "the lanes, heads and head size of the cache"
        )
    if logit_clip is not None and not logit_clip > 0.0:
        raise ValueError(f"logit_clip={logit_clip} is not allowed; give None or a number > 0")
    scale = head_dim**-0.5 if scale is None else scale
    dtype = cache.keys.dtype
    attend = _ATTEND[_choose(backend, (dtype, logit_clip is not None))]
    with torch.no_grad():
        used = plan_decode(cache, window=window, sink=sink, sink_bias=sink_bias) if plan is None else plan
        cache.keys[used.place] = k.to(dtype)
        cache.values[used.place] = v.to(dtype)
        # Autocast would cast the whole cache, at every timestep.
        with without_autocast(q.device):
            out = attend(q.to(dtype), cache, used, scale, logit_clip).to(q.dtype)
        if plan is None:
            cache.advance()
    return out


def _reference(q: Tensor, cache: RingCache, plan: DecodePlan, scale: float, logit_clip: float | None) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = cache.keys[:, :, : plan.looked].to(wide)
    values = cache.values[:, :, : plan.looked].to(wide)
    if plan.hidden is not None:
        keys = keys.masked_fill(plan.hidden[:, None, :, None], 0.0)
        values = values.masked_fill(plan.hidden[:, None, :, None], 0.0)
    scores = torch.einsum("bhe,bhme->bhm", q.to(wide), keys) * scale
    weights = _clip_and_hide(scores, plan, logit_clip).softmax(dim=-1)
    return torch.einsum("bhm,bhme->bhe", weights, values)


def _clip_and_hide(scores: Tensor, plan: DecodePlan, logit_clip: float | None) -> Tensor:
    """The options one after the other, on scores `[B, H, S]`, in the order that clipping needs."""
    if plan.sinks is not None:
        scores = scores + plan.sinks[:, None].to(scores.dtype)
    if logit_clip is not None:
        scores = scores.clamp(-logit_clip, logit_clip)
    return scores if plan.hidden is None else scores.masked_fill(plan.hidden[:, None], _NEG)


def _matmul(q: Tensor, cache: RingCache, plan: DecodePlan, scale: float, logit_clip: float | None) -> Tensor:
    batch, heads, slots, head_dim = cache.keys.shape
    query = q.reshape(batch * heads, 1, head_dim)

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
        if plan.looked < slots:
            keys, values = keys[:, :, : plan.looked], values[:, : plan.looked]
        if logit_clip is None:
            scores = torch.baddbmm(plan.bias, query, keys, alpha=scale)
        else:
            scores = torch.bmm(query, keys).mul_(scale).view(batch, heads, plan.looked)
            scores = _clip_and_hide(scores, plan, logit_clip).view(batch * heads, 1, plan.looked)
        return torch.bmm(scores.softmax(dim=-1), values).view(batch, heads, head_dim)

    return _without_leaks(attend, cache, plan)


def _sdpa(q: Tensor, cache: RingCache, plan: DecodePlan, scale: float, logit_clip: float | None) -> Tensor:
    batch, heads, _, head_dim = cache.keys.shape
    mask = None
    if plan.sinks is not None:
        mask = plan.bias.view(batch, heads, 1, plan.looked)
    elif plan.hidden is not None:
        mask = ~plan.hidden[:, None, None]

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys[:, :, : plan.looked], values[:, :, : plan.looked]
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask, scale=scale)
        return out.view(batch, heads, head_dim)

    return _without_leaks(attend, cache, plan)


def _without_leaks(attend: Callable[[Tensor, Tensor], Tensor], cache: RingCache, plan: DecodePlan) -> Tensor:
    """Keeps NaN in hidden slots out of the result, although their weight, exactly 0, times NaN is NaN.

    Hidden slots hold finite leftovers in all but odd cases. On the CPU the result shows cheaply whether this is one;
    elsewhere looking would stall the device, and the slots are cleared beforehand.
    """
    if plan.hidden is None:
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
    if plan.windowed:
        hidden = F.pad(plan.hidden, (0, cache.slots - plan.looked))[:, None, :, None]
        keys, values = keys.masked_fill(hidden, 0.0), values.masked_fill(hidden, 0.0)
    return attend(keys, values)


_ATTEND = {"reference": _reference, "matmul": _matmul, "sdpa": _sdpa}
