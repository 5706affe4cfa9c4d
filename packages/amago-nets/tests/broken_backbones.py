"""Backbones that break one promise each, and the property of the contract that must notice."""

from __future__ import annotations

import torch
from torch import nn

from amago_nets.traj_encoders import (
    FFConfig,
    FFTrajEncoder,
    GRUConfig,
    GRUTrajEncoder,
    State,
)


class Broken(GRUTrajEncoder):
    """A GRU to be spoiled."""

    def __init__(self, in_dim: int, max_seq_len: int) -> None:
        super().__init__(GRUConfig(d_hidden=8, d_output=8, n_layers=1), in_dim, max_seq_len)


class IgnoresResetsInWindows(Broken):
    def forward(self, x, time_idx, reset=None, state=None):
        return super().forward(x, time_idx, None, state)


class IgnoresResetsInSteps(Broken):
    def reset_state(self, state, lanes):
        pass


class ResetLeavesNaN(Broken):
    def reset_state(self, state, lanes):
        state["hidden"].mul_(~lanes[None, :, None])


class SeesTheFuture(Broken):
    def forward(self, x, time_idx, reset=None, state=None):
        y, state = super().forward(x, time_idx, reset, state)
        return y + 1e-7 * y[:, -1:], state


class MixesLanes(Broken):
    def step(self, x, time_idx, state):
        return super().step(x + 1e-7 * x.mean(0), time_idx, state)


class MixesRows(Broken):
    def forward(self, x, time_idx, reset=None, state=None):
        return super().forward(x + 1e-7 * x.mean(0), time_idx, reset, state)


class ForgetsEarly(Broken):
    """Restarts every `max_seq_len` timesteps in windows."""

    def forward(self, x, time_idx, reset=None, state=None):
        restart = (time_idx % self.max_seq_len == 0) & (time_idx > 0)
        return super().forward(x, time_idx, restart if reset is None else reset | restart, state)


class IgnoresTheStateGiven(Broken):
    def forward(self, x, time_idx, reset=None, state=None):
        return super().forward(x, time_idx, reset)[0], state


class ReturnsAnotherState(Broken):
    def forward(self, x, time_idx, reset=None, state=None):
        y, state = super().forward(x, time_idx, reset, state)
        return y, None if state is None else state.select(torch.arange(state.lanes))


class CountsInEvaluation(Broken):
    def __init__(self, in_dim, max_seq_len):
        super().__init__(in_dim, max_seq_len)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, time_idx, reset=None, state=None):
        self.calls += 1
        return super().forward(x, time_idx, reset, state)


class AlwaysDrops(Broken):
    def forward(self, x, time_idx, reset=None, state=None):
        y, state = super().forward(x, time_idx, reset, state)
        return nn.functional.dropout(y, 0.1), state


class NormalisesOverTime(Broken):
    """Statistics of the whole window in the gradient only: outputs stay right."""

    def forward(self, x, time_idx, reset=None, state=None):
        y, state = super().forward(x, time_idx, reset, state)
        return y + (0.1 * y.mean(1, keepdim=True) - 0.1 * y.mean(1, keepdim=True).detach()), state


class LearnsFromPadding(Broken):
    """Right outputs and gradients of inputs, but the weights hear from every timestep."""

    def forward(self, x, time_idx, reset=None, state=None):
        y, state = super().forward(x, time_idx, reset, state)
        mean = self.output.weight.sum() * x.detach().sum()
        return y + (mean - mean.detach()), state


class Moves(Broken):
    def step(self, x, time_idx, state):
        y = super().step(x, time_idx, state)
        state._tensors["hidden"] = state["hidden"].clone()
        return y


class Grows(Broken):
    def step(self, x, time_idx, state):
        y = super().step(x, time_idx, state)
        seen = state.tensors.get("seen", x[:, :0])
        state._tensors["seen"], state._lane_axis["seen"] = torch.cat([seen, x[:, :1]], dim=1), 0
        return y


class SharedMemory(State):
    def select(self, indices):
        return self


class SelectsNothing(Broken):
    def initial_state(self, lanes, device=None, dtype=None):
        state = super().initial_state(lanes, device, dtype)
        return SharedMemory(lanes, state.tensors, {"hidden": 1})


class LiveSnapshot(State):
    def state_dict(self):
        return self.tensors


class SnapshotsAreViews(Broken):
    def initial_state(self, lanes, device=None, dtype=None):
        state = super().initial_state(lanes, device, dtype)
        return LiveSnapshot(lanes, state.tensors, {"hidden": 1})


class MovesInForward(Broken):
    def forward(self, x, time_idx, reset=None, state=None):
        y, state = super().forward(x, time_idx, reset, state)
        if state is not None:
            state._tensors["hidden"] = state["hidden"].clone()
        return y, state


class MovesOnReset(Broken):
    def reset_state(self, state, lanes):
        state._tensors["hidden"] = torch.where(lanes[None, :, None], 0.0, state["hidden"])


class LoadsByReference(State):
    def load_state_dict(self, state_dict):
        self._tensors.update({name: value.clone() for name, value in state_dict.items()})


class MovesOnLoad(Broken):
    def initial_state(self, lanes, device=None, dtype=None):
        state = super().initial_state(lanes, device, dtype)
        return LoadsByReference(lanes, state.tensors, {"hidden": 1})


