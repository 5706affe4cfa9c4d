"""Multi-head self-attention as a layer: over windows for training, over ring buffers for acting.

Dimensions: `B` batch or lanes, `L` timesteps, `D` model, `H` heads, `E = D/H` head size, `M` slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amago_kernels import DecodePlan, RingCache, attention, decode_attention

from .kv_cache import Prefill
from .positions import apply_rotary
from .sigma_reparam import make_linear, update_spectral_norms

__all__ = ["SelfAttention", "update_spectral_norms"]

Rotary = tuple[Tensor, Tensor]


class SelfAttention(nn.Module):
    """Causal self-attention with one fused projection to queries, keys and values, and a learned gain per head.

    Args:
        d_model: width `D`, a multiple of `n_heads`.
        n_heads: `H`.
        sigma_reparam: builds both projections as `SigmaReparamLinear`.
        head_scaling: learns the gain of every head; otherwise gains are fixed at 1.
        dropout_qkv: probability that an entry of the projection is dropped.
        dropout_attn: probability that an attention weight is dropped.
        sink: the first `sink` timesteps of an episode stay visible beyond the window.
        sink_bias: added to the scores of these timesteps, in windows; for steps it is part of the plan.
        logit_clip: scores are clamped to `[-logit_clip, logit_clip]`; None is no clamp.
        backend: backend of `amago_kernels.attention`.

    Raises:
        ValueError: if `d_model` is not a multiple of `n_heads`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        sigma_reparam: bool = True,
        head_scaling: bool = True,
        dropout_qkv: float = 0.0,
        dropout_attn: float = 0.0,
        sink: int = 0,
        sink_bias: float = 0.0,
        logit_clip: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model={d_model} is not allowed with n_heads={n_heads}; give a multiple of n_heads")
        self.n_heads = n_heads
        self.head_dim = d_model // n_heads
        self.head_scaling = head_scaling
        self.dropout_qkv = dropout_qkv
        self.dropout_attn = dropout_attn
        self.sink = sink
        self.sink_bias = sink_bias
        self.logit_clip = logit_clip
        self.backend = backend
        self.qkv = make_linear(d_model, 3 * d_model, bias=False, sigma_reparam=sigma_reparam)
        self.out = make_linear(d_model, d_model, sigma_reparam=sigma_reparam)
        self.gain = nn.Parameter(torch.ones(1, 1, n_heads, 1), requires_grad=head_scaling)

    def _project(self, x: Tensor, rotary: Rotary | None, dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x)
        if dropout > 0.0:
            qkv = F.dropout(qkv, dropout)
        qkv = qkv.view(*x.shape[:-1], 3, self.n_heads, self.head_dim)
        if rotary is None:
            q, k, v = qkv.unbind(-3)
            return q, k, v
        q, k = apply_rotary(qkv[..., :2, :, :], *rotary).unbind(-3)
        return q, k, qkv[..., 2, :, :]

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary | None = None,
        window: int | None = None,
        reset: Tensor | None = None,
        prefill: Prefill | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attends inside windows.

        Args:
            x: `[B, L, D]`.
            rotary: cosines and sines `[B, L, 1, 1, E/2]`, or None.
            window: a timestep sees this many timesteps before itself; None is no limit.
            reset: `[B, L]` bool, or None.
            prefill: memory to put in front of the window; it then replaces `reset`.
            layer: number of this layer, for `prefill`.

        Returns:
            `[B, L, D]`.
        """
        q, k, v = self._project(x, rotary, self.dropout_qkv if self.training else 0.0)
        if prefill is not None:
            k, v = prefill.extend(layer, k, v)
            # Queries of remembered timesteps are not needed; zeros keep the window square.
            q = F.pad(q, (0, 0, 0, 0, prefill.slots, 0))
            reset = prefill.reset
        heads = attention(
            q,
            k,
            v,
            window=window,
            sink=self.sink,
            sink_bias=self.sink_bias,
            logit_clip=self.logit_clip,
            reset=reset,
            dropout=self.dropout_attn if self.training else 0.0,
            backend=self.backend,
        )
        if prefill is not None:
            heads = heads[:, prefill.slots :]
        if self.head_scaling:
            heads = heads * self.gain
        return self.out(heads.flatten(-2))

    def step(self, x: Tensor, cache: RingCache, plan: DecodePlan, *, rotary: Rotary | None = None) -> Tensor:
        """Attends from one timestep of every lane to what the lane remembers, and remembers the timestep.

        Args:
            x: `[B, D]`.
            cache: ring buffer of this layer, updated in place.
            plan: slots and visibility, shared by all layers.
            rotary: cosines and sines `[B, 1, 1, E/2]`, or None.

        Returns:
            `[B, D]`.
        """
        q, k, v = self._project(x, rotary)
        heads = decode_attention(q, k, v, cache, plan=plan, logit_clip=self.logit_clip)
        if self.head_scaling:
            heads = heads * self.gain[0]
        return self.out(heads.flatten(-2))
