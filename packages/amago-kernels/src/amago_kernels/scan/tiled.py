"""The selective scan tile by tile: what has `N` numbers per channel and timestep exists for a few timesteps only.

States between chunks of timesteps are kept, and the backward pass computes the others again.

Dimensions: `B` batch, `L` timesteps, `D` channels, `N` states per channel, `K` chunks; `G` lanes and `T` timesteps of a
tile. Inside of this module states are `[..., N, D]`: the longer axis runs along memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..inputs import drop_idle
from .blocked import WIDE, scan_into

# Timesteps of a tile and numbers in one of its buffers. On a CPU a few buffers fit into the second-level cache, and
# tiles are longer where calls cost more than numbers; on an accelerator they are as large as memory bears, because
# every call costs a launch.
_CPU_TILE = (16, 1 << 18)
_LONG_CPU_TILE = (128, 1 << 18)
_ACCELERATOR_TILE = (64, 1 << 24)
_Place = tuple[slice, slice]


@torch.library.custom_op(
    "amago_kernels::selective_scan_tiled",
    mutates_args=(),
    schema="(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor state, Tensor? reset)"
    " -> (Tensor, Tensor, Tensor)",
)
def tiled_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t` and `y_t = C_t . h_t`; all inputs in one dtype.

    Args:
        u: `[B, L, D]`.
        delta: `[B, L, D]`.
        A: `[D, N]`.
        B: `[B, L, N]`.
        C: `[B, L, N]`.
        state: `[B, D, N]`.
        reset: `[B, L]` bool or None.

    Returns:
        `y` `[B, L, D]`, the last state `[B, D, N]`, and the state before each chunk `[B, K, N, D]`.
    """
    y, last, starts = _outputs(u, A)
    reset = drop_idle(reset)
    rates = A.t().contiguous()
    lanes_of, steps_of, buffers = _tiles(u, A, 2)
    with torch.autocast(u.device.type, enabled=False):
        for lanes in lanes_of:
            before = state[lanes].transpose(1, 2)
            for k, steps in enumerate(steps_of):
                at = (lanes, steps)
                starts[lanes, k] = before
                decay, h = buffers[:, : before.shape[0], : steps.stop - steps.start]
                _states(decay, h, u[at] * delta[at], delta[at], rates, B[at], starts[lanes, k], _at(reset, at))
                y[at] = torch.matmul(C[at].unsqueeze(2), h).squeeze(2)
                before = h[:, -1]
            last[lanes] = before.transpose(1, 2)
    return y, last, starts


@tiled_scan.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(u, A)


