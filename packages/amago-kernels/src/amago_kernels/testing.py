"""Helpers to test kernels with: relative errors that NaN never passes, and memory that shows when it is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def error_ratio(out: Tensor, ref: Tensor) -> float:
    """Relative error `|out - ref| / |ref|` in float64 (Euclidean norms over all entries).

    Args:
        out: result to judge.
        ref: what it should be, same shape.

    Returns:
        The ratio; infinity if either side holds a NaN or an infinity; `|out|` if `ref` is all zeros.

    Raises:
        ValueError: if shapes disagree.
    """
    if out.shape != ref.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; give {tuple(ref.shape)}, like ref")
    wide_out, wide_ref = out.detach().double(), ref.detach().double().to(out.device)
    size = float(torch.linalg.vector_norm(wide_ref))
    error = float(torch.linalg.vector_norm(wide_out - wide_ref))
    if not (math.isfinite(error) and math.isfinite(size)):
        return math.inf
    return error if size == 0.0 else error / size


def assert_close_ratio(out: Tensor, ref: Tensor, tolerance: float, name: str = "output") -> None:
    """Asserts that `error_ratio` is within a tolerance.

    Args:
        out: result to judge.
        ref: what it should be, same shape.
        tolerance: largest ratio that passes.
        name: what is compared, for the message.

    Raises:
        AssertionError: if the ratio is larger, or anything is NaN or infinite.
    """
    ratio = error_ratio(out, ref)
    assert ratio <= tolerance, f"{name}: relative error {ratio:.3g} > {tolerance:.3g}"


def poisoned(
    shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """A buffer full of NaN, to stand for memory that must be written before it is read.

    Args:
        shape: its shape.
        dtype: a floating dtype.
        device: its device.

    Returns:
        The buffer.
    """
    return torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)
