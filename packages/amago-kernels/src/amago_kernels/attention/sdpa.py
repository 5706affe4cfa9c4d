"""Attention on PyTorch's `scaled_dot_product_attention`.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import AttentionCall, visible_keys


def sdpa_refusal(call: AttentionCall) -> str | None:
    """Says why this backend cannot serve a call.

    Args:
        call: the options.

    Returns:
        The reason, or None.
    """
    return "logit_clip is not something SDPA can do" if call.logit_clip is not None else None


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Attention by SDPA: the causal flag alone where that is enough, else a mask.

    Args:
        q: `[B, L, H, E]`, any strides.
        k: `[B, L, H, E]`, any strides.
        v: `[B, L, H, E]`, any strides.
        call: the options; `logit_clip` must be None.

    Returns:
        `[B, L, H, E]` in the dtype of `q`.
    """
    mask = None
    # The causal flag with a factor that is not positive gives NaN on CPUs.
    if not call.plain or call.scale <= 0.0:
        mask, sinks = visible_keys(call, q.shape[1], q.device)
        if call.biased and sinks is not None:
            bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
            mask = bias.masked_fill_(sinks, call.sink_bias).masked_fill_(~mask, float("-inf"))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=call.causal and mask is None,
        scale=call.scale,
    )
    # Autocast has its own choice of dtype.
    return out.transpose(1, 2).to(q.dtype)
