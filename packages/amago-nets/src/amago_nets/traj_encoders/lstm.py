"""LSTM backbone: unlimited memory, a hidden vector and a cell per layer.

Dimensions: `B` batch or lanes, `L` timesteps, `D` input features, `N` layers, `U` hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amago_kernels import lstm_layer

from ..registry import register
from .gated import GatedConfig, GatedLayers, GatedTrajEncoder


class LSTMTrajEncoder(GatedTrajEncoder):
    """LSTM, linear layer, norm; the state is `hidden [N, B, U]` and `cell [N, B, U]`.

    Args:
        config: sizes and choices.
        in_dim: features `D` of a timestep.
        max_seq_len: unused; part of the contract.

    Source: Hochreiter & Schmidhuber (1997), in the form of `torch.nn.LSTM` (forget gate, no peepholes).
    """

    state_entries = ("hidden", "cell")
    layers_name = "lstm"
    mode = "LSTM"
    torch_trains_fast = True

    lstm: GatedLayers

    def _window(
        self, x: Tensor, memory: Sequence[Tensor], weights: Sequence[Tensor], reset: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, cell = lstm_layer(x, *memory, *weights, reset=reset)
        return out, (out[:, -1], cell)

    def _cell(self, x: Tensor, memory: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.lstm_cell(x, tuple(memory), *weights)


@register("lstm")
@dataclass(frozen=True, kw_only=True)
class LSTMConfig(GatedConfig):
    """LSTM backbone.

    Attributes:
        d_hidden: hidden units of every layer.
        n_layers: recurrent layers.
        d_output: features of the output.
        norm: name of the norm of the output.
        max_timescale: at the start units forget over 2 to so many timesteps, log-uniform; a good value is the longest
            gap to bridge. None: PyTorch's initial values.
    """

    def build(self, in_dim: int, max_seq_len: int) -> LSTMTrajEncoder:
        """See `TrajEncoderConfig.build`."""
        return LSTMTrajEncoder(self, in_dim, max_seq_len)
