"""Cross-entropy between predicted value distributions and scalar targets.

A critic that classifies returns puts probabilities on `N` bins. A scalar target becomes a label on the same bins: its
two neighbours (two-hot) or a discretised Gaussian around it (HL-Gauss). The losses here never need that label for every
prediction: critics that share a target share its label, and only the few bins that carry weight are looked at.

Dimensions: `N` bins, `K` neighbouring bins that carry the label, `...` any leading axes.

Source: Hafner et al. (2023), "Mastering Diverse Domains through World Models" (symlog two-hot); Imani & White (2018),
"Improving Regression Performance with Distributional Losses", and Farebrother et al. (2024), "Stop Regressing"
(HL-Gauss).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .dispatch import choose

Transform = Literal["symlog"] | None

# Rows of logits whose exponentials exist at one time on the CPU: small enough to stay in the cache.
_ROWS = 2048
# Standard deviations on each side of a target beyond which a Gaussian label is taken as zero: below rounding.
_REACH = {torch.float32: 6.0, torch.float64: 9.0}


def symlog(x: Tensor) -> Tensor:
    """`sign(x) ln(1 + |x|)`, elementwise; its slope at 0 is 1.

    Source: Hafner et al. (2023), "Mastering Diverse Domains through World Models".
    """
    # Not through sign and abs, whose product has slope 0 at 0. Of the two halves, one passes a gradient there.
    return x.clamp_min(0.0).log1p() - (-x).relu().log1p()


def symexp(x: Tensor) -> Tensor:
    """`sign(x) (e^|x| - 1)`, the inverse of `symlog`, elementwise; its slope at 0 is 1."""
    return x.clamp_min(0.0).expm1() - (-x).relu().expm1()


_CANDIDATES: dict[str, Callable[[Tensor], str | None]] = {
    "fused": lambda logits: None,
    "reference": lambda logits: None,
}


def two_hot_cross_entropy(
    logits: Tensor, target: Tensor, support: Tensor, *, transform: Transform = "symlog", backend: str = "auto"
) -> Tensor:
    """Cross-entropy of predicted bins with the two-hot label of a scalar.

    The label puts all weight on the two bins around the target, such that its mean is the target; a target outside the
    bins counts as the nearest end.

    Args:
        logits: `[..., N]`.
        target: scalars that broadcast to `[...]`, before the transform; no gradient flows to them.
        support: `[N]` bin centres in transformed units, ascending, evenly spaced or not.
        transform: "symlog" or None, applied to the targets.
        backend: "auto", "reference" or "fused". The fused backend keeps nothing but its inputs for the backward pass.

    Returns:
        Losses `[...]` in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: if shapes disagree, the transform is unknown, or the backend cannot serve the call.
    """
    _check(logits, target, support, transform)
    if choose("two_hot_cross_entropy", backend, logits, _CANDIDATES) == "fused":
        return _cross_entropy(logits, target, support, transform == "symlog", None)
    labels = two_hot_labels(target.to(_wide(logits)), support.to(_wide(logits)), transform=transform)
    return -(labels * logits.to(labels.dtype).log_softmax(dim=-1)).sum(dim=-1)


def hl_gauss_cross_entropy(
    logits: Tensor,
    target: Tensor,
    support: Tensor,
    sigma: float,
    *,
    transform: Transform = "symlog",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of predicted bins with a Gaussian around a scalar, integrated over each bin.

    Bins end half-way between their centres, and the label is renormalised over all of them. A target outside the bins
    counts as the nearest end.

    Args:
        logits: `[..., N]`.
        target: scalars that broadcast to `[...]`, before the transform; no gradient flows to them.
        support: `[N]` bin centres in transformed units, ascending.
        sigma: standard deviation in transformed units, > 0; 0.75 of the spacing is usual.
        transform: "symlog" or None, applied to the targets.
        backend: "auto", "reference" or "fused". The fused backend keeps nothing but its inputs for the backward pass.

    Returns:
        Losses `[...]` in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: if shapes disagree, `sigma` or the transform is not allowed, or the backend cannot serve the call.
    """
    _check(logits, target, support, transform)
    _check_sigma(sigma)
    if choose("hl_gauss_cross_entropy", backend, logits, _CANDIDATES) == "fused":
        return _cross_entropy(logits, target, support, transform == "symlog", float(sigma))
    labels = hl_gauss_labels(target.to(_wide(logits)), support.to(_wide(logits)), sigma, transform=transform)
    return -(labels * logits.to(labels.dtype).log_softmax(dim=-1)).sum(dim=-1)


