"""The selective scan of Mamba: ours beside mamba-ssm and a compiled scan that holds all states.

Dimensions: `B` batch, `L` timesteps, `D` channels, `N` states per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import costs
import torch
import torch.nn.functional as F
from cases import BOTH, FORWARD, REFERENCE, Case, Contender, Inputs, Operation, Rows, Run, Target
from contenders import LONGEST_LOOP, chunked_scan, compiled, lineup, without_long_loops
from machine import installed
from torch import Tensor

from amago_kernels import selective_scan

_PLAIN, _RESETS = "no resets", "resets"
_COMPILED = "log-depth scan, compiled"
_PACKAGE = "mamba-ssm, its layout"
_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def _log_depth(inputs: Inputs) -> Tensor:
    """Holds `[B, L, D, N]` several times."""
    u, delta, A, B, C, D, z, bias = (inputs[name].float() for name in _NAMES)
    sizes = F.softplus(delta + bias)
    decay = torch.exp(sizes.unsqueeze(-1) * A)
    if "reset" in inputs:
        decay = torch.where(inputs["reset"][:, :, None, None], 0.0, decay)
    states = chunked_scan(decay, (sizes * u).unsqueeze(-1) * B.unsqueeze(2))
    y = (states * C.unsqueeze(2)).sum(-1) + u * D
    return (y * F.silu(z)).to(inputs["u"].dtype)


def _mamba_ssm(inputs: Inputs) -> Run:
    """Wants time last: given so beforehand."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    timed = [inputs[name].dim() == 3 for name in _NAMES]
    leaves = [
        (inputs[name].detach().transpose(1, 2).contiguous() if over_time else inputs[name].detach().clone())
        for name, over_time in zip(_NAMES, timed, strict=True)
    ]
    for leaf in leaves:
        leaf.requires_grad_()

    def gradients(given: object) -> list[Tensor]:
        return [g.transpose(1, 2) if over else g for g, over in zip(given, timed, strict=True)]  # type: ignore[call-overload]

    return Run(
        lambda: selective_scan_fn(*leaves, delta_softplus=True).transpose(1, 2), leaves=leaves, gradients=gradients
    )


def _case(
    kind: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, with_compiled: bool
) -> Case:
    batch, length, channels, states = sizes

    def make() -> Inputs:
        wide, narrow = (batch, length, channels), (batch, length, states)
        inputs = {
            "u": torch.randn(wide, device=device).to(dtype),
            "delta": torch.randn(wide, device=device).to(dtype),
            "A": -torch.arange(1.0, states + 1, device=device).repeat(channels, 1),
            "B": torch.randn(narrow, device=device).to(dtype),
            "C": torch.randn(narrow, device=device).to(dtype),
            "D": torch.randn(channels, device=device),
            "z": torch.randn(wide, device=device).to(dtype),
            "delta_bias": torch.full((channels,), -3.0, device=device),
        }
        if kind == _RESETS:
            inputs["reset"] = torch.rand(batch, length, device=device) < 0.01
        return inputs

    def call(inputs: Inputs, backend: str) -> Tensor:
        return selective_scan(**inputs, delta_softplus=True, backend=backend)[0]

    others = [compiled(_COMPILED, _log_depth)] if with_compiled else []
    if kind == _PLAIN and device.type == "cuda" and installed("mamba_ssm"):
        others.append(Contender(_PACKAGE, _mamba_ssm))
    return Case(
        kind=kind,
        sizes=dict(zip("BLDN", sizes, strict=True)),
        dtype=dtype,
        make=make,
        reference=partial(call, backend="reference"),
        contenders=lineup("selective_scan", call, others, skip=without_long_loops(device, length)),
        cost=lambda inputs: costs.selective_scan(*sizes, inputs["u"].element_size()),
        auto=partial(call, backend="auto"),
        differentiable=_NAMES,
        shared=frozenset({"A", "D", "delta_bias"}),
    )


