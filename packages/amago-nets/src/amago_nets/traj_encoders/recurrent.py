"""The frame of backbones that stack recurrent layers on a residual stream.

Dimensions: `B` batch or lanes, `L` timesteps, `D` model and output features, `N` layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import make_norm
from ..recurrence import RecurrentMixer, at_least_float32
from ..state import State
from .base import TrajEncoder


class RecurrentTrajEncoder(TrajEncoder):
    """Linear layer, layers `x <- x + drop(mixer(norm(x)))`, norm.

    Memory is unlimited and of constant size; a timestep costs the same however long the history is.

    Args:
        in_dim: features of a timestep.
        d_model: width `D`.
        max_seq_len: unused; part of the contract.
        mixers: one per layer, all of one kind and size.
        norm: name of all norms.
        dropout: probability.
    """

    def __init__(
        self,
        in_dim: int,
        d_model: int,
        max_seq_len: int,
        mixers: Iterable[RecurrentMixer],
        *,
        norm: str,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_dim, d_model, max_seq_len)
        self.dropout = dropout
        self.input = nn.Linear(in_dim, d_model)
        self.mixers: Sequence[RecurrentMixer] = nn.ModuleList(mixers)  # type: ignore[assignment]
        self.norms = nn.ModuleList(make_norm(norm, d_model) for _ in self.mixers)
        self.norm = make_norm(norm, d_model)

    def forward(
        self, x: Tensor, time_idx: Tensor, reset: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See `TrajEncoder.forward`."""
        self._check_window(x, time_idx, reset, state)
        hidden = self.input(x)
        for i, (mixer, norm) in enumerate(zip(self.mixers, self.norms, strict=True)):
            # The clones keep what autograd saved intact when the state is updated in place below.
            before = None if state is None else {name: tensor[i].clone() for name, tensor in state.tensors.items()}
            mixed, after = mixer(norm(hidden), before, reset)
            if self.training and self.dropout > 0.0:
                mixed = F.dropout(mixed, self.dropout)
            hidden = hidden + mixed
            if state is not None:
                for name, tensor in after.items():
                    state[name][i].copy_(tensor.detach())
        return self.norm(hidden), state

    def initial_state(
        self, lanes: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See `TrajEncoder.initial_state`; tensors are `[N, B, ...]`, in float32 at least."""
        place, kind = self._placement(device, dtype)
        with torch.inference_mode(False):
            tensors = {
                name: torch.zeros(len(self.mixers), lanes, *shape, device=place, dtype=at_least_float32(kind))
                for name, shape in self.mixers[0].memory_shapes().items()
            }
        return State(lanes, tensors, dict.fromkeys(tensors, 1))

    @torch.no_grad()
    def step(self, x: Tensor, time_idx: Tensor, state: State) -> Tensor:
        """See `TrajEncoder.step`."""
        self._check_step(x, time_idx, state)
        tensors = state.tensors
        hidden = self.input(x)
        for i, (mixer, norm) in enumerate(zip(self.mixers, self.norms, strict=True)):
            hidden = hidden + mixer.step(norm(hidden), {name: tensor[i] for name, tensor in tensors.items()})
        return self.norm(hidden)

    def reset_state(self, state: State, lanes: Tensor) -> None:
        """See `TrajEncoder.reset_state`."""
        self._check_lanes(state, lanes)
        for tensor in state.tensors.values():
            tensor.masked_fill_(lanes.view(1, -1, *[1] * (tensor.dim() - 2)), 0.0)
