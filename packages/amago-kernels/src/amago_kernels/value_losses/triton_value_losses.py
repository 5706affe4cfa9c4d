"""Triton kernels of the value losses: one pass over the logits each way, labels in registers only.

Dimensions: `N` bins, `...` any leading axes. A program holds some targets and all bins; it makes their labels once and
goes through the copies of the logits that share them, critics for example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import config, on_device, tuned
from .call import padded_shape

if TYPE_CHECKING:
    from ..builds import Build

# Copies that one program goes through, and rows that must be left to share out among programs.
_COPIES = 8
_LEAST_ROWS = 1024
_AXES = 3

_CONFIGS = [config(4, TILE=1024), config(4, TILE=2048), config(8, TILE=2048), config(8, TILE=4096)]


@triton.jit
def _symlog(x):
    # log(1 + |x|), with what rounding 1 + |x| lost put back; an infinity would make that NaN.
    size = tl.minimum(tl.abs(x), 3.0e38)
    more = 1.0 + size
    result = tl.where(more == 1.0, size, tl.log(more) * (size / tl.where(more == 1.0, 1.0, more - 1.0)))
    return tl.where(x < 0.0, -result, result)


@triton.jit
def _places(
    count, size_1, size_2, row_0, row_1, row_2, target_0, target_1, target_2, AXES: tl.constexpr, ROWS: tl.constexpr
):
    """Which of the targets a program has, the rows of their first copies, and where the targets are."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = place < count
    last = place % size_2 if AXES > 1 else place
    row = last.to(tl.int64) * row_2
    address = last.to(tl.int64) * target_2
    if AXES > 1:
        middle = place // size_2
        first = middle // size_1
        if AXES > 2:
            middle = middle % size_1
            row += first.to(tl.int64) * row_0
            address += first.to(tl.int64) * target_0
        row += middle.to(tl.int64) * row_1
        address += middle.to(tl.int64) * target_1
    return real, row, address


@triton.jit
def _labels(target, support, bins, inverse, SYMLOG: tl.constexpr, GAUSS: tl.constexpr, BINS: tl.constexpr):
    """Labels `[ROWS, BINS]` of targets `[ROWS]` that are not NaN, zeros beyond the last bin."""
    bin_ = tl.arange(0, BINS)
    inner = bin_ < bins
    here = tl.load(support + bin_, mask=inner, other=0.0).to(tl.float32)
    below = tl.load(support + tl.maximum(bin_ - 1, 0), mask=inner, other=0.0).to(tl.float32)
    above = tl.load(support + tl.minimum(bin_ + 1, bins - 1), mask=inner, other=0.0).to(tl.float32)
    lowest, highest = tl.load(support).to(tl.float32), tl.load(support + bins - 1).to(tl.float32)
    z = _symlog(target) if SYMLOG else target
    z = tl.minimum(tl.maximum(z, lowest), highest)[:, None]
    is_first, is_last = bin_ == 0, bin_ == bins - 1
    if GAUSS:
        left = tl.where(is_first, here - 0.5 * (above - here), below + 0.5 * (here - below))
        right = tl.where(is_last, here + 0.5 * (here - below), here + 0.5 * (above - here))
        mass = tl.erf((right[None, :] - z) * inverse) - tl.erf((left[None, :] - z) * inverse)
        mass = tl.where(inner[None, :], mass, 0.0)
        return mass / tl.sum(mass, axis=1)[:, None]
    # A triangle over each bin, 1 at its centre and 0 at the centres beside it; the end bins have one slope only.
    up = 1.0 / tl.where(is_first | (inner == 0), 1.0, here - below)
    down = 1.0 / tl.where(is_last | (inner == 0), 1.0, above - here)
    rising = tl.where(is_first[None, :], 1.0, (z - below[None, :]) * up[None, :])
    falling = tl.where(is_last[None, :], 1.0, (above[None, :] - z) * down[None, :])
    return tl.where(inner[None, :], tl.maximum(tl.minimum(rising, falling), 0.0), 0.0)


