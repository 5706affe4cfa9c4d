"""Return targets over many discounts at once.

Dimensions: `B` batch, `T` transitions, `G` discounts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def n_step_targets(
    rewards: Tensor,
    terminated: Tensor,
    next_values: Tensor,
    gammas: Tensor,
    mask: Tensor,
    *,
    n: int = 1,
) -> Tensor:
    """n-step TD targets for every transition and discount in parallel.

    `y_t = sum_{i<k} g^i r_{t+i} + g^k V(s_{t+k})`, where k is n, or less: a terminated transition is the last one used
    and is not bootstrapped from; the sum also ends before the first masked transition, bootstrapping from where it is.

    Args:
        rewards: `[B, T]` float, environment units.
        terminated: `[B, T]` bool; True stops the bootstrap. A truncated transition is not terminated.
        next_values: `[B, T, G]` float; `[:, t]` is V(s_{t+1}).
        gammas: `[G]` float in [0, 1].
        mask: `[B, T]` bool; True is a real transition.
        n: horizon in transitions, >= 1.

    Returns:
        `[B, T, G]` in the dtype of `next_values`; undefined where `mask` is False. What lies under the mask, or in
        `next_values` under a terminated transition, never reaches a defined entry.

    Raises:
        ValueError: if `n < 1` or shapes disagree.

    Source: Sutton & Barto (2018), section 7.1.
    """
    _check(rewards, terminated, next_values, gammas, mask, n)
    horizon = min(n, rewards.shape[1])
    reward = rewards.unsqueeze(-1)
    stop = terminated.unsqueeze(-1)
    if horizon <= 1:
        return torch.where(stop, 0.0, next_values) * gammas + reward
    # follow[:, t]: the sum may go on from transition t to t+1.
    follow = torch.zeros_like(mask)
    follow[:, :-1] = mask[:, 1:]
    follow = follow.unsqueeze(-1)
    if horizon == rewards.shape[1]:
        return _to_the_end(reward, stop, next_values, gammas, follow)
    target = torch.where(stop, 0.0, next_values) * gammas + reward
    for _ in range(horizon - 1):
        shifted = torch.cat([target[:, 1:], target[:, -1:]], dim=1)
        ahead = torch.where(follow, shifted, next_values)
        target = torch.where(stop, 0.0, ahead) * gammas + reward
    return target


def _to_the_end(reward: Tensor, stop: Tensor, next_values: Tensor, gammas: Tensor, follow: Tensor) -> Tensor:
    """The same recursion when no horizon cuts it: one reverse pass over time."""
    targets = []
    ahead = next_values[:, -1]
    for t in reversed(range(next_values.shape[1])):
        ahead = torch.where(follow[:, t], ahead, next_values[:, t])
        ahead = torch.where(stop[:, t], 0.0, ahead) * gammas + reward[:, t]
        targets.append(ahead)
    return torch.stack(targets[::-1], dim=1)


def _check(rewards: Tensor, terminated: Tensor, next_values: Tensor, gammas: Tensor, mask: Tensor, n: int) -> None:
    if n < 1:
        raise ValueError(f"n={n} is not allowed; give an integer >= 1")
    if rewards.dim() != 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; give [B, T]")
    for name, tensor in (("terminated", terminated), ("mask", mask)):
        if tensor.shape != rewards.shape or tensor.dtype != torch.bool:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; give torch.bool {tuple(rewards.shape)}, like rewards"
            )
    if gammas.dim() != 1 or next_values.shape != (*rewards.shape, gammas.shape[0]):
        raise ValueError(
            f"next_values {tuple(next_values.shape)} and gammas {tuple(gammas.shape)} do not fit rewards "
            f"{tuple(rewards.shape)}; give [B, T, G] and [G]"
        )
