"""Losses of value distributions: ours beside the eager reference and its compiled form.

Dimensions: `B` batch, `T` transitions, `C` critics, `G` discounts, `N` bins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import costs
import torch
from cases import BOTH, FORWARD, REFERENCE, Case, Inputs, Operation, Rows, Target
from contenders import compiled, lineup
from torch import Tensor

from amago_kernels import hl_gauss_cross_entropy, two_hot_cross_entropy

_TRITON = "ours: triton"
_COMPILED = "reference, compiled"
_MEMORY = "peak memory of the reference over ours"
_FUNCTIONS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "two-hot": ("two_hot_cross_entropy", two_hot_cross_entropy),
    "HL-Gauss": ("hl_gauss_cross_entropy", hl_gauss_cross_entropy),
}


def _case(
    kind: str, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, with_compiled: bool
) -> Case:
    batch, length, critics, discounts, bins = sizes
    name, function = _FUNCTIONS[kind]
    # The usual width of a Gaussian label: three quarters of a bin.
    options: dict[str, Any] = {} if kind == "two-hot" else {"sigma": 0.75 * 20 / (bins - 1)}

    def make() -> Inputs:
        return {
            "logits": torch.randn(sizes, device=device).to(dtype),
            "target": 100 * torch.randn(batch, length, 1, discounts, device=device),
            "support": torch.linspace(-10.0, 10.0, bins, device=device),
        }

    def call(inputs: Inputs, backend: str) -> Tensor:
        return function(**inputs, **options, backend=backend)

    others = [compiled(_COMPILED, partial(call, backend="reference"), forward=False)] if with_compiled else []
    rows = batch * length * critics * discounts
    return Case(
        kind=kind,
        sizes=dict(zip("BTCGN", sizes, strict=True)),
        dtype=dtype,
        make=make,
        reference=partial(call, backend="reference"),
        contenders=lineup(name, call, others),
        cost=lambda inputs: costs.value_loss(rows, rows // critics, bins, inputs["logits"].element_size()),
        auto=partial(call, backend="auto"),
        differentiable=("logits",),
        shared=frozenset({"support"}),
    )


def operation(device: torch.device, quick: bool) -> Operation:
    """What is measured.

    Args:
        device: where.
        quick: a few small shapes.

    Returns:
        The operation.
    """
    half, wide = torch.bfloat16, torch.float32
    shapes: list[tuple[tuple[int, int, int, int, int], torch.dtype, bool]]
    if device.type == "cuda":
        shapes = [((32, 512, 4, 7, 64), wide, True), ((32, 512, 4, 7, 64), half, not quick)]
        if not quick:
            shapes += [((32, length, 4, 7, 64), wide, False) for length in (128, 1024)]
            shapes += [((64, 1024, 4, 7, 128), wide, False), ((24, 128, 4, 7, 16), wide, False)]
    else:
        shapes = [((8, 128, 4, 7, 64), wide, False)]
        shapes += [] if quick else [((24, 128, 4, 7, 64), wide, True), ((8, 128, 4, 7, 16), wide, False)]
    return Operation(
        name="value_losses",
        cases=[_case(kind, sizes, dtype, device, slow) for sizes, dtype, slow in shapes for kind in _FUNCTIONS],
        targets=[*_on_cuda(), *_on_cpu()],
        bound="copy",
        axis="T",
        notes=(
            "Targets are shared by the critics, in symlog units. Peak memory is beyond logits and targets; with the "
            "backward pass it includes the gradient of the logits.",
        ),
        builds=("amago_kernels.triton_value_losses", "amago_kernels.value_losses"),
    )


def _ratio(ours: str, other: str, column: str, direction: str = BOTH, **wanted: Any) -> Callable[[Rows], float | None]:
    return lambda rows: rows.where(direction=direction, **wanted).speedup(ours, other, column=column)


def _on_cuda() -> list[Target]:
    made = []
    for kind in _FUNCTIONS:
        for dtype in ("float32", "bfloat16"):
            place: dict[str, Any] = {"kind": kind, "dtype": dtype, "B": 32, "T": 512, "N": 64}
            text = f"{kind}, B=32 T=512 C=4 G=7 N=64, {dtype}, forward+backward"
            made += [
                Target(f"{text}: speed over the eager reference", 3.0, _ratio(_TRITON, REFERENCE, "ms", **place)),
                Target(f"{text}: speed over its compiled form", 1.2, _ratio(_TRITON, _COMPILED, "ms", **place)),
                Target(f"{text}: {_MEMORY}", 3.0, _ratio(_TRITON, REFERENCE, "peak_bytes", **place)),
            ]
    return made


def _on_cpu() -> list[Target]:
    made = []
    for kind in _FUNCTIONS:
        place: dict[str, Any] = {"kind": kind, "B": 8, "T": 128, "N": 64}
        text = f"{kind}, B=8 T=128 C=4 G=7 N=64"
        forward = _ratio("ours", REFERENCE, "peak_bytes", direction=FORWARD, **place)
        made += [
            Target(f"{text}, forward: {_MEMORY}", 3.0, forward, device="cpu"),
            Target(
                f"{text}, forward+backward: {_MEMORY}",
                3.0,
                _ratio("ours", REFERENCE, "peak_bytes", **place),
                device="cpu",
            ),
        ]
    return made
