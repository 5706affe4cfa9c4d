"""Attention over windows: ours beside SDPA, its backends forced one by one, and compiled flex_attention.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import costs
import torch
import torch.nn.functional as F
from cases import BOTH, Case, Contender, Inputs, Operation, Rows, Run, Target, least
from contenders import lineup
from torch import Tensor

from amago_kernels import attention
from amago_kernels.builds import MODULES

# Switches of SDPA's backends.
_SWITCHES = {
    "flash": torch.backends.cuda.enable_flash_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}
# One in so many timesteps begins an episode.
_EPISODE = 100


def _allow(*names: str) -> None:
    for name, switch in _SWITCHES.items():
        switch(not names or name in names)


def _options(kind: str, length: int) -> dict[str, Any]:
    window = max(length // 4, 8)
    return {
        "causal": {},
        "window": {"window": window},
        "sink": {"window": window, "sink": 4, "sink_bias": 1.0},
        "clip": {"logit_clip": 2.0},
        "resets": {},
        "all": {"window": window, "sink": 4, "sink_bias": 1.0, "logit_clip": 2.0},
    }[kind]


def _positions(inputs: Inputs) -> Tensor:
    """Timesteps since the last reset."""
    batch, length = inputs["q"].shape[:2]
    index = torch.arange(length, device=inputs["q"].device).expand(batch, length)
    if "reset" not in inputs:
        return index
    return index - torch.where(inputs["reset"], index, 0).cummax(dim=1).values


def _mask(inputs: Inputs, options: dict[str, Any]) -> Tensor | None:
    """What SDPA is given instead of options: None, bool, or a bias; made beforehand, and not timed."""
    if not options and "reset" not in inputs:
        return None
    position = _positions(inputs)[:1] if "reset" not in inputs else _positions(inputs)
    length = position.shape[1]
    index = torch.arange(length, device=position.device)
    distance = index[:, None] - index
    visible = (distance >= 0) & (distance <= position[:, :, None])
    sinks = position[:, None, :] < options.get("sink", 0)
    if "window" in options:
        visible &= (distance <= options["window"]) | sinks
    visible, sinks = visible[:, None], sinks[:, None]
    if not options.get("sink_bias"):
        return visible
    bias = torch.zeros(visible.shape, dtype=inputs["q"].dtype, device=position.device)
    return bias.masked_fill_(sinks, options["sink_bias"]).masked_fill_(~visible, float("-inf"))


def _by_sdpa(backend: str, options: dict[str, Any]) -> Contender:
    """SDPA that has one backend to choose from."""

    def make(inputs: Inputs) -> Run:
        mask = _mask(inputs, options)

        def call() -> Tensor:
            q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)

        return Run(call, restore=partial(_allow, backend))

    return Contender(f"SDPA {backend}", make)


def _case(kind: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, flex: bool) -> Case:
    batch, length, heads, size = sizes
    options = _options(kind, length)

    def make() -> Inputs:
        inputs = {name: torch.randn(sizes, device=device).to(dtype) for name in "qkv"}
        if kind in ("resets", "all"):
            inputs["reset"] = torch.rand(batch, length, device=device) < 1 / _EPISODE
        return inputs

    def call(inputs: Inputs, backend: str) -> Tensor:
        return attention(**inputs, **options, backend=backend)

    def cost(inputs: Inputs) -> dict[str, costs.Cost]:
        position = _positions(inputs)
        pairs = costs.visible_pairs(position, options.get("window"), options.get("sink", 0))
        return costs.attention(*sizes, inputs["q"].element_size(), pairs)

    able = _SWITCHES if device.type == "cuda" else ("flash", "math")
    forced = [] if "logit_clip" in options else [_by_sdpa(backend, options) for backend in able]
    return Case(
        kind=kind,
        sizes=dict(zip("BLHE", sizes, strict=True)),
        dtype=dtype,
        make=make,
        reference=partial(call, backend="reference"),
        contenders=[
            _unforced(contender) for contender in lineup("attention", call, forced, skip=() if flex else ("flex",))
        ],
        cost=cost,
        auto=partial(call, backend="auto"),
        differentiable=("q", "k", "v"),
        graph=True,
    )


def _unforced(contender: Contender) -> Contender:
    """Lets SDPA choose again, whoever had a turn before."""
    if contender.name.startswith("SDPA"):
        return contender
    return replace(contender, make=lambda inputs: replace(contender.make(inputs), restore=_allow))


def operation(device: torch.device, quick: bool) -> Operation:
    """What is measured.

    Args:
        device: where.
        quick: a few small shapes.

    Returns:
        The operation.
    """
    if device.type != "cuda":
        sizes = [(4, 33, 2, 16)] if quick else [(24, 81, 4, 16), (24, 129, 4, 32), (24, 513, 4, 32)]
        shapes = [(kind, size, torch.float32, False) for size in sizes for kind in ("causal", "window", "resets")]
        shapes += [(kind, size, torch.float32, False) for size in sizes[:2] for kind in ("sink", "clip")]
    else:
        shapes = _on_cuda(quick)
    return Operation(
        name="attention",
        cases=[_case(kind, size, dtype, device, flex) for kind, size, dtype, flex in shapes],
        targets=_targets(),
        bound="matmul",
        axis="L",
        notes=(
            "window: L/4; sink: with a window, 4 keys and a bias of 1; clip: 2; resets: one in 100 timesteps; all: "
            "window, sink, clip and resets. FLOPs count visible pairs only.",
            "SDPA gets its mask ready-made. Replay is a CUDA graph: the device without the host.",
        ),
        builds=tuple(module for module in MODULES if ".attention." in module and "decode" not in module),
        finish=_allow,
    )


def _on_cuda(quick: bool) -> list[tuple[str, tuple[int, int, int, int], torch.dtype, bool]]:
    half = torch.bfloat16
    first = [("causal", (16, 2048, 8, 64), half, False), ("causal", (64, 256, 8, 64), half, False)]
    options = [(kind, (16, 1024, 8, 64), half, True) for kind in ("resets", "all", "window", "sink", "clip")]
    if quick:
        return first + options[:1]
    short = [("causal", (64, length, 8, 64), half, False) for length in (64, 128)]
    long = [("causal", (16, length, 8, 64), half, False) for length in (256, 1024, 4096)]
    resets = [("resets", (16, length, 8, 64), half, False) for length in (256, 4096)]
    more = [("causal", (32, 512, 8, 32), half, False), ("causal", (16, 1024, 4, 64), torch.float32, False)]
    return [*first, *options[:1], *short, *long, *resets, *options[1:], *more]


def _targets() -> list[Target]:
    def causal(length: int, column: str = "ms") -> Callable[[Rows], float | None]:
        def value(rows: Rows) -> float | None:
            here = [rows.where(kind="causal", direction=BOTH, dtype="bfloat16", L=length, B=b) for b in (16, 64)]
            ratios = [rows_of.speedup("ours: triton", "SDPA", column=column) for rows_of in here if rows_of]
            return least(ratios)

        return value

    def short(column: str) -> Callable[[Rows], float | None]:
        def value(rows: Rows) -> float | None:
            found = [causal(length, column)(rows) for length in (64, 128, 256)]
            return least([ratio for ratio in found if ratio is not None])

        return value

    def flex(kind: str) -> Callable[[Rows], float | None]:
        return lambda rows: rows.where(kind=kind, direction=BOTH, L=1024).speedup("ours: triton", "flex_attention")

    both = "forward+backward, bfloat16"
    return [
        Target(f"plain causal, L=2048, {both}: speed over SDPA's best backend", 0.9, causal(2048)),
        Target(f"plain causal, L<=256, {both}: speed over SDPA's best backend", 1.0, short("ms")),
        Target(f"the same, replayed as CUDA graphs, L<=256, {both}", 1.0, short("graph_ms")),
        *(
            Target(f"{kind}, L=1024, {both}: speed over compiled flex_attention", 1.5, flex(kind))
            for kind in ("window", "sink", "clip", "resets", "all")
        ),
    ]
