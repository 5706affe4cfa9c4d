"""Ensembles of critics that classify returns.

Dimensions: `D` state size, `A` action size, `G` discounts, `C` critics, `N` bins.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from amago_kernels.value_losses import (
    hl_gauss_cross_entropy,
    hl_gauss_labels,
    symexp,
    two_hot_cross_entropy,
    two_hot_labels,
)

from ..registry import register
from ..specs import ActionSpec
from ..validation import check_bool, check_choice, check_float, check_int
from .ensemble import CriticEnsemble, CriticEnsembleConfig, EnsembleLinear

LabelType = Literal["two_hot", "hl_gauss", "two_hot_raw"]

_INIT_WIDTH = 4.0
_EDGE_BINS = 12


@register("two_hot")
@dataclass(frozen=True, kw_only=True)
class NCriticsTwoHotConfig(CriticEnsembleConfig):
    """Options of `NCriticsTwoHot`, beside those of `CriticEnsembleConfig`.

    Attributes:
        num_bins: number of bins `N`.
        min_return: smallest return that can be told apart, in the units of the targets (rewards after their
            multiplier).
        max_return: largest return that can be told apart.
        use_symlog: space the bins evenly in `symlog` of the return, not in the return itself.
        label_type: "two_hot", "hl_gauss", or "two_hot_raw": bins spaced as with "two_hot", while labels and means are
            taken of raw returns, so that the value of a distribution is its mean (half 0, half 100 is 50, not 9.05).
        sigma_ratio: standard deviation of "hl_gauss" labels in bins.
        init_value: return that fresh critics predict, roughly; None leaves them random.

    Raises:
        ValueError: if a field is not allowed.
    """

    num_bins: int = 128
    min_return: float = -1e5
    max_return: float = 1e5
    use_symlog: bool = True
    label_type: LabelType = "two_hot"
    sigma_ratio: float = 0.75
    init_value: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("num_bins", self.num_bins, low=2)
        check_float("min_return", self.min_return)
        check_float("max_return", self.max_return)
        if self.min_return >= self.max_return:
            raise ValueError(
                f"min_return={self.min_return!r} is not allowed; give less than max_return={self.max_return!r}"
            )
        check_bool("use_symlog", self.use_symlog)
        check_choice("label_type", self.label_type, get_args(LabelType))
        check_float("sigma_ratio", self.sigma_ratio, low=0.0)
        if self.sigma_ratio == 0:
            raise ValueError(f"sigma_ratio={self.sigma_ratio!r} is not allowed; give more than 0")
        if self.init_value is not None:
            check_float("init_value", self.init_value, low=self.min_return, high=self.max_return)

    @property
    def bin_limits(self) -> tuple[float, float]:
        """First and last bin, in the units in which bins are evenly spaced."""
        return self.spaced(self.min_return), self.spaced(self.max_return)

    @property
    def bin_width(self) -> float:
        """Distance of neighbouring bins, in the same units."""
        low, high = self.bin_limits
        return (high - low) / (self.num_bins - 1)

    def spaced(self, value: float) -> float:
        """A return in the units in which bins are evenly spaced."""
        return math.copysign(math.log1p(abs(value)), value) if self.use_symlog else float(value)

    def build(self, in_dim: int, action_spec: ActionSpec, gammas: Sequence[float] | Tensor) -> NCriticsTwoHot:
        """Builds the ensemble. Warns if `init_value` is within 12 bins of an end, which distorts its prediction.

        Args:
            in_dim: state size `D`.
            action_spec: the action of one timestep; always an input, discrete ones as one-hot vectors.
            gammas: `[G]` discounts.

        Returns:
            A module with random weights.
        """
        if self.init_value is not None:
            at, (low, high) = self.spaced(self.init_value), self.bin_limits
            if min(at - low, high - at) < _EDGE_BINS * self.bin_width:
                warnings.warn(
                    f"init_value={self.init_value!r} is within {_EDGE_BINS} bins of an end of "
                    f"[{self.min_return!r}, {self.max_return!r}]: fresh critics will predict something further inside; "
                    "widen the limits or add bins",
                    stacklevel=2,
                )
        return NCriticsTwoHot(self, in_dim, action_spec, gammas)


class NCriticsTwoHot(CriticEnsemble):
    """`C` independent MLPs that give distributions over `N` bins of return, for `G` discounts.

    The state, the discount and the action are inputs, see `CriticEnsemble`.

    Args:
        config: options.
        in_dim: state size `D`.
        action_spec: the action of one timestep.
        gammas: `[G]` discounts.

    Attributes:
        bins: `[N]` bin centres in the units that labels and means are taken in, at least float32; not part of the
            state dict.

    Raises:
        ValueError: if `in_dim < 1` or `gammas` is not allowed.

    Source: Grigsby et al., "AMAGO-2: Breaking the Multi-Task Barrier in Meta-Reinforcement Learning with Transformers",
    NeurIPS 2024.
    """

    bins: Tensor

    def __init__(
        self, config: NCriticsTwoHotConfig, in_dim: int, action_spec: ActionSpec, gammas: Sequence[float] | Tensor
    ) -> None:
        super().__init__(config, in_dim, action_spec, gammas, action_input=True, out_dim=config.num_bins)
        self.config = config
        self._in_symlog = config.use_symlog and config.label_type != "two_hot_raw"
        self.register_buffer("bins", self._make_bins().float(), persistent=False)
        if config.init_value is not None:
            distance = (self._even_bins() - config.spaced(config.init_value)) / (_INIT_WIDTH * config.bin_width)
            last = self.rest[-1]
            assert isinstance(last, EnsembleLinear)
            with torch.no_grad():
                last.bias.copy_(-0.5 * distance.square())

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """Logits of the bins.

        Args:
            state: `[..., D]`.
            action: `[..., G, A]`, one-hot for discrete actions; may have further leading axes (such as `K` action
                samples), over which the state is repeated.

        Returns:
            `[..., C, G, N]` with the leading axes of `action`.

        Raises:
            ValueError: if the last axis of `state` is wrong, or `action` has the wrong shape.
        """
        return self.evaluate_actions(state, action).movedim(0, -3)

    def value(self, logits: Tensor) -> Tensor:
        """Returns that distributions stand for: their mean, taken of `symlog` if the bins are.

        Args:
            logits: `[..., N]`.

        Returns:
            `[...]`, at least float32, in the units of the targets.

        Raises:
            ValueError: if the last axis is not `N`.
        """
        if logits.shape[-1:] != self.bins.shape:
            raise ValueError(f"logits.shape={tuple(logits.shape)} is not allowed; give [..., {self.bins.shape[0]}]")
        mean = (logits.softmax(dim=-1, dtype=self._wide(logits)) * self.bins).sum(dim=-1)
        return symexp(mean) if self._in_symlog else mean

    def labels(self, target: Tensor) -> Tensor:
        """Distributions that stand for returns.

        Args:
            target: `[...]` returns; outside the limits they count as the nearest one.

        Returns:
            `[..., N]` probabilities, at least float32.
        """
        target = target.to(torch.promote_types(target.dtype, self.bins.dtype))
        if self.config.label_type == "hl_gauss":
            return hl_gauss_labels(target, self.bins, self._sigma, transform=self._transform)
        return two_hot_labels(target, self.bins, transform=self._transform)

    def loss(self, logits: Tensor, target: Tensor, *, backend: str = "auto") -> Tensor:
        """Cross-entropy of every critic's distribution with the label of a return.

        Args:
            logits: `[..., C, G, N]`, as from `forward`.
            target: `[..., G]` returns, the same for all critics; no gradient flows to them.
            backend: see `amago_kernels.two_hot_cross_entropy`.

        Returns:
            `[..., C, G]` in nats, at least float32.

        Raises:
            ValueError: if the shape of `logits` or `target` is wrong.
        """
        tail = (self.num_critics, self.num_gammas, self.bins.shape[0])
        if logits.shape[-3:] != tail:
            raise ValueError(
                f"logits.shape={tuple(logits.shape)} is not allowed; give [..., {', '.join(map(str, tail))}]"
            )
        # An axis of critics in the target would be taken for one of the batch where the two are equal.
        if target.ndim > logits.ndim - 2:
            raise ValueError(
                f"target.shape={tuple(target.shape)} is not allowed with logits of shape {tuple(logits.shape)}; give "
                f"{(*logits.shape[:-3], self.num_gammas)}: all critics share a target"
            )
        # As `forward` made them: critics first, which is contiguous and lets the label of a target be shared.
        by_critic = logits.movedim(-3, 0)
        if self.config.label_type == "hl_gauss":
            losses = hl_gauss_cross_entropy(
                by_critic, target, self.bins, self._sigma, transform=self._transform, backend=backend
            )
        else:
            losses = two_hot_cross_entropy(by_critic, target, self.bins, transform=self._transform, backend=backend)
        return losses.movedim(0, -2)

    @property
    def _transform(self) -> Literal["symlog"] | None:
        return "symlog" if self._in_symlog else None

    @property
    def _sigma(self) -> float:
        return self.config.sigma_ratio * self.config.bin_width

    def _even_bins(self) -> Tensor:
        low, high = self.config.bin_limits
        return torch.linspace(low, high, self.config.num_bins, dtype=torch.float64)

    def _make_bins(self) -> Tensor:
        raw = self.config.use_symlog and not self._in_symlog
        return symexp(self._even_bins()) if raw else self._even_bins()

    def _wide(self, logits: Tensor) -> torch.dtype:
        return torch.promote_types(logits.dtype, torch.float32)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NCriticsTwoHot:
        super()._apply(fn, recurse)
        # Half precision could not tell neighbouring bins apart, and float64 deserves bins that are not rounded.
        dtype = torch.promote_types(self.bins.dtype, torch.float32)
        self.bins = self._make_bins().to(device=self.bins.device, dtype=dtype)
        return self