@torch.library.custom_op(
    "amago_kernels::selective_scan_tiled_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor grad_last, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor starts,"
    " Tensor? reset) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _tiled_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `u`, `delta`, `A`, `B`, `C` and the initial state."""
    grads = _gradients(u, A, B)
    grad_u, grad_delta, grad_a, grad_b, grad_c, grad_state = grads
    reset = drop_idle(reset)
    grad_rates = torch.zeros(A.shape[1], A.shape[0], dtype=u.dtype, device=u.device)
    rates = A.t().contiguous()
    lanes_of, steps_of, buffers = _tiles(u, A, 4)
    with torch.autocast(u.device.type, enabled=False):
        for lanes in lanes_of:
            carry = grad_last[lanes].transpose(1, 2)
            for k in range(len(steps_of) - 1, -1, -1):
                at = (lanes, steps_of[k])
                start, resets, step_sizes, dy = starts[lanes, k], _at(reset, at), delta[at], grad_y[at]
                decay, h, grad_h, work = buffers[:, : dy.shape[0], : dy.shape[1]]
                scaled = u[at] * step_sizes
                _states(decay, h, scaled, step_sizes, rates, B[at], start, resets)
                _state_gradients(grad_h, decay, C[at], dy, carry, resets)
                grad_c[at] = torch.matmul(h, dy.unsqueeze(3)).squeeze(3)
                grad_b[at] = torch.matmul(grad_h, scaled.unsqueeze(3)).squeeze(3)
                grad_scaled = torch.matmul(B[at].unsqueeze(2), grad_h).squeeze(2)
                grad_u[at] = grad_scaled * step_sizes
                # What the exponent `delta A` gets: d(h_t) * h_{t-1} * decay_t.
                grad_h.mul_(decay)
                if resets is not None:
                    grad_h.masked_fill_(resets[:, :, None, None], 0.0)
                carry = grad_h[:, 0].clone()
                grad_h[:, 1:].mul_(h[:, :-1])
                grad_h[:, 0].mul_(start if resets is None else torch.where(resets[:, :1, None], 0.0, start))
                torch.add(torch.mul(grad_h, rates, out=work).sum(2), grad_scaled * u[at], out=grad_delta[at])
                grad_rates += torch.mul(grad_h, step_sizes.unsqueeze(2), out=work).sum((0, 1))
            grad_state[lanes] = carry.transpose(1, 2)
    grad_a.copy_(grad_rates.t())
    return grads


@_tiled_backward.register_fake
def _(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(u, A, B)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    u, delta, A, B, C, _, reset = inputs
    ctx.save_for_backward(u, delta, A, B, C, output[2], reset)


def _differentiate(ctx: Any, grad_y: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_tiled_backward(grad_y, grad_last, *ctx.saved_tensors), None


tiled_scan.register_autograd(_differentiate, setup_context=_save)


def _states(
    decay: Tensor,
    h: Tensor,
    scaled: Tensor,
    delta: Tensor,
    rates: Tensor,
    B: Tensor,
    before: Tensor,
    reset: Tensor | None,
) -> None:
    """Fills two buffers `[G, T, N, D]` with the decays and the states of a tile; `scaled` is `delta u`."""
    torch.mul(delta.unsqueeze(2), rates, out=decay).exp_()
    torch.mul(scaled.unsqueeze(2), B.unsqueeze(3), out=h)
    scan_into(h.flatten(2), decay.flatten(2), h.flatten(2), before.flatten(1), reset)


def _state_gradients(
    grad_h: Tensor, decay: Tensor, C: Tensor, grad_y: Tensor, carry: Tensor, reset: Tensor | None
) -> None:
    """Fills a buffer with the gradients of a tile's states; `carry` `[G, N, D]` is what comes from later timesteps."""
    torch.mul(C.unsqueeze(3), grad_y.unsqueeze(2), out=grad_h)
    grad_h[:, -1] += carry
    earlier = grad_h[:, :-1].flatten(2)
    later = None if reset is None else reset[:, 1:]
    scan_into(earlier, decay[:, 1:].flatten(2), earlier, grad_h[:, -1].flatten(1), later, reverse=True)


def _tile_size(u: Tensor, A: Tensor) -> tuple[int, int]:
    if u.device.type != "cpu":
        return _ACCELERATOR_TILE
    return _LONG_CPU_TILE if u.shape[0] * A.numel() < WIDE else _CPU_TILE


def _tiles(u: Tensor, A: Tensor, count: int) -> tuple[list[slice], list[slice], Tensor]:
    """Slices over lanes and over timesteps, and `count` buffers `[G, T, N, D]` that hold any of the tiles."""
    batch, length, _ = u.shape
    chunk, numbers = _tile_size(u, A)
    chunk = min(chunk, length)
    lanes = max(1, min(batch, numbers // (chunk * A.numel())))
    lanes_of = [slice(first, min(first + lanes, batch)) for first in range(0, batch, lanes)]
    steps_of = [slice(first, min(first + chunk, length)) for first in range(0, length, chunk)]
    shape = (count, lanes, chunk, A.shape[1], A.shape[0])
    return lanes_of, steps_of, torch.empty(shape, dtype=u.dtype, device=u.device)


def _outputs(u: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chunk = _tile_size(u, A)[0]
    batch, length, channels = u.shape
    states = A.shape[1]
    y, last = u.new_empty(u.shape), u.new_empty(batch, channels, states)
    return y, last, u.new_empty(batch, (length + chunk - 1) // chunk, states, channels)


def _gradients(u: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    state = (u.shape[0], *A.shape)
    shapes = (u.shape, u.shape, A.shape, B.shape, B.shape, state)
    grad_u, grad_delta, grad_a, grad_b, grad_c, grad_state = (u.new_empty(shape) for shape in shapes)
    return grad_u, grad_delta, grad_a, grad_b, grad_c, grad_state


def _at(reset: Tensor | None, at: _Place) -> Tensor | None:
    return None if reset is None else reset[at]
