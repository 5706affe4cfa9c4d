"""Choices among discrete actions that gradients can pass.

Dimensions: `A` action size. `...` stands for any leading axes.

Source: Jang et al. (2017), "Categorical Reparameterization with Gumbel-Softmax".
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import IndexedDistribution, PolicyDistribution


def straight_through(scores: Tensor, temperature: float) -> Tensor:
    """One-hot of the largest score, with the gradient of a softmax.

    Args:
        scores: `[..., A]`, for example log-probabilities plus Gumbel noise.
        temperature: of the softmax, > 0.

    Returns:
        `[..., A]` one-hot in value; differentiates like `softmax(scores / temperature)`.
    """
    soft = (scores / temperature).softmax(dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
    # In this order the value is exactly one-hot: soft - soft is exactly 0.
    return hard + (soft - soft.detach())


def gumbel_one_hot(log_probs: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Draws one-hot vectors with straight-through gradients.

    Args:
        log_probs: `[..., A]`.
        temperature: of the relaxed gradient, > 0.
        generator: source of randomness on the device of `log_probs`; None is the global one.

    Returns:
        `[..., A]` one-hot in value.
    """
    tiny = torch.finfo(log_probs.dtype).tiny
    u = torch.rand(log_probs.shape, generator=generator, dtype=log_probs.dtype, device=log_probs.device)
    gumbel = -(-u.clamp_min(tiny).log()).clamp_min(tiny).log()
    return straight_through(log_probs + gumbel, temperature)


class StraightThrough(PolicyDistribution):
    """Discrete actions as continuous ones: every action is a one-hot vector, and samples can be differentiated.

    For critics that take the action as input. Gradients of `rsample` are those of a Gumbel-softmax with the temperature
    of `base`: biased, of low variance. Log-probabilities are those of the indices.

    Args:
        base: the distribution over indices, such as `Discrete` or `MultiDiscrete`.

    Attributes:
        base: the same.

    Raises:
        ValueError: if `base` is not over indices.
    """

    def __init__(self, base: IndexedDistribution) -> None:
        if not isinstance(base, IndexedDistribution):
            raise ValueError(f"base={base!r} is not allowed; give a distribution over indices, such as Discrete")
        self.base = base

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws one-hot actions `[..., A]` without gradient; see the base class."""
        with torch.no_grad():
            return self.base.rsample(generator)

    def rsample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws one-hot actions `[..., A]` with straight-through gradients; see the base class."""
        return self.base.rsample(generator)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of one-hot actions.

        Args:
            action: `[..., A]`; the largest entry counts, so that softened one-hots are scored as what they stand for.

        Returns:
            `[...]`.
        """
        return self.base.log_prob(self.base.decode(action))

    @property
    def mode(self) -> Tensor:
        """Likeliest action, one-hot `[..., A]`."""
        return self.base.encode(self.base.mode)

    @property
    def mean(self) -> Tensor:
        """Expected one-hot action `[..., A]`, which are the probabilities."""
        return self.base.mean

    def entropy(self) -> Tensor:
        """Entropy of the indices in nats, `[...]`."""
        return self.base.entropy()
