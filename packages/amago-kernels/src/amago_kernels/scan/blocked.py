"""The recurrence `h_t = a_t h_{t-1} + b_t` in few calls: blocks of timesteps side by side, then what lies between them.

Dimensions: `B` batch, `T` timesteps, `D` channels, `K` blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

# From so many numbers per timestep on, a CPU is bound by memory, and one pass beats two.
WIDE = 4096
# Timesteps of a block. Odd, because steps through memory of a power of two compete for the same few lines of a cache.
_SIZES = range(9, 32, 2)
# What blocks cost beside their timesteps, in calls.
_EXTRA_CALLS = 16
_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def scan_into(
    out: Tensor, a: Tensor, b: Tensor, before: Tensor, reset: Tensor | None, *, reverse: bool = False
) -> None:
    """Writes all states of the recurrence; nothing is ever divided.

    Args:
        out: `[B, T, D]`, real or complex; may be `b`.
        a: `[B, T, D]`; any strides, zero included.
        b: `[B, T, D]`.
        before: `[B, D]`, the state that comes first.
        reset: `[B, T]` bool or None; True takes the state that comes before that timestep as zero.
        reverse: run from the last timestep to the first.
    """
    length, visible = b.shape[1], _visible(b)
    wide = visible and b.shape[0] * b.shape[2] * (1 + b.is_complex()) >= WIDE
    # Products between blocks that cannot be looked at cost three calls each, and are not safe without float64, as on
    # Apple's GPUs.
    size = _block_size(length, 1 if visible else 3)
    if size == 0 or wide or b.device.type == "mps":
        _one_pass(out, a, b, before, reset, reverse)
        return
    blocks, rest = divmod(length, size)
    body = slice(rest, length) if reverse else slice(0, length - rest)
    out_k, a_k, b_k = (x[:, body].unflatten(1, (blocks, size)) for x in (out, a, b))
    across = a_k.prod(2) if visible else a_k.prod(2, dtype=_WIDER.get(a.dtype, a.dtype))
    if visible and not bool(across.sum().isfinite()):
        # A product that overflows says nothing about the states: they may be zero.
        _one_pass(out, a, b, before, reset, reverse)
        return
    resets_k = None if reset is None else reset[:, body].unflatten(1, (blocks, size))
    factors, terms = _by_time(a_k, 2, reverse), _by_time(b_k, 2, reverse)
    masks = _masks(resets_k, 2, size, reverse)
    # What blocks end with if they begin with zero; then, from block to block, what they really end with. The state
    # before the first block lies beside them, so that what blocks begin with is one view.
    borders = torch.empty((b.shape[0], blocks + 1, b.shape[2]), dtype=b.dtype, device=b.device)
    ends, begins = (borders[:, :-1], borders[:, 1:]) if reverse else (borders[:, 1:], borders[:, :-1])
    borders[:, -1 if reverse else 0] = before
    _steps([ends] * (size - 1), factors[1:], terms[1:], masks[1:], terms[0])
    any_reset = None if resets_k is None else resets_k.any(2)
    if visible:
        # Where a block holds a reset, nothing goes across it.
        scan_into(ends, across, ends, before, any_reset, reverse=reverse)
    else:
        _between(ends, across, before, any_reset, reverse)
    _steps(_by_time(out_k, 2, reverse), factors, terms, masks, begins)
    if rest:
        left = slice(0, rest) if reverse else slice(length - rest, length)
        last = ends[:, 0 if reverse else -1]
        _one_pass(out[:, left], a[:, left], b[:, left], last, None if reset is None else reset[:, left], reverse)


@lru_cache(maxsize=256)
def _block_size(length: int, calls_between: int) -> int:
    """The number of timesteps per block that takes the fewest calls; 0 if one pass takes fewer still."""
    calls, size = min((2 * size + calls_between * (length // size) + length % size, size) for size in _SIZES)
    return size if calls + _EXTRA_CALLS < length else 0


def _visible(x: Tensor) -> bool:
    """Whether the host can look at values without a stall."""
    return x.device.type == "cpu"


def _one_pass(out: Tensor, a: Tensor, b: Tensor, before: Tensor, reset: Tensor | None, reverse: bool) -> None:
    targets, factors = _by_time(out, 1, reverse), _by_time(a, 1, reverse)
    terms = targets if out is b else _by_time(b, 1, reverse)
    _steps(targets, factors, terms, _masks(reset, 1, b.shape[1], reverse), before)


def _between(ends: Tensor, across: Tensor, before: Tensor, reset: Tensor | None, reverse: bool) -> None:
    """The recurrence from block to block with products that may have overflowed, unseen.

    Products of float32 are float64 here: where those overflow, so do the states, but for zeros, which remain zeros.
    """
    wide, state = ends.to(across.dtype), before.to(across.dtype)
    views = _by_time(wide, 1, reverse), _by_time(across, 1, reverse), _masks(reset, 1, ends.shape[1], reverse)
    for end, factor, mask in zip(*views, strict=True):
        idle = state == 0 if mask is None else (state == 0) | mask
        state = torch.where(idle, end, torch.addcmul(end, factor, state), out=end)
    ends.copy_(wide)


def _steps(
    out: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], masks: Sequence[Tensor | None], state: Tensor
) -> None:
    for target, factor, term, mask in zip(out, a, b, masks, strict=True):
        if mask is not None:
            state = torch.where(mask, 0.0, state)
        state = torch.addcmul(term, factor, state, out=target)


def _by_time(x: Tensor, dim: int, reverse: bool) -> Sequence[Tensor]:
    return x.unbind(dim)[::-1] if reverse else x.unbind(dim)


def _masks(reset: Tensor | None, dim: int, length: int, reverse: bool) -> Sequence[Tensor | None]:
    """One mask per timestep, None where the host can see that there is no reset."""
    if reset is None:
        return [None] * length
    masks = _by_time(reset.unsqueeze(-1), dim, reverse)
    if not _visible(reset):
        return masks
    needed = reset.flatten(0, dim - 1).any(0).tolist()
    return [mask if any_reset else None for mask, any_reset in zip(masks, needed[:: -1 if reverse else 1], strict=True)]
