"""`attention` over whole windows: options checked, backend chosen.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import choose
from ..inputs import check_count, check_devices
from .call import AttentionCall
from .flash import flash_attention, flash_refusal
from .flex import flex_attention, flex_refusal
from .reference import reference_attention
from .sdpa import sdpa_attention, sdpa_refusal
from .triton_op import triton_attention, triton_attention_refusal

# Triton first, for what needs a mask or a clamp: SDPA reads a mask `[L, L]` and computes what it hides. Calls that need
# neither go to SDPA without asking (see `attention`): on GPUs it is PyTorch's own choice of fused kernels. On CPUs it
# takes 0.2 to 0.7 of the time of explicit matrix products, forward plus backward, with a mask as well as without
# (benchmarks/kernels). "flex" and "flash" come last, behind one that can always serve: only those who ask for
# them get them. The first compiles for seconds at every new length, the second is another package.
_CANDIDATES: dict[str, Callable[[AttentionCall], str | None]] = {
    "triton": triton_attention_refusal,
    "sdpa": sdpa_refusal,
    "reference": lambda call: None,
    "flex": flex_refusal,
    "flash": flash_refusal,
}
_BACKENDS = {
    "triton": triton_attention,
    "sdpa": sdpa_attention,
    "reference": reference_attention,
    "flex": flex_attention,
    "flash": flash_attention,
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    sink: int = 0,
    sink_bias: float = 0.0,
    logit_clip: float | None = None,
    reset: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Multi-head attention inside windows that may hold several episodes.

    Args:
        q: queries `[B, L, H, E]`, float; any strides.
        k: keys, like `q`.
        v: values, like `q`.
        causal: query i sees key j only if `j <= i`.
        window: query i sees key j only if `i - j <= window`, that is `window + 1` timesteps with itself.
        sink: the first `sink` keys of a segment stay visible beyond the window.
        sink_bias: added to the scaled scores of sink keys.
        logit_clip: scores are clamped to `[-logit_clip, logit_clip]` after the sink bias; None is no clamp.
        reset: `[B, L]` bool; True starts a segment, and a query sees keys of its own segment only.
        scale: factor on the scores; by default `E ** -0.5`.
        dropout: probability that an attention weight is dropped; the caller passes 0 outside training.
        backend: "auto", "reference", "sdpa" (no `logit_clip`), "triton" (CUDA devices, `E` a multiple of 8 from 16 to
            128, no float64, no dropout), "flex" (compiled flex_attention: `E` a power of two from 16 to 256, no
            dropout, no gradients on CPUs), or "flash" (the flash-attn package: bfloat16 and float16 on CUDA devices,
            causal or not, with or without a window, nothing else).

    Returns:
        `[B, L, H, E]` in the dtype of `q`.

    Raises:
        ValueError: if shapes, dtypes or devices disagree, an option is out of range, or the backend cannot serve the
            call.
    """
    _check_tensors(q, k, v, reset)
    check_count("window", window, "None or an integer >= 0")
    if window is not None and not causal:
        raise ValueError("window needs causal=True: it counts timesteps back from the query")
    check_count("sink", sink)
    _check_numbers(sink_bias, logit_clip, scale, dropout)
    call = AttentionCall(
        causal=causal,
        window=None if window is None or window >= q.shape[1] - 1 else window,
        sink=sink,
        sink_bias=sink_bias,
        logit_clip=logit_clip,
        reset=reset if reset is not None and has_interior_reset(reset) else None,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout=dropout,
        dtype=q.dtype,
        device_type=q.device.type,
        head_dim=q.shape[-1],
        differentiable=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )
    if backend == "auto" and call.plain:
        backend = "sdpa"
    return _BACKENDS[choose("attention", backend, call, _CANDIDATES)](q, k, v, call)


def has_interior_reset(reset: Tensor) -> bool:
    """Whether resets can matter inside the window; True where finding out would stall the device.

    Args:
        reset: `[B, L]` bool.

    Returns:
        False if no reset lies beyond column 0. Always True on accelerators and while compiling, where looking at the
        data costs a synchronisation or a graph break.
    """
    if reset.shape[1] < 2:
        return False
    if reset.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return bool(reset[:, 1:].any())


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, reset: Tensor | None) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes} must share one shape [B, L, H, E]")
    if q.shape[1] < 1 or q.shape[3] < 1:
        raise ValueError(f"q has L={q.shape[1]} timesteps and head size E={q.shape[3]}; give at least 1 of each")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; give one floating dtype")
    if reset is not None and (reset.dtype != torch.bool or reset.shape != q.shape[:2]):
        raise ValueError(f"reset is {reset.dtype} {tuple(reset.shape)}; give torch.bool {tuple(q.shape[:2])}")
    check_devices(q=q, k=k, v=v, reset=reset)


def _check_numbers(sink_bias: float, logit_clip: float | None, scale: float | None, dropout: float) -> None:
    # Not `math.isfinite`: a compiled graph may hold these numbers as variables.
    if not -math.inf < sink_bias < math.inf:
        raise ValueError(f"sink_bias={sink_bias} is not allowed; give a finite number")
    if logit_clip is not None and not logit_clip > 0.0:
        raise ValueError(f"logit_clip={logit_clip} is not allowed; give None or a number > 0")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale={scale} is not allowed; give None or a finite number")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} is not allowed; give a number in [0, 1)")
