"""Encoder of observations that are indices: discrete states, several discrete features, words.

Dimensions: `K` tokens of one timestep, `V` classes, `E` embedding size, `U` recurrent size. `...` stands for any
leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from amago_kernels import gru_layer

from ..registry import register
from ..specs import ArraySpec
from ..validation import check_choice, check_int
from .base import ObsEncoder, ObsEncoderConfig, flatten_tail, raw_dtype

TokenPool = Literal["flatten", "mean", "gru"]


@register("tokens")
@dataclass(frozen=True, kw_only=True)
class TokenEncoderConfig(ObsEncoderConfig):
    """Options of `TokenEncoder`.

    Attributes:
        d_embed: size of the embedding of a token.
        d_output: size of the output.
        pool: how the `K` embeddings become one vector: "flatten" tells positions apart, for features; "mean" ignores
            their order; "gru" reads them in order, for short texts.
        d_hidden: size of the recurrent state; only for "gru".
        num_classes: number of distinct tokens; None takes that of the spec.
        pad_token: token that stands for nothing and is left out; "gru" then ends at the last other token.

    Raises:
        ValueError: if a field is not allowed.
    """

    d_embed: int = 16
    d_output: int = 64
    pool: TokenPool = "flatten"
    d_hidden: int = 64
    num_classes: int | None = None
    pad_token: int | None = None

    def __post_init__(self) -> None:
        for name in ("d_embed", "d_output", "d_hidden"):
            check_int(name, getattr(self, name))
        check_choice("pool", self.pool, get_args(TokenPool))
        if self.num_classes is not None:
            check_int("num_classes", self.num_classes)
        if self.pad_token is not None:
            high = None if self.num_classes is None else self.num_classes - 1
            check_int("pad_token", self.pad_token, low=0, high=high)

    def build(self, spec: ArraySpec, *, key: str = "observation") -> TokenEncoder:
        """Builds the part; see the base class."""
        return TokenEncoder(self, spec, key=key)


class TokenEncoder(ObsEncoder):
    """Embeds every token by one table, pools the embeddings, and maps them through a linear layer.

    A token outside the table raises a `ValueError` on the CPU. Elsewhere, and when compiled, the lookup itself fails.

    Args:
        config: options.
        spec: the observation of one timestep; its axes are flattened.
        key: name of the observation, for error messages.

    Raises:
        ValueError: if neither `config` nor `spec` says how many classes there are.
    """

    def __init__(self, config: TokenEncoderConfig, spec: ArraySpec, *, key: str = "observation") -> None:
        super().__init__(spec, key=key)
        num_classes = spec.num_classes if config.num_classes is None else config.num_classes
        if num_classes is None:
            raise ValueError(
                f"num_classes=None is not allowed for obs[{key!r}], a {spec.kind} observation whose spec does not say "
                "it either; give TokenEncoderConfig(num_classes=...)"
            )
        if config.pad_token is not None:
            check_int("pad_token", config.pad_token, low=0, high=num_classes - 1)
        self.config = config
        self.num_classes = num_classes
        self.out_dim = config.d_output
        self.embedding = nn.Embedding(num_classes, config.d_embed)
        # Holds the weights, in PyTorch's initialisation; nn.GRU itself would break compiled graphs.
        self.gru = nn.GRUCell(config.d_embed, config.d_hidden) if config.pool == "gru" else None
        pooled = {"flatten": spec.numel * config.d_embed, "mean": config.d_embed, "gru": config.d_hidden}
        self.linear = nn.Linear(pooled[config.pool], config.d_output)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps `[..., *shape]` to `[..., out_dim]`; see the base class.

        Raises:
            ValueError: if the shape is wrong, or, on the CPU, a token is out of range.
        """
        tokens = flatten_tail(self._take(x, mask), len(self.spec.shape)).long()
        self._check_range(tokens)
        embedded = self.embedding(tokens)
        present = None if self.config.pad_token is None else tokens != self.config.pad_token
        if present is not None:
            embedded = embedded.masked_fill(~present.unsqueeze(-1), 0.0)
        return self.linear(self._pool(embedded, present))

    def _check_range(self, tokens: Tensor) -> None:
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return
        wrong = (tokens < 0) | (tokens >= self.num_classes)
        if wrong.any():
            raise ValueError(
                f"obs[{self.key!r}] holds the token {int(tokens[wrong][0])}, which is not allowed; "
                f"give 0 to {self.num_classes - 1}"
            )

    def _pool(self, embedded: Tensor, present: Tensor | None) -> Tensor:
        """Maps `[..., K, E]` to one vector; `present` is `[..., K]` bool."""
        if self.config.pool == "flatten":
            return embedded.flatten(-2)
        if self.config.pool == "mean":
            if present is None:
                return embedded.mean(-2)
            return embedded.sum(-2) / present.sum(-1, keepdim=True).clamp_min(1).to(embedded.dtype)
        return self._read(embedded, present)

    def _read(self, embedded: Tensor, present: Tensor | None) -> Tensor:
        """Last GRU state `[..., U]`; zeros where no token is present."""
        assert self.gru is not None
        lead, (k, size) = embedded.shape[:-2], embedded.shape[-2:]
        # A recurrent state in bfloat16 would forget: the whole layer runs in float32 at least.
        dtype = raw_dtype(embedded.dtype)
        cell = self.gru
        weights = [weight.to(dtype) for weight in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)]
        rows = embedded.reshape(-1, k, size).to(dtype)
        states = gru_layer(rows, rows.new_zeros(rows.shape[0], self.config.d_hidden), *weights)
        if present is None:
            last = states[:, -1]
        else:
            place = torch.arange(1, k + 1, device=present.device)
            length = (present.reshape(-1, k) * place).amax(1)
            index = (length - 1).clamp_min(0).reshape(-1, 1, 1).expand(-1, 1, states.shape[-1])
            last = states.gather(1, index).squeeze(1).masked_fill(length.unsqueeze(1) == 0, 0.0)
        return last.reshape(*lead, self.config.d_hidden).to(embedded.dtype)