@tuned(_CONFIGS, key=("BINS", "GAUSS"))
@triton.jit
def forward_kernel(
    logits,
    target,
    support,
    losses,
    bins,
    inverse,
    count,
    size_1,
    size_2,
    row_0,
    row_1,
    row_2,
    target_0,
    target_1,
    target_2,
    copies,
    copies_each,
    copy_rows,
    AXES: tl.constexpr,
    SYMLOG: tl.constexpr,
    GAUSS: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Losses of some targets in some copies."""
    ROWS: tl.constexpr = TILE // BINS
    real, row, address = _places(count, size_1, size_2, row_0, row_1, row_2, target_0, target_1, target_2, AXES, ROWS)
    scalar = tl.load(target + address, mask=real, other=0.0).to(tl.float32)
    label = _labels(scalar, support, bins, inverse, SYMLOG, GAUSS, BINS)
    bin_ = tl.arange(0, BINS)
    inner = (bin_ < bins)[None, :]
    start = tl.program_id(1) * copies_each
    for copy in range(start, tl.minimum(start + copies_each, copies)):
        at = row + copy * copy_rows
        x = tl.load(logits + at[:, None] * bins + bin_[None, :], mask=real[:, None] & inner, other=0.0).to(tl.float32)
        x = tl.where(inner, x, float("-inf"))
        x -= tl.max(x, axis=1)[:, None]
        loss = tl.log(tl.sum(tl.exp(x), axis=1)) - tl.sum(label * tl.where(inner, x, 0.0), axis=1)
        # Minima and maxima have hidden a target that is NaN.
        tl.store(losses + at, tl.where(scalar == scalar, loss, float("nan")), mask=real)


@tuned(_CONFIGS, key=("BINS", "GAUSS"))
@triton.jit
def backward_kernel(
    grad,
    logits,
    target,
    support,
    out,
    bins,
    inverse,
    grad_row,
    count,
    size_1,
    size_2,
    row_0,
    row_1,
    row_2,
    target_0,
    target_1,
    target_2,
    copies,
    copies_each,
    copy_rows,
    AXES: tl.constexpr,
    SYMLOG: tl.constexpr,
    GAUSS: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradients of the logits of some targets in some copies."""
    ROWS: tl.constexpr = TILE // BINS
    real, row, address = _places(count, size_1, size_2, row_0, row_1, row_2, target_0, target_1, target_2, AXES, ROWS)
    scalar = tl.load(target + address, mask=real, other=0.0).to(tl.float32)
    label = _labels(scalar, support, bins, inverse, SYMLOG, GAUSS, BINS)
    label = tl.where((scalar == scalar)[:, None], label, float("nan"))
    bin_ = tl.arange(0, BINS)
    inner = (bin_ < bins)[None, :]
    start = tl.program_id(1) * copies_each
    for copy in range(start, tl.minimum(start + copies_each, copies)):
        at = row + copy * copy_rows
        place = at[:, None] * bins + bin_[None, :]
        x = tl.load(logits + place, mask=real[:, None] & inner, other=0.0).to(tl.float32)
        upstream = tl.load(grad + at * grad_row, mask=real, other=0.0).to(tl.float32)
        x = tl.where(inner, x, float("-inf"))
        x = tl.exp(x - tl.max(x, axis=1)[:, None])
        x = x * (upstream / tl.sum(x, axis=1))[:, None] - upstream[:, None] * label
        tl.store(out + place, x.to(out.dtype.element_ty), mask=real[:, None] & inner)


@dataclass(frozen=True)
class _Plan:
    """How rows of logits and targets go together.

    Attributes:
        target: the target, perhaps moved.
        axes: of what one copy of the logits has: sizes, strides in rows, strides of the target.
        copies: size, and stride in rows, of the axis along which a program uses its labels again.
    """

    target: Tensor
    axes: list[tuple[int, int, int]]
    copies: tuple[int, int]


def _merged(axes: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Neighbours that are one axis are made one."""
    result: list[tuple[int, int, int]] = []
    for size, row, stride in axes:
        if result and result[-1][1] == row * size and result[-1][2] == stride * size:
            size *= result.pop()[0]
        if size > 1:
            result.append((size, row, stride))
    return result


def _plan(lead: tuple[int, ...], target: Tensor) -> _Plan:
    shape = padded_shape(target.shape, len(lead))
    strides = (0,) * (len(lead) - target.dim()) + target.stride()
    axes = [
        (size, math.prod(lead[axis + 1 :]), strides[axis] if shape[axis] > 1 else 0) for axis, size in enumerate(lead)
    ]
    merged = _merged(axes)
    repeated = [axis for axis in merged if axis[2] == 0]
    if repeated:
        longest = max(repeated)
        rest = _merged([axis for axis in merged if axis is not longest])
        if len(merged) > _AXES or math.prod(lead) // longest[0] >= _LEAST_ROWS:
            return _moved_if_needed(lead, _Plan(target, rest, longest[:2]))
    return _moved_if_needed(lead, _Plan(target, merged, (1, 0)))


def _moved_if_needed(lead: tuple[int, ...], plan: _Plan) -> _Plan:
    if len(plan.axes) <= _AXES:
        return plan
    return _plan(lead, plan.target.contiguous())


def _arguments(
    logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None
) -> tuple[dict[str, Any], int, int]:
    """What both kernels take; how many targets of one copy there are, and groups of copies."""
    plan = _plan(tuple(logits.shape[:-1]), target)
    axes = [(1, 0, 0)] * (_AXES - len(plan.axes)) + plan.axes
    count, (copies, copy_rows) = math.prod(size for size, _, _ in axes), plan.copies
    # A grid has at most 65535 programs on its second axis.
    copies_each = max(min(copies, _COPIES), triton.cdiv(copies, 1 << 15))
    arguments = {
        "logits": logits,
        "target": plan.target,
        "support": support.contiguous(),
        "bins": logits.shape[-1],
        "inverse": 0.0 if sigma is None else 1.0 / (sigma * math.sqrt(2.0)),
        "count": count,
        "size_1": axes[1][0],
        "size_2": axes[2][0],
        **{f"row_{axis}": axes[axis][1] for axis in range(_AXES)},
        **{f"target_{axis}": axes[axis][2] for axis in range(_AXES)},
        "copies": copies,
        "copies_each": copies_each,
        "copy_rows": copy_rows,
        "AXES": max(len(plan.axes), 1),
        "SYMLOG": use_symlog,
        "GAUSS": sigma is not None,
        "BINS": max(triton.next_power_of_2(logits.shape[-1]), 16),
    }
    return arguments, count, triton.cdiv(copies, copies_each)


def launch_forward(logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None) -> Tensor:
    """Both losses; two-hot if `sigma` is None.

    Args:
        logits: `[..., N]`; copied if it is not contiguous.
        target: broadcasts to `[...]`.
        support: `[N]`.
        use_symlog: transform targets by `symlog`.
        sigma: of HL-Gauss labels.

    Returns:
        `[...]` float32.
    """
    losses = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    if losses.numel() == 0:
        return losses
    arguments, count, groups = _arguments(logits.contiguous(), target, support, use_symlog, sigma)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(count, meta["TILE"] // meta["BINS"]), groups

    with on_device(logits):
        forward_kernel[grid](**arguments, losses=losses)
    return losses


def launch_backward(
    grad: Tensor, logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None
) -> Tensor:
    """The gradient of the logits.

    Args:
        grad: `[...]`.
        logits: `[..., N]`; copied if it is not contiguous.
        target: broadcasts to `[...]`.
        support: `[N]`.
        use_symlog: transform targets by `symlog`.
        sigma: of HL-Gauss labels.

    Returns:
        `[..., N]` in the dtype of the logits, contiguous.
    """
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if out.numel() == 0:
        return out
    arguments, count, groups = _arguments(logits.contiguous(), target, support, use_symlog, sigma)
    # The gradient of a sum is one number, repeated.
    repeated = all(stride == 0 for stride in grad.stride())
    upstream = grad if repeated else grad.contiguous()

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(count, meta["TILE"] // meta["BINS"]), groups

    with on_device(logits):
        backward_kernel[grid](**arguments, grad=upstream, grad_row=0 if repeated else 1, out=out)
    return out


def builds() -> list[Build]:
    """What `amago_kernels.builds` compiles: 32 windows of 512 transitions, 4 critics, 7 discounts."""
    from ..builds import Build

    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    target = torch.empty(32, 512, 7, device="meta")
    result = []
    for bins, dtype, sigma in (
        (64, torch.float32, None),
        (64, torch.bfloat16, 0.75),
        (128, torch.bfloat16, None),
        (128, torch.float32, 0.75),
    ):
        logits = torch.empty(4, 32, 512, 7, bins, dtype=dtype, device="meta")
        support = torch.empty(bins, device="meta")
        arguments = {
            name: pointers[value.dtype] if isinstance(value, Tensor) else value
            for name, value in _arguments(logits, target, support, True, sigma)[0].items()
        }
        name = f"{'two_hot' if sigma is None else 'hl_gauss'}_cross_entropy {pointers[dtype][1:]} N={bins}"
        result.append(Build(f"{name} forward", forward_kernel, arguments | {"losses": "*fp32"}))
        arguments |= {"grad": "*fp32", "grad_row": 1, "out": pointers[dtype]}
        result.append(Build(f"{name} backward", backward_kernel, arguments))
    return result