@torch.no_grad()
def two_hot_labels(target: Tensor, support: Tensor, *, transform: Transform = "symlog") -> Tensor:
    """Two-hot labels, in full; see `two_hot_cross_entropy`.

    Args:
        target: `[...]` scalars, before the transform.
        support: `[N]` bin centres in transformed units, ascending.
        transform: "symlog" or None.

    Returns:
        `[..., N]` probabilities.
    """
    z = _place(target, support, transform == "symlog").unsqueeze(-1)
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
    """
    z = _place(target, support, transform == "symlog").unsqueeze(-1)
    mass = torch.special.ndtr((_edges(support) - z) / sigma).diff(dim=-1)
    return mass / mass.sum(dim=-1, keepdim=True)


def _place(target: Tensor, support: Tensor, use_symlog: bool) -> Tensor:
    """Targets in transformed units, within the bins."""
    # Scalar bounds would mean a host sync.
    return torch.minimum(torch.maximum(symlog(target) if use_symlog else target, support[0]), support[-1])


def _edges(support: Tensor) -> Tensor:
    """`[N + 1]` ends of the bins; the outer ones are as far from their centre as the inner ones."""
    half = 0.5 * support.diff()
    return torch.cat([support[:1] - half[:1], support[:-1] + half, support[-1:] + half[-1:]])


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _label_window(target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None) -> tuple[Tensor, Tensor]:
    """The bins that carry a label: indices `[..., K]` of `K` neighbours and their weights `[..., K]`."""
    z = _place(target, support, use_symlog)
    last = support.shape[0] - 1
    # The bins left and right of the target; the end belongs to the last pair.
    left = (torch.searchsorted(support, z.contiguous(), right=True) - 1).clamp(0, last - 1)
    if sigma is None:
        lower, upper = support[left], support[left + 1]
        weight = (z - lower) / (upper - lower)
        return torch.stack([left, left + 1], dim=-1), torch.stack([1.0 - weight, weight], dim=-1)
    beside = _bins_beside(support, sigma)
    count = min(2 * beside + 2, last + 1)
    start = (left - beside).clamp(0, last + 1 - count).unsqueeze(-1)
    offsets = torch.arange(count + 1, device=support.device)
    mass = torch.special.ndtr((_edges(support)[start + offsets] - z.unsqueeze(-1)) / sigma).diff(dim=-1)
    return start + offsets[:-1], mass / mass.sum(dim=-1, keepdim=True)


def _bins_beside(support: Tensor, sigma: float) -> int:
    """How many bins beyond the two around a target a Gaussian label can reach on one side."""
    if support.device.type != "cpu":
        # Looking at the spacing would be a host sync; all bins are right too.
        return support.shape[0]
    return min(math.ceil(_REACH[support.dtype] * sigma / float(support.diff().min())), support.shape[0])


def _log_sum_exp(logits: Tensor) -> Tensor:
    if logits.device.type != "cpu":
        return logits.to(_wide(logits)).logsumexp(dim=-1)
    rows = logits.reshape(-1, logits.shape[-1])
    out = torch.empty(rows.shape[0], dtype=_wide(logits))
    for part, into in zip(rows.split(_ROWS), out.split(_ROWS), strict=True):
        torch.logsumexp(part.to(out.dtype), dim=-1, out=into)
    return out.view(logits.shape[:-1])


@torch.library.custom_op("amago_kernels::value_cross_entropy", mutates_args=())
def _cross_entropy(logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None) -> Tensor:
    """Both losses; two-hot if `sigma` is None."""
    wide = _wide(logits)
    index, weight = _label_window(target.to(wide), support.to(wide), use_symlog, sigma)
    shape = (*logits.shape[:-1], index.shape[-1])
    picked = logits.gather(-1, index.expand(shape)).to(wide)
    return _log_sum_exp(logits) - (picked * weight).sum(dim=-1)


@_cross_entropy.register_fake
def _(logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=_wide(logits))


@torch.library.custom_op("amago_kernels::value_cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None
) -> Tensor:
    """`grad (softmax(logits) - label)`, in the dtype of the logits."""
    wide = _wide(logits)
    index, weight = _label_window(target.to(wide), support.to(wide), use_symlog, sigma)
    shape = (*logits.shape[:-1], index.shape[-1])
    grad = grad.unsqueeze(-1)
    out = logits.contiguous().softmax(dim=-1, dtype=wide).mul_(grad)
    return out.scatter_add_(-1, index.expand(shape), -grad * weight).to(logits.dtype)


@_cross_entropy_backward.register_fake
def _(grad: Tensor, logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, support, ctx.use_symlog, ctx.sigma = inputs
    ctx.save_for_backward(logits, target, support)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_logits = _cross_entropy_backward(grad, *ctx.saved_tensors, ctx.use_symlog, ctx.sigma)
    return grad_logits, None, None, None, None


_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def _check(logits: Tensor, target: Tensor, support: Tensor, transform: Transform) -> None:
    if transform not in ("symlog", None):
        raise ValueError(f"transform={transform!r} is not allowed; give 'symlog' or None")
    if not logits.is_floating_point() or logits.dim() < 1:
        raise ValueError(f"logits is {logits.dtype} {tuple(logits.shape)}; give a floating dtype and [..., N]")
    if support.dim() != 1 or support.shape[0] < 2 or support.shape[0] != logits.shape[-1]:
        raise ValueError(
            f"support has shape {tuple(support.shape)} and logits {tuple(logits.shape)}; give [N] and [..., N], N >= 2"
        )
    lead = logits.shape[:-1]
    padded = (1,) * (len(lead) - target.dim()) + tuple(target.shape)
    if len(padded) != len(lead) or any(ours not in (1, theirs) for ours, theirs in zip(padded, lead, strict=True)):
        raise ValueError(f"target has shape {tuple(target.shape)}, which does not broadcast to {tuple(lead)}")


def _check_sigma(sigma: float) -> None:
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0.0 < sigma < math.inf:
        raise ValueError(f"sigma={sigma!r} is not allowed; give a finite number > 0")
