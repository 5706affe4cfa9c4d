"""The recurrence `h_t = a_t h_{t-1} + b_t` in few calls: blocks of timesteps side by side, then what lies between them.

Dimensions: `B` batch, `T` timesteps, `D` channels, `K` blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 16
# From so many numbers per timestep on, a CPU is bound by memory, and one pass beats two.
WIDE = 4096


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
    batch, length, channels = b.shape
    blocks, rest = divmod(length, BLOCK)
    on_cpu = b.device.type == "cpu"
    if blocks < 3 or (on_cpu and batch * channels * (1 + b.is_complex()) >= WIDE):
        _one_pass(out, a, b, before, reset, reverse)
        return
    body = slice(rest, length) if reverse else slice(0, length - rest)
    out_k, a_k, b_k = (x[:, body].unflatten(1, (blocks, BLOCK)) for x in (out, a, b))
    across, any_reset, resets_k = a_k.prod(2), None, None
    if on_cpu and not bool(across.isfinite().all()):
        # A product that overflows says nothing about the states: they may be zero.
        _one_pass(out, a, b, before, reset, reverse)
        return
    if reset is not None:
        resets_k = reset[:, body].unflatten(1, (blocks, BLOCK))
        any_reset = resets_k.any(2)
        across = torch.where(any_reset.unsqueeze(-1), 0.0, across)
    inputs = _by_time(a_k, 2, reverse), _by_time(b_k, 2, reverse), _masks(resets_k, 2, BLOCK, reverse)
    # What blocks end with if they begin with zero; then, from block to block, what they really end with.
    ends = torch.zeros_like(across)
    _steps([ends] * BLOCK, *inputs, ends)
    scan_into(ends, across, ends, before, any_reset, reverse=reverse)
    first = before.unsqueeze(1)
    begins = torch.cat([ends[:, 1:], first] if reverse else [first, ends[:, :-1]], dim=1)
    _steps(_by_time(out_k, 2, reverse), *inputs, begins)
    if rest:
        left = slice(0, rest) if reverse else slice(length - rest, length)
        last = ends[:, 0 if reverse else -1]
        _one_pass(out[:, left], a[:, left], b[:, left], last, None if reset is None else reset[:, left], reverse)


def _one_pass(out: Tensor, a: Tensor, b: Tensor, before: Tensor, reset: Tensor | None, reverse: bool) -> None:
    views = _by_time(out, 1, reverse), _by_time(a, 1, reverse), _by_time(b, 1, reverse)
    _steps(*views, _masks(reset, 1, b.shape[1], reverse), before)


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
    if reset.device.type != "cpu":
        return masks
    needed = reset.flatten(0, dim - 1).any(0).tolist()
    return [mask if any_reset else None for mask, any_reset in zip(masks, needed[:: -1 if reverse else 1], strict=True)]