class KeepsGradientsInTheState(Broken):
    def forward(self, x, time_idx, reset=None, state=None):
        y, state = super().forward(x, time_idx, reset, state)
        if state is not None and torch.is_grad_enabled():
            state["hidden"].add_(0.0 * y.sum())
        return y, state


class StopsGradients(Broken):
    """Right outputs, but what flows back stops every four timesteps."""

    def forward(self, x, time_idx, reset=None, state=None):
        if state is not None:
            return super().forward(x, time_idx, reset, state)
        resets = [None] if reset is None else reset.split(4, dim=1)
        memory = self.initial_state(x.shape[0])
        parts = []
        for i, (piece, times) in enumerate(zip(x.split(4, dim=1), time_idx.split(4, dim=1), strict=True)):
            here = None if reset is None else resets[i]
            parts.append(super().forward(piece, times, here, memory)[0])
        return torch.cat(parts, dim=1), None


class StateWithoutGradients(Broken):
    """Gradients only without a state."""

    def forward(self, x, time_idx, reset=None, state=None):
        y, state = super().forward(x, time_idx, reset, state)
        return y if state is None else y.detach() + 0.0 * y, state


class ForgetsEverything(Broken):
    """No memory at all."""

    def forward(self, x, time_idx, reset=None, state=None):
        y, state = super().forward(x, time_idx, torch.ones_like(time_idx, dtype=torch.bool), state)
        return y, state

    def step(self, x, time_idx, state):
        state["hidden"].zero_()
        return super().step(x, time_idx, state)


class HidesWeights(Broken):
    """Random numbers that `state_dict` does not know of."""

    def __init__(self, in_dim, max_seq_len):
        super().__init__(in_dim, max_seq_len)
        self.scale = float(1 + torch.rand(()))

    def forward(self, x, time_idx, reset=None, state=None):
        return super().forward(self.scale * x, time_idx, reset, state)

    def step(self, x, time_idx, state):
        return super().step(self.scale * x, time_idx, state)


class OtherNamesEveryTime(Broken):
    def __init__(self, in_dim, max_seq_len):
        super().__init__(in_dim, max_seq_len)
        self.register_buffer(f"run_{int(torch.randint(10**6, ()))}", torch.zeros(()))


class TakesWideInputs(Broken):
    def forward(self, x, time_idx, reset=None, state=None):
        return super().forward(x[..., : self.in_dim], time_idx, reset, state)


class TakesAnyLanes(Broken):
    def reset_state(self, state, lanes):
        state["hidden"][:, : len(lanes)].masked_fill_(lanes[None, :, None], 0.0)


class RaisesSomethingElse(Broken):
    def reset_state(self, state, lanes):
        if len(lanes) != state.lanes:
            raise IndexError(f"{len(lanes)} lanes")
        super().reset_state(state, lanes)


class WritesBeforeItLooks(Broken):
    def step(self, x, time_idx, state):
        if x.shape[-1] != self.in_dim:
            state["hidden"].zero_()
        return super().step(x, time_idx, state)


class WrongWidth(Broken):
    def __init__(self, in_dim, max_seq_len):
        super().__init__(in_dim, max_seq_len)
        self.out_dim = 9


FAULTS = {
    IgnoresResetsInWindows: "P1",
    IgnoresResetsInSteps: "P1",
    ResetLeavesNaN: "P3",
    SeesTheFuture: "P2",
    MixesLanes: "P4",
    MixesRows: "P4",
    ForgetsEarly: "P6",
    IgnoresTheStateGiven: "P1",
    ReturnsAnotherState: "P1",
    CountsInEvaluation: "P7",
    AlwaysDrops: "P1",
    NormalisesOverTime: "P3",
    LearnsFromPadding: "P5",
    Moves: "P10",
    MovesInForward: "P10",
    MovesOnReset: "P10",
    MovesOnLoad: "P10",
    KeepsGradientsInTheState: "P10",
    Grows: "P10",
    SnapshotsAreViews: "P10",
    WrongWidth: "P1",
    StopsGradients: "P11",
    StateWithoutGradients: "P11",
    ForgetsEverything: "P11",
    HidesWeights: "P12",
    OtherNamesEveryTime: "P12",
    TakesWideInputs: "P13",
    TakesAnyLanes: "P13",
    RaisesSomethingElse: "P13",
    WritesBeforeItLooks: "P13",
}
# Spoiled by so little that the rounding of bfloat16 hides it.
SUBTLE = {SeesTheFuture, NormalisesOverTime, LearnsFromPadding, MixesLanes, MixesRows}


class BreaksTheGraph(Broken):
    def forward(self, x, time_idx, reset=None, state=None):
        if bool(x.sum() > 0):
            x = x + 0.0
        return super().forward(x, time_idx, reset, state)


class ComputesSomethingElseCompiled(FFTrajEncoder):
    """Right outputs, wrong gradients, and only when compiled."""

    def __init__(self, in_dim, max_seq_len):
        super().__init__(FFConfig(d_model=4), in_dim, max_seq_len)

    def forward(self, x, time_idx, reset=None, state=None):
        y, state = super().forward(x, time_idx, reset, state)
        return (0.5 * y + 0.5 * y.detach() if torch.compiler.is_compiling() else y), state
