"""Scans of amago-kernels on the CPU beside Python loops over timesteps.

Every line is beside its reference, a loop that unbinds its inputs once; small linear recurrences also beside a loop
that indexes `a[:, t]`, as one writes it first, and whose backward pass is quadratic in the length. Every output and
every gradient is compared with the reference first; where they disagree the script stops and reports nothing.
Sides take turns, call by call, and the median is reported; a side that has used up its seconds sits the rest out.
For linear recurrences `floor_ms` is what memory alone takes, in turn with the others: three elementwise passes over
fresh outputs (states, and the gradients of factors and terms). It bounds the speedup of wide shapes.

    python benchmarks/scans_cpu.py [--threads 1] [--repeats 15] [--seconds 5] [--out results.json]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _report import report
from torch import Tensor

from amago_kernels import available, causal_conv1d, linear_scan, selective_scan
from amago_kernels.testing import error_ratio

TOLERANCE = 1e-4
Sides = dict[str, Callable[..., Tensor]]


def indexing_loop(a: Tensor, b: Tensor, state: Tensor, pairs: bool) -> Tensor:
    """What one writes first."""
    if pairs:
        a, b, state = torch.view_as_complex(a), torch.view_as_complex(b), torch.view_as_complex(state)
    states = []
    for t in range(b.shape[1]):
        state = a[:, t] * state + b[:, t]
        states.append(state)
    h = torch.stack(states, dim=1)
    return torch.view_as_real(h) if pairs else h


def backends(operation: str) -> list[str]:
    """Those of ours that run on a CPU, the reference first."""
    return [name for name in available()[operation] if name in ("reference", "blocked", "numba")]


def agree(operation: str, sides: Sides, inputs: list[Tensor], weight: Tensor) -> dict[str, float]:
    """Largest relative errors to the reference, gradients included; refuses to go on if one is too large."""
    results = {}
    for name, side in sides.items():
        out = side(*inputs)
        results[name] = [out, *torch.autograd.grad(out, inputs, weight)]
    errors = {
        name: max(error_ratio(one, other) for one, other in zip(result, results["reference"], strict=True))
        for name, result in results.items()
    }
    for name, error in errors.items():
        if not error < TOLERANCE:
            raise SystemExit(f"{operation}: {name} differs from the reference by {error:.3g}; nothing is reported")
    return errors


def median_ms(calls: dict[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, float]:
    """Medians of calls that take turns, for as long as each has seconds left."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            if sum(times[name]) < args.seconds:
                start = time.perf_counter()
                result = call()
                times[name].append(time.perf_counter() - start)
                del result
    return {name: 1e3 * sorted(values)[len(values) // 2] for name, values in times.items()}


def compare(
    operation: str,
    shape: str,
    sides: Sides,
    inputs: list[Tensor],
    args: argparse.Namespace,
    floor: Callable[..., Any] | None = None,
) -> list[dict[str, Any]]:
    """One line per side; `floor` moves the bytes that forward and backward have to move."""
    inputs = [x.requires_grad_() for x in inputs]
    with torch.no_grad():
        weight = torch.randn_like(sides["reference"](*inputs))
    errors = agree(f"{operation} {shape}", sides, inputs, weight)

    def differentiate(side: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(side(*inputs), inputs, weight)

    with torch.no_grad():
        forward = median_ms({name: partial(side, *inputs) for name, side in sides.items()}, args)
    calls: dict[str, Callable[[], Any]] = {name: partial(differentiate, side) for name, side in sides.items()}
    both = median_ms(calls if floor is None else {**calls, "floor": floor}, args)
    return [
        {
            "operation": operation,
            "shape": shape,
            "side": name,
            "forward_ms": forward[name],
            "forward_speedup": forward["reference"] / forward[name],
            "forward_backward_ms": both[name],
            "forward_backward_speedup": both["reference"] / both[name],
            "floor_ms": both.get("floor"),
            "error": errors[name],
        }
        for name in sides
    ]


def bench_linear(shape: tuple[int, int, int], pairs: bool, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Factors and terms of their own at every timestep."""
    batch, length, channels = shape
    tail = (channels, 2) if pairs else (channels,)
    inputs = [0.6 * torch.rand(batch, length, *tail), torch.randn(batch, length, *tail), torch.randn(batch, *tail)]

    def side(backend: str) -> Callable[..., Tensor]:
        return lambda a, b, state: linear_scan(a, b, initial_state=state, pairs=pairs, backend=backend)[0]

    sides: Sides = {name: side(name) for name in backends("linear_scan")}
    if batch * channels <= 512:
        sides["by hand: loop over a[:, t]"] = lambda a, b, state: indexing_loop(a, b, state, pairs)
    a, b = (torch.view_as_complex(x) if pairs else x for x in inputs[:2])

    def floor() -> tuple[Tensor, ...]:
        return torch.addcmul(b, a, b), torch.addcmul(b, a, b), torch.mul(a, b)

    label = f"B{batch} L{length} D{channels}"
    return compare(f"linear_scan, {'complex' if pairs else 'real'}", label, sides, inputs, args, floor)


def bench_selective(shape: tuple[int, int, int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Softplus step sizes, skip connection and gates, as in Mamba."""
    batch, length, channels, states = shape
    wide, narrow = (batch, length, channels), (batch, length, states)
    inputs = [torch.randn(wide), torch.randn(wide) - 3.0, -torch.arange(1.0, states + 1).repeat(channels, 1)]
    inputs += [torch.randn(narrow), torch.randn(narrow), torch.randn(channels), torch.randn(wide)]

    def side(backend: str) -> Callable[..., Tensor]:
        return lambda u, delta, A, B, C, D, z: selective_scan(
            u, delta, A, B, C, D=D, z=z, delta_softplus=True, backend=backend
        )[0]

    sides: Sides = {name: side(name) for name in backends("selective_scan")}
    return compare("selective_scan", f"B{batch} L{length} D{channels} N{states}", sides, inputs, args)


def bench_conv(shape: tuple[int, int, int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A few resets inside."""
    batch, length, channels, taps = shape
    inputs = [torch.randn(batch, length, channels), torch.randn(channels, taps), torch.randn(channels)]
    reset = torch.rand(batch, length) < 0.05

    def side(backend: str) -> Callable[..., Tensor]:
        return lambda x, weight, bias: causal_conv1d(x, weight, bias, reset=reset, activation="silu", backend=backend)[
            0
        ]

    sides: Sides = {name: side(name) for name in ("reference", "fused")}
    return compare("causal_conv1d, resets", f"B{batch} L{length} D{channels} W{taps}", sides, inputs, args)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=5.0, help="per side and line")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for pairs in (False, True):
        for batch in (1, 8, 32):
            for channels in (8, 64, 256):
                rows += bench_linear((batch, 512, channels), pairs, args)
    selectives = [(2, 512, 32, 8), (2, 512, 128, 16), (8, 512, 256, 16), (8, 128, 512, 16), (24, 128, 256, 16)]
    for selective in selectives:
        rows += bench_selective(selective, args)
    for conv in ((2, 64, 64, 4), (24, 128, 512, 4)):
        rows += bench_conv(conv, args)
    report("scans_cpu", rows, args.out, settings={**vars(args), "torch": torch.__version__})


if __name__ == "__main__":
    main()
