"""Functions of one number for kernels that Numba compiles.

Of float32, each is a polynomial or two, without a branch, so that a loop over them becomes a loop over vectors; the C
library's would be called number by number. Of float64, they are the C library's: right, and slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import types
from numba.extending import overload

from .numba_jit import EXACT

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

# What a power of e is multiplied with to be a power of two.
LOG2_E = 1.0 / math.log(2.0)


def _of_float32(implementation: Callable[[Any], Any]) -> Callable[[FunctionT], FunctionT]:
    """Compiles this where the number is a float32, and the function itself where it is a float64."""

    def decorate(function: FunctionT) -> FunctionT:
        def choose(x: Any) -> Any:
            return implementation if x == types.float32 else function

        overload(function, jit_options={"fastmath": EXACT, "error_model": "numpy"})(choose)
        return function

    return decorate


def _exp2_float32(x: Any) -> Any:
    y = max(min(x, np.float32(128.0)), np.float32(-126.0))
    # So large a number rounds the sum to an integer, and leaves it in the lowest bits: ready to be an exponent.
    rounded = np.float32(y + np.float32(12582912.0 + 126.0))
    r = y - (rounded - np.float32(12582912.0 + 126.0))
    # Twice the polynomial, times half the power of two, which alone would overflow before the result does.
    p = np.float32(2 * 1.326472731307149e-3)
    p = p * r + np.float32(2 * 9.671512991189957e-3)
    p = p * r + np.float32(2 * 5.550733581185341e-2)
    p = p * r + np.float32(2 * 2.4022242426872253e-1)
    p = p * r + np.float32(2 * 6.931470036506653e-1)
    p = p * r + np.float32(2.0)
    return p * np.int32(rounded.view(np.int32) << np.int32(23)).view(np.float32)


@_of_float32(_exp2_float32)
def exp2(x: Any) -> Any:
    """`2^x`.

    Args:
        x: float32 or float64.

    Returns:
        Within 2 units in the last place; infinities and NaN as in `math.exp2`, and zero where float32 results are below
        twice the smallest normal number.
    """
    return np.exp2(x)


def _log_float32(x: Any) -> Any:
    """Source: the polynomial is that of Cephes (Moshier), `logf`."""
    bits = np.float32(x).view(np.int32)
    # Mantissas from sqrt(1/2) to sqrt(2).
    exponent = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    f = np.int32(bits - np.int32(exponent << np.int32(23))).view(np.float32) - np.float32(1.0)
    n = np.float32(exponent)
    p = np.float32(7.0376836292e-2)
    p = p * f - np.float32(1.1514610310e-1)
    p = p * f + np.float32(1.1676998740e-1)
    p = p * f - np.float32(1.2420140846e-1)
    p = p * f + np.float32(1.4249322787e-1)
    p = p * f - np.float32(1.6668057665e-1)
    p = p * f + np.float32(2.0000714765e-1)
    p = p * f - np.float32(2.4999993993e-1)
    p = p * f + np.float32(3.3333331174e-1)
    square = f * f
    low = p * f * square - np.float32(2.12194440e-4) * n - np.float32(0.5) * square
    return f + low + np.float32(0.693359375) * n


@_of_float32(_log_float32)
def log(x: Any) -> Any:
    """The natural logarithm.

    Args:
        x: float32 or float64, normal and > 0, neither infinite nor NaN.

    Returns:
        Within 2 units in the last place.
    """
    return math.log(x)


def _log1p_float32(x: Any) -> Any:
    # What rounding 1 + x lost is put back; an infinity would make that NaN. A NaN stays in the quotient.
    size = np.float32(3.0e38) if x > np.float32(3.0e38) else x
    more = np.float32(1.0) + size
    lost = more == np.float32(1.0)
    quotient = size / (np.float32(1.0) if lost else more - np.float32(1.0))
    return size if lost else log(more) * quotient


@_of_float32(_log1p_float32)
def log1p(x: Any) -> Any:
    """`ln(1 + x)`.

    Args:
        x: float32 or float64, >= 0 or NaN.

    Returns:
        Within 4 units in the last place.
    """
    return math.log1p(x)


def _erf_float32(x: Any) -> Any:
    # A rational function fitted to erf between -4 and 4, within 3e-8; beyond, erf is 1 in float32.
    y = np.float32(4.0) if x > np.float32(4.0) else x
    y = np.float32(-4.0) if y < np.float32(-4.0) else y
    t = y * y
    p = np.float32(1.9867530255920285e-06)
    p = p * t + np.float32(2.845744233797559e-04)
    p = p * t + np.float32(3.883640287721098e-03)
    p = p * t + np.float32(5.31026499529612e-02)
    p = p * t + np.float32(1.935517207971939e-01)
    p = p * t + np.float32(1.1283791390715407)
    q = np.float32(3.7420322281766355e-05)
    q = q * t + np.float32(1.185646817956373e-03)
    q = q * t + np.float32(1.520783674211668e-02)
    q = q * t + np.float32(1.153527762037891e-01)
    q = q * t + np.float32(5.048632993122091e-01)
    q = q * t + np.float32(1.0)
    return y * p / q


@_of_float32(_erf_float32)
def erf(x: Any) -> Any:
    """The error function.

    Args:
        x: float32 or float64.

    Returns:
        Within 4e-7.
    """
    return math.erf(x)


def _sigmoid_float32(x: Any) -> Any:
    return np.float32(1.0) / (np.float32(1.0) + exp2(x * np.float32(-LOG2_E)))


@_of_float32(_sigmoid_float32)
def sigmoid(x: Any) -> Any:
    """`1 / (1 + e^-x)`.

    Args:
        x: float32 or float64.

    Returns:
        Within `4 + 2 |x|` units in the last place.
    """
    return 1.0 / (1.0 + math.exp(-x))


def _softplus_float32(x: Any) -> Any:
    # log(1 + p) = 2 artanh(p / (2 + p)), and the quotient is a third at most.
    power = exp2(abs(x) * np.float32(-LOG2_E))
    quotient = power / (np.float32(2.0) + power)
    square = quotient * quotient
    p = np.float32(0.14005993)
    p = p * square + np.float32(0.14000903)
    p = p * square + np.float32(0.20010764)
    p = p * square + np.float32(0.33333208)
    p = p * square * quotient + quotient
    return max(x, np.float32(0.0)) + (p + p)


@_of_float32(_softplus_float32)
def softplus(x: Any) -> Any:
    """`ln(1 + e^x)`.

    Args:
        x: float32 or float64.

    Returns:
        Within `4 + 2 |x|` units in the last place.
    """
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
