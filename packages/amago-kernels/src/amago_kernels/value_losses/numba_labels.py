"""Labels of scalar targets as windows of neighbouring bins, compiled by Numba.

Dimensions: `N` bins, `K` bins of a window, `S` targets.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..numba_jit import jit
from ..numba_math import erf, log1p

_Array = np.ndarray[Any, Any]


@jit
def _place(target: _Array, first: int, size: int, support: _Array, use_symlog: bool, z: _Array) -> None:
    """Targets in transformed units, within the bins; NaN stays."""
    low, high, zero = support[0], support[support.size - 1], support.dtype.type(0)
    if use_symlog:
        for i in range(size):
            x = target[np.uintp(first) + i]
            y = log1p(abs(x))
            y = -y if x < zero else y
            y = low if y < low else y
            z[i] = high if y > high else y
    else:
        for i in range(size):
            y = target[np.uintp(first) + i]
            y = low if y < low else y
            z[i] = high if y > high else y


@jit
def _left(z: Any, support: _Array, spacing: Any) -> int:
    """The bin left of a target; the end belongs to the last pair."""
    last = support.size - 2
    # Right at once where the bins are evenly spaced. Elsewhere the walk is no longer than the row it is made for.
    left = min(max(int((z - support[0]) / spacing), 0), last) if z == z else 0
    while left > 0 and z < support[left]:
        left -= 1
    while left < last and z >= support[left + 1]:
        left += 1
    return left


@jit
def windows(
    target: _Array,
    first: int,
    size: int,
    support: _Array,
    ends: _Array,
    scale: Any,
    reach: int,
    use_symlog: bool,
    start: _Array,
    weight: _Array,
    scratch: _Array,
) -> None:
    """Writes the labels of some targets: `K` neighbouring bins each.

    Args:
        target: all targets.
        first: of them.
        size: how many, unsigned.
        support: `[N]`.
        ends: `[N + 1]` ends of the bins for HL-Gauss; none for two-hot.
        scale: of a difference, for the Gaussian's argument.
        reach: how many bins beyond the two around a target its window holds on its left.
        use_symlog: transform targets by `symlog`.
        start: `[S]`, first bin of each window.
        weight: `[S * K]`.
        scratch: `[S * (K + 2)]`.
    """
    bins, count, one = support.size, np.uintp(weight.size // start.size), np.uintp(1)
    spacing = (support[bins - 1] - support[0]) / support.dtype.type(bins - 1)
    _place(target, first, size, support, use_symlog, scratch)
    masses, width = np.uintp(start.size), count + one
    for i in range(size):
        z = scratch[i]
        left = _left(z, support, spacing)
        if ends.size == 0:
            share = (z - support[left]) / (support[left + 1] - support[left])
            start[i] = left
            weight[i * count], weight[i * count + one] = support.dtype.type(1) - share, share
        else:
            begin, into = np.uintp(min(max(left - reach, 0), bins - np.int64(count))), masses + i * width
            start[i] = begin
            for k in range(width):
                scratch[into + k] = (ends[begin + k] - z) * scale
    if ends.size > 0:
        for j in range(size * width):
            scratch[masses + j] = erf(scratch[masses + j])
        for i in range(size):
            place = masses + i * width
            whole = support.dtype.type(1) / (scratch[place + count] - scratch[place])
            for k in range(count):
                weight[i * count + k] = (scratch[place + k + one] - scratch[place + k]) * whole
