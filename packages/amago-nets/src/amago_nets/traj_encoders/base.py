"""The contract every sequence backbone keeps.

Dimensions: `B` batch or lanes, `L` timesteps, `D` input features, `E` output features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..state import State


class TrajEncoder(nn.Module):
    """Base class of sequence backbones.

    `forward` over a window equals `step` over its timesteps, with resets anywhere; `amago_nets.testing.check_backbone`
    holds a backbone to that.

    Args:
        in_dim: features `D` of a timestep.
        out_dim: features `E` of the output.
        max_seq_len: timesteps that attention sees, itself included; recurrent backbones have no such limit.

    Attributes:
        state_entries: names of tensors that a state must hold; one without them comes from another backbone.
    """

    state_entries: ClassVar[tuple[str, ...]] = ()

    def __init__(self, in_dim: int, out_dim: int, max_seq_len: int) -> None:
        super().__init__()
        for name, value in (("in_dim", in_dim), ("max_seq_len", max_seq_len)):
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed; give an integer >= 1")
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.max_seq_len = max_seq_len

    def forward(
        self, x: Tensor, time_idx: Tensor, reset: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """Encodes windows.

        Args:
            x: `[B, L, D]`, finite, under padding as well.
            time_idx: `[B, L]` int64, time since the episode began.
            reset: `[B, L]` bool; True starts an episode: that timestep sees nothing before it. None: no reset.
            state: memory to go on from; the lanes are the batch. None: nothing was seen before.

        Returns:
            `[B, L, E]`, and the state after the last timestep: the same object, updated in place, or None. So do not
            run it with a state under gradient checkpointing, which runs it twice.
        """
        raise NotImplementedError

    def initial_state(
        self, lanes: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Memory of lanes that have seen nothing.

        Args:
            lanes: number of lanes `B`.
            device: by default that of the parameters.
            dtype: by default that of the parameters.

        Returns:
            A new state.
        """
        raise NotImplementedError

    def step(self, x: Tensor, time_idx: Tensor, state: State) -> Tensor:
        """Encodes one timestep of every lane; records no gradient and applies no dropout.

        Args:
            x: `[B, D]`.
            time_idx: `[B]` int64.
            state: updated in place; its tensors stay at their addresses.

        Returns:
            `[B, E]`.
        """
        raise NotImplementedError

    def reset_state(self, state: State, lanes: Tensor) -> None:
        """Forgets what some lanes have seen, in place.

        Args:
            state: the state.
            lanes: `[B]` bool; True forgets the lane.
        """
        raise NotImplementedError

    def _check_window(self, x: Tensor, time_idx: Tensor, reset: Tensor | None, state: State | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.in_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; give [B, L, {self.in_dim}]")
        if x.shape[1] < 1:
            raise ValueError("x has L=0 timesteps; give at least 1")
        if time_idx.shape != x.shape[:2]:
            raise ValueError(f"time_idx has shape {tuple(time_idx.shape)}; give {tuple(x.shape[:2])}, like x")
        if reset is not None and (reset.shape != x.shape[:2] or reset.dtype != torch.bool):
            raise ValueError(f"reset is {reset.dtype} {tuple(reset.shape)}; give torch.bool {tuple(x.shape[:2])}")
        self._check_dtype("x", x)
        if state is not None:
            self._check_state(state)
            if state.lanes != x.shape[0]:
                raise ValueError(f"state has {state.lanes} lanes; give {x.shape[0]}, one per row of x")

    def _check_step(self, x: Tensor, time_idx: Tensor, state: State) -> None:
        self._check_state(state)
        if x.shape != (state.lanes, self.in_dim) or time_idx.shape != (state.lanes,):
            raise ValueError(
                f"x {tuple(x.shape)} and time_idx {tuple(time_idx.shape)} do not fit; give "
                f"({state.lanes}, {self.in_dim}) and ({state.lanes},)"
            )
        self._check_dtype("x", x)

    def _check_state(self, state: State) -> None:
        if not isinstance(state, State):
            raise ValueError(f"state is a {type(state).__name__}; give what initial_state of this backbone returned")
        if self.state_entries and not set(self.state_entries) <= set(state.tensors):
            raise ValueError(
                f"state holds {sorted(state.tensors)}, this backbone keeps {sorted(self.state_entries)}; give what "
                "initial_state of this backbone returned"
            )

    def _check_dtype(self, name: str, tensor: Tensor) -> None:
        parameter = self._first_parameter()
        if parameter is None or tensor.dtype == parameter.dtype:
            return
        # Autocast casts between these three, and leaves float64 alone.
        castable = (torch.float32, torch.bfloat16, torch.float16)
        both = tensor.dtype in castable and parameter.dtype in castable
        if not (both and torch.is_autocast_enabled(tensor.device.type)):
            raise ValueError(f"{name} is {tensor.dtype}; give {parameter.dtype}, like the parameters of the backbone")

    def _first_parameter(self) -> Tensor | None:
        """The parameter whose device and dtype inputs must have; None if there is no parameter."""
        # A loop, because older versions of torch.compile know no next() with a default.
        for parameter in self.parameters():
            return parameter
        return None

    def _check_lanes(self, state: State, lanes: Tensor) -> None:
        self._check_state(state)
        if lanes.dtype != torch.bool or lanes.shape != (state.lanes,):
            raise ValueError(f"lanes is {lanes.dtype} {tuple(lanes.shape)}; give torch.bool ({state.lanes},)")

    def _placement(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> tuple[torch.device, torch.dtype]:
        parameter = next(self.parameters())
        return torch.device(device) if device is not None else parameter.device, dtype or parameter.dtype


class TrajEncoderConfig:
    """Base class of backbone configs: frozen keyword-only dataclasses with `build`."""

    registry_kind: ClassVar[str] = "traj_encoder"

    def build(self, in_dim: int, max_seq_len: int) -> TrajEncoder:
        """Builds the backbone with fresh weights.

        Args:
            in_dim: features of a timestep.
            max_seq_len: timesteps the policy can see.

        Returns:
            The backbone.

        Raises:
            ValueError: if a size is below 1.
        """
        raise NotImplementedError
