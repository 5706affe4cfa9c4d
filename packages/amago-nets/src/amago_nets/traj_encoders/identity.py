"""Identity backbone: hands timestep encodings through; no memory, no parameters.

Dimensions: `B` batch or lanes, `L` timesteps, `D` input and output features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import register
from ..state import State
from .base import TrajEncoder, TrajEncoderConfig


class IdentityTrajEncoder(TrajEncoder):
    """Returns its input: what is left when the timestep encoder is all there is.

    Args:
        in_dim: features `D` of a timestep, and of the output.
        max_seq_len: unused; part of the contract.
    """

    def __init__(self, in_dim: int, max_seq_len: int) -> None:
        super().__init__(in_dim, in_dim, max_seq_len)

    def forward(
        self, x: Tensor, time_idx: Tensor, reset: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See `TrajEncoder.forward`; the output is `x` itself, not a copy."""
        self._check_window(x, time_idx, reset, state)
        return x, state

    def initial_state(
        self, lanes: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See `TrajEncoder.initial_state`; the state is empty."""
        return State(lanes, {}, {})

    @torch.no_grad()
    def step(self, x: Tensor, time_idx: Tensor, state: State) -> Tensor:
        """See `TrajEncoder.step`."""
        self._check_step(x, time_idx, state)
        # A copy: callers refill their input buffers at the next timestep while they still hold the output.
        return x.clone()

    def reset_state(self, state: State, lanes: Tensor) -> None:
        """See `TrajEncoder.reset_state`; there is nothing to forget."""
        self._check_lanes(state, lanes)


@register("identity")
@dataclass(frozen=True, kw_only=True)
class IdentityConfig(TrajEncoderConfig):
    """Identity backbone: no fields."""

    def build(self, in_dim: int, max_seq_len: int) -> IdentityTrajEncoder:
        """See `TrajEncoderConfig.build`."""
        return IdentityTrajEncoder(in_dim, max_seq_len)
