"""Where the tests of Triton kernels run: in the interpreter on the CPU, or for real (`pytest -m gpu`)."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from amago_kernels import available

_INSTALLED = importlib.util.find_spec("triton") is not None
_REASON = "Triton is not installed" if not _INSTALLED else "runs for real on the CUDA device"

# For `@pytest.mark.parametrize("device", DEVICES)`.
DEVICES = (
    pytest.param("cpu", marks=pytest.mark.skipif(not _INSTALLED or torch.cuda.is_available(), reason=_REASON)),
    pytest.param("cuda", marks=pytest.mark.gpu),
)


def without_triton(operation: str) -> tuple[str, ...]:
    """The backends of an operation that can run here and are not Triton's."""
    return tuple(backend for backend in available()[operation] if backend != "triton")
