"""Returns as they are defined, transition by transition; differentiable.

Dimensions: `B` batch, `T` transitions, `G` discounts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Transitions


def going_on(terminated: Tensor, truncated: Tensor | None, mask: Tensor) -> Tensor:
    """Where a sum may go on to the next transition.

    Args:
        terminated: `[B, T]` bool.
        truncated: `[B, T]` bool or None.
        mask: `[B, T]` bool.

    Returns:
        `[B, T]` bool; False at ends of episodes, at the end of the window and before a masked transition.
    """
    ended = terminated if truncated is None else terminated | truncated
    follows = torch.zeros_like(mask)
    follows[:, :-1] = mask[:, 1:]
    return follows & ~ended


def n_step_reference(transitions: Transitions, n: int) -> Tensor:
    """n-step targets.

    Args:
        transitions: the inputs, with values.
        n: horizon in transitions.

    Returns:
        `[B, T, G]`.
    """
    rewards, values, gammas, goes_on = _cleaned(transitions)
    length = rewards.shape[1]
    targets = []
    for t in range(length):
        total, bootstrap = torch.zeros_like(values[:, t]), torch.zeros_like(values[:, t])
        discount, within = torch.ones_like(gammas), torch.ones_like(goes_on[:, t])
        for i in range(t, min(t + n, length)):
            total = total + discount * torch.where(within, rewards[:, i], 0.0)
            discount = discount * gammas
            bootstrap = torch.where(within, discount * values[:, i], bootstrap)
            within = within & goes_on[:, i]
        targets.append(total + bootstrap)
    return torch.stack(targets, dim=1)


def lambda_reference(transitions: Transitions, lambda_: float) -> Tensor:
    """TD(lambda) returns.

    Args:
        transitions: the inputs, with values.
        lambda_: weight of longer returns.

    Returns:
        `[B, T, G]`.
    """
    rewards, values, gammas, goes_on = _cleaned(transitions)
    returns: list[Tensor] = []
    for t in reversed(range(rewards.shape[1])):
        later = torch.where(goes_on[:, t], returns[-1], values[:, t]) if returns else values[:, t]
        returns.append(rewards[:, t] + gammas * ((1.0 - lambda_) * values[:, t] + lambda_ * later))
    return torch.stack(returns[::-1], dim=1)


def discounted_reference(transitions: Transitions) -> Tensor:
    """Discounted returns.

    Args:
        transitions: the inputs, with values or without.

    Returns:
        `[B, T, G]`.
    """
    rewards, values, gammas, goes_on = _cleaned(transitions)
    returns: list[Tensor] = []
    for t in reversed(range(rewards.shape[1])):
        later = torch.where(goes_on[:, t], returns[-1], values[:, t]) if returns else values[:, t]
        returns.append(rewards[:, t] + gammas * later)
    return torch.stack(returns[::-1], dim=1)


def _cleaned(transitions: Transitions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards `[B, T, 1]`, values `[B, T, G]`, zero where they do not count, `gammas`, and `going_on` `[B, T, 1]`."""
    rewards, terminated, truncated, values, gammas, mask = transitions.flat()
    goes_on = going_on(terminated, truncated, mask).unsqueeze(-1)
    if values is None:
        values = torch.zeros_like(rewards.unsqueeze(-1) * gammas)
    values = torch.where((mask & ~terminated).unsqueeze(-1), values, 0.0)
    return torch.where(mask, rewards, 0.0).unsqueeze(-1), values, gammas, goes_on
