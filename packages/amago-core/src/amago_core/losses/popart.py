"""PopArt: normalised value targets whose statistics may drift without moving the predictions.

Dimensions: B batch, T transitions, G discounts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from amago_core.losses.masking import align_mask

__all__ = ["PopArtLayer"]


class PopArtLayer(nn.Module):
    """Running mean and scale of the value targets, one of each per discount, shared by all critics.

    A critic's raw output `x` is read as a normalised prediction `w*x + b`, or in target units as
    `sigma*(w*x + b) + mu`. `update` moves `mu` and `sigma` and corrects `w` and `b` so that the latter never changes.
    All state is float64 and nothing is trained by gradient.

    Args:
        num_gammas: number of discounts G, >= 1.
        beta: step size of the running moments, in (0, 1).
        init_nu: initial second moment, > 0.
        initial_count: number of updates to pretend; 1 makes the first batch weigh one half, which keeps the scale from
            collapsing in tasks of sparse reward, 0 makes it weigh everything, as in the paper.
        enabled: False makes every method the identity and `update` do nothing.

    Raises:
        ValueError: if an argument is out of its range.

    Source: van Hasselt et al., "Learning values across many orders of magnitude" (NeurIPS 2016), with the debiased
    step size of its appendix.
    """

    mu: Tensor
    nu: Tensor
    w: Tensor
    b: Tensor
    count: Tensor

    def __init__(
        self,
        num_gammas: int,
        beta: float = 5e-4,
        init_nu: float = 100.0,
        initial_count: int = 1,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if num_gammas < 1:
            raise ValueError(f"num_gammas: got {num_gammas}, must be >= 1")
        if not 0.0 < beta < 1.0:
            raise ValueError(f"beta: got {beta}, must be in (0, 1)")
        if not 0.0 < init_nu < math.inf:
            raise ValueError(f"init_nu: got {init_nu}, must be finite and > 0")
        if initial_count < 0:
            raise ValueError(f"initial_count: got {initial_count}, must be >= 0")
        self.num_gammas = num_gammas
        self.beta = beta
        self.enabled = enabled
        self.register_buffer("mu", torch.zeros(num_gammas, dtype=torch.float64))
        self.register_buffer("nu", torch.full((num_gammas,), init_nu, dtype=torch.float64))
        self.register_buffer("w", torch.ones(num_gammas, dtype=torch.float64))
        self.register_buffer("b", torch.zeros(num_gammas, dtype=torch.float64))
        self.register_buffer("count", torch.full((num_gammas,), initial_count, dtype=torch.int64))

    @property
    def sigma(self) -> Tensor:
        """Scale of the targets, `[G]` float64, in [1e-2, 1e4]."""
        return _sigma(self.mu, self.nu)

    def summary(self) -> dict[str, Tensor]:
        """Means over the discounts of `mu`, `nu`, `sigma`, `w` and `b`, for logging."""
        names = ("mu", "nu", "sigma", "w", "b")
        return {name: getattr(self, name).mean().float() for name in names}

    @torch.no_grad()
    def update(self, targets: Tensor, mask: Tensor) -> None:
        """Move the statistics towards those of a batch; a discount without valid entries keeps its own.

        Args:
            targets: `[B, T, G]` float (or any leading dimensions), unnormalised.
            mask: `[B, T]` bool, or `[B, T, G]`; entries under it may hold anything, NaN included.

        Raises:
            ValueError: if the shapes disagree.
        """
        if self.enabled:
            self.apply_moments(self.moment_sums(targets, mask))

    @torch.no_grad()
    def moment_sums(self, targets: Tensor, mask: Tensor) -> Tensor:
        """What one batch adds: sums, so that those of several batches or processes can be added up first.

        Args:
            targets: `[B, T, G]` float (or any leading dimensions), unnormalised.
            mask: `[B, T]` bool, or `[B, T, G]`.

        Returns:
            `[3, G]` float64: number of valid targets, their sum, the sum of their squares.

        Raises:
            ValueError: if the shapes disagree.
        """
        self._check(targets, "targets")
        valid = align_mask(mask, targets).bool().expand_as(targets)
        y = torch.where(valid, targets.double(), 0.0).reshape(-1, self.num_gammas)
        number = valid.reshape(-1, self.num_gammas).sum(0, dtype=torch.float64)
        return torch.stack((number, y.sum(0), y.square().sum(0)))

    @torch.no_grad()
    def apply_moments(self, sums: Tensor) -> None:
        """Second half of `update`, from the sums of `moment_sums`; never waits for the device.

        Args:
            sums: `[3, G]` float64.
        """
        if not self.enabled:
            return
        number, first, second = sums.unbind(0)
        seen = number > 0
        count = self.count + seen
        # With initial_count=0, a discount that has seen nothing yet divides by 0 here; `where` drops it below.
        step = self.beta / -torch.expm1(count.double() * math.log1p(-self.beta))
        safe_number = number.clamp(min=1.0)
        mu = self.mu + torch.where(seen, step, 0.0) * (first / safe_number - self.mu)
        nu = self.nu + torch.where(seen, step, 0.0) * (second / safe_number - self.nu)
        sigma, new_sigma = self.sigma, _sigma(mu, nu)
        self.b.copy_((sigma * self.b + self.mu - mu) / new_sigma)
        self.w.copy_(self.w * sigma / new_sigma)
        self.mu.copy_(mu)
        self.nu.copy_(nu)
        self.count.copy_(count)

    def normalize(self, y: Tensor) -> Tensor:
        """Target units to normalised units, `(y - mu) / sigma`.

        Args:
            y: `[..., G]` float.

        Returns:
            `[..., G]` float32, differentiable in `y`.
        """
        self._check(y, "y")
        return ((y.double() - self.mu) / self.sigma).float() if self.enabled else y.float()

    def head(self, x: Tensor) -> Tensor:
        """Raw critic output to normalised prediction, `w*x + b`.

        Args:
            x: `[..., G]` float.

        Returns:
            `[..., G]` float32, differentiable in `x`.
        """
        self._check(x, "x")
        return x.float() * self.w.float() + self.b.float() if self.enabled else x.float()

    def denormalize(self, x: Tensor) -> Tensor:
        """Raw critic output to target units, `sigma*(w*x + b) + mu`; unchanged by `update`.

        Args:
            x: `[..., G]` float.

        Returns:
            `[..., G]` float32, differentiable in `x`.
        """
        self._check(x, "x")
        if not self.enabled:
            return x.float()
        # The two coefficients are invariant; formed in float64 they stay so where sigma*b and mu are large and cancel.
        sigma = self.sigma
        return x.float() * (sigma * self.w).float() + (sigma * self.b + self.mu).float()

    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return f"num_gammas={self.num_gammas}, beta={self.beta}, enabled={self.enabled}"

    def _check(self, x: Tensor, name: str) -> None:
        if x.ndim < 1 or x.shape[-1] != self.num_gammas:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, the last dimension must be {self.num_gammas} discounts"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `model.bfloat16()` and the like must move the statistics without rounding them.
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)


def _sigma(mu: Tensor, nu: Tensor) -> Tensor:
    variance = (nu - mu.square()).clamp(1e-4, 1e8)
    return variance.sqrt().clamp(1e-4, 1e6)
