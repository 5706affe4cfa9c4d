"""GRU backbone: unlimited memory, one hidden vector per layer.

Dimensions: `B` batch or lanes, `L` timesteps, `D` input features, `N` layers, `U` hidden units, `E` output features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amago_kernels import gru_layer

from ..norms import NORMS, make_norm
from ..registry import register
from ..state import State
from ..validation import check_choice, check_int
from .base import TrajEncoder, TrajEncoderConfig


class GRUTrajEncoder(TrajEncoder):
    """GRU, linear layer, norm.

    Args:
        config: sizes and choices.
        in_dim: features `D` of a timestep.
        max_seq_len: unused; part of the contract.

    Source: Cho et al. (2014), in the form of `torch.nn.GRU` (reset gate after the recurrent product).
    """

    def __init__(self, config: GRUConfig, in_dim: int, max_seq_len: int) -> None:
        super().__init__(in_dim, config.d_output, max_seq_len)
        self.gru = nn.GRU(in_dim, config.d_hidden, config.n_layers, batch_first=True)
        self.output = nn.Linear(config.d_hidden, config.d_output)
        self.norm = make_norm(config.norm, config.d_output)

    def forward(
        self, x: Tensor, time_idx: Tensor, reset: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See `TrajEncoder.forward`.

        On accelerators a window without resets beyond column 0 is one call of PyTorch's GRU, and otherwise split at
        every column that holds a reset; finding those columns costs a synchronisation: pass `reset=None` if there are
        none.
        """
        self._check_window(x, time_idx, reset, state)
        # The clone keeps what autograd saved intact when the state is updated in place below.
        hidden = self._zeros(x.shape[0], x.device, x.dtype) if state is None else state["hidden"].clone()
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            out, last = self._forward_layers(x, reset, hidden)
        elif reset is None:
            out, last = self.gru(x, hidden)
        else:
            out, last = self._forward_segments(x, reset, hidden)
        if state is not None:
            state["hidden"].copy_(last.detach())
        return self.norm(self.output(out)), state

    def _weights(self, layer: int) -> list[Tensor]:
        return [getattr(self.gru, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]

    def _forward_layers(self, x: Tensor, reset: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
        last = []
        for layer in range(self.gru.num_layers):
            x = gru_layer(x, hidden[layer], *self._weights(layer), reset=reset)
            last.append(x[:, -1].detach())
        return x, torch.stack(last)

    def _forward_segments(self, x: Tensor, reset: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        cuts = [t for t, here in enumerate(reset.any(dim=0).tolist()) if here]
        starts = sorted({0, *cuts})
        outputs = []
        for start, stop in zip(starts, [*starts[1:], x.shape[1]], strict=True):
            if start in cuts:
                hidden = torch.where(reset[:, start, None], 0.0, hidden)
            out, hidden = self.gru(x[:, start:stop], hidden)
            outputs.append(out)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), hidden

    def _zeros(self, lanes: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.gru.num_layers, lanes, self.gru.hidden_size, device=device, dtype=dtype)

    def initial_state(
        self, lanes: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See `TrajEncoder.initial_state`; the state is `hidden [N, B, U]`."""
        with torch.inference_mode(False):
            hidden = self._zeros(lanes, *self._placement(device, dtype))
        return State(lanes, {"hidden": hidden}, {"hidden": 1})

    @torch.no_grad()
    def step(self, x: Tensor, time_idx: Tensor, state: State) -> Tensor:
        """See `TrajEncoder.step`."""
        self._check_step(x, time_idx, state)
        hidden = state["hidden"]
        out = x
        for layer in range(self.gru.num_layers):
            out = torch.gru_cell(out, hidden[layer], *self._weights(layer))
            hidden[layer].copy_(out)
        return self.norm(self.output(out))

    def reset_state(self, state: State, lanes: Tensor) -> None:
        """See `TrajEncoder.reset_state`."""
        self._check_lanes(state, lanes)
        state["hidden"].masked_fill_(lanes[None, :, None], 0.0)


@register("gru")
@dataclass(frozen=True, kw_only=True)
class GRUConfig(TrajEncoderConfig):
    """GRU backbone.

    Attributes:
        d_hidden: hidden units of every layer.
        n_layers: recurrent layers.
        d_output: features of the output.
        norm: name of the norm of the output.
    """

    d_hidden: int = 256
    n_layers: int = 2
    d_output: int = 256
    norm: str = "layer"

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        for name in ("d_hidden", "n_layers", "d_output"):
            check_int(name, getattr(self, name))
        check_choice("norm", self.norm, NORMS)

    def build(self, in_dim: int, max_seq_len: int) -> GRUTrajEncoder:
        """See `TrajEncoderConfig.build`."""
        return GRUTrajEncoder(self, in_dim, max_seq_len)