def operation(device: torch.device, quick: bool) -> Operation:
    """What is measured.

    Args:
        device: where.
        quick: a few small shapes.

    Returns:
        The operation.
    """
    shapes = _on_cuda(quick) if device.type == "cuda" else _on_cpu(quick)
    return Operation(
        name="selective_scan",
        cases=[_case(kind, sizes, dtype, device, slow) for kind, sizes, dtype, slow in shapes],
        targets=_targets(),
        bound="copy",
        axis="L",
        notes=(
            "With softplus, bias, skip connection and gates; resets: one in 100 timesteps. The log-depth scan is plain "
            "PyTorch by torch.compile and holds all states.",
            f"On CUDA the eager reference is a loop that is timed up to {LONGEST_LOOP} timesteps only.",
        ),
        builds=("amago_kernels.scan.triton_selective",),
    )


_Shape = tuple[str, tuple[int, int, int, int], torch.dtype, bool]


def _on_cuda(quick: bool) -> list[_Shape]:
    half = torch.bfloat16
    first: list[_Shape] = [(_PLAIN, (16, 1024, 512, 16), half, True), (_RESETS, (16, 1024, 512, 16), half, False)]
    if quick:
        return [(kind, sizes, dtype, False) for kind, sizes, dtype, _ in first]
    lengths: list[_Shape] = [(_PLAIN, (16, length, 512, 16), half, False) for length in (128, 512, 2048, 4096)]
    wide: list[_Shape] = [
        (_PLAIN, (32, 1024, 1024, 16), half, False),
        (_PLAIN, (16, 1024, 512, 16), torch.float32, False),
    ]
    return [*first, *wide, *lengths]


def _on_cpu(quick: bool) -> list[_Shape]:
    dtype = torch.float32
    shapes: list[_Shape] = [
        (_PLAIN, (2, 512, 32, 8), dtype, False),
        (_RESETS, (2, 512, 32, 8), dtype, False),
        (_PLAIN, (2, 128, 32, 8), dtype, False),
    ]
    return (
        shapes
        if quick
        else [*shapes, *((_PLAIN, sizes, dtype, False) for sizes in ((2, 64, 64, 8), (8, 128, 512, 16)))]
    )


def _targets() -> list[Target]:
    sizes = {"B": 16, "L": 1024, "D": 512, "N": 16, "dtype": "bfloat16"}

    def over(other: str, direction: str) -> Callable[[Rows], float | None]:
        return lambda rows: rows.where(kind=_PLAIN, direction=direction, **sizes).speedup("ours: triton", other)

    def resets(direction: str) -> Callable[[Rows], float | None]:
        def value(rows: Rows) -> float | None:
            mine = rows.where(direction=direction, contender="ours: triton", **sizes)
            times = [mine.where(kind=kind).best("ours") for kind in (_PLAIN, _RESETS)]
            return None if times[0] is None or times[1] is None else times[0] / times[1]

        return value

    def on_cpu(direction: str) -> Callable[[Rows], float | None]:
        return lambda rows: rows.where(kind=_PLAIN, B=2, L=512, D=32, direction=direction).speedup("ours", REFERENCE)

    place = "B=16 L=1024 D=512 N=16, bfloat16"
    made = []
    for direction in (FORWARD, BOTH):
        # Where mamba-ssm is, it is what counts.
        if installed("mamba_ssm"):
            made.append(Target(f"{place}, {direction}: speed over mamba-ssm", 1.0, over("mamba-ssm", direction)))
        else:
            made.append(Target(f"{place}, {direction}: speed over the compiled scan", 3.0, over(_COMPILED, direction)))
        made.append(Target(f"{place}, {direction}: speed with resets over without", 1 / 1.1, resets(direction)))
        text = f"B=2 L=512 D=32 N=8, {direction}: speed over the reference loop"
        made.append(Target(text, 5.0, on_cpu(direction), device="cpu"))
    return made
