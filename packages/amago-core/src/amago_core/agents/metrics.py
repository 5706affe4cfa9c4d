"""What an agent logs about a batch beyond its losses. Everything is a finite scalar.

Dimensions: `...` rows of transitions (`[B, T]` or `[1, N]`), C critics, G discounts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amago_core.agents.rows import TransitionRows
from amago_core.losses.popart import PopArtLayer
from amago_nets.distributions import PolicyDistribution
from amago_offline.batch import Batch


@dataclass(frozen=True)
class AgentTerms:
    """Intermediate results of `Agent.loss`; value tensors are raw critic outputs, detached.

    Attributes:
        policy: distribution over actions, batch dimensions `[..., G]`.
        log_prob: `[..., G]` of the action taken.
        actor_loss: `[B, T, G]`.
        critic_loss: `[B, T, C, G]`, None when no critic is trained; so are the fields below.
        targets: `[..., G]` TD targets in multiplied reward units.
        q_taken: `[..., C, G]`.
        v_policy: `[..., C, G]`.
        advantage: `[..., G]` in normalised units.
        weights: `[..., G]` of the behaviour-cloning term.
    """

    policy: PolicyDistribution
    log_prob: Tensor
    actor_loss: Tensor
    critic_loss: Tensor | None = None
    targets: Tensor | None = None
    q_taken: Tensor | None = None
    v_policy: Tensor | None = None
    advantage: Tensor | None = None
    weights: Tensor | None = None


def detailed_metrics(
    batch: Batch,
    rows: TransitionRows,
    terms: AgentTerms,
    *,
    popart: PopArtLayer,
    gammas: tuple[float, ...],
    reward_multiplier: float,
) -> dict[str, Tensor]:
    """Metrics of one batch, rewards and values in the environment's own units.

    Args:
        batch: the windows.
        rows: their real transitions.
        terms: what the loss computed of them.
        popart: the value normalisation.
        gammas: the G discounts.
        reward_multiplier: what values were multiplied by.

    Returns:
        Name to `[]` float tensor.
    """
    valid = rows.mask
    rewards = batch.rewards[batch.mask]
    metrics = {
        "batch/timesteps": torch.tensor(float(batch.mask.numel())),
        "batch/transitions": batch.mask.sum().float(),
        "batch/reward_mean": rewards.mean(),
        "batch/reward_min": rewards.min(),
        "batch/reward_max": rewards.max(),
        "batch/terminated_windows": (batch.terminations & batch.mask).any(1).sum().float(),
        "policy/log_prob_mean": terms.log_prob[valid].mean(),
        "policy/log_prob_min": terms.log_prob[valid].min(),
        "policy/log_prob_max": terms.log_prob[valid].max(),
        "policy/entropy": terms.policy.entropy()[..., -1][valid].mean(),
    }
    if hasattr(terms.policy, "probs"):
        acting = terms.policy.probs[..., -1, :][valid]
        metrics["policy/highest_prob"] = acting.amax(-1).mean()
        metrics["policy/lowest_prob"] = acting.amin(-1).mean()
    if terms.q_taken is not None:
        metrics.update(_value_metrics(terms, valid, popart, gammas, reward_multiplier))
    return metrics


def _value_metrics(
    terms: AgentTerms, valid: Tensor, popart: PopArtLayer, gammas: tuple[float, ...], scale: float
) -> dict[str, Tensor]:
    assert terms.targets is not None and terms.advantage is not None and terms.weights is not None
    assert terms.q_taken is not None
    q = popart.denormalize(terms.q_taken)[valid] / scale
    targets = terms.targets[valid] / scale
    advantage, weights = terms.advantage[valid], terms.weights[valid]
    metrics = {
        "td_target/min": targets.min(),
        "td_target/max": targets.max(),
        "td_target/mean": targets[:, -1].mean(),
        "q/ensemble_std": terms.q_taken[valid].std(1).mean() if q.shape[1] > 1 else q.new_zeros(()),
        "filter/approved": 100.0 * (advantage > 0).float().mean(),
        "filter/mean": weights.mean(),
        "filter/max": weights.max(),
        "filter/min": weights.min(),
        **{f"popart/{name}": value for name, value in popart.summary().items()},
    }
    for index, gamma in enumerate(gammas):
        metrics[f"q/mean_gamma_{gamma:g}"] = q[..., index].mean()
    return metrics
