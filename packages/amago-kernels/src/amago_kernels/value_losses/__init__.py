"""Cross-entropy between predicted value distributions and scalar targets.

A critic that classifies returns puts probabilities on `N` bins. A scalar target becomes a label on the same bins: its
two neighbours (two-hot) or a discretised Gaussian around it (HL-Gauss). The losses here never hold that label for every
prediction, and critics that share a target share the work on it.

Dimensions: `N` bins, `...` any leading axes.

Source: Hafner et al. (2023), "Mastering Diverse Domains through World Models" (symlog two-hot); Imani & White (2018),
"Improving Regression Performance with Distributional Losses", and Farebrother et al. (2024), "Stop Regressing"
(HL-Gauss).
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import choose
from .call import CANDIDATES, check, describe
from .fused import fused_cross_entropy, wide_dtype
from .labels import Transform, check_sigma, hl_gauss_labels, symexp, symlog, two_hot_labels
from .operators import numba_cross_entropy, triton_cross_entropy

__all__ = [
    "Transform",
    "hl_gauss_cross_entropy",
    "hl_gauss_labels",
    "symexp",
    "symlog",
    "two_hot_cross_entropy",
    "two_hot_labels",
]


def two_hot_cross_entropy(
    logits: Tensor, target: Tensor, support: Tensor, *, transform: Transform = "symlog", backend: str = "auto"
) -> Tensor:
    """Cross-entropy of predicted bins with the two-hot label of a scalar.

    The label puts all weight on the two bins around the target, such that its mean is the target; a target outside the
    bins counts as the nearest end.

    Args:
        logits: `[..., N]`.
        target: scalars that broadcast to `[...]`, before the transform; no gradient flows to them.
        support: `[N]` bin centres in transformed units, finite and ascending, evenly spaced or not. Checked on the CPU
            only: elsewhere, looking at them would stall the host.
        transform: "symlog" or None, applied to the targets.
        backend: "auto", "reference", "fused", "numba" (on the CPU; not for float16) or "triton". For the backward pass,
            the last three keep their inputs, and "numba" one number per loss besides.

    Returns:
        Losses `[...]` in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: if shapes or devices disagree, support or transform are not allowed, or the backend cannot serve the
            call.
    """
    check(logits, target, support, transform)
    chosen = choose("two_hot_cross_entropy", backend, describe(logits, target), CANDIDATES)
    if chosen == "triton":
        return triton_cross_entropy(logits, target, support, transform == "symlog", None)
    if chosen == "numba":
        return numba_cross_entropy(logits, target, support, transform == "symlog", None)[0]
    if chosen == "fused":
        return fused_cross_entropy(logits, target, support, transform == "symlog", None)
    wide = wide_dtype(logits)
    return _by_labels(logits, two_hot_labels(target.to(wide), support.to(wide), transform=transform))


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
        support: `[N]` bin centres in transformed units, finite and ascending. Checked on the CPU only: elsewhere,
            looking at them would stall the host.
        sigma: standard deviation in transformed units, > 0; 0.75 of the spacing is usual.
        transform: "symlog" or None, applied to the targets.
        backend: "auto", "reference", "fused", "numba" (on the CPU; not for float16) or "triton". For the backward pass,
            the last three keep their inputs, and "numba" one number per loss besides.

    Returns:
        Losses `[...]` in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: if shapes or devices disagree, `sigma`, support or transform are not allowed, or the backend cannot
            serve the call.
    """
    check(logits, target, support, transform)
    check_sigma(sigma)
    chosen = choose("hl_gauss_cross_entropy", backend, describe(logits, target), CANDIDATES)
    if chosen == "triton":
        return triton_cross_entropy(logits, target, support, transform == "symlog", float(sigma))
    if chosen == "numba":
        return numba_cross_entropy(logits, target, support, transform == "symlog", float(sigma))[0]
    if chosen == "fused":
        return fused_cross_entropy(logits, target, support, transform == "symlog", float(sigma))
    wide = wide_dtype(logits)
    return _by_labels(logits, hl_gauss_labels(target.to(wide), support.to(wide), sigma, transform=transform))


def _by_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return -(labels * logits.to(labels.dtype).log_softmax(dim=-1)).sum(dim=-1)
