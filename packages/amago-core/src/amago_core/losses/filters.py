"""Filters: how much an action of the data set is imitated, given its advantage.

A filter is any callable from advantages to weights of the same shape; the configurations here build the usual ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amago_core.errors import ConfigError

__all__ = [
    "BinaryFilterConfig",
    "ExpFilterConfig",
    "Filter",
    "FilterConfig",
    "LeakyFilterConfig",
    "binary_filter",
    "exp_filter",
    "leaky_filter",
]

Filter = Callable[[Tensor], Tensor]
"""Advantages, any shape, to weights >= 0, the same shape in float32, without gradient."""


def binary_filter(advantage: Tensor, *, threshold: float = 0.0) -> Tensor:
    """Imitate the actions that are better than the policy: `1[advantage > threshold]`, strict.

    Args:
        advantage: any shape.
        threshold: in the units of the advantage.

    Returns:
        0 or 1, float32, the shape of `advantage`.
    """
    return (advantage.detach().float() > threshold).float()


def exp_filter(
    advantage: Tensor,
    *,
    beta: float = 1.0,
    clip_weights_low: float = 1e-7,
    clip_weights_high: float | None = None,
    clip_adv_low: float | None = None,
    clip_adv_high: float | None = None,
) -> Tensor:
    """Exponential weights, `clip(exp(beta * clip(advantage)))`.

    Args:
        advantage: any shape.
        beta: inverse temperature, > 0.
        clip_weights_low: smallest weight, >= 0.
        clip_weights_high: largest weight; without it, weights overflow to infinity where `beta * advantage > 88.7`.
        clip_adv_low: advantages below it count as it; None does not clip.
        clip_adv_high: advantages above it count as it; None does not clip.

    Returns:
        float32, the shape of `advantage`.

    Source: Peng et al., "Advantage-Weighted Regression" (2019).
    """
    adv = advantage.detach().float()
    if clip_adv_low is not None or clip_adv_high is not None:
        adv = adv.clamp(clip_adv_low, clip_adv_high)
    return torch.exp(beta * adv).clamp(clip_weights_low, clip_weights_high)


def leaky_filter(
    advantage: Tensor,
    *,
    beta: float = 2.0,
    tau: float = 0.01,
    neg_slope: float = 0.05,
    f0: float = 0.01,
    clip_weights_low: float = 1e-7,
    clip_weights_high: float | None = 10.0,
    add_binary: bool = True,
) -> Tensor:
    """Leaky linear weights, `clip(f0 + neg_slope*tau/beta + leaky_relu((adv - tau)/beta)) + 1[adv > 0]`.

    Args:
        advantage: any shape.
        beta: temperature, > 0.
        tau: advantage at which the slope changes.
        neg_slope: slope below `tau`, relative to the one above.
        f0: weight at advantage 0, without the binary term.
        clip_weights_low: smallest weight, >= 0, before the binary term.
        clip_weights_high: largest weight before the binary term; None does not clip.
        add_binary: add the binary filter of threshold 0.

    Returns:
        float32, the shape of `advantage`.
    """
    adv = advantage.detach().float()
    weights = f0 + neg_slope * tau / beta + F.leaky_relu((adv - tau) / beta, negative_slope=neg_slope)
    weights = weights.clamp(clip_weights_low, clip_weights_high)
    return weights + (adv > 0).float() if add_binary else weights


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Base of the filter configurations; a custom one overrides `build`."""

    def build(self) -> Filter:
        """Build the filter.

        Returns:
            A picklable callable from advantages to weights.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement build()")


@dataclass(frozen=True, kw_only=True)
class BinaryFilterConfig(FilterConfig):
    """Configures `binary_filter`.

    Args:
        threshold: imitate where the advantage is above it.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        _require_finite(self)

    def build(self) -> Filter:
        """Build the filter.

        Returns:
            A callable from advantages to 0 or 1.
        """
        return functools.partial(binary_filter, threshold=self.threshold)


@dataclass(frozen=True, kw_only=True)
class ExpFilterConfig(FilterConfig):
    """Configures `exp_filter`.

    Args:
        beta: inverse temperature, > 0.
        clip_weights_low: smallest weight, >= 0.
        clip_weights_high: largest weight; None does not clip.
        clip_adv_low: smallest advantage; None does not clip.
        clip_adv_high: largest advantage; None does not clip.
    """

    beta: float = 1.0
    clip_weights_low: float = 1e-7
    clip_weights_high: float | None = None
    clip_adv_low: float | None = None
    clip_adv_high: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        _require_finite(self)
        _require_positive("beta", self.beta)
        _require_weight_range(self.clip_weights_low, self.clip_weights_high)
        _require_ordered("clip_adv_low", self.clip_adv_low, "clip_adv_high", self.clip_adv_high)

    def build(self) -> Filter:
        """Build the filter.

        Returns:
            A callable from advantages to weights.
        """
        return functools.partial(exp_filter, **_as_kwargs(self))


@dataclass(frozen=True, kw_only=True)
class LeakyFilterConfig(FilterConfig):
    """Configures `leaky_filter`.

    Args:
        beta: temperature, > 0.
        tau: advantage at which the slope changes.
        neg_slope: slope below `tau`, relative to the one above.
        f0: weight at advantage 0, without the binary term.
        clip_weights_low: smallest weight, >= 0, before the binary term.
        clip_weights_high: largest weight before the binary term; None does not clip.
        add_binary: add the binary filter of threshold 0.
    """

    beta: float = 2.0
    tau: float = 0.01
    neg_slope: float = 0.05
    f0: float = 0.01
    clip_weights_low: float = 1e-7
    clip_weights_high: float | None = 10.0
    add_binary: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        _require_finite(self)
        _require_positive("beta", self.beta)
        _require_weight_range(self.clip_weights_low, self.clip_weights_high)

    def build(self) -> Filter:
        """Build the filter.

        Returns:
            A callable from advantages to weights.
        """
        return functools.partial(leaky_filter, **_as_kwargs(self))


def _as_kwargs(config: ExpFilterConfig | LeakyFilterConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _require_finite(config: BinaryFilterConfig | ExpFilterConfig | LeakyFilterConfig) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{field.name}: got {value}, must be finite (None where a limit is optional)")


def _require_positive(name: str, value: float) -> None:
    if value <= 0:
        raise ConfigError(f"{name}: got {value}, must be > 0")


def _require_weight_range(low: float, high: float | None) -> None:
    if low < 0:
        raise ConfigError(f"clip_weights_low: got {low}, must be >= 0")
    _require_ordered("clip_weights_low", low, "clip_weights_high", high)


def _require_ordered(low_name: str, low: float | None, high_name: str, high: float | None) -> None:
    if low is not None and high is not None and low > high:
        raise ConfigError(f"{low_name}: got {low}, must be <= {high_name}, which is {high}")
