"""How Triton kernels are started: tuned over a few configurations, on the right device, without surprises in graphs.

Imports Triton, so it is imported by the Triton modules only. Set `AMAGO_KERNELS_TUNE=0` to always take the first
configuration of a kernel: no timing at first use, and the same arithmetic in every process.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor

from .dispatch import INTERPRETING

# Newer Tritons remember on disk what won, so that only the first process that meets a shape pays for it.
_REMEMBER = {"cache_results": True} if "cache_results" in inspect.signature(triton.autotune).parameters else {}


def config(num_warps: int, num_stages: int = 2, **blocks: int) -> triton.Config:
    """One configuration of a kernel.

    Args:
        num_warps: warps per program.
        num_stages: depth of software pipelines.
        blocks: values of the kernel's tunable `tl.constexpr` parameters.

    Returns:
        What `tuned` takes.
    """
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)


class TunedKernel:
    """A kernel and its configurations; called as `kernel[grid](*args, **kwargs)`.

    Attributes:
        fn: what `triton.jit` made.
        configs: from the one that is taken when nothing may be timed to the least likely.
    """

    def __init__(self, fn: Any, configs: Sequence[triton.Config], key: Sequence[str], restore: Iterable[str]) -> None:
        self.fn = fn
        self.configs = list(configs)
        self._autotuned = triton.autotune(
            self.configs, list(key), restore_value=list(restore) or None, do_bench=_median_time, **_REMEMBER
        )(fn)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """Binds a grid: a tuple, or a function of the kernel's meta-parameters."""

        def launch(*args: Any, **kwargs: Any) -> None:
            if not (INTERPRETING or os.environ.get("AMAGO_KERNELS_TUNE", "1") == "0"):
                try:
                    self._autotuned[grid](*args, **kwargs)
                    return
                except _MustNotTime:
                    pass
            self.fn[grid](*args, **kwargs, **self.configs[0].all_kwargs())

        return launch


class _MustNotTime(Exception):
    """Nothing is known about this call yet, and this is no moment to find out."""


def _median_time(launch: Callable[[], None], quantiles: Sequence[float]) -> Any:
    if torch.cuda.is_current_stream_capturing():
        raise _MustNotTime
    return triton.testing.do_bench(launch, warmup=5, rep=30, quantiles=quantiles)


def tuned(
    configs: Sequence[triton.Config], *, key: Sequence[str] = (), restore: Iterable[str] = ()
) -> Callable[[Any], TunedKernel]:
    """Decorates a `triton.jit` function: the fastest configuration is found at first use and remembered.

    Args:
        configs: a few; the first is used wherever timing is impossible (in Triton's interpreter, while a CUDA graph is
            captured) or unwanted (`AMAGO_KERNELS_TUNE=0`), so it must suit the default shapes.
        key: arguments whose values ask for another search; dtypes always do.
        restore: tensors that the kernel updates in place, and timing must put back.

    Returns:
        The decorator.
    """
    return lambda fn: TunedKernel(fn, configs, key, restore)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """The context to launch in: Triton takes the current device, wherever the tensors are.

    Args:
        tensor: one of the arguments.

    Returns:
        A context manager.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def bucket(size: int, largest: int = 1 << 16) -> int:
    """The next power of two, so that lengths that differ a little share one search.

    Args:
        size: what to round up.
        largest: sizes beyond share one bucket.

    Returns:
        A power of two.
    """
    return min(triton.next_power_of_2(max(size, 1)), largest)
