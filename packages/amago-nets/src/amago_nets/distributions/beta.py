"""Continuous actions from Beta distributions.

Dimensions: `A` action size. `...` stands for any leading axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register
from ..specs import ActionKind
from .base import ACTION_LIMIT, DistributionConfig, PolicyDistribution, at_least_float32, check_action, halves

_LOG_2 = math.log(2.0)
# Above 1, so that there is one peak and it lies inside.
_MIN_CONCENTRATION = 1.0001


@register("beta")
@dataclass(frozen=True, kw_only=True)
class BetaConfig(DistributionConfig):
    """`Beta` has no options."""

    action_kind: ClassVar[ActionKind] = "continuous"
    differentiable: ClassVar[bool] = True

    def param_size(self, action_size: int) -> int:
        """Two raw concentrations for each dimension; see the base class."""
        return 2 * action_size

    def build(self, params: Tensor) -> Beta:
        """Makes distributions from `[..., 2 A]` (raw alphas, then raw betas); see the base class."""
        return Beta(*halves(params))


class Beta(PolicyDistribution):
    """Independent Beta distributions stretched to [-1, 1], with one peak each.

    `alpha = softplus(raw_alpha) + 1.0001`, beta likewise; action `2 y - 1` with `y ~ Beta(alpha, beta)`. Densities are
    taken at the action clipped to [-0.99, 0.99].

    Args:
        raw_alpha: `[..., A]`.
        raw_beta: `[..., A]`.

    Attributes:
        alpha: `[..., A]`.
        beta: `[..., A]`.

    Source: Chou et al. (2017), "Improving Stochastic Policy Gradients in Continuous Control with Deep Reinforcement
    Learning using the Beta Distribution".
    """

    def __init__(self, raw_alpha: Tensor, raw_beta: Tensor) -> None:
        self.alpha = F.softplus(at_least_float32(raw_alpha)) + _MIN_CONCENTRATION
        self.beta = F.softplus(at_least_float32(raw_beta)) + _MIN_CONCENTRATION

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws actions `[..., A]` without gradient; see the base class."""
        with torch.no_grad():
            return self.rsample(generator)

    def rsample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws actions `[..., A]`, differentiable in both concentrations by implicit reparametrisation.

        A Beta is the share of one Gamma in the sum of two. See the base class.

        Source: Figurnov et al. (2018), "Implicit Reparameterization Gradients".
        """
        # The only sampler of Gamma in torch that takes a generator; it differentiates, on every device.
        both = torch._standard_gamma(torch.stack([self.alpha, self.beta]), generator=generator)
        first, second = both.unbind(0)
        return (first - second) / (first + second)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of actions.

        Args:
            action: `[..., A]` in [-1, 1]; may have further leading axes.

        Returns:
            `[...]`, summed over `A`.

        Raises:
            ValueError: if the last axis is not `A`.
        """
        check_action(action, self.alpha.shape[-1])
        a = action.to(self.alpha.dtype).clamp(-ACTION_LIMIT, ACTION_LIMIT)
        up, down = torch.log1p(a) - _LOG_2, torch.log1p(-a) - _LOG_2
        return ((self.alpha - 1.0) * up + (self.beta - 1.0) * down - self._log_norm() - _LOG_2).sum(dim=-1)

    @property
    def mode(self) -> Tensor:
        """Greedy action `[..., A]`: the mean, which moves less than the peak where the density is flat."""
        return self.mean

    @property
    def mean(self) -> Tensor:
        """Expected action `[..., A]`."""
        return (self.alpha - self.beta) / (self.alpha + self.beta)

    def entropy(self) -> Tensor:
        """Exact differential entropy in nats `[...]`, summed over `A`."""
        total = self.alpha + self.beta
        digamma = torch.special.digamma
        slopes = (self.alpha - 1.0) * digamma(self.alpha) + (self.beta - 1.0) * digamma(self.beta)
        return (self._log_norm() - slopes + (total - 2.0) * digamma(total) + _LOG_2).sum(dim=-1)

    def _log_norm(self) -> Tensor:
        """Logarithm of the Beta function, `[..., A]`."""
        return self.alpha.lgamma() + self.beta.lgamma() - (self.alpha + self.beta).lgamma()
