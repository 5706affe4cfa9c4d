"""The losses on the CPU in one walk through the logits per direction, compiled by Numba.

Kernels see flat arrays and the places of rows in them, as unsigned integers: signed ones might count from the end,
which takes longer than a short row.

Dimensions: `N` bins, `K` bins of a label's window, `S` targets, `...` any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from ..numba_jit import array, in_threads, jit
from ..numba_math import LOG2_E, exp2, log
from .call import padded_shape
from .fused import label_reach, wide_dtype
from .labels import edges
from .numba_labels import windows

_Array = np.ndarray[Any, Any]
# Targets whose labels are made at one time.
_BLOCK = 64
_LANES = 8
# Sums of exponentials between which nothing that counts was lost.
_LEAST, _MOST = 1e-30, 1e30
# Beyond, the logarithm of a sum is too coarse a float32 to normalise with.
_LARGE = 32.0


def wide(x: Any) -> Any:
    """A logit to compute with, inside of a kernel: bfloat16, whose bits come as an integer, becomes float32."""
    return x


def narrow(x: Any, memory: Any) -> Any:
    """A number as some memory keeps it, inside of a kernel."""
    return x


@overload(wide)
def _(x: Any) -> Callable[[Any], Any]:
    return _from_bits if x == types.uint16 else wide


@overload(narrow)
def _(x: Any, memory: Any) -> Callable[[Any, Any], Any]:
    return _to_bits if memory.dtype == types.uint16 else narrow


def _from_bits(x: Any) -> Any:
    return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)


def _to_bits(x: Any, memory: Any) -> Any:
    # To the nearest, and to even ones; a carry would turn a NaN into something else.
    bits = np.float32(x).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16) if x == x else np.uint32(0x7FC0))


@dataclass(frozen=True)
class _Plan:
    """How rows of logits and targets go together.

    Attributes:
        target: `[S]`, those that differ.
        base: rows of the first copies of every `inner`-th target.
        inner: how many targets follow each of them.
        step: rows between these.
        copies: rows between the first copy and all of them.
    """

    target: Tensor
    base: _Array
    inner: int
    step: int
    copies: _Array

    def arguments(self) -> tuple[Any, ...]:
        """What kernels take."""
        return array(self.target), self.base, self.inner, self.step, self.copies


def _offsets(axes: list[tuple[int, int]]) -> _Array:
    """Rows of all places in some axes, given by size and stride."""
    result = np.zeros(1, np.uintp)
    for size, stride in axes:
        result = (result[:, None] + np.arange(size, dtype=np.uintp) * np.uintp(stride)).reshape(-1)
    return result


def _plan(logits: Tensor, target: Tensor) -> _Plan:
    lead = logits.shape[:-1]
    shape = padded_shape(target.shape, len(lead))
    axes = [(size, math.prod(lead[axis + 1 :])) for axis, size in enumerate(lead)]
    shared = [axis for axis, ours in zip(axes, shape, strict=True) if ours == 1 < axis[0]]
    alone: list[tuple[int, int]] = []
    for (size, stride), ours in zip(axes, shape, strict=True):
        if ours > 1:
            if alone and alone[-1][1] == stride * size:
                size *= alone.pop()[0]
            alone.append((size, stride))
    inner, step = alone.pop() if alone else (1, 1)
    flat = target.to(wide_dtype(logits)).reshape(-1).contiguous()
    return _Plan(flat, _offsets(alone), inner, step, _offsets(shared))


@dataclass(frozen=True)
class _Bins:
    """What is the same for all labels.

    Attributes:
        support: `[N]`.
        ends: see `numba_labels.windows`.
        scale: see there.
        reach: see there.
        count: `K`.
        use_symlog: transform targets by `symlog`.
    """

    support: Tensor
    ends: Tensor
    scale: float
    reach: int
    count: int
    use_symlog: bool

    def arguments(self) -> tuple[Any, ...]:
        """What kernels take."""
        support = array(self.support)
        scale = support.dtype.type(self.scale)
        return support, array(self.ends), scale, self.reach, self.count, self.use_symlog


def _make_bins(support: Tensor, use_symlog: bool, sigma: float | None) -> _Bins:
    support = support.contiguous()
    if sigma is None:
        return _Bins(support, support[:0], 1.0, 0, 2, use_symlog)
    bins, reach = support.shape[0], label_reach(support, sigma)
    # A multiple of what a vector holds, so that loops leave nothing over.
    count = min(-(-(2 * reach + 2) // _LANES) * _LANES, bins)
    return _Bins(support, edges(support), 1.0 / (sigma * math.sqrt(2.0)), reach, count, use_symlog)


def _memory(x: Tensor) -> _Array:
    """Logits as a flat array; bfloat16 as the integers that hold its bits."""
    # Numbers in a row may still be apart, for which Numba would compile once more.
    flat = x.reshape(-1).contiguous()
    return array(flat.view(torch.int16)).view(np.uint16) if x.dtype == torch.bfloat16 else array(flat)


def forward(
    logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None, out: tuple[Tensor, Tensor]
) -> None:
    """Writes both losses; two-hot if `sigma` is None.

    Args:
        logits: `[..., N]`; copied if it is not contiguous.
        target: broadcasts to `[...]`.
        support: `[N]`.
        use_symlog: transform targets by `symlog`.
        sigma: of HL-Gauss labels.
        out: `[...]` twice, for the losses and the logarithms of the sums of exponentials; contiguous.
    """
    losses, sums = out
    if losses.numel() == 0:
        return
    plan, bins = _plan(logits, target), _make_bins(support.to(losses.dtype), use_symlog, sigma)
    arguments = _memory(logits), *plan.arguments(), *bins.arguments(), _memory(losses), _memory(sums)

    def run(first: int, end: int) -> None:
        _forward(*arguments, first, end)

    in_threads(run, plan.target.shape[0], logits.numel())


def backward(
    grad: Tensor,
    sums: Tensor,
    logits: Tensor,
    target: Tensor,
    support: Tensor,
    use_symlog: bool,
    sigma: float | None,
    out: Tensor,
) -> None:
    """Writes the gradient of the logits.

    Args:
        grad: `[...]`.
        sums: from `forward`.
        logits: `[..., N]`; copied if it is not contiguous.
        target: broadcasts to `[...]`.
        support: `[N]`.
        use_symlog: transform targets by `symlog`.
        sigma: of HL-Gauss labels.
        out: like `logits`, contiguous.
    """
    if out.numel() == 0:
        return
    plan, bins = _plan(logits, target), _make_bins(support.to(sums.dtype), use_symlog, sigma)
    # The gradient of a sum is one number, repeated.
    repeated = all(stride == 0 for stride in grad.stride())
    upstream = grad.reshape(-1)[:1] if repeated else grad
    arguments = _memory(logits), *plan.arguments(), *bins.arguments(), _memory(sums)
    arguments += _memory(upstream), int(not repeated), _memory(out)

    def run(first: int, end: int) -> None:
        _backward(*arguments, first, end)

    in_threads(run, plan.target.shape[0], 2 * logits.numel())


@jit
def _forward(
    logits: _Array,
    target: _Array,
    base: _Array,
    inner: int,
    step: int,
    copies: _Array,
    support: _Array,
    ends: _Array,
    scale: Any,
    reach: int,
    count: int,
    use_symlog: bool,
    losses: _Array,
    sums: _Array,
    first: int,
    end: int,
) -> None:
    bins, one, to_two = np.uintp(support.size), np.uintp(1), support.dtype.type(LOG2_E)
    start, weight = np.empty(_BLOCK, np.uintp), np.empty(_BLOCK * count, support.dtype)
    scratch = np.empty(_BLOCK * (count + 2), support.dtype)
    row, total = np.empty(_BLOCK, np.uintp), np.empty(_BLOCK, support.dtype)
    for begin in range(first, end, _BLOCK):
        size = np.uintp(min(_BLOCK, end - begin))
        windows(target, begin, size, support, ends, scale, reach, use_symlog, start, weight, scratch)
        for copy in copies:
            outer, place = np.uintp(begin // inner), np.uintp(begin % inner)
            for i in range(size):
                row[i] = base[outer] + place * np.uintp(step) + copy
                place += one
                if place == np.uintp(inner):
                    outer, place = outer + one, np.uintp(0)
            _sum_exps(logits, row, size, bins, to_two, total)
            for i in range(size):
                scratch[i] = log(total[i])
            for i in range(size):
                if not _LEAST < total[i] < _MOST:
                    scratch[i] = _log_sum_exp(logits, row[i] * bins, bins, to_two)
            _products(weight, logits, row, size, bins, start, total)
            for i in range(size):
                sums[row[i]] = scratch[i]
                losses[row[i]] = scratch[i] - total[i]


@jit(sums=True)
def _sum_exps(logits: _Array, row: _Array, size: int, bins: int, to_two: Any, total: _Array) -> None:
    """Sums of exponentials of some rows, as they come: what counts rarely overflows or vanishes."""
    for i in range(size):
        at, result = row[i] * bins, total.dtype.type(0)
        for n in range(bins):
            result += exp2(wide(logits[at + n]) * to_two)
        total[i] = result


@jit(sums=True)
def _sum_exp(logits: _Array, at: int, bins: int, shift: Any, to_two: Any) -> Any:
    result = shift - shift
    for n in range(bins):
        result += exp2((wide(logits[at + n]) - shift) * to_two)
    return result


@jit
def _log_sum_exp(logits: _Array, at: int, bins: int, to_two: Any) -> Any:
    """Of a row whose exponentials do overflow or vanish, or that holds a NaN."""
    shift = wide(logits[at])
    for n in range(bins):
        shift = max(shift, wide(logits[at + n]))
    return shift + math.log(_sum_exp(logits, at, bins, shift, to_two))


@jit(sums=True)
def _products(
    weight: _Array, logits: _Array, row: _Array, size: int, bins: int, start: _Array, product: _Array
) -> None:
    """Of labels and the logits of their windows."""
    count = np.uintp(weight.size // start.size)
    for i in range(size):
        at, first, result = row[i] * bins + start[i], i * count, product.dtype.type(0)
        for k in range(count):
            result += weight[first + k] * wide(logits[at + k])
        product[i] = result


@jit
def _backward(
    logits: _Array,
    target: _Array,
    base: _Array,
    inner: int,
    step: int,
    copies: _Array,
    support: _Array,
    ends: _Array,
    scale: Any,
    reach: int,
    count: int,
    use_symlog: bool,
    sums: _Array,
    grad: _Array,
    grad_step: int,
    out: _Array,
    first: int,
    end: int,
) -> None:
    bins, reads, one = np.uintp(support.size), np.uintp(count), np.uintp(1)
    zero, to_two = support.dtype.type(0), support.dtype.type(LOG2_E)
    start, weight = np.empty(_BLOCK, np.uintp), np.empty(_BLOCK * count, support.dtype)
    scratch, label = np.empty(_BLOCK * (count + 2), support.dtype), np.zeros(support.size, support.dtype)
    outer, place = np.uintp(first // inner), np.uintp(first % inner)
    for begin in range(first, end, _BLOCK):
        size = np.uintp(min(_BLOCK, end - begin))
        windows(target, begin, size, support, ends, scale, reach, use_symlog, start, weight, scratch)
        for i in range(size):
            for k in range(reads):
                label[start[i] + k] = weight[i * reads + k]
            for copy in copies:
                row = base[outer] + place * np.uintp(step) + copy
                at, upstream, total = row * bins, grad[row * np.uintp(grad_step)], sums[row]
                for n in range(bins):
                    share = exp2((wide(logits[at + n]) - total) * to_two)
                    out[at + n] = narrow(upstream * (share - label[n]), out)
                if abs(total) > _LARGE:
                    _normalise(logits, at, bins, total, to_two, upstream, label, out)
            for k in range(reads):
                label[start[i] + k] = zero
            place += one
            if place == np.uintp(inner):
                outer, place = outer + one, np.uintp(0)


@jit
def _normalise(
    logits: _Array, at: int, bins: int, total: Any, to_two: Any, upstream: Any, label: _Array, out: _Array
) -> None:
    """The gradient of a row whose sum of exponentials is not known well."""
    whole = upstream / _sum_exp(logits, at, bins, total, to_two)
    for n in range(bins):
        share = exp2((wide(logits[at + n]) - total) * to_two)
        out[at + n] = narrow(whole * share - upstream * label[n], out)
