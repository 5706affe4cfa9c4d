"""Decoding over a ring buffer: ours beside an index_put and a masked SDPA over the whole cache.

Dimensions: `B` lanes, `M` slots, `H` heads, `E` head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import costs
import torch
import torch.nn.functional as F
from cases import FORWARD, Case, Contender, Inputs, Operation, Rows, Run, Target, least
from contenders import lineup
from machine import installed
from torch import Tensor

from amago_kernels import RingCache, decode_attention

_BY_HAND = "index_put + masked SDPA"
_FULL, _RAGGED, _WINDOW = "full lanes", "ragged lanes", "window and sink"
_TEMPTING = 1e4


def _step(inputs: Inputs, options: dict[str, Any], backend: str, cache: RingCache | None = None) -> Tensor:
    """One timestep; without a cache, on a copy of what it holds."""
    if cache is None:
        cache = RingCache(*(inputs[name].clone() for name in ("keys", "values", "length")))
    return decode_attention(inputs["q"], inputs["k"], inputs["v"], cache, **options, backend=backend)


def _ours(contender: Contender, options: dict[str, Any]) -> Contender:
    """Gives a backend the keys and values that all of ours share: each writes the same numbers to the same slots."""
    backend = contender.backend or ""

    def make(inputs: Inputs) -> Run:
        cache = RingCache(inputs["keys"], inputs["values"], inputs["length"].clone())
        lanes, slot = torch.arange(len(cache.length), device=cache.length.device), cache.slot_of(cache.length)
        for stored in (cache.keys, cache.values):
            # Whoever does not write is found out.
            stored[lanes, :, slot] = _TEMPTING
        return Run(
            lambda: _step(inputs, options, backend, cache),
            restore=lambda: cache.length.copy_(inputs["length"]),
        )

    return Contender(contender.name, make, backend=backend, backward=False)


def _visible(inputs: Inputs, options: dict[str, Any]) -> Tensor:
    """Which slots lanes see, `[B, M]`, once the timestep is written."""
    length, slots = inputs["length"][:, None], inputs["keys"].shape[2]
    index = torch.arange(slots, device=length.device)
    timestep = length - (length - index) % slots
    visible = timestep >= 0
    if options:
        visible &= (length - timestep <= options["window"]) | (timestep < options["sink"])
    return visible


def _by_hand(options: dict[str, Any]) -> Contender:
    def make(inputs: Inputs) -> Run:
        keys, values = inputs["keys"].clone(), inputs["values"].clone()
        length, slots = inputs["length"].clone(), keys.shape[2]
        every, index = torch.arange(len(length), device=length.device), torch.arange(slots, device=length.device)

        def call() -> Tensor:
            slot = length % slots
            keys[every, :, slot] = inputs["k"]
            values[every, :, slot] = inputs["v"]
            if options:
                visible = _visible({**inputs, "length": length}, options)
            else:
                visible = index <= length[:, None]
            length.add_(1)
            mask = visible[:, None, None]
            return F.scaled_dot_product_attention(inputs["q"][:, :, None], keys, values, attn_mask=mask)[:, :, 0]

        return Run(call, restore=lambda: length.copy_(inputs["length"]))

    return Contender(_BY_HAND, make, backward=False)


def _flash() -> Contender:
    """Its cache is no ring: it appends to full lanes at their last slot, which is where the ring has come to."""

    def make(inputs: Inputs) -> Run:
        from flash_attn import flash_attn_with_kvcache

        keys, values = (inputs[name].transpose(1, 2).contiguous() for name in ("keys", "values"))
        q, k, v = (inputs[name][:, None] for name in "qkv")
        held = torch.full((len(q),), keys.shape[1] - 1, dtype=torch.int32, device=q.device)
        return Run(lambda: flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=held)[:, 0])

    return Contender("flash-attn flash_attn_with_kvcache", make, backward=False)


def _case(kind: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Case:
    batch, slots, heads, size = sizes
    options = {"window": slots // 4, "sink": 4} if kind == _WINDOW else {}

    def make() -> Inputs:
        inputs = {name: torch.randn(batch, heads, size, device=device).to(dtype) for name in "qkv"}
        cache = RingCache.allocate(batch, heads, slots, size, dtype=dtype, device=device)
        cache.keys.normal_()
        cache.values.normal_()
        if kind == _RAGGED:
            # Spread evenly: of a few lanes drawn at random all may be full.
            cache.length.copy_(torch.arange(batch, device=device) * 2 * slots // batch)
        else:
            # Sinks are still there; full lanes have wrapped.
            cache.length.fill_((1 if options else 2) * slots - 1)
        return {**inputs, "keys": cache.keys, "values": cache.values, "length": cache.length}

    others = [_by_hand(options)]
    if kind == _FULL and device.type == "cuda" and installed("flash_attn"):
        others.append(_flash())
    contenders = [
        _ours(contender, options) if contender.backend else contender
        for contender in lineup("decode_attention", lambda inputs, _: inputs["q"], others)
    ]

    def cost(inputs: Inputs) -> dict[str, costs.Cost]:
        return costs.decode(int(_visible(inputs, options).sum()), batch, heads, size, inputs["q"].element_size())

    return Case(
        kind=kind,
        sizes=dict(zip("BMHE", sizes, strict=True)),
        dtype=dtype,
        make=make,
        reference=lambda inputs: _step(inputs, options, "reference"),
        contenders=contenders,
        cost=cost,
        auto=lambda inputs: _step(inputs, options, "auto"),
        directions=(FORWARD,),
        graph=True,
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
        name="decode",
        cases=[_case(kind, size, dtype, device) for kind, size, dtype in shapes],
        targets=_targets(),
        bound="copy",
        axis="M",
        notes=(
            "full lanes have wrapped; ragged ones hold 1 to 2M timesteps; window and sink: M/4 and 4 of M timesteps. "
            "Bytes count visible slots only.",
            "A copy reads and writes; decoding mostly reads. Replay is a CUDA graph: the device without the host.",
        ),
        builds=("amago_kernels.attention.triton_decode",),
    )


_Shape = tuple[str, tuple[int, int, int, int], torch.dtype]


def _on_cuda(quick: bool) -> list[_Shape]:
    half = torch.bfloat16
    first: list[_Shape] = [(_FULL, (256, 1024, 8, 32), half), (_FULL, (256, 1024, 8, 32), torch.float32)]
    if quick:
        return [*first[:1], (_RAGGED, (8, 128, 4, 32), half)]
    slots: list[_Shape] = [(_FULL, (256, m, 8, 32), half) for m in (128, 512, 4096)]
    lanes: list[_Shape] = [(_FULL, (b, 1024, 8, 64), half) for b in (8, 64, 1024)]
    others: list[_Shape] = [(_RAGGED, (256, 1024, 8, 32), half), (_WINDOW, (256, 1024, 8, 32), half)]
    few: list[_Shape] = [(_FULL, (8, m, 4, 64), half) for m in (128, 512, 1024, 4096)]
    return [*first, *others, *slots, *few, *lanes]


def _on_cpu(quick: bool) -> list[_Shape]:
    lanes, slots = ((8, 32), (64, 128)) if quick else ((8, 32, 128), (128, 512))
    shapes = [(b, m, heads, size) for b in lanes for m in slots for heads, size in ((4, 16), (8, 32))[quick:]]
    return [(kind, shape, torch.float32) for shape in shapes for kind in (_FULL, _RAGGED)]


def _targets() -> list[Target]:
    def share(dtype: str, column: str) -> Callable[[Rows], float | None]:
        def value(rows: Rows) -> float | None:
            here = rows.where(kind=_FULL, B=256, M=1024, H=8, E=32, dtype=dtype, contender="ours: triton")
            return least([row[column] / 100 for row in here if row[column] is not None])

        return value

    def by_hand(dtype: str, column: str) -> Callable[[Rows], float | None]:
        def value(rows: Rows) -> float | None:
            here = rows.where(kind=_FULL, B=256, M=1024, H=8, E=32, dtype=dtype)
            return here.speedup("ours: triton", _BY_HAND, column=column)

        return value

    place = "B=256 M=1024 H=8 E=32"
    made = []
    for dtype in ("bfloat16", "float32"):
        text = f"{place}, {dtype}"
        made += [
            Target(f"{text}: share of the copy bandwidth", 0.8, share(dtype, "percent_of_copy")),
            Target(
                f"{text}, replayed as a CUDA graph: share of the copy bandwidth",
                0.8,
                share(dtype, "graph_percent_of_copy"),
            ),
            Target(f"{text}: speed over index_put and masked SDPA", 3.0, by_hand(dtype, "ms")),
        ]
    return made
