"""Kernels of amago-kernels on the CPU, every backend beside what one would write without the package.

Attention: forward, and forward plus backward, of windows. Decoding: one timestep for all lanes over a full ring buffer
of 128 slots, beside a masked SDPA over the whole cache after an index_put. GRU: beside `torch.nn.GRU`.
Every line is compared with the reference first; where they disagree the script stops and reports nothing.
Backends take turns, call by call, and the median is reported.

    python benchmarks/kernels_cpu.py [--threads 2] [--repeats 15] [--out results.json]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _report import report
from torch import Tensor

from amago_kernels import RingCache, attention, decode_attention, gru_layer
from amago_kernels.testing import error_ratio

TOLERANCE = 1e-5
SLOTS = 128
Case = dict[str, Callable[[], Tensor]]


def median_ms(calls: Case, repeats: int, *, grad: bool, leaf: Tensor | None = None) -> dict[str, float]:
    """Medians of calls that take turns; with `grad` each call is followed by its backward pass."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.set_grad_enabled(grad):
        for repeat in range(repeats + 2):
            for name, call in calls.items():
                start = time.perf_counter()
                out = call()
                if grad:
                    out.sum().backward()
                if repeat >= 2:
                    times[name].append(time.perf_counter() - start)
                if leaf is not None:
                    leaf.grad = None
    return {name: 1e3 * sorted(values)[len(values) // 2] for name, values in times.items()}


def agree(operation: str, shape: str, calls: Case) -> dict[str, float]:
    """Relative errors to the reference; refuses to go on if one is too large."""
    with torch.no_grad():
        expected = calls["reference"]()
        errors = {name: error_ratio(call(), expected) for name, call in calls.items()}
    for name, error in errors.items():
        if not error < TOLERANCE:
            raise SystemExit(
                f"{operation} {shape}: {name} differs from the reference by {error:.3g}; nothing is reported"
            )
    return errors


def rows_of(
    operation: str, shape: str, errors: dict[str, float], forward: dict[str, float], both: dict[str, float] | None
) -> list[dict[str, Any]]:
    """One line per backend."""
    return [
        {
            "operation": operation,
            "shape": shape,
            "backend": name,
            "forward_ms": forward[name],
            "forward_backward_ms": None if both is None else both[name],
            "calls_per_s": 1e3 / forward[name],
            "speedup": (forward if both is None else both)["reference"] / (forward if both is None else both)[name],
            "error": errors[name],
        }
        for name in forward
    ]


def bench_attention(shape: tuple[int, int, int, int], kind: str, repeats: int) -> list[dict[str, Any]]:
    """Windows `[B, L, H, E]` with a plain causal mask, a band, or resets inside."""
    batch, length, heads, size = shape
    qkv = torch.randn(batch, length, 3, heads, size, requires_grad=True)
    options: dict[str, Any] = {}
    if kind == "band":
        options["window"] = length - 2
    if kind == "resets":
        options["reset"] = torch.rand(batch, length) < 0.05

    def call(backend: str) -> Callable[[], Tensor]:
        return lambda: attention(*qkv.unbind(2), backend=backend, **options)

    calls = {name: call(name) for name in ("reference", "sdpa", "auto")}
    label = f"B{batch} L{length} H{heads} E{size}"
    errors = agree(f"attention, {kind}", label, calls)
    forward = median_ms(calls, repeats, grad=False)
    both = median_ms(calls, repeats, grad=True, leaf=qkv)
    return rows_of(f"attention, {kind}", label, errors, forward, both)


def bench_decode(lanes: int, heads: int, size: int, ragged: bool, repeats: int) -> list[dict[str, Any]]:
    """One timestep of all lanes; ragged lanes have lengths from 0 to beyond the ring."""
    steps = torch.randn(3, lanes, heads, size)
    length = torch.randint(0, 2 * SLOTS, (lanes,)) if ragged else torch.full((lanes,), SLOTS + 3)
    filled = torch.randn(2, lanes, heads, SLOTS, size)

    def fresh() -> RingCache:
        cache = RingCache.allocate(lanes, heads, SLOTS, size)
        cache.keys.copy_(filled[0])
        cache.values.copy_(filled[1])
        cache.length.copy_(length)
        cache.steps = 2 * SLOTS
        return cache

    def call(backend: str) -> Callable[[], Tensor]:
        cache = fresh()

        def run() -> Tensor:
            # The length is put back, so that every call does the same.
            out = decode_attention(*steps.unbind(0), cache, backend=backend)
            cache.length.sub_(1)
            return out

        return run

    keys, values = filled.clone().unbind(0)
    slots, every = torch.arange(SLOTS), torch.arange(lanes)

    def by_hand() -> Tensor:
        slot = length % SLOTS
        keys[every, :, slot] = steps[1]
        values[every, :, slot] = steps[2]
        visible = slots <= length[:, None]
        return F.scaled_dot_product_attention(steps[0][:, :, None], keys, values, attn_mask=visible[:, None, None])[
            :, :, 0
        ]

    calls: Case = {name: call(name) for name in ("reference", "sdpa", "matmul", "auto")}
    calls["by hand: index_put + SDPA"] = by_hand
    operation = f"decode, {'ragged' if ragged else 'full'} lanes"
    label = f"B{lanes} M{SLOTS} H{heads} E{size}"
    errors = agree(operation, label, calls)
    return rows_of(operation, label, errors, median_ms(calls, 10 * repeats, grad=False), None)


def bench_gru(shape: tuple[int, int, int, int], repeats: int) -> list[dict[str, Any]]:
    """One layer over windows `[B, L, D]` with `U` units, no reset inside: what `torch.nn.GRU` can do as well."""
    batch, length, inputs, size = shape
    layer = torch.nn.GRU(inputs, size, batch_first=True)
    x = torch.randn(batch, length, inputs, requires_grad=True)
    hidden = torch.zeros(batch, size)
    weights = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0)
    calls: Case = {
        "reference": lambda: gru_layer(x, hidden, *weights, backend="reference"),
        "fused": lambda: gru_layer(x, hidden, *weights, backend="fused"),
        "by hand: torch.nn.GRU": lambda: layer(x, hidden[None])[0],
    }
    label = f"B{batch} L{length} D{inputs} U{size}"
    errors = agree("gru_layer", label, calls)
    forward = median_ms(calls, repeats, grad=False)
    both = median_ms(calls, repeats, grad=True, leaf=x)
    return rows_of("gru_layer", label, errors, forward, both)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for shape in ((24, 81, 4, 16), (24, 129, 4, 32), (64, 129, 4, 16), (24, 129, 8, 32)):
        for kind in ("causal", "band", "resets"):
            rows += bench_attention(shape, kind, args.repeats)
    for lanes in (8, 32, 128):
        for heads, size in ((4, 16), (8, 32)):
            for ragged in (False, True):
                rows += bench_decode(lanes, heads, size, ragged, args.repeats)
    for shape in ((24, 129, 64, 128), (64, 81, 64, 128), (24, 129, 256, 256)):
        rows += bench_gru(shape, args.repeats)
    report("kernels_cpu", rows, args.out, settings={**vars(args), "torch": torch.__version__})


if __name__ == "__main__":
    main()
