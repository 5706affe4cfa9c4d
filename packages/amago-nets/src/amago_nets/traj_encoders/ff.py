"""Feed-forward backbone: no memory; the twin of a Transformer for memory-free tasks and ablations.

Dimensions: `B` batch or lanes, `L` timesteps, `D` input features, `E` output features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import ACTIVATIONS, NORMS, make_activation, make_norm
from ..registry import register
from ..state import State
from ..validation import check_choice, check_dropout, check_int
from .base import TrajEncoder, TrajEncoderConfig


class FFLayer(nn.Module):
    """`drop(act(norm(W x + b)))`.

    Args:
        inputs: width of `x`.
        outputs: width of the result.
        activation: name.
        norm: name.
    """

    def __init__(self, inputs: int, outputs: int, *, activation: str, norm: str = "none") -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = make_norm(norm, outputs)
        self.activation = make_activation(activation)

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        """Maps `[..., inputs]` to `[..., outputs]`, dropping activations with the given probability."""
        out = self.activation(self.norm(self.linear(x)))
        return F.dropout(out, dropout) if dropout > 0.0 else out


class FFBlock(nn.Module):
    """`x + layer2(layer1(x))`; there is an activation after the second linear layer too.

    Args:
        d_model: width of `x`.
        d_ff: inner width.
        activation: name.
        norm: name.
    """

    def __init__(self, d_model: int, d_ff: int, *, activation: str, norm: str) -> None:
        super().__init__()
        self.layer1 = FFLayer(d_model, d_ff, activation=activation, norm=norm)
        self.layer2 = FFLayer(d_ff, d_model, activation=activation, norm=norm)

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        """Maps `[..., d_model]` to the same shape, dropping activations with the given probability."""
        return x + self.layer2(self.layer1(x, dropout), dropout)


class FFTrajEncoder(TrajEncoder):
    """Encodes every timestep on its own.

    Args:
        config: sizes and choices.
        in_dim: features `D` of a timestep.
        max_seq_len: unused; part of the contract.
    """

    def __init__(self, config: FFConfig, in_dim: int, max_seq_len: int) -> None:
        super().__init__(in_dim, config.d_model, max_seq_len)
        width = config.d_model
        d_ff = 4 * width if config.d_ff is None else config.d_ff
        self.dropout = config.dropout
        self.input = FFLayer(in_dim, width, activation=config.activation)
        self.blocks = nn.ModuleList(
            FFBlock(width, d_ff, activation=config.activation, norm=config.norm) for _ in range(config.n_layers)
        )
        self.output = nn.Linear(width, width)
        self.norm = make_norm(config.out_norm, width)

    def forward(
        self, x: Tensor, time_idx: Tensor, reset: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See `TrajEncoder.forward`."""
        self._check_window(x, time_idx, reset, state)
        return self._encode(x, self.dropout if self.training else 0.0), state

    def _encode(self, x: Tensor, dropout: float) -> Tensor:
        hidden = self.input(x, dropout)
        for block in self.blocks:
            hidden = block(hidden, dropout)
        out = self.norm(self.output(hidden))
        # A dropout after the output norm is deliberate: it is what the original agent trains with.
        return F.dropout(out, dropout) if dropout > 0.0 else out

    def initial_state(
        self, lanes: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See `TrajEncoder.initial_state`; the state is empty."""
        return State(lanes, {}, {})

    @torch.no_grad()
    def step(self, x: Tensor, time_idx: Tensor, state: State) -> Tensor:
        """See `TrajEncoder.step`."""
        self._check_step(x, time_idx, state)
        return self._encode(x, 0.0)

    def reset_state(self, state: State, lanes: Tensor) -> None:
        """See `TrajEncoder.reset_state`; there is nothing to forget."""
        self._check_lanes(state, lanes)


@register("ff")
@dataclass(frozen=True, kw_only=True)
class FFConfig(TrajEncoderConfig):
    """Feed-forward backbone.

    Attributes:
        d_model: width, and features of the output.
        d_ff: inner width of a block; None is `4 * d_model`.
        n_layers: blocks.
        dropout: probability, after every activation and after the output norm.
        activation: name of the activation.
        norm: name of the norm inside blocks.
        out_norm: name of the norm of the output.
    """

    d_model: int = 256
    d_ff: int | None = None
    n_layers: int = 1
    dropout: float = 0.0
    activation: str = "leaky_relu"
    norm: str = "none"
    out_norm: str = "layer"

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        check_int("d_model", self.d_model)
        check_int("n_layers", self.n_layers, low=0)
        if self.d_ff is not None:
            check_int("d_ff", self.d_ff)
        check_dropout("dropout", self.dropout)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("out_norm", self.out_norm, NORMS)

    def build(self, in_dim: int, max_seq_len: int) -> FFTrajEncoder:
        """See `TrajEncoderConfig.build`."""
        return FFTrajEncoder(self, in_dim, max_seq_len)
