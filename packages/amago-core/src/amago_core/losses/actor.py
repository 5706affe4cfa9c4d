"""Actor losses: up the critic's gradient (online), and filtered behaviour cloning (offline).

Dimensions: B batch, T transitions, C critics, G discounts.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["advantages", "offline_loss", "online_loss"]


def online_loss(values: Tensor) -> Tensor:
    """Deterministic-policy-gradient loss: minus the smallest of all critics' values.

    Args:
        values: `[..., C, G]` float, V_c(s_t) of the current policy through frozen critics, normalised by PopArt and
            differentiable with respect to the policy.

    Returns:
        `[..., G]` float32.

    Raises:
        ValueError: if `values` has fewer than two dimensions.

    Source: Fujimoto et al., "Addressing Function Approximation Error in Actor-Critic Methods" (ICML 2018).
    """
    if values.ndim < 2:
        raise ValueError(f"values: expected shape [..., C, G], got {tuple(values.shape)}")
    return -values.float().amin(-2)


def advantages(q_values: Tensor, state_values: Tensor) -> Tensor:
    """Advantage of the actions taken, `mean_C Q(s, a) - mean_C V(s)`, without gradient.

    Args:
        q_values: `[..., C, G]` float, Q(s, a) of the stored actions.
        state_values: `[..., C, G]` float, V(s) of the current policy.

    Returns:
        `[..., G]` float32.

    Raises:
        ValueError: if the shapes disagree.
    """
    if q_values.shape != state_values.shape or q_values.ndim < 2:
        raise ValueError(
            f"state_values: got shape {tuple(state_values.shape)} for q_values {tuple(q_values.shape)}; expected two "
            "equal shapes [..., C, G]"
        )
    return q_values.detach().float().mean(-2) - state_values.detach().float().mean(-2)


def offline_loss(log_prob: Tensor, weights: Tensor) -> Tensor:
    """Filtered behaviour cloning, `-f(advantage) * log pi(a|s)`.

    Args:
        log_prob: `[B, T, G]` float, log-probability of the stored actions.
        weights: `[B, T, G]` float, from a filter; finite also under the padding. No gradient flows into it.

    Returns:
        `[B, T, G]` float32.

    Raises:
        ValueError: if the shapes disagree.

    Source: Wang et al., "Critic Regularized Regression" (NeurIPS 2020).
    """
    if log_prob.shape != weights.shape:
        raise ValueError(
            f"weights: got shape {tuple(weights.shape)}, expected that of log_prob {tuple(log_prob.shape)}"
        )
    return -(weights.detach().float() * log_prob.float())
