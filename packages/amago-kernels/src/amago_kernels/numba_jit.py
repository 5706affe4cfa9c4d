"""Kernels for the CPU that Numba compiles at their first call: the compiler's options, what is kept on disk, threads.

Compiled code is kept beside the sources, or in the user's cache, so that the next process loads it.
Modules named `numba_*` are imported when one of their kernels is called, because importing Numba takes time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

# Products and sums become one instruction. Infinities and NaNs keep their meaning.
EXACT = {"contract", "nsz"}
# Sums may be taken in any order, so that a loop that adds up can run over vectors.
_SUMS = EXACT | {"reassoc"}
# Whether references to arrays are counted is an option that Numba does not promise to keep.
_UNCOUNTED: dict[str, Any] = {"_nrt": False}
try:
    njit(**_UNCOUNTED)(lambda: None)
except KeyError:
    _UNCOUNTED = {}
# Of everything that can be a part of a kernel.
_SOURCES = sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("numba_*.py")))).hexdigest()
# A thread takes about 0.1 ms to start; so many numbers take longer.
_PER_THREAD = 1 << 17


def jit(function: Any = None, *, sums: bool = False, allocates: bool = True, inlined: bool = False) -> Any:
    """Compiles a kernel, at its first call for each combination of dtypes; it runs without Python's lock.

    Args:
        function: loops over arrays; None gives a decorator.
        sums: let loops add up in any order. Not for functions that rely on the order of products.
        allocates: whether the kernel makes arrays of its own. One that does not, counts no references to rows of
            arrays either, which would take longer than to compute a short row.
        inlined: into kernels that call it, however long it is; for what is called for every short row.

    Returns:
        The kernel. Divisions by zero give infinities, as in NumPy.
    """
    if function is None:
        return lambda function: jit(function, sums=sums, allocates=allocates, inlined=inlined)
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _SUMS if sums else EXACT}
    options["forceinline"] = inlined
    if not allocates:
        options |= _UNCOUNTED
    try:
        kernel = njit(cache=True, **options)(function)
        # Numba looks at a kernel's own file only, and would keep what it has compiled of functions from other files.
        index = kernel._cache._cache_file
        index._source_stamp = (index._source_stamp, _SOURCES)
    except (RuntimeError, AttributeError):  # No place to write to, or another version's cache: each process compiles.
        kernel = njit(**options)(function)
    return kernel


def in_threads(run: Callable[[int, int], None], count: int, numbers: int) -> None:
    """Runs a kernel over `range(count)`, cut into as many pieces as PyTorch has threads where there is enough to do.

    Threads end with the call: nothing stays behind that a forked process would miss.

    Args:
        run: takes the first index and the one after the last; pieces write to different memory.
        count: of indices.
        numbers: how many numbers all of it touches.
    """
    pieces = max(1, min(torch.get_num_threads(), count, numbers // _PER_THREAD))
    if pieces == 1:
        run(0, count)
        return
    bounds = [count * piece // pieces for piece in range(pieces + 1)]
    with ThreadPoolExecutor(pieces - 1) as pool:
        others = [pool.submit(run, *bounds[piece : piece + 2]) for piece in range(1, pieces)]
        run(*bounds[:2])
        for other in others:
            other.result()


def array(x: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a tensor on the CPU as an array, without a copy.

    Args:
        x: whose gradient, if any, is somebody else's business.

    Returns:
        An array of the same shape.
    """
    return x.detach().numpy()
