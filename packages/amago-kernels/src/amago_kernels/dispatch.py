"""Chooses the backend of an operation, before anything runs.

An operation hands in its backends from the fastest to the most general, each with a function that says why it cannot
serve a call (None: it can). "auto" takes the first that can; a backend asked for by name that cannot serve is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeVar

import torch

# Triton decides when it is imported; a constant is what torch.compile can trace.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
_AUTO_TRITON = os.environ.get("AMAGO_KERNELS_TRITON", "1") != "0"
_AUTO_NUMBA = os.environ.get("AMAGO_KERNELS_NUMBA", "1") != "0"
# Nobody imports Numba before it is needed, and torch.compile cannot trace a search on disk.
_NUMBA_FOUND = importlib.util.find_spec("numba") is not None
# Numba's own switch: its kernels would run as Python, ten thousand times slower.
_NUMBA_DISABLED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
_OLDEST_CAPABILITY = (8, 0)
_OLDEST_NUMBA = (0, 61)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CallT = TypeVar("CallT")

# The backends of every operation, in the order users read them.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("reference", "sdpa", "flex", "triton", "flash"),
    "causal_conv1d": ("reference", "fused", "triton", "causal_conv1d"),
    "decode_attention": ("reference", "matmul", "sdpa", "triton"),
    "discounted_returns": ("reference", "blocked", "triton"),
    "gru_layer": ("reference", "fused"),
    "hl_gauss_cross_entropy": ("reference", "fused", "numba", "triton"),
    "lambda_returns": ("reference", "blocked", "triton"),
    "lstm_layer": ("reference", "fused"),
    "linear_scan": ("reference", "blocked", "numba", "triton"),
    "n_step_targets": ("reference", "fused", "triton"),
    "selective_scan": ("reference", "blocked", "numba", "triton", "mamba_ssm"),
    "two_hot_cross_entropy": ("reference", "fused", "numba", "triton"),
}
_PACKAGES = {
    "numba": ("numba", "numba"),
    "triton": ("triton", "triton"),
    "flash": ("flash_attn", "flash"),
    "mamba_ssm": ("mamba_ssm", "mamba"),
    "causal_conv1d": ("causal_conv1d", "mamba"),
}


def available() -> dict[str, tuple[str, ...]]:
    """Lists the backends that can run here, per operation.

    Returns:
        Operation name to backend names; "auto" is always allowed and not listed. "triton" is listed where the package
        is installed and there is a CUDA device, or Triton's interpreter is on; "numba" where the package is installed
        and its compiler not switched off.
    """
    idle = {"triton"} if not (INTERPRETING or torch.cuda.is_available()) else set()
    if _NUMBA_DISABLED:
        idle.add("numba")
    return {
        name: tuple(backend for backend in backends if missing(backend) is None and backend not in idle)
        for name, backends in OPERATIONS.items()
    }


def missing(backend: str) -> str | None:
    """Says which package a backend lacks.

    Args:
        backend: a backend name.

    Returns:
        The reason, or None if it lacks nothing.
    """
    module, extra = _PACKAGES.get(backend, ("", ""))
    if backend == "numba":
        found = _NUMBA_FOUND
    else:
        # Looking among the imported modules first is what torch.compile can trace; the search on disk is not.
        found = not module or module in sys.modules or importlib.util.find_spec(module) is not None
    if not found:
        return f"{module} is not installed (pip install 'amago-kernels[{extra}]')"
    return None


def triton_refusal(device_type: str, *dtypes: torch.dtype) -> str | None:
    """Says why Triton kernels cannot serve inputs.

    Args:
        device_type: where they are, for example "cuda".
        dtypes: of all floating inputs.

    Returns:
        The reason, or None.
    """
    if device_type != "cuda" and not INTERPRETING:
        return (
            f"Triton kernels run on CUDA devices, and the input is on {device_type} "
            "(to debug, set TRITON_INTERPRET=1 before the first import)"
        )
    for dtype in dtypes:
        if dtype not in _TRITON_DTYPES:
            return f"Triton kernels take float32, bfloat16 and float16, not {dtype}"
    if device_type == "cuda" and not torch.compiler.is_compiling():
        capability = torch.cuda.get_device_capability()
        if capability < _OLDEST_CAPABILITY:
            return f"Triton kernels need compute capability 8.0 or later, and this device has {capability}"
    return None


def numba_refusal(device_type: str) -> str | None:
    """Says why kernels that Numba compiles cannot serve inputs.

    Args:
        device_type: where they are, for example "cpu".

    Returns:
        The reason, or None.
    """
    if device_type != "cpu":
        return f"Numba's kernels run on the CPU, and the input is on {device_type}"
    if _NUMBA_DISABLED:
        return "NUMBA_DISABLE_JIT is set, and without its compiler Numba is slower than the reference"
    # What is traced cannot be imported meanwhile; it will be when it runs.
    return None if torch.compiler.is_compiling() else _numba_fault()


@cache
def _numba_fault() -> str | None:
    """Why Numba cannot be used although it is installed; finding out takes its import, once."""
    try:
        numba = importlib.import_module("numba")
    except ImportError as error:
        return f"numba is installed and cannot be imported: {error}"
    if numba.version_info[:2] < _OLDEST_NUMBA:
        return f"numba {numba.__version__} is installed, and 0.61 or later is needed"
    return None


def numba_unasked() -> bool:
    """Whether "auto" may take Numba: where it is installed and users do not forbid it."""
    return _AUTO_NUMBA and _NUMBA_FOUND


def triton_unasked() -> bool:
    """Whether "auto" may take Triton: not in its interpreter, which is there to debug, nor where users forbid it."""
    return _AUTO_TRITON and not INTERPRETING and missing("triton") is None


def choose(operation: str, backend: str, call: CallT, candidates: Mapping[str, Callable[[CallT], str | None]]) -> str:
    """Resolves `backend` to the name of a backend that serves the call.

    Args:
        operation: key of `OPERATIONS`, for messages.
        backend: "auto" or a backend name.
        call: description of the call, handed to the candidates.
        candidates: backends from the preferred to the most general; each value says why it cannot serve, or None.

    Returns:
        Name of a candidate.

    Raises:
        ValueError: if the name is unknown, the backend is not installed, or it cannot serve this call.
    """
    if backend == "auto":
        for name, refusal in candidates.items():
            if _unasked(name) and refusal(call) is None:
                return name
        raise ValueError(f"backend='auto': none of {sorted(candidates)} can serve this {operation} call")
    if backend not in OPERATIONS[operation]:
        allowed = ", ".join(repr(name) for name in ("auto", *OPERATIONS[operation]))
        raise ValueError(f"backend={backend!r} is not known for {operation}; choose one of {allowed}")
    reason = missing(backend)
    if reason is None:
        reason = candidates[backend](call)
    if reason is not None:
        usable = [name for name, refusal in candidates.items() if missing(name) is None and refusal(call) is None]
        raise ValueError(f"backend={backend!r} cannot serve this {operation} call: {reason}; these can: {usable}")
    return backend


def _unasked(backend: str) -> bool:
    if backend == "triton":
        return triton_unasked()
    return backend != "numba" or numba_unasked()
