"""One timestep of attention per lane over a ring buffer of keys and values.

Dimensions: `B` lanes, `H` heads, `M` slots, `E` head size, `S` slots that are looked at (`S <= M`).
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

_NEG = float("-inf")


@dataclass
class RingCache:
    """Keys and values of the last `M` timesteps of every lane; all tensors stay at fixed addresses.

    Timestep `p` of a lane (counted from its last reset) lies in slot `p % M`. Slots a lane has not written since its
    last reset may hold anything, NaN included: they are never used.

    Attributes:
        keys: `[B, H, M, E]`.
        values: `[B, H, M, E]`.
        length: `[B]` int64, timesteps since the lane's last reset.
        steps: timesteps decoded since allocation, known to the host: no lane can be longer. None if unknown. It only
            spares work on slots that no lane has reached yet. Resets leave it alone, so that what one lane computes
            never depends, not even in rounding, on what happens to another.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    steps: int | None = None

    def __post_init__(self) -> None:
        """Checks the shapes.

        Raises:
            ValueError: if shapes or dtypes disagree.
        """
        if self.keys.dim() != 4 or self.values.shape != self.keys.shape or self.values.dtype != self.keys.dtype:
            raise ValueError(
                f"keys {self.keys.dtype} {tuple(self.keys.shape)} and values {self.values.dtype} "
                f"{tuple(self.values.shape)} must share one dtype and one shape [B, H, M, E]"
            )
        if self.length.dtype != torch.int64 or self.length.shape != self.keys.shape[:1]:
            raise ValueError(
                f"length is {self.length.dtype} {tuple(self.length.shape)}; give torch.int64 ({self.keys.shape[0]},)"
            )

    @classmethod
    def allocate(
        cls,
        batch: int,
        heads: int,
        slots: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RingCache:
        """An empty cache.

        Args:
            batch: lanes `B`.
            heads: `H`.
            slots: `M`, the timesteps kept per lane.
            head_dim: `E`.
            dtype: of keys and values.
            device: of all tensors.

        Returns:
            A cache with all lengths 0.

        Raises:
            ValueError: if a size is below 1.
        """
        for name, size in (("batch", batch), ("heads", heads), ("slots", slots), ("head_dim", head_dim)):
            if size < 1:
                raise ValueError(f"{name}={size} is not allowed; give an integer >= 1")
        keys, values = allocate_storage((batch, heads), slots, head_dim, dtype=dtype, device=device)
        with torch.inference_mode(False):
            return cls(keys, values, torch.zeros(batch, dtype=torch.int64, device=device), steps=0)

    @property
    def slots(self) -> int:
        """`M`, the timesteps kept per lane."""
        return self.keys.shape[2]

    def advance(self) -> None:
        """Counts one timestep for every lane, in place."""
        self.length.add_(1)
        if self.steps is not None:
            self.steps += 1


def allocate_storage(
    leading: tuple[int, ...], slots: int, head_dim: int, *, dtype: torch.dtype, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Zeroed keys and values in the memory order that decoding reads fastest.

    Args:
        leading: leading sizes, for example `(B, H)`.
        slots: `M`.
        head_dim: `E`.
        dtype: of both.
        device: of both.

    Returns:
        Keys and values `[*leading, M, E]`. On the CPU the keys lie in memory as `[*leading, E, M]`: products with the
        query then run along the slots, which takes a third to two thirds of the time.
    """
    # Tensors made under inference_mode could never be updated outside of it.
    with torch.inference_mode(False):
        values = torch.zeros((*leading, slots, head_dim), dtype=dtype, device=device)
        if values.device.type == "cpu":
            return torch.zeros((*leading, head_dim, slots), dtype=dtype, device=device).transpose(-1, -2), values
        return torch.zeros_like(values), values


def reset_lanes(cache: RingCache, mask: Tensor) -> None:
    """Forgets everything some lanes have seen, in place: lengths become 0, keys and values stay where they are.

    Args:
        cache: the cache.
        mask: `[B]` bool; True forgets the lane.

    Raises:
        ValueError: if `mask` is not `[B]` bool.
    """
    if mask.dtype != torch.bool or mask.shape != cache.length.shape:
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; give torch.bool {tuple(cache.length.shape)}")
    cache.length.masked_fill_(mask, 0)


@dataclass(slots=True)
class DecodePlan:
    """What one timestep of decoding needs besides keys and values; layers that step together can share it.

    Attributes:
        lanes: `[B]` int64, 0 to B-1.
        slot: `[B]` int64, where each lane writes.
        looked: `S`; later slots have never been written by any lane.
        visible: `[B, S]` bool.
        sinks: `[B, S]` bool, or None.
        bias: `[B*H, 1, S]`: 0 or the sink bias where visible, -inf elsewhere.
        has_stale: False if the host knows that every slot in `[:S]` holds a timestep of the present episode.
    """

    lanes: Tensor
    slot: Tensor
    looked: int
    visible: Tensor
    sinks: Tensor | None
    bias: Tensor
    has_stale: bool


def plan_decode(cache: RingCache, *, window: int | None = None, sink: int = 0, sink_bias: float = 0.0) -> DecodePlan:
    """Works out slots and visibility for the next timestep of a cache.

    Several layers that step together hold caches that share one `length` tensor: plan once on the first, pass the
    plan to every `decode_attention`, then call `advance()` on the first.

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
    device = cache.length.device
    looked, has_stale = slots, True
    if device.type == "cpu" and not torch.compiler.is_compiling():
        shortest, longest = (int(end) for end in cache.length.aminmax())
        if cache.steps is not None and longest <= cache.steps:
            looked = min(cache.steps + 1, slots)
        has_stale = shortest + 1 < looked
    length = cache.length[:, None]
    slot = cache.length % slots
    age = (slot[:, None] - torch.arange(looked, device=device)) % slots
    visible = age <= length
    sinks = None
    if sink > 0:
        sinks = age > length - sink
    if window is not None:
        near = age <= window
        visible = visible & (near if sinks is None else near | sinks)
    bias = torch.zeros(visible.shape, dtype=cache.keys.dtype, device=device)
    if sinks is not None and sink_bias != 0.0:
        bias.masked_fill_(sinks, sink_bias)
    bias.masked_fill_(~visible, _NEG)
    bias = bias[:, None].expand(batch, heads, looked).reshape(batch * heads, 1, looked)
    lanes = torch.arange(batch, device=device)
    return DecodePlan(lanes, slot, looked, visible, sinks, bias, has_stale)


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
    """Writes one timestep per lane and attends to the lane's last `min(length + 1, M)` timesteps.

    Equal to the last row of `attention` over the lane's history since its reset, restricted to `M` timesteps. Rotary
    rotation, if any, is the caller's, at absolute times, before the call. For inference: no gradient is recorded.

    Args:
        q: queries `[B, H, E]`.
        k: keys `[B, H, E]`, stored in the dtype of the cache.
        v: values `[B, H, E]`, stored in the dtype of the cache.
        cache: updated in place; nothing is shifted or cloned.
        window: only timesteps of age `<= window` are visible (age 0 is the present one).
        sink: the first `sink` timesteps since the reset stay visible beyond the window, as long as the ring still
            holds them.
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
        cache.keys[used.lanes, :, used.slot] = k.to(dtype)
        cache.values[used.lanes, :, used.slot] = v.to(dtype)
        out = attend(q.to(dtype), cache, used, scale, sink_bias, logit_clip).to(q.dtype)
        if plan is None:
            cache.advance()
    return out


def _reference(
    q: Tensor, cache: RingCache, plan: DecodePlan, scale: float, sink_bias: float, logit_clip: float | None
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    visible = plan.visible[:, None]
    keys = cache.keys[:, :, : plan.looked].to(wide).masked_fill(~visible[..., None], 0.0)
    values = cache.values[:, :, : plan.looked].to(wide).masked_fill(~visible[..., None], 0.0)
    scores = torch.einsum("bhe,bhme->bhm", q.to(wide), keys) * scale
    if plan.sinks is not None:
        scores = scores + sink_bias * plan.sinks[:, None].to(wide)
    if logit_clip is not None:
        scores = scores.clamp(-logit_clip, logit_clip)
    return torch.einsum("bhm,bhme->bhe", scores.masked_fill(~visible, _NEG).softmax(dim=-1), values)


def _matmul(
    q: Tensor, cache: RingCache, plan: DecodePlan, scale: float, sink_bias: float, logit_clip: float | None
) -> Tensor:
    if plan.has_stale and not _on_host(q):
        _clear_stale(cache, plan)
    out = _matmul_once(q, cache, plan, scale, sink_bias, logit_clip)
    # Weights of stale slots are exactly 0, but 0 * NaN is NaN. Stale slots hold finite leftovers in all but odd cases,
    # so looking at the result is cheaper than masking the cache at every step.
    if plan.has_stale and _on_host(q) and math.isnan(out.sum().item()):
        _clear_stale(cache, plan)
        out = _matmul_once(q, cache, plan, scale, sink_bias, logit_clip)
    return out


def _matmul_once(
    q: Tensor, cache: RingCache, plan: DecodePlan, scale: float, sink_bias: float, logit_clip: float | None
) -> Tensor:
    batch, heads, slots, head_dim = cache.keys.shape
    keys = cache.keys.flatten(0, 1).transpose(1, 2)
    values = cache.values.flatten(0, 1)
    if plan.looked < slots:
        keys, values = keys[:, :, : plan.looked], values[:, : plan.looked]
    query = q.reshape(batch * heads, 1, head_dim)
    if logit_clip is None:
        scores = torch.baddbmm(plan.bias, query, keys, alpha=scale)
    else:
        scores = torch.bmm(query, keys).mul_(scale).view(batch, heads, plan.looked)
        if plan.sinks is not None:
            scores = scores + sink_bias * plan.sinks[:, None].to(q.dtype)
        scores = scores.clamp_(-logit_clip, logit_clip).masked_fill_(~plan.visible[:, None], _NEG)
        scores = scores.view(batch * heads, 1, plan.looked)
    return torch.bmm(scores.softmax(dim=-1), values).view(batch, heads, head_dim)


def _sdpa(
    q: Tensor, cache: RingCache, plan: DecodePlan, scale: float, sink_bias: float, logit_clip: float | None
) -> Tensor:
    if plan.has_stale:
        _clear_stale(cache, plan)
    batch, heads, _, head_dim = cache.keys.shape
    keys, values = cache.keys[:, :, : plan.looked], cache.values[:, :, : plan.looked]
    mask = plan.bias.view(batch, heads, 1, plan.looked)
    out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask, scale=scale)
    return out.view(batch, heads, head_dim)


_ATTEND = {"reference": _reference, "matmul": _matmul, "sdpa": _sdpa}


def _on_host(q: Tensor) -> bool:
    return q.device.type == "cpu" and not torch.compiler.is_compiling()


def _clear_stale(cache: RingCache, plan: DecodePlan) -> None:
    """Zeroes the slots that hold nothing of the present episode; visible by `window` or not, the others stay."""
    slots = torch.arange(plan.looked, device=cache.length.device)
    stale = ((plan.slot[:, None] - slots) % cache.slots > cache.length[:, None])[:, None, :, None]
    cache.keys[:, :, : plan.looked].masked_fill_(stale, 0.0)
    cache.values[:, :, : plan.looked].masked_fill_(stale, 0.0)
