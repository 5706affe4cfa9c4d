"""Continuous actions from mixtures of Gaussians squashed by tanh.

Dimensions: `A` action size, `M` modes, `Q` quadrature points. `...` stands for any leading axes.
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
from ..validation import check_int
from .base import DistributionConfig, PolicyDistribution, at_least_float32, check_action, draw_index, not_differentiable

_LOG_2 = math.log(2.0)
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_MIN_STD = 1e-4
_EPS = 1e-6
_QUADRATURE_POINTS = 33
_QUADRATURE_WIDTH = 5.0
_BUMP_WIDTH = 7.0


@register("gmm")
@dataclass(frozen=True, kw_only=True)
class GMMConfig(DistributionConfig):
    """Options of `GMM`.

    Attributes:
        num_modes: number of modes `M`.

    Raises:
        ValueError: if the field is not allowed.
    """

    action_kind: ClassVar[ActionKind] = "continuous"
    differentiable: ClassVar[bool] = False

    num_modes: int = 5

    def __post_init__(self) -> None:
        check_int("num_modes", self.num_modes)

    def param_size(self, action_size: int) -> int:
        """A mean and a raw scale for each mode and dimension, a logit for each mode; see the base class."""
        return 2 * self.num_modes * action_size + self.num_modes

    def build(self, params: Tensor) -> GMM:
        """Makes distributions from `[..., 2 M A + M]`: means and raw scales (mode by mode), then logits.

        See the base class.
        """
        modes = self.num_modes
        size, rest = divmod(params.shape[-1] - modes, 2 * modes)
        if rest or size < 1:
            raise ValueError(
                f"params.shape={tuple(params.shape)} is not allowed; give [..., 2 * {modes} * A + {modes}]"
            )
        means, raw, logits = params.split([modes * size, modes * size, modes], dim=-1)
        return GMM(means.unflatten(-1, (modes, size)), raw.unflatten(-1, (modes, size)), logits)


class GMM(PolicyDistribution):
    """A mixture of diagonal Gaussians, squashed into (-1, 1) by tanh. Not differentiable: there is no `rsample`.

    `sigma = softplus(raw) + 1e-4`, without upper bound.

    Args:
        loc: `[..., M, A]` means before the tanh.
        raw: `[..., M, A]` raw scales.
        logits: `[..., M]` of the modes.

    Attributes:
        loc: `[..., M, A]`.
        std: `[..., M, A]`.
        log_weights: `[..., M]` log-probabilities of the modes.
    """

    def __init__(self, loc: Tensor, raw: Tensor, logits: Tensor) -> None:
        self.loc = at_least_float32(loc)
        self.std = F.softplus(at_least_float32(raw)) + _MIN_STD
        self.log_weights = at_least_float32(logits).log_softmax(dim=-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws actions `[..., A]` without gradient; see the base class."""
        with torch.no_grad():
            mode = draw_index(self.log_weights.exp(), generator)
            loc, std = self._pick(self.loc, mode), self._pick(self.std, mode)
            eps = torch.randn(loc.shape, generator=generator, dtype=loc.dtype, device=loc.device)
            return torch.addcmul(loc, std, eps).tanh()

    def rsample(self, generator: torch.Generator | None = None) -> Tensor:
        """Refuses; see the base class."""
        raise not_differentiable(self)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of actions.

        Args:
            action: `[..., A]` in [-1, 1]; may have further leading axes.

        Returns:
            `[...]`. Finite at the bounds: `1 + a`, `1 - a` and `1 - a^2` are kept above 1e-6.

        Raises:
            ValueError: if the last axis is not `A`.
        """
        check_action(action, self.loc.shape[-1])
        a = action.to(self.loc.dtype)
        x = 0.5 * ((1.0 + a).clamp_min(_EPS).log() - (1.0 - a).clamp_min(_EPS).log())
        gaussian = -0.5 * ((x.unsqueeze(-2) - self.loc) / self.std).square() - self.std.log() - _HALF_LOG_2PI
        squash = (1.0 - a.square() + _EPS).log().sum(dim=-1)
        return (self.log_weights + gaussian.sum(dim=-1)).logsumexp(dim=-1) - squash

    @property
    def mode(self) -> Tensor:
        """Greedy action `[..., A]`: tanh of the mean of the likeliest mode."""
        return self._pick(self.loc, self.log_weights.argmax(dim=-1)).tanh()

    @property
    def mean(self) -> Tensor:
        """Tanh of the mean before the tanh, `[..., A]`: between the modes, not the exact expectation."""
        return (self.log_weights.exp().unsqueeze(-1) * self.loc).sum(dim=-2).tanh()

    def entropy(self) -> Tensor:
        """Lower bound of the differential entropy in nats, `[...]`.

        Exact (but for quadrature, below 0.02 per dimension) if the modes coincide or are far apart; in between it is
        too low by less than `ln M`.

        Source: Kolchinsky & Tracey (2017), "Estimating Mixture Entropy with Pairwise Distances", with Bhattacharyya
        distances; the tanh adds the mean logarithm of its slope.
        """
        weights = self.log_weights.exp()
        of_modes = (self.std.log() + (0.5 + _HALF_LOG_2PI) + mean_log_tanh_slope(self.loc, self.std)).sum(dim=-1)
        overlap = (self.log_weights.unsqueeze(-2) - self._distances()).logsumexp(dim=-1)
        return (weights * (of_modes - overlap)).sum(dim=-1)

    def _distances(self) -> Tensor:
        """Bhattacharyya distances between the modes before the tanh, `[..., M, M]`."""
        loc, log_std = self.loc, self.std.log()
        variance = self.std.square()
        both = variance.unsqueeze(-2) + variance.unsqueeze(-3)
        apart = 0.25 * (loc.unsqueeze(-2) - loc.unsqueeze(-3)).square() / both
        unlike = 0.5 * (both.log() - _LOG_2 - log_std.unsqueeze(-2) - log_std.unsqueeze(-3))
        return (apart + unlike).sum(dim=-1)

    @staticmethod
    def _pick(per_mode: Tensor, mode: Tensor) -> Tensor:
        """Of `[..., M, A]` the mode `[...]`: `[..., A]`."""
        return torch.take_along_dim(per_mode, mode[..., None, None], dim=-2).squeeze(-2)


def mean_log_tanh_slope(loc: Tensor, std: Tensor) -> Tensor:
    """Mean of `ln(1 - tanh(x)^2)` for Gaussian x.

    It is `2 (ln 2 - |x| - ln(1 + e^{-2|x|}))`: the mean of |x| is known, the rest is a bump that quadrature can do.

    Args:
        loc: means, any shape.
        std: standard deviations, the same shape.

    Returns:
        The means, of that shape.
    """
    ratio = loc / std
    absolute = math.sqrt(2.0 / math.pi) * std * (-0.5 * ratio.square()).exp() + loc * torch.erf(ratio * math.sqrt(0.5))
    # Where the Gaussian and the bump both matter; where they do not meet the piece is empty.
    reach = _QUADRATURE_WIDTH * std
    low = (loc - reach).clamp_min(-_BUMP_WIDTH)
    length = ((loc + reach).clamp_max(_BUMP_WIDTH) - low).clamp_min(0.0)
    steps = torch.linspace(0.0, 1.0, _QUADRATURE_POINTS, dtype=loc.dtype, device=loc.device)
    x = low.unsqueeze(-1) + length.unsqueeze(-1) * steps
    density = (-0.5 * ((x - loc.unsqueeze(-1)) / std.unsqueeze(-1)).square() - _HALF_LOG_2PI).exp()
    bump = ((-2.0 * x.abs()).exp().log1p() * density).sum(dim=-1) * length / (std * (_QUADRATURE_POINTS - 1))
    return 2.0 * (_LOG_2 - absolute - bump)
