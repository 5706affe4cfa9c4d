"""Linear recurrences: ours beside a compiled scan in log2(L) passes and other people's kernels.

Dimensions: `B` batch, `L` timesteps, `D` channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import costs
import torch
from cases import BACKWARD, BOTH, FORWARD, REFERENCE, Case, Contender, Inputs, Operation, Rows, Run, Target, least
from contenders import LONGEST_LOOP, chunked_scan, compiled, lineup, plain, without_long_loops
from machine import installed
from torch import Tensor

from amago_kernels import linear_scan

_REAL, _RESETS, _COMPLEX = "real", "resets", "complex pairs"
_COMPILED = "log-depth scan, compiled"


def _by_hand(inputs: Inputs) -> Tensor:
    """What one writes first; its backward pass is quadratic in the length."""
    state = torch.zeros_like(inputs["b"][:, 0])
    states = []
    for t in range(inputs["b"].shape[1]):
        state = inputs["a"][:, t] * state + inputs["b"][:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def _log_depth(inputs: Inputs) -> Tensor:
    a, b = inputs["a"].float(), inputs["b"].float()
    if "reset" in inputs:
        a = torch.where(inputs["reset"].unsqueeze(-1), 0.0, a)
    return chunked_scan(a, b).to(inputs["b"].dtype)


def _fla(inputs: Inputs) -> Run:
    """Its HGRN recurrence is the same with logarithms of factors."""
    from fla.ops.hgrn import fused_recurrent_hgrn

    logs, terms = (x.detach().clone().requires_grad_() for x in (inputs["a"].detach().float().log(), inputs["b"]))
    return Run(
        lambda: fused_recurrent_hgrn(terms, logs)[0],
        leaves=(logs, terms),
        gradients=lambda given: (given[0] / inputs["a"].detach(), given[1]),
    )


def _accelerated_scan(inputs: Inputs) -> Run:
    """Wants time last."""
    from accelerated_scan.warp import scan

    leaves = [inputs[name].detach().transpose(1, 2).contiguous().requires_grad_() for name in "ab"]
    return Run(
        lambda: scan(*leaves).transpose(1, 2),
        leaves=leaves,
        gradients=lambda given: [gradient.transpose(1, 2) for gradient in given],
    )


def _case(
    kind: str, sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device, with_compiled: bool
) -> Case:
    shape = (*sizes, 2) if kind == _COMPLEX else sizes

    def make() -> Inputs:
        # Factors near 1 and far from 0: logarithms of them exist.
        inputs = {
            "a": (0.3 + 0.6 * torch.rand(shape, device=device)).to(dtype),
            "b": torch.randn(shape, device=device).to(dtype),
        }
        if kind == _RESETS:
            inputs["reset"] = torch.rand(sizes[:2], device=device) < 0.01
        return inputs

    def call(inputs: Inputs, backend: str) -> Tensor:
        return linear_scan(**inputs, pairs=kind == _COMPLEX, backend=backend)[0]

    others: list[Contender] = []
    if with_compiled and kind != _COMPLEX:
        others.append(compiled(_COMPILED, _log_depth, keeps_graph=True))
    if kind == _REAL and device.type == "cuda":
        if installed("fla"):
            others.append(Contender("fla fused_recurrent_hgrn", _fla))
        if installed("accelerated_scan") and sizes[1] >= 32 and sizes[1] & (sizes[1] - 1) == 0:
            others.append(Contender("accelerated-scan warp, time last", _accelerated_scan))
    if kind == _REAL and sizes[0] * sizes[2] <= 512:
        others.append(plain("loop over a[:, t]", _by_hand))
    return Case(
        kind=kind,
        sizes=dict(zip("BLD", sizes, strict=True)),
        dtype=dtype,
        make=make,
        reference=partial(call, backend="reference"),
        contenders=lineup("linear_scan", call, others, skip=without_long_loops(device, sizes[1])),
        cost=lambda inputs: costs.linear_scan(inputs["b"].numel(), inputs["b"].element_size()),
        auto=partial(call, backend="auto"),
        differentiable=("a", "b"),
        directions=(FORWARD, BACKWARD, BOTH) if device.type == "cuda" else (FORWARD, BOTH),
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
        name="linear_scan",
        cases=[_case(kind, sizes, dtype, device, slow) for kind, sizes, dtype, slow in shapes],
        targets=_targets(),
        bound="copy",
        axis="L",
        notes=(
            "resets: one in 100 timesteps. The log-depth scan is plain PyTorch by torch.compile, in chunks of 32 "
            "timesteps: to compile a Python loop over timesteps takes minutes.",
            f"On CUDA the eager reference is a loop that is timed up to {LONGEST_LOOP} timesteps only.",
        ),
        builds=("amago_kernels.scan.triton_linear",),
    )


_Shape = tuple[str, tuple[int, int, int], torch.dtype, bool]


def _on_cuda(quick: bool) -> list[_Shape]:
    wide, half = torch.float32, torch.bfloat16
    first: list[_Shape] = [(_REAL, (32, 1024, 1024), wide, True), (_REAL, (32, 1024, 1024), half, False)]
    if quick:
        return [*first[:1], (_RESETS, (32, 256, 512), wide, False)]
    lengths: list[_Shape] = [(_REAL, (32, length, 1024), wide, False) for length in (64, 256, 2048, 4096)]
    others: list[_Shape] = [(_RESETS, (32, 1024, 1024), wide, False), (_COMPLEX, (32, 1024, 256), wide, False)]
    return [*first, *others, *lengths, (_REAL, (4, 4096, 256), wide, False)]


def _on_cpu(quick: bool) -> list[_Shape]:
    wide = torch.float32
    shapes: list[_Shape] = [
        (_REAL, (8, 512, 64), wide, False),
        (_REAL, (1, 512, 64), wide, False),
        (_REAL, (8, 128, 64), wide, False),
        (_RESETS, (8, 512, 64), wide, False),
        (_COMPLEX, (8, 512, 64), wide, False),
    ]
    if quick:
        return shapes
    more: list[_Shape] = [(kind, (8, 512, 256), wide, False) for kind in (_REAL, _COMPLEX)]
    return [*shapes, (_REAL, (8, 2048, 64), wide, True), *more]


def _targets() -> list[Target]:
    def share(direction: str, dtype: str) -> Callable[[Rows], float | None]:
        def value(rows: Rows) -> float | None:
            here = rows.where(kind=_REAL, B=32, L=1024, D=1024, direction=direction, dtype=dtype)
            return least([row["percent_of_copy"] / 100 for row in here.where(contender="ours: triton")])

        return value

    def on_cpu(batch: int, direction: str) -> Callable[[Rows], float | None]:
        place = {"kind": _REAL, "B": batch, "L": 512, "D": 64, "direction": direction}
        return lambda rows: rows.where(**place).speedup("ours", REFERENCE)

    return [
        *(
            Target(
                f"B=32 L=1024 D=1024, {dtype}, {direction}: share of the copy bandwidth", 0.85, share(direction, dtype)
            )
            for dtype in ("float32", "bfloat16")
            for direction in (FORWARD, BACKWARD)
        ),
        *(
            Target(
                f"B={batch} L=512 D=64, {direction}: speed over the reference loop",
                5.0,
                on_cpu(batch, direction),
                device="cpu",
            )
            for batch in (1, 8)
            for direction in (FORWARD, BOTH)
        ),
    ]
