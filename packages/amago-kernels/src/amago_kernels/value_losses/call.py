"""What one call of a value loss is made of, checked before anything runs.

Dimensions: `N` bins, `...` any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import numba_refusal, triton_refusal
from ..inputs import check_devices
from .labels import Transform, check_bins, check_transform

# What Triton kernels are written for: bins, and runs of axes that target and logits share or do not.
_MOST_BINS = 1024
_MOST_RUNS = 4
_NUMBA_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class LossCall:
    """What decides which backend serves.

    Attributes:
        device_type: where the inputs are, for example "cuda".
        dtype: of the logits.
        lead: leading axes of the logits.
        target_shape: shape of the target.
        bins: `N`.
    """

    device_type: str
    dtype: torch.dtype
    lead: tuple[int, ...]
    target_shape: tuple[int, ...]
    bins: int


def describe(logits: Tensor, target: Tensor) -> LossCall:
    """The call that inputs make.

    Args:
        logits: `[..., N]`.
        target: broadcasts to `[...]`.

    Returns:
        The call.
    """
    return LossCall(logits.device.type, logits.dtype, tuple(logits.shape[:-1]), tuple(target.shape), logits.shape[-1])


def padded_shape(shape: Sequence[int], axes: int) -> tuple[int, ...]:
    """A shape with ones in front.

    Args:
        shape: at most `axes` sizes.
        axes: how many to return.

    Returns:
        The sizes.
    """
    return (1,) * (axes - len(shape)) + tuple(shape)


def _triton_refusal(call: LossCall) -> str | None:
    refused = triton_refusal(call.device_type, call.dtype)
    if refused is not None:
        return refused
    if call.bins > _MOST_BINS:
        return f"Triton kernels take at most {_MOST_BINS} bins, and support has {call.bins}"
    if math.prod(call.lead) >= 1 << 31:
        return f"Triton kernels take fewer than 2**31 rows of logits, not {math.prod(call.lead)}"
    target_shape = padded_shape(call.target_shape, len(call.lead))
    shared = [one == 1 for one, size in zip(target_shape, call.lead, strict=True) if size > 1]
    runs = sum(one != other for one, other in zip(shared, [None, *shared], strict=False))
    if runs > _MOST_RUNS:
        return (
            f"target {call.target_shape} is repeated along axes of {call.lead} in more than {_MOST_RUNS} runs "
            "(bring axes along which it is repeated together)"
        )
    return None


def _numba_refusal(call: LossCall) -> str | None:
    if call.dtype not in _NUMBA_DTYPES:
        return f"Numba's kernels take float32, float64 and bfloat16 logits, not {call.dtype}"
    return numba_refusal(call.device_type)


CANDIDATES: dict[str, Callable[[LossCall], str | None]] = {
    "triton": _triton_refusal,
    "numba": _numba_refusal,
    "fused": lambda call: None,
    "reference": lambda call: None,
}


def check(logits: Tensor, target: Tensor, support: Tensor, transform: Transform) -> None:
    """Refuses what none of the backends can compute.

    Whether the bins are finite and ascending is seen on the CPU only: elsewhere, looking would stall the host.

    Args:
        logits: `[..., N]`.
        target: broadcasts to `[...]`.
        support: `[N]`.
        transform: "symlog" or None.

    Raises:
        ValueError: if an argument is not allowed.
    """
    check_transform(transform)
    if not logits.is_floating_point() or logits.dim() < 1:
        raise ValueError(f"logits is {logits.dtype} {tuple(logits.shape)}; give a floating dtype and [..., N]")
    if support.dim() != 1 or support.shape[0] < 2 or support.shape[0] != logits.shape[-1]:
        raise ValueError(
            f"support has shape {tuple(support.shape)} and logits {tuple(logits.shape)}; give [N] and [..., N], N >= 2"
        )
    if target.is_complex() or support.is_complex():
        raise ValueError(f"target is {target.dtype} and support {support.dtype}; give real dtypes")
    check_devices(logits=logits, target=target, support=support)
    lead = logits.shape[:-1]
    padded = padded_shape(target.shape, len(lead))
    if len(padded) != len(lead) or any(ours not in (1, theirs) for ours, theirs in zip(padded, lead, strict=True)):
        raise ValueError(f"target has shape {tuple(target.shape)}, which does not broadcast to {tuple(lead)}")
    check_bins(support)
