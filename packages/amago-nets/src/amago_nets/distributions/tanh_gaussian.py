"""Continuous actions from Gaussians squashed by tanh.

Dimensions: `A` action size, `Q` quadrature points. `...` stands for any leading axes.
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
from ..validation import check_float
from .base import ACTION_LIMIT, DistributionConfig, PolicyDistribution, at_least_float32, check_action, halves

_LOG_2 = math.log(2.0)
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_QUADRATURE_POINTS = 129
_QUADRATURE_WIDTH = 6.0


@register("tanh_gaussian")
@dataclass(frozen=True, kw_only=True)
class TanhGaussianConfig(DistributionConfig):
    """Options of `TanhGaussian`.

    Attributes:
        log_std_low: smallest log standard deviation.
        log_std_high: largest log standard deviation.

    Raises:
        ValueError: unless both are finite and `log_std_low < log_std_high`.
    """

    action_kind: ClassVar[ActionKind] = "continuous"
    differentiable: ClassVar[bool] = True

    log_std_low: float = -5.0
    log_std_high: float = 2.0

    def __post_init__(self) -> None:
        check_float("log_std_low", self.log_std_low)
        check_float("log_std_high", self.log_std_high)
        if self.log_std_low >= self.log_std_high:
            raise ValueError(
                f"log_std_low={self.log_std_low!r} is not allowed; give less than log_std_high={self.log_std_high!r}"
            )

    def param_size(self, action_size: int) -> int:
        """A location and a raw scale for each dimension; see the base class."""
        return 2 * action_size

    def build(self, params: Tensor) -> TanhGaussian:
        """Makes distributions from `[..., 2 A]` (locations, then raw scales); see the base class."""
        loc, raw = halves(params)
        return TanhGaussian(loc, raw, log_std_low=self.log_std_low, log_std_high=self.log_std_high)


class TanhGaussian(PolicyDistribution):
    """Independent Gaussians squashed into (-1, 1) by tanh.

    `sigma = exp(low + (high - low) (tanh(raw) + 1) / 2)`, action `tanh(loc + sigma eps)`. Densities are taken at the
    action clipped to [-0.99, 0.99], because the inverse of tanh has no bound.

    Args:
        loc: `[..., A]` means before the tanh.
        raw: `[..., A]` raw scales.
        log_std_low: smallest log standard deviation.
        log_std_high: largest log standard deviation.

    Attributes:
        loc: `[..., A]`.
        log_std: `[..., A]`.
        std: `[..., A]`.

    Source: Haarnoja et al. (2018), "Soft Actor-Critic", appendix C.
    """

    def __init__(self, loc: Tensor, raw: Tensor, *, log_std_low: float = -5.0, log_std_high: float = 2.0) -> None:
        self.loc = at_least_float32(loc)
        half_range = 0.5 * (log_std_high - log_std_low)
        self.log_std = log_std_low + half_range * (at_least_float32(raw).tanh() + 1.0)
        self.std = self.log_std.exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws actions `[..., A]` without gradient; see the base class."""
        with torch.no_grad():
            return self.rsample(generator)

    def rsample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws actions `[..., A]`, differentiable in location and scale; see the base class."""
        eps = torch.randn(self.loc.shape, generator=generator, dtype=self.loc.dtype, device=self.loc.device)
        return torch.addcmul(self.loc, self.std, eps).tanh()

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of actions.

        Args:
            action: `[..., A]` in [-1, 1]; may have further leading axes.

        Returns:
            `[...]`, summed over `A`.

        Raises:
            ValueError: if the last axis is not `A`.
        """
        check_action(action, self.loc.shape[-1])
        x = torch.atanh(action.to(self.loc.dtype).clamp(-ACTION_LIMIT, ACTION_LIMIT))
        gaussian = -0.5 * ((x - self.loc) / self.std).square() - self.log_std - _HALF_LOG_2PI
        return (gaussian - log_tanh_slope(x)).sum(dim=-1)

    @property
    def mode(self) -> Tensor:
        """Greedy action `tanh(loc)`, `[..., A]`."""
        return self.loc.tanh()

    @property
    def mean(self) -> Tensor:
        """Expected action `[..., A]`, by quadrature (error below 1e-4); not the same as `mode`."""
        x, weights = self._quadrature()
        return (x.tanh() * weights).sum(dim=-1)

    def entropy(self) -> Tensor:
        """Differential entropy in nats `[...]`, summed over `A`, by quadrature (error below 1e-3 per dimension)."""
        x, weights = self._quadrature()
        slope = (log_tanh_slope(x) * weights).sum(dim=-1)
        return (self.log_std + (0.5 + _HALF_LOG_2PI) + slope).sum(dim=-1)

    def _quadrature(self) -> tuple[Tensor, Tensor]:
        """Points `[..., A, Q]` before the tanh and weights `[Q]`: the trapezoid rule, exact enough under a Gaussian."""
        eps = torch.linspace(
            -_QUADRATURE_WIDTH, _QUADRATURE_WIDTH, _QUADRATURE_POINTS, dtype=self.loc.dtype, device=self.loc.device
        )
        weights = (-0.5 * eps.square()).softmax(dim=0)
        return self.loc.unsqueeze(-1) + self.std.unsqueeze(-1) * eps, weights


def log_tanh_slope(x: Tensor) -> Tensor:
    """`ln(1 - tanh(x)^2)` without cancellation; any shape."""
    return 2.0 * (_LOG_2 - x - F.softplus(-2.0 * x))
