"""What every action distribution offers, and what makes one from network outputs.

All sampling takes an optional `torch.Generator`, so that a run is reproducible without touching global state.

Dimensions: `A` action size, `P` distribution parameters. `...` stands for any leading axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..specs import ActionKind

# Densities of squashed actions are taken at most this far out, because the inverse of the squashing has no bound.
ACTION_LIMIT = 0.99


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

        Raises:
            NotImplementedError: if samples of this distribution cannot be differentiated.
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


class IndexedDistribution(PolicyDistribution):
    """A distribution whose actions are indices, which networks see as one-hot vectors."""

    @abstractmethod
    def encode(self, action: Tensor) -> Tensor:
        """Turns indices as from `sample()` into one-hot vectors `[..., A]`; -1 (no action) is all zeros."""

    @abstractmethod
    def decode(self, encoded: Tensor) -> Tensor:
        """Turns vectors `[..., A]` into indices shaped like `sample()`: the largest entry; all zeros is 0."""


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


def not_differentiable(distribution: PolicyDistribution) -> NotImplementedError:
    """The error of an `rsample` that cannot be.

    Args:
        distribution: the distribution that was asked.

    Returns:
        An error to raise.
    """
    return NotImplementedError(
        f"{type(distribution).__name__} is not differentiable: it has no rsample; "
        "call sample, and train the policy by log_prob"
    )


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, or `x` in float32 if it is in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_action(action: Tensor, size: int) -> None:
    """Refuses actions whose last axis is another, which would broadcast to densities of something else.

    Args:
        action: `[..., A]`.
        size: `A`.

    Raises:
        ValueError: if the last axis is not `A`.
    """
    if action.shape[-1:] != (size,):
        raise ValueError(f"action.shape={tuple(action.shape)} is not allowed; give [..., {size}]")


def safe_log(probs: Tensor) -> Tensor:
    """Logarithm that stays finite at 0."""
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


def halves(params: Tensor) -> tuple[Tensor, Tensor]:
    """Splits `[..., 2 A]` into two of `[..., A]`.

    Raises:
        ValueError: if the last axis is odd.
    """
    if params.shape[-1] % 2:
        raise ValueError(f"params.shape={tuple(params.shape)} is not allowed; the last axis must be even")
    first, second = params.chunk(2, dim=-1)
    return first, second


def draw_index(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws indices by inverting the distribution function, without gradient.

    Args:
        probs: `[..., A]`.
        generator: source of randomness on the device of `probs`; None is the global one.

    Returns:
        `[...]` int64.
    """
    with torch.no_grad():
        cdf = probs.cumsum(dim=-1)
        u = torch.rand(cdf.shape[:-1], generator=generator, dtype=cdf.dtype, device=cdf.device)
        # Scaled by the last entry, which rounding keeps from being exactly 1; without that entry the
        # result cannot run past the last action.
        return ((u.unsqueeze(-1) * cdf[..., -1:]) >= cdf[..., :-1]).sum(dim=-1)
