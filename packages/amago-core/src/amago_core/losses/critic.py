"""Losses of the scalar critics, and how values are read from discrete ones.

Dimensions: B batch, T transitions, C critics, G discounts, A actions.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["discrete_action_values", "discrete_state_values", "squared_error"]


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Squared error of every critic against the same target.

    Args:
        pred: `[B, T, C, G]` float (or any leading dimensions), normalised predictions.
        target: `[B, T, G]` float, normalised targets; finite also under the padding. No gradient flows into it.

    Returns:
        `[B, T, C, G]` float32.

    Raises:
        ValueError: if the shapes disagree.
    """
    if pred.ndim < 2 or target.shape != pred.shape[:-2] + pred.shape[-1:]:
        raise ValueError(
            f"target: got shape {tuple(target.shape)} for predictions {tuple(pred.shape)}; expected [B, T, G] for "
            "[B, T, C, G]"
        )
    return (pred.float() - target.detach().float().unsqueeze(-2)).square()


def discrete_action_values(q_values: Tensor, actions: Tensor) -> Tensor:
    """Q(s, a) of the actions taken.

    Args:
        q_values: `[..., C, G, A]` float.
        actions: `[...]` integers; -1, which only padding may hold, reads entry 0.

    Returns:
        `[..., C, G]` float32.

    Raises:
        ValueError: if the leading dimensions disagree.
    """
    if q_values.ndim < 3 or actions.shape != q_values.shape[:-3]:
        raise ValueError(
            f"actions: got shape {tuple(actions.shape)} for q_values {tuple(q_values.shape)}; expected [...] for "
            "[..., C, G, A]"
        )
    index = actions.long().clamp(min=0)[..., None, None, None].expand(*q_values.shape[:-1], 1)
    return q_values.float().gather(-1, index).squeeze(-1)


def discrete_state_values(q_values: Tensor, probs: Tensor) -> Tensor:
    """V(s) = sum_a pi(a|s) Q(s, a), differentiable in both.

    Args:
        q_values: `[..., C, G, A]` float.
        probs: `[..., G, A]` float, one policy per discount.

    Returns:
        `[..., C, G]` float32.

    Raises:
        ValueError: if the shapes disagree.
    """
    if q_values.ndim < 3 or probs.shape != q_values.shape[:-3] + q_values.shape[-2:]:
        raise ValueError(
            f"probs: got shape {tuple(probs.shape)} for q_values {tuple(q_values.shape)}; expected [..., G, A] for "
            "[..., C, G, A]"
        )
    return torch.sum(q_values.float() * probs.float().unsqueeze(-3), dim=-1)
