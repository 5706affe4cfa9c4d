"""The causal depthwise convolution: ours beside torch.nn.functional.conv1d and causal-conv1d.

Dimensions: `B` batch, `L` timesteps, `D` channels, `W` taps.
"""

from __future__ import annotations

from functools import partial

import costs
import torch
import torch.nn.functional as F
from cases import REFERENCE, Case, Contender, Inputs, Operation, Run, Target
from contenders import LONGEST_LOOP, compiled, lineup, plain, without_long_loops
from machine import installed
from torch import Tensor

from amago_kernels import causal_conv1d

_PLAIN, _RESETS = "no resets", "resets"


def _by_conv1d(inputs: Inputs) -> Tensor:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    channels, taps = weight.shape
    y = F.conv1d(
        x.transpose(1, 2), weight.to(x.dtype).unsqueeze(1), bias.to(x.dtype), padding=taps - 1, groups=channels
    )
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def _package(inputs: Inputs) -> Run:
    """Wants time last: given so beforehand."""
    from causal_conv1d import causal_conv1d_fn

    x = inputs["x"].detach().transpose(1, 2).contiguous().requires_grad_()
    weight, bias = (inputs[name].detach().clone().requires_grad_() for name in ("weight", "bias"))
    return Run(
        lambda: causal_conv1d_fn(x, weight, bias, activation="silu").transpose(1, 2),
        leaves=(x, weight, bias),
        gradients=lambda given: (given[0].transpose(1, 2), *given[1:]),
    )


def _case(
    kind: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, with_compiled: bool
) -> Case:
    batch, length, channels, taps = sizes

    def make() -> Inputs:
        inputs = {
            "x": torch.randn(batch, length, channels, device=device).to(dtype),
            "weight": torch.randn(channels, taps, device=device),
            "bias": torch.randn(channels, device=device),
        }
        if kind == _RESETS:
            inputs["reset"] = torch.rand(batch, length, device=device) < 0.05
        return inputs

    def call(inputs: Inputs, backend: str) -> Tensor:
        return causal_conv1d(**inputs, activation="silu", backend=backend)[0]

    others = []
    if kind == _PLAIN:
        others.append(plain("F.conv1d", _by_conv1d))
        if with_compiled:
            others.append(compiled("F.conv1d, compiled", _by_conv1d, forward=False))
        if device.type == "cuda" and installed("causal_conv1d"):
            others.append(Contender("causal-conv1d, its layout", _package))
    return Case(
        kind=kind,
        sizes=dict(zip("BLDW", sizes, strict=True)),
        dtype=dtype,
        make=make,
        reference=partial(call, backend="reference"),
        contenders=lineup("causal_conv1d", call, others, skip=without_long_loops(device, length)),
        cost=lambda inputs: costs.conv(inputs["x"].numel(), taps, inputs["x"].element_size()),
        auto=partial(call, backend="auto"),
        differentiable=("x", "weight", "bias"),
        shared=frozenset({"weight", "bias"}),
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
    shapes: list[tuple[str, tuple[int, int, int, int], torch.dtype, bool]]
    if device.type == "cuda":
        shapes = [(_PLAIN, (32, 1024, 1024, 4), half, True), (_RESETS, (32, 1024, 1024, 4), half, False)]
        more = [(_PLAIN, (32, length, 1024, 4), half, False) for length in (64, 256, 4096)]
        shapes += [] if quick else [*more, (_RESETS, (32, 1024, 1024, 4), wide, False)]
    else:
        small = [(2, 64, 64, 4), (8, 512, 64, 4)]
        shapes = [(kind, sizes, wide, False) for sizes in small for kind in (_PLAIN, _RESETS)]
        shapes += [] if quick else [(_RESETS, (24, 128, 512, 4), wide, False)]
    return Operation(
        name="conv",
        cases=[_case(kind, sizes, dtype, device, slow) for kind, sizes, dtype, slow in shapes],
        targets=[
            Target(
                "B=8 L=512 D=64 W=4, forward+backward: speed over the reference loop",
                5.0,
                lambda rows: rows.where(B=8, L=512, kind=_RESETS, direction="forward+backward").speedup(
                    "ours", REFERENCE
                ),
                device="cpu",
            ),
        ],
        bound="copy",
        axis="L",
        notes=(
            "With bias and SiLU; resets: one in 20 timesteps. F.conv1d knows no resets.",
            f"On CUDA the eager reference is a loop that is timed up to {LONGEST_LOOP} timesteps only.",
        ),
        builds=("amago_kernels.triton_conv", "amago_kernels.conv"),
    )
