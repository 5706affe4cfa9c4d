"""Several bits at once.

Dimensions: `A` bits. `...` stands for any leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register
from ..specs import ActionKind
from ..validation import check_choice
from .base import DistributionConfig, PolicyDistribution, at_least_float32, check_action, not_differentiable

Reduction = Literal["mean", "sum"]


@register("multi_binary")
@dataclass(frozen=True, kw_only=True)
class MultiBinaryConfig(DistributionConfig):
    """Options of `MultiBinary`.

    Attributes:
        reduction: what `log_prob` does over the bits: "mean", so that the weight of behaviour cloning does not grow
            with their number, or "sum", the log-probability of the whole action.

    Raises:
        ValueError: if the field is not allowed.
    """

    action_kind: ClassVar[ActionKind] = "multi_binary"
    differentiable: ClassVar[bool] = False

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, get_args(Reduction))

    def param_size(self, action_size: int) -> int:
        """One logit for each bit; see the base class."""
        return action_size

    def build(self, params: Tensor) -> MultiBinary:
        """Makes distributions from logits `[..., A]`; see the base class."""
        return MultiBinary(params, reduction=self.reduction)


class MultiBinary(PolicyDistribution):
    """Independent bits. Not differentiable: there is no `rsample`.

    Args:
        logits: `[..., A]` log-odds of a 1.
        reduction: "mean" or "sum", what `log_prob` does over the bits.

    Attributes:
        logits: `[..., A]`, at least float32.
    """

    def __init__(self, logits: Tensor, *, reduction: Reduction = "mean") -> None:
        self.logits = at_least_float32(logits)
        self.reduction = reduction

    @property
    def probs(self) -> Tensor:
        """Probability of a 1 for each bit, `[..., A]`."""
        return self.logits.sigmoid()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws bits `[..., A]` as floats 0 and 1; see the base class."""
        with torch.no_grad():
            p = self.probs
            return (torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device) < p).to(p.dtype)

    def rsample(self, generator: torch.Generator | None = None) -> Tensor:
        """Refuses; see the base class."""
        raise not_differentiable(self)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of actions, averaged over the bits unless `reduction` is "sum".

        Args:
            action: `[..., A]` of any dtype; above 0.5 is a 1. May have further leading axes.

        Returns:
            `[...]`.

        Raises:
            ValueError: if the last axis is not `A`.
        """
        check_action(action, self.logits.shape[-1])
        per_bit = F.logsigmoid(torch.where(action > 0.5, self.logits, -self.logits))
        return per_bit.mean(dim=-1) if self.reduction == "mean" else per_bit.sum(dim=-1)

    @property
    def mode(self) -> Tensor:
        """1 where a 1 is likelier than a 0, `[..., A]`."""
        return (self.logits > 0).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        """Expected action `[..., A]`, which is the probability of a 1."""
        return self.probs

    def entropy(self) -> Tensor:
        """Exact entropy of all bits in nats, `[...]`: a sum, whatever the reduction of `log_prob`."""
        p = self.probs
        return (p * F.softplus(-self.logits) + (1.0 - p) * F.softplus(self.logits)).sum(dim=-1)
