"""What the GRU and LSTM backbones share.

Dimensions: `B` batch or lanes, `L` timesteps, `D` input features, `N` layers, `U` hidden units, `E` output features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..norms import NORMS, make_norm
from ..recurrence import at_least_float32
from ..state import State
from ..validation import check_choice, check_float, check_int
from .base import TrajEncoder, TrajEncoderConfig


def _without_autocast(device_type: str) -> AbstractContextManager[None]:
    enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


class GatedLayers(nn.RNNBase):
    """Parameters, names and initial values of `torch.nn.GRU` or `torch.nn.LSTM`.

    `torch.compile` refuses graphs that touch those two classes, and not this one.

    Args:
        mode: "GRU" or "LSTM".
        in_dim: features `D` of a timestep.
        d_hidden: units `U`.
        n_layers: layers `N`.
    """

    def __init__(self, mode: str, in_dim: int, d_hidden: int, n_layers: int) -> None:
        super().__init__(mode, in_dim, d_hidden, n_layers, batch_first=True)

    @torch.no_grad()
    def remember_long(self, max_timescale: float) -> None:
        """Draws new biases of the gates that keep and write memory.

        Args:
            max_timescale: the longest time constant in timesteps, at least 2. While its input says nothing, a unit
                forgets over `tau` timesteps, log-uniform in `[2, max_timescale]`.

        Source: Tallec and Ollivier (2018), "Can recurrent neural networks warp time?".
        """
        keep = slice(self.hidden_size, 2 * self.hidden_size)  # The update gate of a GRU, the forget gate of an LSTM.
        for layer in range(self.num_layers):
            _, _, bias, other = self.weights(layer)
            tau = torch.empty_like(bias[keep]).uniform_(math.log(2.0), math.log(max_timescale)).exp_()
            bias[keep] = (tau - 1.0).log_()
            other[keep] = 0.0
            if self.mode == "LSTM":
                write = slice(0, self.hidden_size)
                bias[write] = -bias[keep]
                other[write] = 0.0

    def weights(self, layer: int) -> list[Tensor]:
        """Input weights, recurrent weights and the bias of each."""
        return [getattr(self, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]

    def forward(self, x: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
        """PyTorch's own loop over a window without resets.

        Args:
            x: `[B, L, D]`.
            memory: hidden state, for an LSTM also the cell, `[N, B, U]` each.

        Returns:
            `[B, L, U]`, and the memory after the last timestep.
        """
        weights = [weight for layer in range(self.num_layers) for weight in self.weights(layer)]
        # cuDNN differentiates only what ran in its training mode; without dropout that changes nothing else.
        train = torch.is_grad_enabled()
        if self.mode == "GRU":
            return torch.gru(x, memory[0], weights, True, self.num_layers, 0.0, train, False, True)
        return torch.lstm(x, memory, weights, True, self.num_layers, 0.0, train, False, True)


class GatedTrajEncoder(TrajEncoder):
    """Recurrent layers with gates, linear layer, norm.

    The weights are those of PyTorch's module. The layers compute in float32 at least, whatever autocast says, and every
    entry of the state is `[N, B, U]` in that dtype.

    Args:
        config: sizes and choices.
        in_dim: features `D` of a timestep.
        max_seq_len: unused; part of the contract.

    Attributes:
        layers_name: attribute that holds the layers.
        mode: "GRU" or "LSTM".
        torch_trains_fast: whether PyTorch's own loop is the faster one for training on the CPU without resets.
    """

    layers_name: ClassVar[str]
    mode: ClassVar[str]
    torch_trains_fast: ClassVar[bool]

    def __init__(self, config: GatedConfig, in_dim: int, max_seq_len: int) -> None:
        super().__init__(in_dim, config.d_output, max_seq_len)
        layers = GatedLayers(self.mode, in_dim, config.d_hidden, config.n_layers)
        if config.max_timescale is not None:
            layers.remember_long(config.max_timescale)
        self.add_module(self.layers_name, layers)
        self.output = nn.Linear(config.d_hidden, config.d_output)
        self.norm = make_norm(config.norm, config.d_output)

    def _window(
        self, x: Tensor, memory: Sequence[Tensor], weights: Sequence[Tensor], reset: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer over a window; `memory` is `[B, U]` each, and so is what is returned after the outputs."""
        raise NotImplementedError

    def _cell(self, x: Tensor, memory: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One layer over one timestep: the new memory, its output first."""
        raise NotImplementedError

    @property
    def _layers(self) -> GatedLayers:
        return getattr(self, self.layers_name)

    @property
    def _dtype(self) -> torch.dtype:
        return at_least_float32(self.output.weight.dtype)

    def forward(
        self, x: Tensor, time_idx: Tensor, reset: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See `TrajEncoder.forward`.

        A reset tensor costs no synchronisation, but on accelerators the layers then run timestep by timestep: pass
        `reset=None` where there are no resets.
        """
        self._check_window(x, time_idx, reset, state)
        dtype = self._dtype
        memory = (
            self._zeros(x.shape[0], x.device, dtype)
            if state is None
            # Copies keep what autograd saved intact when the state is updated in place below.
            else tuple(state[name].to(dtype, copy=True) for name in self.state_entries)
        )
        if reset is None and self._prefers_torch(x):
            with _without_autocast(x.device.type):
                out, *last = self._layers(x.to(dtype), *memory)
        else:
            out, last = self._own_layers(x, memory, reset)
        if state is not None:
            for name, tensor in zip(self.state_entries, last, strict=True):
                state[name].copy_(tensor.detach())
        return self.norm(self.output(out.to(self.output.weight.dtype))), state

    def _prefers_torch(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or self.output.weight.dtype != self._dtype:
            return False
        return self.torch_trains_fast or x.device.type != "cpu" or not torch.is_grad_enabled()

    def _own_layers(self, x: Tensor, memory: tuple[Tensor, ...], reset: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        last = []
        for layer in range(self._layers.num_layers):
            x, after = self._window(x, [tensor[layer] for tensor in memory], self._layers.weights(layer), reset)
            last.append(after)
        return x, [torch.stack(tensors) for tensors in zip(*last, strict=True)]

    def _zeros(self, lanes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shape = (self._layers.num_layers, lanes, self._layers.hidden_size)
        return tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in self.state_entries)

    def initial_state(
        self, lanes: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See `TrajEncoder.initial_state`; every entry is `[N, B, U]`, in float32 at least."""
        place, kind = self._placement(device, dtype)
        with torch.inference_mode(False):
            tensors = self._zeros(lanes, place, at_least_float32(kind))
        return State(lanes, dict(zip(self.state_entries, tensors, strict=True)), dict.fromkeys(self.state_entries, 1))

    @torch.no_grad()
    def step(self, x: Tensor, time_idx: Tensor, state: State) -> Tensor:
        """See `TrajEncoder.step`."""
        self._check_step(x, time_idx, state)
        layers, dtype = self._layers, self._dtype
        memory = [state[name] for name in self.state_entries]
        # Acting is bound by the number of calls: casts that do nothing are left out.
        casts = any(tensor.dtype != dtype for tensor in (self.output.weight, *memory))
        out = x.to(dtype)
        with _without_autocast(x.device.type):
            for layer in range(layers.num_layers):
                before, weights = [tensor[layer] for tensor in memory], layers.weights(layer)
                if casts:
                    wide = [[tensor.to(dtype) for tensor in tensors] for tensors in (before, weights)]
                    after = self._cell(out, *wide)
                else:
                    after = self._cell(out, before, weights)
                for tensor, value in zip(before, after, strict=True):
                    tensor.copy_(value)
                out = after[0]
        return self.norm(self.output(out.to(self.output.weight.dtype) if casts else out))

    def reset_state(self, state: State, lanes: Tensor) -> None:
        """See `TrajEncoder.reset_state`."""
        self._check_lanes(state, lanes)
        for name in self.state_entries:
            state[name].masked_fill_(lanes[None, :, None], 0.0)


@dataclass(frozen=True, kw_only=True)
class GatedConfig(TrajEncoderConfig):
    """Base class of the configs of the GRU and LSTM backbones.

    Attributes:
        d_hidden: hidden units of every layer.
        n_layers: recurrent layers.
        d_output: features of the output.
        norm: name of the norm of the output.
        max_timescale: at the start units forget over 2 to so many timesteps, log-uniform; a good value is the longest
            gap to bridge. None: PyTorch's initial values.
    """

    d_hidden: int = 256
    n_layers: int = 2
    d_output: int = 256
    norm: str = "layer"
    max_timescale: float | None = None

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        for name in ("d_hidden", "n_layers", "d_output"):
            check_int(name, getattr(self, name))
        check_choice("norm", self.norm, NORMS)
        if self.max_timescale is not None:
            check_float("max_timescale", self.max_timescale, low=2.0)
