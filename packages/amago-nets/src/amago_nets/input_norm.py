"""Running normalisation of raw features that padding cannot touch.

Dimensions: `F` features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .validation import check_float, check_int


class MaskedInputNorm(nn.Module):
    """Centres and scales every feature by running statistics of the valid timesteps seen in training.

    Each forward in training mode first updates, with `t` the number of updates so far counted from 1,
    `beta_t = beta / (1 - (1 - beta)^t)`: `mu <- (1 - beta_t) mu + beta_t mean(x)`,
    `nu <- (1 - beta_t) nu + beta_t mean(x^2)`. Then `sigma = clamp(sqrt(nu - mu^2 + 1e-5), 1e-3, 1e6)` and the
    output is `clamp((x - mu) / sigma, -1e4, 1e4)` where `sigma > 0.01`, else `x - mu`.

    Nothing here waits for the device: a batch without a valid timestep is skipped by selection, not by a branch.
    With `torch.distributed` initialised the batch sums are added over all processes, so every process must run
    the same number of training forwards.

    Args:
        dim: number of features `F`.
        beta: step size of the running statistics, in (0, 1).
        initial_count: number of updates the initial statistics (mean 0, mean square 1) count for.

    Attributes:
        mu: `[F]` float64 running mean.
        nu: `[F]` float64 running mean of squares.
        count: `[1]` float64, number of updates plus `initial_count`.

    Source: adaptive step size of van Hasselt et al. (2016), "Learning values across many orders of magnitude".
    """

    mu: Tensor
    nu: Tensor
    count: Tensor
    _affine: Tensor

    def __init__(self, dim: int, *, beta: float = 1e-4, initial_count: int = 1) -> None:
        super().__init__()
        check_int("dim", dim)
        check_float("beta", beta, low=1e-12, high=0.5)
        check_int("initial_count", initial_count, low=0)
        self.dim = dim
        self.beta = beta
        # float64: nu - mu^2 cancels for features far from zero, and 1 - (1 - beta)^t for small t.
        self.register_buffer("mu", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("nu", torch.ones(dim, dtype=torch.float64))
        # One axis: torch.compile takes a float64 CPU tensor without axes for a constant and loses what is added to it.
        self.register_buffer("count", torch.full((1,), float(initial_count), dtype=torch.float64))
        # Rows shift, scale, limit: derived from the statistics, kept because acting is many small steps.
        self.register_buffer("_affine", torch.empty(3, dim, dtype=torch.float64), persistent=False)
        self._refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedInputNorm:
        # module.half() or .bfloat16() must not round the statistics: take the new device, keep the dtype.
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        sigma = self.sigma
        scales = sigma > 0.01
        self._affine[0].copy_(self.mu)
        self._affine[1].copy_(torch.where(scales, sigma.reciprocal(), 1.0))
        # Features that are not scaled are not clamped either.
        self._affine[2].copy_(torch.where(scales, 1e4, math.inf))

    @property
    def sigma(self) -> Tensor:
        """`[F]` float64 scale of each feature, within `[1e-3, 1e6]`."""
        return (self.nu - self.mu.square() + 1e-5).sqrt().nan_to_num(nan=0.0).clamp(1e-3, 1e6)

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Moves the statistics towards those of a batch.

        Args:
            x: `[..., F]` features; anything, even NaN, where `mask` is False.
            mask: `[...]` bool, True is a real timestep; None is all real.
        """
        rows = x.detach().reshape(-1, self.dim).to(self.mu.dtype)
        if mask is None:
            total = torch.full_like(self.count, rows.shape[0])
        else:
            valid = mask.reshape(-1)
            rows = rows.masked_fill(~valid.unsqueeze(-1), 0.0)
            total = valid.sum(dim=0, keepdim=True).to(self.mu.dtype)
        sums = torch.cat([rows.sum(0), rows.square().sum(0), total])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        total = sums[-1:]
        means = sums[:-1] / total.clamp_min(1.0)
        seen = (total > 0).to(self.mu.dtype)
        self.count.add_(seen)
        steps = self.count.clamp_min(1.0)
        beta_t = seen * self.beta / -torch.expm1(steps * math.log1p(-self.beta))
        self.mu.lerp_(means[: self.dim], beta_t)
        self.nu.lerp_(means[self.dim :], beta_t)
        self._refresh()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalises, after updating the statistics if in training mode.

        Args:
            x: `[..., F]` features.
            mask: `[...]` bool, True is a real timestep; None is all real. Only used for the update.

        Returns:
            `[..., F]` in the dtype of `x`.
        """
        if self.training:
            self.update(x, mask)
        # A copy: the next update must not overwrite what the backward pass still needs.
        shift, scale, limit = self._affine.to(x.dtype, copy=True).unbind()
        return ((x - shift) * scale).clamp(-limit, limit)
