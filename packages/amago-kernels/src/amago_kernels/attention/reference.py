"""Plain attention: the specification every other backend is compared with.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import without_autocast
from .call import AttentionCall, visible_keys


def reference_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Softmax attention with every option, in float32 at least, whatever autocast says; differentiable by autograd.

    Args:
        q: `[B, L, H, E]`.
        k: `[B, L, H, E]`.
        v: `[B, L, H, E]`.
        call: the options.

    Returns:
        `[B, L, H, E]` in the dtype of `q`.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device):
        scores = torch.einsum("bihe,bjhe->bhij", q.to(wide), k.to(wide)) * call.scale
    visible, sinks = visible_keys(call, q.shape[1], q.device)
    if sinks is not None:
        scores = scores + call.sink_bias * sinks.to(wide)
    if call.logit_clip is not None:
        scores = scores.clamp(-call.logit_clip, call.logit_clip)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    if call.dropout > 0.0:
        weights = F.dropout(weights, call.dropout)
    with without_autocast(q.device):
        return torch.einsum("bhij,bjhe->bihe", weights, v.to(wide)).to(q.dtype)
