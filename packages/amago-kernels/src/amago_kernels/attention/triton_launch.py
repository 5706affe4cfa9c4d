"""What the launches of the Triton kernels of attention share: segments, layouts, arguments.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import INTERPRETING
from ..tuning import bucket, config, on_device, tuned

# Numbers whose values change nothing that the compiler could use.
_STEPS = [f"{tensor}_{axis}" for tensor in ("q", "k", "v", "grad") for axis in "blh"]
UNSPECIALIZED = ["L", "H", "window", "sink", "bucket", *_STEPS]
# What asks for another search of the configuration; dtypes always do.
KEY = ("bucket", "E", "CAUSAL", "HAS_RESET", "HAS_WINDOW", "HAS_BIAS", "HAS_CLIP")


@tuned([config(4, 1, BLOCK=64, SPAN=1024)])
@triton.jit(do_not_specialize=["L"])
def segments_kernel(reset, starts, stops, reset_b, reset_l, L, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """For every timestep of a lane, the first timestep of its segment and the first one beyond it."""
    blocks = tl.cdiv(L, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK
    base = reset + b * reset_b
    index = first + tl.arange(0, BLOCK)
    span = tl.arange(0, SPAN)
    before = tl.zeros([SPAN], tl.int32)
    for t in range(0, first, SPAN):
        flag = tl.load(base + (t + span).to(tl.int64) * reset_l, mask=t + span < first, other=0)
        before = tl.maximum(before, tl.where(flag != 0, t + span, 0))
    after = tl.zeros([SPAN], tl.int32) + L
    for t in range(first + BLOCK, L, SPAN):
        flag = tl.load(base + (t + span).to(tl.int64) * reset_l, mask=t + span < L, other=0)
        after = tl.minimum(after, tl.where(flag != 0, t + span, L))
    flag = tl.load(base + index.to(tl.int64) * reset_l, mask=index < L, other=0) != 0
    begins = flag[None, :] & (index[None, :] <= index[:, None])
    ends = flag[None, :] & (index[None, :] > index[:, None])
    start = tl.maximum(tl.max(tl.where(begins, index[None, :], 0), axis=1), tl.max(before, axis=0))
    stop = tl.minimum(tl.min(tl.where(ends, index[None, :], L), axis=1), tl.min(after, axis=0))
    tl.store(starts + b * L + index, start, mask=index < L)
    tl.store(stops + b * L + index, stop, mask=index < L)


def segment_bounds(reset: Tensor) -> Tensor:
    """Where the segment of every timestep starts, and where it ends (the first timestep beyond it).

    Args:
        reset: `[B, L]` bool.

    Returns:
        `[2, B, L]` int32.
    """
    batch, length = reset.shape
    bounds = torch.empty(2, batch, length, dtype=torch.int32, device=reset.device)
    with on_device(reset):
        segments_kernel[lambda meta: (batch * triton.cdiv(length, meta["BLOCK"]),)](
            reset.view(torch.uint8), bounds[0], bounds[1], *reset.stride(), length
        )
    return bounds


def rows_of(x: Tensor) -> Tensor:
    """`x`, or a copy where its rows do not lie such that 16 bytes can be read at once.

    Args:
        x: `[B, L, H, E]`.

    Returns:
        A tensor of that shape.
    """
    steps = [step for step, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    regular = x.stride(3) == 1 and all(step % 8 == 0 for step in steps) and x.data_ptr() % 16 == 0
    # Within a block kernels count in 32 bits.
    regular = regular and (x.shape[1] == 1 or x.stride(1) < 1 << 24)
    return x if regular else x.clone(memory_format=torch.contiguous_format)


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Eighths of the strides over `B`, `L` and `H`; 0 where there is one entry, and any stride would do.

    Args:
        x: `[B, L, H, E]`, as `rows_of` returns it.

    Returns:
        Three numbers.
    """
    return tuple(step // 8 if size > 1 else 0 for step, size in zip(x.stride()[:3], x.shape[:3], strict=True))


def kind_of(x: Tensor) -> str:
    """What decides how large blocks may be.

    Args:
        x: `[B, L, H, E]`.

    Returns:
        "half" for two bytes per number and "single" for four; with heads beyond 64 "long" and "wide".
    """
    small = x.shape[3] <= 64
    if x.element_size() > 2:
        return "single" if small else "wide"
    return "half" if small else "long"


def options_of(
    q: Tensor,
    resets: bool,
    causal: bool,
    window: int | None,
    sink: int,
    sink_bias: float,
    logit_clip: float | None,
    scale: float,
) -> dict[str, Any]:
    """Arguments that all three kernels take.

    Args:
        q: `[B, L, H, E]`.
        resets: whether there are any.
        causal: as in `attention`.
        window: as in `attention`.
        sink: as in `attention`.
        sink_bias: as in `attention`.
        logit_clip: as in `attention`.
        scale: as in `attention`.

    Returns:
        Keyword arguments.
    """
    biased_sinks = sink > 0 and sink_bias != 0.0
    narrow = q.dtype != torch.float32 or _rounds_products()
    return {
        "L": q.shape[1],
        "H": q.shape[2],
        "scale": scale,
        "window": window or 0,
        "sink": min(sink, q.shape[1]),
        "sink_bias": sink_bias,
        "clip": logit_clip or 0.0,
        "bucket": bucket(q.shape[1]),
        "E": q.shape[3],
        "HEAD": triton.next_power_of_2(q.shape[3]),
        "CAUSAL": causal,
        "HAS_RESET": resets,
        "HAS_WINDOW": window is not None,
        "HAS_SINK": sink > 0 and window is not None,
        "HAS_BIAS": biased_sinks,
        "HAS_CLIP": logit_clip is not None,
        # Exponentials want a positive factor.
        "FOLD": scale > 0.0 and not biased_sinks and logit_clip is None,
        "WIDE": q.dtype == torch.float32 or INTERPRETING,
        "PRECISION": "tf32" if narrow else "tf32x3",
    }


def _rounds_products() -> bool:
    """Whether PyTorch may compute products of float32 in TF32."""
    # The older switch cannot be read any more once the newer one, of torch 2.9, says "tf32".
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if newer is None else newer == "tf32"


def built_variants(tensors: Sequence[str]) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """What the kernels are built for without a GPU.

    Args:
        tensors: prefixes of the strides that the kernel takes.

    Yields:
        Name, queries without memory, and arguments but for the pointers to anything else than segments.
    """
    for name, dtype, size, window, resets in (
        ("bf16 E=64", torch.bfloat16, 64, None, False),
        ("bf16 E=32 reset window", torch.bfloat16, 32, 256, True),
        ("fp32 E=64", torch.float32, 64, None, False),
        ("bf16 E=128", torch.bfloat16, 128, None, False),
        ("fp32 E=128", torch.float32, 128, None, False),
    ):
        q = torch.empty(32, 1024, 3, 8, size, dtype=dtype, device="meta")[:, :, 0]
        arguments = options_of(q, resets, True, window, 0, 0.0, None, size**-0.5)
        for prefix in tensors:
            arguments |= {f"{prefix}_{axis}": step for axis, step in zip("blh", strides_of(q), strict=True)}
        arguments |= dict.fromkeys(("starts", "stops"), "*i32" if resets else None)
        yield name, q, arguments
