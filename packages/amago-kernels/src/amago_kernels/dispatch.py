"""Chooses the backend of an operation, before anything runs.

An operation hands in its backends from the fastest to the most general, each with a function that says why it cannot
serve a call (None: it can). "auto" takes the first that can; a backend asked for by name that cannot serve is an error.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

CallT = TypeVar("CallT")

# What exists in principle, per operation, in the order users read it; `built` says what this version can run.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("reference", "sdpa", "flex", "triton", "flash"),
    "causal_conv1d": ("reference", "fused", "triton", "causal_conv1d"),
    "decode_attention": ("reference", "matmul", "sdpa", "triton"),
    "gru_layer": ("reference", "fused"),
    "hl_gauss_cross_entropy": ("reference", "fused", "triton"),
    "lstm_layer": ("reference", "fused"),
    "linear_scan": ("reference", "blocked", "triton"),
    "n_step_targets": ("reference",),
    "selective_scan": ("reference", "blocked", "triton", "mamba_ssm"),
    "two_hot_cross_entropy": ("reference", "fused", "triton"),
}
_BUILT: dict[str, tuple[str, ...]] = {
    "attention": ("reference", "sdpa", "flash"),
    "causal_conv1d": ("reference", "fused", "causal_conv1d"),
    "decode_attention": ("reference", "matmul", "sdpa"),
    "gru_layer": ("reference", "fused"),
    "hl_gauss_cross_entropy": ("reference", "fused"),
    "lstm_layer": ("reference", "fused"),
    "linear_scan": ("reference", "blocked"),
    "n_step_targets": ("reference",),
    "selective_scan": ("reference", "blocked", "mamba_ssm"),
    "two_hot_cross_entropy": ("reference", "fused"),
}
_PACKAGES = {
    "triton": ("triton", "triton"),
    "flash": ("flash_attn", "flash"),
    "mamba_ssm": ("mamba_ssm", "mamba"),
    "causal_conv1d": ("causal_conv1d", "mamba"),
}


def available() -> dict[str, tuple[str, ...]]:
    """Lists the backends that can run here, per operation.

    Returns:
        Operation name to backend names; "auto" is always allowed and not listed.
    """
    return {name: tuple(b for b in backends if missing(name, b) is None) for name, backends in _BUILT.items()}


def missing(operation: str, backend: str) -> str | None:
    """Says why a known backend cannot run at all in this installation.

    Args:
        operation: key of `OPERATIONS`.
        backend: a backend name known for that operation.

    Returns:
        The reason, or None if the backend can run.
    """
    module, extra = _PACKAGES.get(backend, ("", ""))
    # Looking among the imported modules first is what torch.compile can trace; the search on disk is not.
    if module and module not in sys.modules and importlib.util.find_spec(module) is None:
        return f"{module} is not installed (pip install 'amago-kernels[{extra}]')"
    return None if backend in _BUILT[operation] else "this version does not include it yet"


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
            if refusal(call) is None:
                return name
        raise ValueError(f"backend='auto': none of {sorted(candidates)} can serve this {operation} call")
    if backend not in OPERATIONS[operation]:
        allowed = ", ".join(repr(name) for name in ("auto", *OPERATIONS[operation]))
        raise ValueError(f"backend={backend!r} is not known for {operation}; choose one of {allowed}")
    reason = missing(operation, backend)
    if reason is None:
        reason = candidates[backend](call)
    if reason is not None:
        usable = [
            name for name, refusal in candidates.items() if missing(operation, name) is None and refusal(call) is None
        ]
        raise ValueError(f"backend={backend!r} cannot serve this {operation} call: {reason}; these can: {usable}")
    return backend
