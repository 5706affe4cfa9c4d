"""The Mamba layer: a short convolution, then a recurrence whose decay and drive depend on the input.

Dimensions: `B` batch or lanes, `L` timesteps, `D` model, `C` channels (`expand * D`), `N` states per channel, `W` taps
of the convolution, `R` rank of the step sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amago_kernels import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step

from .recurrence import RecurrenceParameters, RecurrentMixer

# Range of the step sizes at the start, and the smallest one.
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4


class SelectiveScanParameters(RecurrenceParameters):
    """Decay rates and skip gains.

    Args:
        channels: `C`.
        d_state: `N`.

    Attributes:
        A_log: `[C, N]`, logarithm of the decay rates; rates 1 to `N` at the start.
        D: `[C]`, gain from the input of the recurrence to its output; 1 at the start.
    """

    def __init__(self, channels: int, d_state: int) -> None:
        super().__init__()
        rates = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(rates.log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))

    def decay(self) -> Tensor:
        """`A = -exp(A_log)`, `[C, N]`."""
        return -torch.exp(self.A_log)


class MambaMixer(RecurrentMixer):
    """`W_out (y * silu(z))`, where `y` is a selective scan over `u`.

    `(u, z) = W_in x`; `u <- silu(conv(u))`, causal and per channel; `(d, B, C) = W_x u`;
    `delta = softplus(W_dt d + b_dt)`; `h <- exp(delta A) h + delta B u`; `y = C . h + D u`.

    Args:
        d_model: width `D`.
        d_state: states per channel `N`.
        d_conv: taps `W`.
        expand: channels per feature.
        scan_backend: backend of `amago_kernels.selective_scan`.

    Source: Gu and Dao (2023), "Mamba: Linear-Time Sequence Modeling with Selective State Spaces".
    """

    def __init__(self, d_model: int, *, d_state: int, d_conv: int, expand: int, scan_backend: str = "auto") -> None:
        super().__init__()
        channels = expand * d_model
        self.channels = channels
        self.d_state = d_state
        self.d_conv = d_conv
        self.rank = math.ceil(d_model / 16)
        self.scan_backend = scan_backend
        self.in_proj = nn.Linear(d_model, 2 * channels, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.x_proj = nn.Linear(channels, self.rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, channels)
        self.scan = SelectiveScanParameters(channels, d_state)
        self.out_proj = nn.Linear(channels, d_model, bias=False)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        for parameter in (self.conv_weight, self.conv_bias):
            nn.init.uniform_(parameter, -(self.d_conv**-0.5), self.d_conv**-0.5)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = math.log(_DT_MIN), math.log(_DT_MAX)
        dt = torch.empty(self.channels).uniform_(low, high).exp().clamp_min(_DT_FLOOR)
        # The inverse of softplus.
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `RecurrentMixer.memory_shapes`: the last inputs of the convolution, and the states."""
        return {"conv": (self.channels, self.d_conv - 1), "h": (self.channels, self.d_state)}

    def forward(
        self, x: Tensor, memory: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `RecurrentMixer.forward`."""
        conv, h = (None, None) if memory is None else (memory["conv"], memory["h"])
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = causal_conv1d(u, self.conv_weight, self.conv_bias, initial_state=conv, reset=reset, activation="silu")
        delta, b, c = self._select(u)
        y, h = selective_scan(
            u,
            delta,
            self.scan.decay(),
            b,
            c,
            D=self.scan.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            initial_state=h,
            reset=reset,
            backend=self.scan_backend,
        )
        return self.out_proj(y), {"conv": conv, "h": h}

    def step(self, x: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
        """See `RecurrentMixer.step`."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = causal_conv1d_step(u, self.conv_weight, self.conv_bias, memory["conv"], activation="silu")
        delta, b, c = self._select(u)
        y = selective_scan_step(
            u,
            delta,
            self.scan.decay(),
            b,
            c,
            memory["h"],
            D=self.scan.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
        )
        return self.out_proj(y)

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low_rank, b, c = self.x_proj(u).split((self.rank, self.d_state, self.d_state), dim=-1)
        return F.linear(low_rank, self.dt_proj.weight), b, c
