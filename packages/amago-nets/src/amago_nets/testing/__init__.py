"""A checker for sequence backbones, ours and yours.

`check_backbone` takes a function that builds a backbone and raises an `AssertionError` that names the property that
does not hold:

=====  ==========================================================================================================
P1     a window equals stepping through it, with resets anywhere, also when the window is fed in pieces with a state
P2     outputs do not depend on later inputs, exactly
P3     a reset forgets everything, NaN included, in steps; and no gradient crosses it in windows
P4     lanes are independent bit for bit; reordered lanes give reordered outputs
P5     timesteps appended on the right change neither earlier outputs nor gradients
P6     P1 holds beyond `max_seq_len`
P7     evaluation changes no parameter and no buffer, and repeats itself
P8     without dropout training equals evaluation; with dropout only training drops, and steps never do
P9     if asked: a constant added to the time changes nothing, or something
P10    the state neither grows nor moves, holds no gradients, and can be saved, restored and selected from
P11    a gradient reaches every earlier timestep that an output depends on; without memory there is none
P12    a module that loads the weights of another one computes the same
P13    wrong shapes raise a `ValueError` and leave the state as it was
P14    if asked: `torch.compile(fullgraph=True)` changes neither outputs nor gradients, with and without resets
=====  ==========================================================================================================

Dimensions: `B` lanes, `L` timesteps, `D` input features, `E` output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._case import Case
from ._compile import check_compile
from ._gradients import check_gradients, check_padding, check_resets_in_windows
from ._module import check_bad_input, check_dropout, check_purity, check_time_offset, check_weights
from ._outputs import check_causality, check_lanes, check_resets_in_steps, check_windows_equal_steps
from ._state import check_state

__all__ = ["check_backbone"]

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}


def check_backbone(
    factory: Callable[[int, int], Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    in_dim: int = 6,
    max_seq_len: int = 7,
    lanes: int = 4,
    length: int | None = None,
    memory: bool = True,
    dropout: bool = False,
    time_offset: str | None = None,
    compile: bool = False,
    tolerance: float | None = None,
    seed: int = 0,
) -> None:
    """Holds a sequence backbone to the contract of `TrajEncoder`.

    Args:
        factory: builds the backbone from `in_dim` and `max_seq_len`, for example `GRUConfig(d_hidden=16).build`.
        dtype: float32, float64 or bfloat16; the whole module is converted to it.
        device: where to run.
        in_dim: features `D` of the random inputs.
        max_seq_len: given to the factory.
        lanes: `B`, at least 3.
        length: timesteps `L`; by default `3 * max_seq_len + 2`, which wraps a ring buffer three times. Times run from
            0 to `L - 1`, and to `L + 8` with `time_offset`.
        memory: whether the backbone sees earlier timesteps. False demands that it does not.
        dropout: whether the backbone was built with dropout.
        time_offset: "invariant" (rotary positions), "sensitive" (absolute positions), or None: not checked.
        compile: whether to compile the module; takes some ten seconds, a C++ compiler on the CPU, and clears what
            `torch.compile` has cached in this process.
        tolerance: largest difference allowed where two ways of computing round differently, relative to the largest
            output or to 1; by default 1e-10 for float64, 1e-5 for float32 and 0.05, about 13 roundings, for bfloat16.
            Gradients get ten times as much, and at most 0.1, relative to their norm or to 1.
        seed: of weights and inputs; the global generator of torch is left as it was.

    Raises:
        AssertionError: naming the property that does not hold.
        ValueError: if an argument is out of range.
    """
    if lanes < 3:
        raise ValueError(f"lanes={lanes} is not allowed; give an integer >= 3")
    if time_offset not in (None, "invariant", "sensitive"):
        raise ValueError(f"time_offset={time_offset!r} is not allowed; choose None, 'invariant' or 'sensitive'")
    if dtype not in _TOLERANCES:
        raise ValueError(f"dtype={dtype} is not allowed; choose one of {', '.join(map(str, _TOLERANCES))}")
    if compile and dropout:
        raise ValueError("compile=True is not allowed with dropout=True: compiled code draws other random numbers")
    steps = 3 * max_seq_len + 2 if length is None else length
    if steps < 4:
        raise ValueError(f"length={length} is not allowed; give None or an integer >= 4")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = factory(in_dim, max_seq_len).to(device=device, dtype=dtype)
        twin = factory(in_dim, max_seq_len).to(device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(lanes, steps, in_dim, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
        time_idx = torch.arange(steps, device=device).expand(lanes, steps).contiguous()
        limit = _TOLERANCES[dtype] if tolerance is None else tolerance
        case = Case(module, x, time_idx, limit, max_seq_len, generator)
        module.eval()
        check_windows_equal_steps(case)
        check_causality(case)
        check_resets_in_steps(case)
        check_resets_in_windows(case)
        check_lanes(case)
        check_padding(case)
        check_purity(case)
        check_dropout(case, dropout)
        check_time_offset(case, time_offset)
        check_state(case)
        check_gradients(case, memory)
        check_weights(case, twin.eval())
        check_bad_input(case)
        if compile:
            check_compile(case)
