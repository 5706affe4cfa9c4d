"""Categorical actions with clipped probabilities.

Dimensions: `A` number of actions. `...` stands for any leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..registry import register
from ..specs import ActionKind
from ..validation import check_choice, check_float
from .base import DistributionConfig, IndexedDistribution, at_least_float32, draw_index, safe_log
from .straight_through import gumbel_one_hot

ProbFloor = Literal["clip", "mixture"]


def check_clips(low: float, high: float, floor: str) -> None:
    """Refuses limits of probabilities that make no sense.

    Args:
        low: lower limit.
        high: upper limit.
        floor: one of `ProbFloor`.

    Raises:
        ValueError: unless `0 <= low < high <= 1` and `floor` is known.
    """
    check_float("clip_prob_low", low, low=0.0, high=1.0)
    check_float("clip_prob_high", high, low=0.0, high=1.0)
    if low >= high:
        raise ValueError(f"clip_prob_low={low!r} is not allowed; give less than clip_prob_high={high!r}")
    check_choice("floor", floor, get_args(ProbFloor))


@register("discrete")
@dataclass(frozen=True, kw_only=True)
class DiscreteConfig(DistributionConfig):
    """Options of `Discrete`.

    Attributes:
        clip_prob_low: probabilities are raised to at least this, before they are renormalised.
        clip_prob_high: probabilities are lowered to at most this, before they are renormalised.
        floor: "clip" as above, which passes no gradient to a clipped entry; or "mixture", `(1 - A low) p + low`, which
            always does, and does not use `clip_prob_high`.

    Raises:
        ValueError: unless `0 <= clip_prob_low < clip_prob_high <= 1`.
    """

    action_kind: ClassVar[ActionKind] = "discrete"
    differentiable: ClassVar[bool] = True

    clip_prob_low: float = 0.001
    clip_prob_high: float = 0.99
    floor: ProbFloor = "clip"

    def __post_init__(self) -> None:
        check_clips(self.clip_prob_low, self.clip_prob_high, self.floor)

    def param_size(self, action_size: int) -> int:
        """One logit for each action; see the base class."""
        return action_size

    def build(self, params: Tensor) -> Discrete:
        """Makes distributions from logits `[..., A]`; see the base class."""
        return Discrete(params, clip_prob_low=self.clip_prob_low, clip_prob_high=self.clip_prob_high, floor=self.floor)


class Discrete(IndexedDistribution):
    """Categorical with clipped and renormalised probabilities.

    `q = clip(p, low, high) / sum(clip(p, low, high))` with `p = softmax(logits)`: no action ever dies out. A clipped
    entry passes no gradient.

    Args:
        logits: `[..., A]`.
        clip_prob_low: lower clip.
        clip_prob_high: upper clip.
        temperature: of the relaxed gradient of `rsample`.
        floor: "clip" as above, or "mixture": `q = (1 - A low) p + low`.

    Attributes:
        probs: `[..., A]` probabilities `q`, at least float32.

    Raises:
        ValueError: if the floor is a mixture and `A low >= 1`.
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        clip_prob_low: float = 0.001,
        clip_prob_high: float = 0.99,
        temperature: float = 0.5,
        floor: ProbFloor = "clip",
    ) -> None:
        self.logits = at_least_float32(logits)
        self.temperature = temperature
        probs = self.logits.softmax(dim=-1)
        if floor == "mixture":
            uniform = logits.shape[-1] * clip_prob_low
            if uniform >= 1.0:
                raise ValueError(
                    f"clip_prob_low={clip_prob_low!r} is not allowed with floor='mixture' and {logits.shape[-1]} "
                    f"actions; give less than {1 / logits.shape[-1]:g}"
                )
            self.probs = (1.0 - uniform) * probs + clip_prob_low
        else:
            clipped = probs.clamp(clip_prob_low, clip_prob_high)
            self.probs = clipped / clipped.sum(dim=-1, keepdim=True)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws actions `[...]` int64; see the base class."""
        return draw_index(self.probs, generator)

    def rsample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws one-hot actions `[..., A]` with straight-through Gumbel-softmax gradients; see the base class."""
        return gumbel_one_hot(safe_log(self.probs), self.temperature, generator)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of actions `[...]`.

        Args:
            action: `[...]` integers, broadcast against the batch shape. -1 (no action) is read as action 0, so that
                padding needs no care here; the caller masks the result.

        Returns:
            `[...]`.
        """
        index = action.long().clamp_min(0)
        shape = torch.broadcast_shapes(index.shape, self.probs.shape[:-1])
        probs = self.probs.expand(*shape, -1)
        return safe_log(probs.gather(-1, index.expand(shape).unsqueeze(-1)).squeeze(-1))

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
        return -(self.probs * safe_log(self.probs)).sum(dim=-1)

    def encode(self, action: Tensor) -> Tensor:
        """One-hot vectors `[..., A]` of indices `[...]`; see the base class."""
        actions = torch.arange(self.probs.shape[-1], device=action.device)
        return (action.long().unsqueeze(-1) == actions).to(self.probs.dtype)

    def decode(self, encoded: Tensor) -> Tensor:
        """Indices `[...]` int64 of vectors `[..., A]`; see the base class."""
        return encoded.argmax(dim=-1)
