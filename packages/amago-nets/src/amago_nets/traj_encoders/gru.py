"""GRU backbone: unlimited memory, one hidden vector per layer.

Dimensions: `B` batch or lanes, `L` timesteps, `D` input features, `N` layers, `U` hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amago_kernels import gru_layer

from ..registry import register
from .gated import GatedConfig, GatedLayers, GatedTrajEncoder


class GRUTrajEncoder(GatedTrajEncoder):
    """GRU, linear layer, norm; the state is `hidden [N, B, U]`.

    Args:
        config: sizes and choices.
        in_dim: features `D` of a timestep.
        max_seq_len: unused; part of the contract.

    Source: Cho et al. (2014), in the form of `torch.nn.GRU` (reset gate after the recurrent product).
    """

    state_entries = ("hidden",)
    layers_name = "gru"
    mode = "GRU"
    torch_trains_fast = False

    gru: GatedLayers

    def _window(
        self, x: Tensor, memory: Sequence[Tensor], weights: Sequence[Tensor], reset: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = gru_layer(x, *memory, *weights, reset=reset)
        return out, (out[:, -1],)

    def _cell(self, x: Tensor, memory: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.gru_cell(x, *memory, *weights),)


@register("gru")
@dataclass(frozen=True, kw_only=True)
class GRUConfig(GatedConfig):
    """GRU backbone.

    Attributes:
        d_hidden: hidden units of every layer.
        n_layers: recurrent layers.
        d_output: features of the output.
        norm: name of the norm of the output.
        max_timescale: at the start units forget over 2 to so many timesteps, log-uniform; a good value is the longest
            gap to bridge. None: PyTorch's initial values.
    """

    def build(self, in_dim: int, max_seq_len: int) -> GRUTrajEncoder:
        """See `TrajEncoderConfig.build`."""
        return GRUTrajEncoder(self, in_dim, max_seq_len)
