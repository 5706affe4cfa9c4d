"""Masked sums and means: whatever lies under the padding changes neither a loss nor a gradient.

Dimensions: B batch, T transitions.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fill_masked", "masked_mean", "masked_sum"]

MEAN_EPSILON = 1e-5
"""Added to the number of valid entries by `masked_mean`, so that an empty mask gives 0."""


def align_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Give `mask` as many dimensions as `x` by appending dimensions of size 1.

    Args:
        mask: `[B, T]`, or any shape whose leading dimensions are those of `x` (or 1).
        x: `[B, T, ...]`.

    Returns:
        A view of `mask` that broadcasts against `x`.

    Raises:
        ValueError: if `mask` cannot be broadcast to the shape of `x`.
    """
    aligned = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)) if mask.ndim < x.ndim else mask
    if aligned.ndim != x.ndim or any(m not in (1, n) for m, n in zip(aligned.shape, x.shape, strict=True)):
        raise ValueError(
            f"mask: shape {tuple(mask.shape)} does not lead the shape {tuple(x.shape)} of what it masks; "
            "each of its dimensions must be equal to that of x, or 1"
        )
    return aligned


def fill_masked(x: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """Replace what lies under the padding, NaN and infinity included.

    Args:
        x: `[B, T, ...]`.
        mask: `[B, T]` bool (or more dimensions); True keeps the entry.
        value: what padded entries become.

    Returns:
        `[B, T, ...]`; the gradient of padded entries is exactly 0.
    """
    return torch.where(align_mask(mask, x).bool(), x, value)


def masked_sum(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of `x` and sum of the weights, for means over several batches or processes.

    Args:
        x: `[B, T, ...]`.
        mask: bool, or soft weights >= 0, of shape `[B, T]` or with more of the dimensions of `x`.

    Returns:
        `sum(x * m)` and `sum(m)`, both `[]` float32, with `m` broadcast to the shape of `x`. Entries of weight 0 add
        nothing, even if they are NaN or infinite.
    """
    aligned = align_mask(mask, x)
    kept = torch.where(aligned.bool(), x.float(), 0.0)
    weights = aligned.float()
    repeats = x.numel() // max(aligned.numel(), 1)
    total = kept.sum() if aligned.dtype == torch.bool else (kept * weights).sum()
    return total, weights.sum() * repeats


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid entries, `sum(x * m) / (sum(m) + 1e-5)`.

    An entry under the mask gets the gradient 0 and adds nothing even if it is NaN or infinite. (If `x` itself was
    computed from NaN, its own backward pass may still multiply that 0 by NaN: use `fill_masked` on such inputs.)

    Args:
        x: `[B, T, ...]`.
        mask: bool, or soft weights >= 0, of shape `[B, T]` or with more of the dimensions of `x`.

    Returns:
        `[]` float32; 0 if no entry is valid.

    Raises:
        ValueError: if `mask` cannot be broadcast to the shape of `x`.
    """
    total, weight = masked_sum(x, mask)
    return total / (weight + MEAN_EPSILON)
