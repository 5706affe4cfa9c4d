"""Several categorical choices at once.

Dimensions: `M` choices, `A` options of all choices together (`sum(nvec)`). `...` stands for any leading axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from ..registry import register
from ..specs import ActionKind, check_nvec
from .base import DistributionConfig, IndexedDistribution, check_action
from .discrete import Discrete, ProbFloor, check_clips


@register("multi_discrete")
@dataclass(frozen=True, kw_only=True)
class MultiDiscreteConfig(DistributionConfig):
    """Options of `MultiDiscrete`.

    Attributes:
        nvec: number of options of each choice, as in `ActionSpec.nvec`.
        clip_prob_low: see `DiscreteConfig`; for every choice on its own.
        clip_prob_high: see `DiscreteConfig`.
        floor: see `DiscreteConfig`.

    Raises:
        ValueError: if a field is not allowed.
    """

    action_kind: ClassVar[ActionKind] = "multi_discrete"
    differentiable: ClassVar[bool] = True

    nvec: tuple[int, ...]
    clip_prob_low: float = 0.001
    clip_prob_high: float = 0.99
    floor: ProbFloor = "clip"

    def __post_init__(self) -> None:
        object.__setattr__(self, "nvec", check_nvec(self.nvec))
        check_clips(self.clip_prob_low, self.clip_prob_high, self.floor)

    def param_size(self, action_size: int) -> int:
        """One logit for each option; see the base class.

        Raises:
            ValueError: if `action_size` is not `sum(nvec)`.
        """
        if action_size != sum(self.nvec):
            raise ValueError(f"action_size={action_size!r} is not allowed with nvec={self.nvec}; give {sum(self.nvec)}")
        return action_size

    def build(self, params: Tensor) -> MultiDiscrete:
        """Makes distributions from logits `[..., A]`, one choice after the other; see the base class."""
        return MultiDiscrete(
            params,
            self.nvec,
            clip_prob_low=self.clip_prob_low,
            clip_prob_high=self.clip_prob_high,
            floor=self.floor,
        )


class MultiDiscrete(IndexedDistribution):
    """Independent choices, each a `Discrete`.

    Args:
        logits: `[..., A]`, one choice after the other.
        nvec: number of options of each choice.
        clip_prob_low: lower clip of every choice.
        clip_prob_high: upper clip of every choice.
        temperature: of the relaxed gradient of `rsample`.
        floor: see `Discrete`.

    Raises:
        ValueError: if the last axis is not `sum(nvec)`, or a limit is not allowed.
    """

    def __init__(
        self,
        logits: Tensor,
        nvec: tuple[int, ...],
        *,
        clip_prob_low: float = 0.001,
        clip_prob_high: float = 0.99,
        temperature: float = 0.5,
        floor: ProbFloor = "clip",
    ) -> None:
        if logits.shape[-1] != sum(nvec):
            raise ValueError(f"logits.shape={tuple(logits.shape)} is not allowed; give [..., {sum(nvec)}]")
        self.nvec = nvec
        # Neighbouring choices of one size are one batch of categoricals: `(size, how many)`.
        self._runs = [(size, len(list(run))) for size, run in groupby(nvec)]
        self._parts = [
            Discrete(
                part,
                clip_prob_low=clip_prob_low,
                clip_prob_high=clip_prob_high,
                temperature=temperature,
                floor=floor,
            )
            for part in self._by_run(logits)
        ]

    @property
    def probs(self) -> Tensor:
        """Probabilities of all options `[..., A]`, one choice after the other; each choice sums to 1."""
        return torch.cat([part.probs.flatten(-2) for part in self._parts], dim=-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws actions `[..., M]` int64; see the base class."""
        return torch.cat([part.sample(generator) for part in self._parts], dim=-1)

    def rsample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws concatenated one-hots `[..., A]` with straight-through gradients; see the base class."""
        return torch.cat([part.rsample(generator).flatten(-2) for part in self._parts], dim=-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of all choices together.

        Args:
            action: `[..., M]` integers; may have further leading axes. -1 (no action) is read as option 0.

        Returns:
            `[...]`, summed over `M`.

        Raises:
            ValueError: if the last axis is not `M`.
        """
        pieces = zip(self._parts, self._choices(action), strict=True)
        return torch.stack([part.log_prob(piece).sum(dim=-1) for part, piece in pieces]).sum(dim=0)

    @property
    def mode(self) -> Tensor:
        """Likeliest option of every choice, `[..., M]` int64."""
        return torch.cat([part.mode for part in self._parts], dim=-1)

    @property
    def mean(self) -> Tensor:
        """Expected concatenated one-hots `[..., A]`, which are the probabilities."""
        return self.probs

    def entropy(self) -> Tensor:
        """Exact entropy in nats `[...]`, summed over `M`."""
        return torch.stack([part.entropy().sum(dim=-1) for part in self._parts]).sum(dim=0)

    def encode(self, action: Tensor) -> Tensor:
        """Concatenated one-hot vectors `[..., A]` of indices `[..., M]`; see the base class."""
        pieces = zip(self._parts, self._choices(action), strict=True)
        return torch.cat([part.encode(piece).flatten(-2) for part, piece in pieces], dim=-1)

    def decode(self, encoded: Tensor) -> Tensor:
        """Indices `[..., M]` int64 of vectors `[..., A]`; see the base class."""
        return torch.cat([part.argmax(dim=-1) for part in self._by_run(encoded)], dim=-1)

    def _by_run(self, x: Tensor) -> Iterator[Tensor]:
        """Splits `[..., A]` into one `[..., count, size]` for each run of choices of one size."""
        for part, (size, count) in zip(x.split([s * n for s, n in self._runs], dim=-1), self._runs, strict=True):
            yield part.unflatten(-1, (count, size))

    def _choices(self, action: Tensor) -> tuple[Tensor, ...]:
        """Splits `[..., M]` by runs."""
        check_action(action, len(self.nvec))
        return action.split([count for _, count in self._runs], dim=-1)
