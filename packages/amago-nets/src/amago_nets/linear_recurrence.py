"""Layers around a diagonal linear recurrence: minGRU (real, gated by the input) and LRU (complex, time-invariant).

Dimensions: `B` batch or lanes, `L` timesteps, `D` model, `U` hidden units, `N` complex states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from amago_kernels import linear_scan, linear_scan_step

from .norms import make_activation, make_norm
from .recurrence import RecurrenceParameters, RecurrentMixer


class UpdateGateBias(RecurrenceParameters):
    """Bias of the update gates: how long a unit remembers when the input says nothing.

    Args:
        units: `U`.
        max_timescale: the longest time constant, in timesteps.

    Attributes:
        bias: `[U]`; at the start the gates stand at `1 / tau`, with `tau` log-uniform in `[2, max_timescale]`.

    Source: the idea is that of Tallec and Ollivier (2018), "Can recurrent neural networks warp time?".
    """

    def __init__(self, units: int, max_timescale: float) -> None:
        super().__init__()
        tau = torch.empty(units).uniform_(math.log(2.0), math.log(max_timescale)).exp()
        self.bias = nn.Parameter(-torch.log(tau - 1.0))


class MinGRUMixer(RecurrentMixer):
    """`W_o (norm(h) * act(g))` with `h <- (1 - z) h + z c`.

    `z = sigmoid(W_z x + b_z)`; candidates `c` and gates `g` are linear in `x`. Nothing depends on the last `h`, so that
    a window is one parallel scan. Units that remember long move little; the norm makes them heard.

    Args:
        d_model: width `D`.
        units: `U`.
        activation: name.
        norm: name of the norm of `h`.
        max_timescale: see `UpdateGateBias`.

    Source: Feng et al. (2024), "Were RNNs All We Needed?"; norm and output gate are those of gated linear attention.
    """

    def __init__(self, d_model: int, units: int, *, activation: str, norm: str, max_timescale: float) -> None:
        super().__init__()
        self.units = units
        self.update = nn.Linear(d_model, units, bias=False)
        self.update_bias = UpdateGateBias(units, max_timescale)
        self.candidate = nn.Linear(d_model, 2 * units)
        self.norm = make_norm(norm, units)
        self.activation = make_activation(activation)
        self.output = nn.Linear(units, d_model)

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `RecurrentMixer.memory_shapes`: the hidden units."""
        return {"h": (self.units,)}

    def forward(
        self, x: Tensor, memory: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `RecurrentMixer.forward`."""
        keep, drive, gate = self._gates(x)
        before = None if memory is None else memory["h"].to(drive.dtype)
        h, last = linear_scan(keep, drive, initial_state=before, reset=reset)
        return self._read(h, gate), {"h": last}

    def step(self, x: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
        """See `RecurrentMixer.step`."""
        keep, drive, gate = self._gates(x)
        state = memory["h"]
        return self._read(linear_scan_step(keep.to(state.dtype), drive.to(state.dtype), state), gate)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.update(x) + self.update_bias.bias
        candidate, gate = self.candidate(x).chunk(2, dim=-1)
        # sigmoid(-logits) and not 1 - sigmoid(logits): decays near 1 keep their digits.
        return torch.sigmoid(-logits), torch.sigmoid(logits) * candidate, gate

    def _read(self, h: Tensor, gate: Tensor) -> Tensor:
        return self.output(self.norm(h.to(gate.dtype)) * self.activation(gate))


class LRUParameters(RecurrenceParameters):
    """Eigenvalues `lambda = exp(-exp(nu) + i exp(theta))` and gains `gamma`.

    At the start `lambda` is uniform in the ring `r_min <= |lambda| <= r_max` with phases in `[0, max_phase]`, and
    `gamma = sqrt(1 - |lambda|^2)`, so that white noise of variance 1 gives states of variance 1.

    Args:
        d_state: complex states `N`.
        r_min: inner radius.
        r_max: outer radius, below 1.
        max_phase: largest phase.

    Attributes:
        nu: `[N]`.
        theta: `[N]`, logarithm of the phase.
        log_gamma: `[N]`.
    """

    def __init__(self, d_state: int, *, r_min: float, r_max: float, max_phase: float) -> None:
        super().__init__()
        # float64: 1 - |lambda|^2 cancels near the unit circle.
        squared = torch.empty(d_state, dtype=torch.float64).uniform_(r_min**2, r_max**2)
        # The smallest phase keeps the logarithm finite.
        phase = torch.empty(d_state, dtype=torch.float64).uniform_(0.0, max_phase).clamp_min(1e-4)
        self.nu = nn.Parameter(torch.log(-0.5 * squared.log()).float())
        self.theta = nn.Parameter(phase.log().float())
        self.log_gamma = nn.Parameter((0.5 * torch.log1p(-squared)).float())

    def eigenvalues(self) -> Tensor:
        """`lambda` as pairs (real, imaginary), `[N, 2]`."""
        radius, phase = torch.exp(-torch.exp(self.nu)), torch.exp(self.theta)
        return torch.stack((radius * torch.cos(phase), radius * torch.sin(phase)), dim=-1)

    def gains(self) -> Tensor:
        """`gamma`, `[N, 1]`."""
        return torch.exp(self.log_gamma).unsqueeze(-1)


class LRUMixer(RecurrentMixer):
    """`a * sigmoid(W_g a)` with `a = act(Re(C h) + D x)` and `h <- lambda h + gamma B x`, complex.

    Args:
        d_model: width `D`.
        d_state: complex states `N`.
        activation: name.
        r_min: see `LRUParameters`.
        r_max: see `LRUParameters`.
        max_phase: see `LRUParameters`.

    Source: Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks for Long Sequences"; the gated output is
    that of Smith et al. (2023), "Simplified State Space Layers for Sequence Modeling".
    """

    def __init__(
        self, d_model: int, d_state: int, *, activation: str, r_min: float, r_max: float, max_phase: float
    ) -> None:
        super().__init__()
        self.d_state = d_state
        self.recurrence = LRUParameters(d_state, r_min=r_min, r_max=r_max, max_phase=max_phase)
        # Rows and columns in pairs (real, imaginary); the sign of the imaginary part of C is part of its weight.
        self.B = nn.Linear(d_model, 2 * d_state, bias=False)
        self.C = nn.Linear(2 * d_state, d_model, bias=False)
        self.D = nn.Parameter(torch.randn(d_model))
        self.activation = make_activation(activation)
        self.gate = nn.Linear(d_model, d_model)
        nn.init.normal_(self.B.weight, std=(2.0 * d_model) ** -0.5)
        nn.init.normal_(self.C.weight, std=d_state**-0.5)

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `RecurrentMixer.memory_shapes`: the states, as pairs (real, imaginary)."""
        return {"h": (self.d_state, 2)}

    def forward(
        self, x: Tensor, memory: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `RecurrentMixer.forward`."""
        drive = self._drive(x)
        before = None if memory is None else memory["h"].to(drive.dtype)
        h, last = linear_scan(self.recurrence.eigenvalues(), drive, initial_state=before, reset=reset, pairs=True)
        return self._read(h, x), {"h": last}

    def step(self, x: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
        """See `RecurrentMixer.step`."""
        state = memory["h"]
        drive = self._drive(x).to(state.dtype)
        h = linear_scan_step(self.recurrence.eigenvalues().to(state.dtype), drive, state, pairs=True)
        return self._read(h, x)

    def _drive(self, x: Tensor) -> Tensor:
        return self.B(x).unflatten(-1, (self.d_state, 2)) * self.recurrence.gains()

    def _read(self, h: Tensor, x: Tensor) -> Tensor:
        out = self.activation(self.C(h.flatten(-2).to(x.dtype)) + self.D * x)
        return out * torch.sigmoid(self.gate(out))
