"""The scans as loops over timesteps: the specification of every other backend.

Dimensions: `B` batch, `L` timesteps, `D` channels, `N` states per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def multiply_pairs(x: Tensor, y: Tensor) -> Tensor:
    """Complex product of (real, imaginary) pairs.

    Args:
        x: `[..., 2]`.
        y: `[..., 2]`, broadcastable with `x`.

    Returns:
        The product, as pairs.
    """
    real = x[..., 0] * y[..., 0] - x[..., 1] * y[..., 1]
    imaginary = x[..., 0] * y[..., 1] + x[..., 1] * y[..., 0]
    return torch.stack([real, imaginary], dim=-1)


def linear_reference(a: Tensor, b: Tensor, state: Tensor, reset: Tensor | None, pairs: bool) -> Tensor:
    """`h_t = a_t h_{t-1} + b_t`, one timestep after the other.

    Args:
        a: `[B, L, D]`, or `[B, L, D, 2]` with `pairs`.
        b: like `a`.
        state: `[B, D]`, or `[B, D, 2]`.
        reset: `[B, L]` bool or None.
        pairs: the last axis holds (real, imaginary).

    Returns:
        `h`, like `b`.
    """
    states = []
    resets = None if reset is None else reset.reshape(*reset.shape, *[1] * (b.dim() - 2)).unbind(1)
    for t, (factor, term) in enumerate(zip(a.unbind(1), b.unbind(1), strict=True)):
        if resets is not None:
            state = torch.where(resets[t], 0.0, state)
        state = (multiply_pairs(factor, state) if pairs else factor * state) + term
        states.append(state)
    return torch.stack(states, dim=1)


def selective_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t` and `y_t = C_t . h_t`, one timestep after the other.

    Args:
        u: `[B, L, D]`.
        delta: `[B, L, D]`.
        A: `[D, N]`.
        B: `[B, L, N]`.
        C: `[B, L, N]`.
        state: `[B, D, N]`.
        reset: `[B, L]` bool or None.

    Returns:
        `y` `[B, L, D]` and the last state `[B, D, N]`.
    """
    outputs = []
    resets = None if reset is None else reset[:, :, None, None].unbind(1)
    for t, (u_t, delta_t, B_t, C_t) in enumerate(zip(*(x.unbind(1) for x in (u, delta, B, C)), strict=True)):
        if resets is not None:
            state = torch.where(resets[t], 0.0, state)
        decay = torch.exp(delta_t[:, :, None] * A)
        state = decay * state + (delta_t * u_t)[:, :, None] * B_t[:, None, :]
        outputs.append((state * C_t[:, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state
