"""A pre-norm Transformer layer with the extras that keep reinforcement learning stable.

Dimensions: `B` batch or lanes, `L` timesteps, `D` model, `F` feed-forward.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from amago_kernels import DecodePlan, RingCache

from .attention import Rotary, SelfAttention
from .kv_cache import Prefill
from .norms import make_activation, make_norm
from .sigma_reparam import make_linear


class TransformerLayer(nn.Module):
    """`x <- x + n2(Attn(n1(x)))`, then `x <- x + drop(W2 n4(act(W1 n3(x))))`.

    Args:
        d_model: width `D`.
        n_heads: heads.
        d_ff: inner width `F`.
        dropout_ff: probability of the dropout after `W2`.
        dropout_attn: see `SelfAttention`.
        dropout_qkv: see `SelfAttention`.
        activation: name.
        norm: name.
        sigma_reparam: builds all four linear layers as `SigmaReparamLinear`.
        normformer_norms: adds the norms n2 (width `D`) and n4 (width `F`).
        head_scaling: see `SelfAttention`.
        attention_backend: see `SelfAttention`.
        sink: see `SelfAttention`.
        sink_bias: see `SelfAttention`.
        logit_clip: see `SelfAttention`.

    Source: Shleifer et al. (2021), "NormFormer", for n2, n4 and the gain per head.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        *,
        dropout_ff: float,
        dropout_attn: float,
        dropout_qkv: float,
        activation: str,
        norm: str,
        sigma_reparam: bool,
        normformer_norms: bool,
        head_scaling: bool,
        attention_backend: str,
        sink: int = 0,
        sink_bias: float = 0.0,
        logit_clip: float | None = None,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(
            d_model,
            n_heads,
            sigma_reparam=sigma_reparam,
            head_scaling=head_scaling,
            dropout_qkv=dropout_qkv,
            dropout_attn=dropout_attn,
            sink=sink,
            sink_bias=sink_bias,
            logit_clip=logit_clip,
            backend=attention_backend,
        )
        extra = norm if normformer_norms else "none"
        self.norm1 = make_norm(norm, d_model)
        self.norm2 = make_norm(extra, d_model)
        self.norm3 = make_norm(norm, d_model)
        self.norm4 = make_norm(extra, d_ff)
        self.ff1 = make_linear(d_model, d_ff, sigma_reparam=sigma_reparam)
        self.ff2 = make_linear(d_ff, d_model, sigma_reparam=sigma_reparam)
        self.activation = make_activation(activation)
        self.dropout_ff = dropout_ff

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
        """Maps windows `[B, L, D]` to the same shape; arguments as in `SelfAttention.forward`."""
        attended = self.attention(
            self.norm1(x), rotary=rotary, window=window, reset=reset, prefill=prefill, layer=layer
        )
        x = x + self.norm2(attended)
        hidden = self._feed_forward(x)
        if self.training and self.dropout_ff > 0.0:
            hidden = F.dropout(hidden, self.dropout_ff)
        return x + hidden

    def step(self, x: Tensor, cache: RingCache, plan: DecodePlan, *, rotary: Rotary | None = None) -> Tensor:
        """Maps one timestep of every lane, `[B, D]`, to the same shape; arguments as in `SelfAttention.step`."""
        x = x + self.norm2(self.attention.step(self.norm1(x), cache, plan, rotary=rotary))
        return x + self._feed_forward(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.ff2(self.norm4(self.activation(self.ff1(self.norm3(x)))))
