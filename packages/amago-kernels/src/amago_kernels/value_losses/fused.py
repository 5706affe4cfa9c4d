"""The losses in plain PyTorch, of the few bins that carry a label, and in pieces that stay in a CPU's cache.

Dimensions: `N` bins, `K` neighbouring bins that carry the label, `...` any leading axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .call import padded_shape
from .labels import edges, place

# Logits in a piece.
_PIECE = 1 << 18
# Standard deviations on each side of a target beyond which a Gaussian label is taken as zero: below rounding.
_REACH = {torch.float32: 6.0, torch.float64: 9.0}


def wide_dtype(logits: Tensor) -> torch.dtype:
    """The dtype to compute in.

    Args:
        logits: of any floating dtype.

    Returns:
        `torch.float32`, or `torch.float64` for such logits.
    """
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Bins:
    """What is the same for all labels.

    Attributes:
        support: `[N]`.
        use_symlog: transform targets by `symlog`.
        ends: `[N + 1]` ends of the bins in units of the Gaussian's argument; None for two-hot labels.
        scale: what turns transformed targets into these units.
        reach: how many bins beyond the two around a target a Gaussian label can reach on one side.
    """

    support: Tensor
    use_symlog: bool
    ends: Tensor | None
    scale: float
    reach: int


def _make_bins(support: Tensor, use_symlog: bool, sigma: float | None) -> _Bins:
    if sigma is None:
        return _Bins(support, use_symlog, None, 1.0, 0)
    scale, count = 1.0 / (sigma * math.sqrt(2.0)), support.shape[0]
    # Looking at the spacing would be a host sync elsewhere; all bins are right too.
    reach = label_reach(support, sigma) if support.device.type == "cpu" else count
    return _Bins(support, use_symlog, edges(support) * scale, scale, reach)


def label_reach(support: Tensor, sigma: float) -> int:
    """How far a Gaussian label goes.

    Args:
        support: `[N]` float32 or float64, on the CPU.
        sigma: its standard deviation.

    Returns:
        How many bins beyond the two around a target it can reach on one side.
    """
    return min(math.ceil(_REACH[support.dtype] * sigma / float(support.diff().min())), support.shape[0])


def _label_window(target: Tensor, bins: _Bins) -> tuple[Tensor, Tensor]:
    """The bins that carry a label: indices `[..., K]` of `K` neighbours and their weights `[..., K]`."""
    support = bins.support
    z = place(target, support, bins.use_symlog)
    last = support.shape[0] - 1
    # The bins left and right of the target; the end belongs to the last pair.
    left = (torch.searchsorted(support, z.contiguous(), right=True) - 1).clamp_(0, last - 1)
    if bins.ends is None:
        lower, upper = support[left], support[left + 1]
        weight = (z - lower) / (upper - lower)
        return torch.stack([left, left + 1], dim=-1), torch.stack([1.0 - weight, weight], dim=-1)
    count = min(2 * bins.reach + 2, last + 1)
    start = (left - bins.reach).clamp_(0, last + 1 - count).unsqueeze(-1)
    index = start + torch.arange(count + 1, device=support.device)
    mass = (bins.ends[index] - (z * bins.scale).unsqueeze(-1)).erf_().diff(dim=-1)
    return index[..., :-1], mass / mass.sum(dim=-1, keepdim=True)


def _pieces(logits: Tensor, target: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Places in the leading axes of the logits, and in the target, that are worked on at one time."""
    lead = tuple(logits.shape[:-1])
    shared = [size == 1 for size in padded_shape(target.shape, len(lead))]
    steps, rows, most = list(lead), math.prod(lead), max(_PIECE // logits.shape[-1], 1)
    # Axes along which the target is repeated are cut last: the label is found once for all of them.
    for axis in sorted(range(len(lead)), key=lambda axis: shared[axis]):
        if logits.device.type != "cpu" or rows <= most:
            break
        rest = rows // lead[axis]
        steps[axis] = max(most // rest, 1)
        rows = rest * steps[axis]
    cuts = [
        [slice(start, start + step) for start in range(0, size, step)]
        for size, step in zip(lead, (max(step, 1) for step in steps), strict=True)
    ]
    for piece in itertools.product(*cuts):
        whole = slice(None)
        ours = tuple(whole if alone else part for alone, part in zip(shared, piece, strict=True))
        yield piece, ours[len(lead) - target.dim() :]


def _log_sum_exp(logits: Tensor, wide: torch.dtype) -> Tensor:
    if logits.device.type != "cpu":
        return logits.to(wide).logsumexp(dim=-1)
    rows = logits.reshape(-1, logits.shape[-1])
    out = torch.empty(rows.shape[0], dtype=wide)
    most = max(_PIECE // rows.shape[1], 1)
    for part, into in zip(rows.split(most), out.split(most), strict=True):
        torch.logsumexp(part.to(wide), dim=-1, out=into)
    return out.view(logits.shape[:-1])


def _picked(index: Tensor, rows: Tensor) -> Tensor:
    return index.expand(*rows.shape[:-1], index.shape[-1])


@torch.library.custom_op("amago_kernels::value_cross_entropy", mutates_args=())
def fused_cross_entropy(
    logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None
) -> Tensor:
    """Both losses; two-hot if `sigma` is None."""
    wide = wide_dtype(logits)
    bins = _make_bins(support.to(wide), use_symlog, sigma)
    index, weight = _label_window(target.to(wide), bins)
    of_label = (logits.gather(-1, _picked(index, logits)).to(wide) * weight).sum(dim=-1)
    return torch.sub(_log_sum_exp(logits, wide), of_label).contiguous()


@fused_cross_entropy.register_fake
def _(logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None) -> Tensor:
    return torch.empty(logits.shape[:-1], dtype=wide_dtype(logits), device=logits.device)


@torch.library.custom_op("amago_kernels::value_cross_entropy_backward", mutates_args=())
def _backward_op(
    grad: Tensor, logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None
) -> Tensor:
    """`grad (softmax(logits) - label)`, in the dtype of the logits."""
    wide = wide_dtype(logits)
    bins = _make_bins(support.to(wide), use_symlog, sigma)
    whole = logits.dtype == wide
    if whole:
        out = logits.contiguous().softmax(dim=-1).mul_(grad.unsqueeze(-1))
    else:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for piece, ours in _pieces(logits, target):
        index, weight = _label_window(target[ours].to(wide), bins)
        upstream = grad[piece].unsqueeze(-1)
        # In the end, half precision is all that is kept; in between, there is single precision for a piece.
        rows = out[piece] if whole else logits[piece].contiguous().softmax(dim=-1, dtype=wide).mul_(upstream)
        rows.scatter_add_(-1, _picked(index, rows), -upstream * weight)
        if not whole:
            out[piece] = rows
    return out


@_backward_op.register_fake
def _(grad: Tensor, logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What a backward pass needs: the inputs alone.

    Args:
        ctx: of autograd.
        inputs: of the operator.
        output: of the operator.
    """
    logits, target, support, ctx.use_symlog, ctx.sigma = inputs
    ctx.save_for_backward(logits, target, support)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_op(grad, *ctx.saved_tensors, ctx.use_symlog, ctx.sigma), None, None, None, None


fused_cross_entropy.register_autograd(_differentiate, setup_context=save_inputs)
