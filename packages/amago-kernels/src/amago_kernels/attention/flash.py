"""Attention on the flash-attn package, for those who ask for it by name.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import AttentionCall

_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


def flash_refusal(call: AttentionCall) -> str | None:
    """Says why this backend cannot serve a call.

    Args:
        call: the options.

    Returns:
        The reason, or None.
    """
    if call.device_type != "cuda":
        return f"flash-attn runs on CUDA devices, not on {call.device_type!r}"
    if call.dtype not in _DTYPES:
        return f"flash-attn takes torch.bfloat16 and torch.float16, not {call.dtype}: cast, or use torch.autocast"
    if call.head_dim > _MAX_HEAD_DIM:
        return f"flash-attn takes head sizes up to {_MAX_HEAD_DIM}, not {call.head_dim}"
    if call.reset is not None:
        return "flash-attn knows no reset inside a window (give reset=None if there is none, and no state)"
    if call.logit_clip is not None:
        return "flash-attn knows no logit_clip"
    if call.sink > 0:
        return "flash-attn knows no sink"
    return None


def flash_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Attention by `flash_attn.flash_attn_func`, version 2.3 or later.

    Args:
        q: `[B, L, H, E]`, bfloat16 or float16.
        k: like `q`.
        v: like `q`.
        call: the options; `reset` and `logit_clip` must be None, `sink` 0.

    Returns:
        `[B, L, H, E]` in the dtype of `q`.

    Source: Dao (2023), "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning".
    """
    from flash_attn import flash_attn_func

    # Both ends count: keys from i - left to i + right; -1 is no end.
    window = (-1, -1) if call.window is None else (call.window, 0)
    out: Tensor = flash_attn_func(
        q, k, v, dropout_p=call.dropout, softmax_scale=call.scale, causal=call.causal, window_size=window
    )
    return out
