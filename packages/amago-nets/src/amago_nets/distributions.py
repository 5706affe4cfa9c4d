"""Action distributions built from the output of an actor head.

All sampling takes an optional `torch.Generator`, so that a run is reproducible without touching global state.

Dimensions: `A` action size, `P` distribution parameters. `...` stands for any leading axes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import register
from .specs import ActionKind
from .validation import check_float

_LOG_2 = math.log(2.0)
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_ACTION_LIMIT = 0.99
_QUADRATURE_POINTS = 129
_QUADRATURE_WIDTH = 6.0


class PolicyDistribution(ABC):
    """A batch of distributions over actions."""

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws one action for each distribution, without gradient.

        Args:
            generator: source of randomness on the device of the parameters; None is the global one.

        Returns:
            Actions: `[...]` int64 if discrete, else `[..., A]`.
        """

    @abstractmethod
    def rsample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws one action for each distribution, differentiable in the parameters.

        Args:
            generator: source of randomness on the device of the parameters; None is the global one.

        Returns:
            `[..., A]` actions; one-hot if discrete.
        """

    @abstractmethod
    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability, or log-density, of whole actions.

        Args:
            action: `[...]` integers if discrete, else `[..., A]`; may have further leading axes.

        Returns:
            `[...]`.
        """

    @property
    @abstractmethod
    def mode(self) -> Tensor:
        """Greedy action, shaped like `sample()`."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Expected action, `[..., A]`; the probabilities if discrete."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """Entropy in nats, `[...]`."""


@dataclass(frozen=True, kw_only=True)
class DistributionConfig(ABC):
    """Base class of distribution configs.

    Attributes:
        action_kind: kind of action this is for, see `ActionSpec`.
        differentiable: whether expectations under the distribution can be differentiated in its parameters.
    """

    registry_kind: ClassVar[str] = "distribution"
    action_kind: ClassVar[ActionKind]
    differentiable: ClassVar[bool]

    @abstractmethod
    def param_size(self, action_size: int) -> int:
        """Number of parameters `P` for actions of size `A`.

        Args:
            action_size: `A`, see `ActionSpec.size`.

        Returns:
            `P`.
        """

    @abstractmethod
    def build(self, params: Tensor) -> PolicyDistribution:
        """Makes distributions from network outputs.

        Args:
            params: `[..., P]` unconstrained.

        Returns:
            Distributions with batch shape `[...]`.
        """


@register("discrete")
@dataclass(frozen=True, kw_only=True)
class DiscreteConfig(DistributionConfig):
    """Options of `Discrete`.

    Attributes:
        clip_prob_low: probabilities are raised to at least this, before they are renormalised.
        clip_prob_high: probabilities are lowered to at most this, before they are renormalised.

    Raises:
        ValueError: unless `0 <= clip_prob_low < clip_prob_high <= 1`.
    """

    action_kind: ClassVar[ActionKind] = "discrete"
    differentiable: ClassVar[bool] = True

    clip_prob_low: float = 0.001
    clip_prob_high: float = 0.99

    def __post_init__(self) -> None:
        check_float("clip_prob_low", self.clip_prob_low, low=0.0, high=1.0)
        check_float("clip_prob_high", self.clip_prob_high, low=0.0, high=1.0)
        if self.clip_prob_low >= self.clip_prob_high:
            raise ValueError(
                f"clip_prob_low={self.clip_prob_low!r} is not allowed; "
                f"give less than clip_prob_high={self.clip_prob_high!r}"
            )

    def param_size(self, action_size: int) -> int:
        """One logit for each action; see the base class."""
        return action_size

    def build(self, params: Tensor) -> Discrete:
        """Makes distributions from logits `[..., A]`; see the base class."""
        return Discrete(params, clip_prob_low=self.clip_prob_low, clip_prob_high=self.clip_prob_high)


class Discrete(PolicyDistribution):
    """Categorical with clipped and renormalised probabilities.

    `q = clip(p, low, high) / sum(clip(p, low, high))` with `p = softmax(logits)`: no action ever dies out. A clipped
    entry passes no gradient.

    Args:
        logits: `[..., A]`.
        clip_prob_low: lower clip.
        clip_prob_high: upper clip.
        temperature: of the relaxed gradient of `rsample`.

    Attributes:
        probs: `[..., A]` probabilities `q`, at least float32.
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        clip_prob_low: float = 0.001,
        clip_prob_high: float = 0.99,
        temperature: float = 0.5,
    ) -> None:
        self.logits = _at_least_float32(logits)
        self.temperature = temperature
        clipped = self.logits.softmax(dim=-1).clamp(clip_prob_low, clip_prob_high)
        self.probs = clipped / clipped.sum(dim=-1, keepdim=True)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws actions `[...]` int64 by inverting the distribution function; see the base class."""
        with torch.no_grad():
            cdf = self.probs.cumsum(dim=-1)
            u = torch.rand(cdf.shape[:-1], generator=generator, dtype=cdf.dtype, device=cdf.device)
            # Scaled by the last entry, which rounding keeps from being exactly 1; without that entry the
            # result cannot run past the last action.
            return ((u.unsqueeze(-1) * cdf[..., -1:]) >= cdf[..., :-1]).sum(dim=-1)

    def rsample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws one-hot actions `[..., A]` with straight-through Gumbel-softmax gradients; see the base class.

        Source: Jang et al. (2017), "Categorical Reparameterization with Gumbel-Softmax".
        """
        tiny = torch.finfo(self.probs.dtype).tiny
        u = torch.rand(self.probs.shape, generator=generator, dtype=self.probs.dtype, device=self.probs.device)
        gumbel = -(-u.clamp_min(tiny).log()).clamp_min(tiny).log()
        return straight_through(self._log_probs() + gumbel, self.temperature)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of actions `[...]`.

        Args:
            action: `[...]` integers, broadcast against the batch shape. -1 (no action) is read as action 0, so that
                padding needs no care here; the caller masks the result.

        Returns:
            `[...]`.
        """
        index = action.clamp_min(0).long()
        shape = torch.broadcast_shapes(index.shape, self.probs.shape[:-1])
        probs = self.probs.expand(*shape, -1)
        return _safe_log(probs.gather(-1, index.expand(shape).unsqueeze(-1)).squeeze(-1))

    @property
    def mode(self) -> Tensor:
        """Likeliest action, `[...]` int64."""
        return self.logits.argmax(dim=-1)

    @property
    def mean(self) -> Tensor:
        """Expected one-hot action `[..., A]`, which is `probs`."""
        return self.probs

    def entropy(self) -> Tensor:
        """Exact entropy in nats, `[...]`."""
        return -(self.probs * self._log_probs()).sum(dim=-1)

    def _log_probs(self) -> Tensor:
        return _safe_log(self.probs)


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
        if params.shape[-1] % 2:
            raise ValueError(f"params.shape={tuple(params.shape)} is not allowed; the last axis must be even")
        loc, raw = params.chunk(2, dim=-1)
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
        self.loc = _at_least_float32(loc)
        half_range = 0.5 * (log_std_high - log_std_low)
        self.log_std = log_std_low + half_range * (_at_least_float32(raw).tanh() + 1.0)
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
        """
        x = torch.atanh(action.to(self.loc.dtype).clamp(-_ACTION_LIMIT, _ACTION_LIMIT))
        gaussian = -0.5 * ((x - self.loc) / self.std).square() - self.log_std - _HALF_LOG_2PI
        return (gaussian - _log_tanh_slope(x)).sum(dim=-1)

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
        slope = (_log_tanh_slope(x) * weights).sum(dim=-1)
        return (self.log_std + (0.5 + _HALF_LOG_2PI) + slope).sum(dim=-1)

    def _quadrature(self) -> tuple[Tensor, Tensor]:
        """Points `[..., A, Q]` before the tanh and weights `[Q]`: the trapezoid rule, exact enough under a Gaussian."""
        eps = torch.linspace(
            -_QUADRATURE_WIDTH, _QUADRATURE_WIDTH, _QUADRATURE_POINTS, dtype=self.loc.dtype, device=self.loc.device
        )
        weights = (-0.5 * eps.square()).softmax(dim=0)
        return self.loc.unsqueeze(-1) + self.std.unsqueeze(-1) * eps, weights


def _log_tanh_slope(x: Tensor) -> Tensor:
    """`ln(1 - tanh(x)^2)` without cancellation; any shape."""
    return 2.0 * (_LOG_2 - x - F.softplus(-2.0 * x))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _safe_log(probs: Tensor) -> Tensor:
    """Logarithm that stays finite at 0, which only occurs when the lower clip is 0."""
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
