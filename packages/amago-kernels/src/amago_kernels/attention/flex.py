"""Attention on PyTorch's compiled `flex_attention`, for those who ask for it by name.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..inputs import without_autocast
from .call import AttentionCall, autocast_dtype, segment_starts

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEAD_DIMS = (16, 32, 64, 128, 256)
# Every length and set of options is a program of its own; beyond the limit calls would silently not be compiled.
_PROGRAMS = 128


def flex_refusal(call: AttentionCall) -> str | None:
    """Says why this backend cannot serve a call.

    Args:
        call: the options.

    Returns:
        The reason, or None.
    """
    if call.device_type not in ("cpu", "cuda"):
        return f"flex_attention runs on CPUs and CUDA devices, not on {call.device_type!r}"
    if call.dtype not in _DTYPES:
        return f"flex_attention takes float32, bfloat16 and float16, not {call.dtype}"
    if call.head_dim not in _HEAD_DIMS:
        return f"flex_attention takes head sizes {_HEAD_DIMS}, not {call.head_dim}"
    if call.dropout > 0.0:
        return f"flex_attention knows no dropout, and dropout={call.dropout} is given"
    if call.device_type == "cpu" and call.differentiable:
        return "flex_attention has no backward on CPUs, and a gradient may be asked for: use torch.no_grad()"
    if torch.compiler.is_compiling():
        return "it compiles by itself and is not part of a larger torch.compile"
    return None


def flex_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Attention by `torch.nn.attention.flex_attention`, compiled anew for every length and set of options.

    Args:
        q: `[B, L, H, E]`, any strides.
        k: like `q`.
        v: like `q`.
        call: the options; `dropout` must be 0.

    Returns:
        `[B, L, H, E]` in the dtype of `q`.

    Source: Dong et al. (2024), "Flex Attention: A Programming Model for Generating Optimized Attention Kernels".
    """
    length, dtype, starts = q.shape[1], autocast_dtype(q), None
    heads = [x.to(dtype).transpose(1, 2) for x in (q, k, v)]
    if not call.differentiable:
        # On CPUs it refuses tensors that could have gradients, wanted or not.
        heads = [x.detach() for x in heads]
    with without_autocast(q.device), torch._dynamo.config.patch(recompile_limit=_PROGRAMS):
        if call.reset is not None:
            starts = segment_starts(call.reset).to(torch.int32)
            mask = _block_mask(q.is_cuda)(
                _mask_of(call.causal, call.window, call.sink, starts), q.shape[0], None, length, length, q.device
            )
        elif call.causal:
            mask = _whole_mask(call.window, call.sink if call.window is not None else 0, length, q.device)
        else:
            mask = None
        out: Tensor = _compiled()(*heads, score_mod=_score_of(call, starts), block_mask=mask, scale=call.scale)
    return out.transpose(1, 2).to(q.dtype)


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention import flex_attention as module

    return torch.compile(module.flex_attention, dynamic=False)


@functools.cache
def _block_mask(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=False) if compiled else create_block_mask


@functools.lru_cache(maxsize=64)
def _whole_mask(window: int | None, sink: int, length: int, device: torch.device) -> Any:
    """The block mask without resets: the same for every lane and every call."""
    return _block_mask(False)(_mask_of(True, window, sink, None), None, None, length, length, device)


def _mask_of(causal: bool, window: int | None, sink: int, starts: Tensor | None) -> Callable[..., Tensor]:
    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        keep = j <= i if causal else j >= 0
        if window is not None:
            near = i - j <= window
            if sink > 0:
                near = near | ((j if starts is None else j - starts[b, j]) < sink)
            keep = keep & near
        return keep if starts is None else keep & (starts[b, i] == starts[b, j])

    return mask


def _score_of(call: AttentionCall, starts: Tensor | None) -> Callable[..., Tensor] | None:
    """What happens to scaled scores, or None if nothing does."""
    if not call.biased and call.logit_clip is None:
        return None
    biased, sink, sink_bias, clip = call.biased, call.sink, call.sink_bias, call.logit_clip

    def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if biased:
            is_sink = (j if starts is None else j - starts[b, j]) < sink
            value = torch.where(is_sink, value + sink_bias, value)
        return value if clip is None else torch.clamp(value, -clip, clip)

    return score
