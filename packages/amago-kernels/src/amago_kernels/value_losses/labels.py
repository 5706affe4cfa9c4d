"""Scalar targets as distributions over bins.

Dimensions: `N` bins, `...` any leading axes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Transform = Literal["symlog"] | None


def symlog(x: Tensor) -> Tensor:
    """`sign(x) ln(1 + |x|)`, elementwise; its slope at 0 is 1.

    Source: Hafner et al. (2023), "Mastering Diverse Domains through World Models".
    """
    # Not through sign and abs, whose product has slope 0 at 0. Of the two halves, one passes a gradient there.
    return x.clamp_min(0.0).log1p() - (-x).relu().log1p()


def symexp(x: Tensor) -> Tensor:
    """`sign(x) (e^|x| - 1)`, the inverse of `symlog`, elementwise; its slope at 0 is 1."""
    return x.clamp_min(0.0).expm1() - (-x).relu().expm1()


@torch.no_grad()
def two_hot_labels(target: Tensor, support: Tensor, *, transform: Transform = "symlog") -> Tensor:
    """Two-hot labels, in full; see `two_hot_cross_entropy`.

    Args:
        target: `[...]` scalars, before the transform.
        support: `[N]` bin centres in transformed units, ascending.
        transform: "symlog" or None.

    Returns:
        `[..., N]` probabilities.

    Raises:
        ValueError: if support or transform are not allowed.
    """
    check_transform(transform)
    check_bins(support)
    z = place(target, support, transform == "symlog").unsqueeze(-1)
    gap = support.diff()
    # A triangle over each bin, 1 at its centre and 0 at the centres beside it; the end bins have one slope only.
    rising = torch.cat([torch.ones_like(z), (z - support[:-1]) / gap], dim=-1)
    falling = torch.cat([(support[1:] - z) / gap, torch.ones_like(z)], dim=-1)
    return torch.minimum(rising, falling).clamp_min(0.0)


@torch.no_grad()
def hl_gauss_labels(target: Tensor, support: Tensor, sigma: float, *, transform: Transform = "symlog") -> Tensor:
    """HL-Gauss labels, in full; see `hl_gauss_cross_entropy`.

    Args:
        target: `[...]` scalars, before the transform.
        support: `[N]` bin centres in transformed units, ascending.
        sigma: standard deviation in transformed units, > 0.
        transform: "symlog" or None.

    Returns:
        `[..., N]` probabilities.

    Raises:
        ValueError: if `sigma`, support or transform are not allowed.
    """
    check_transform(transform)
    check_bins(support)
    check_sigma(sigma)
    z = place(target, support, transform == "symlog").unsqueeze(-1)
    mass = torch.special.ndtr((edges(support) - z) / sigma).diff(dim=-1)
    return mass / mass.sum(dim=-1, keepdim=True)


def place(target: Tensor, support: Tensor, use_symlog: bool) -> Tensor:
    """Targets in transformed units, within the bins.

    Args:
        target: any shape.
        support: `[N]`.
        use_symlog: transform by `symlog`.

    Returns:
        Like `target`.
    """
    # Scalar bounds would mean a host sync.
    return torch.minimum(torch.maximum(symlog(target) if use_symlog else target, support[0]), support[-1])


def edges(support: Tensor) -> Tensor:
    """Ends of the bins; the outer ones are as far from their centre as the inner ones.

    Args:
        support: `[N]`.

    Returns:
        `[N + 1]`.
    """
    half = 0.5 * support.diff()
    return torch.cat([support[:1] - half[:1], support[:-1] + half, support[-1:] + half[-1:]])


def check_transform(transform: Transform) -> None:
    """Refuses a transform that there is not.

    Args:
        transform: the argument.

    Raises:
        ValueError: if it is neither "symlog" nor None.
    """
    if transform not in ("symlog", None):
        raise ValueError(f"transform={transform!r} is not allowed; give 'symlog' or None")


def check_bins(support: Tensor) -> None:
    """Refuses bins that are not finite and ascending; on the CPU only: elsewhere, looking would stall the host.

    Args:
        support: `[N]`.

    Raises:
        ValueError: if there is one axis too many, or a bin is wrong.
    """
    if support.dim() != 1 or support.shape[0] < 2:
        raise ValueError(f"support has shape {tuple(support.shape)}; give [N], N >= 2")
    if support.device.type != "cpu" or torch.compiler.is_compiling():
        return
    # Distances are finite and positive exactly if the bins are finite and ascend; NaN compares False.
    gaps = support.detach().diff()
    good = (gaps > 0) & (gaps < math.inf)
    if bool(good.all()):
        return
    wrong = "does not ascend" if bool(support.isfinite().all()) else "is not finite"
    place = int(good.logical_not().nonzero()[0])
    raise ValueError(
        f"support {wrong}: {float(support[place]):.6g} is followed by {float(support[place + 1]):.6g} at index "
        f"{place + 1}; give finite, ascending bin centres"
    )


def check_sigma(sigma: float) -> None:
    """Refuses a standard deviation that is none.

    Args:
        sigma: the argument.

    Raises:
        ValueError: if it is not a finite number > 0.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0.0 < sigma < math.inf:
        raise ValueError(f"sigma={sigma!r} is not allowed; give a finite number > 0")
