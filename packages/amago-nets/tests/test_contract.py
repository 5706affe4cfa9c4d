"""Every backbone against the contract, and broken backbones that must fail it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amago_nets.testing import check_backbone
from amago_nets.traj_encoders import (
    FFConfig,
    FFTrajEncoder,
    GRUConfig,
    GRUTrajEncoder,
    IdentityConfig,
    LRUConfig,
    LSTMConfig,
    MambaConfig,
    MinGRUConfig,
    State,
    TrajEncoder,
    TransformerConfig,
)

SMALL = {"d_model": 16, "n_heads": 2, "d_ff": 24, "n_layers": 2, "dropout_ff": 0.0, "dropout_emb": 0.0}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def transformer(**options) -> TransformerConfig:
    return TransformerConfig(**{**SMALL, "max_time_idx": 64, **options})


BACKBONES = {
    "identity": (IdentityConfig(), {"memory": False}),
    "ff": (FFConfig(d_model=16, n_layers=2), {"memory": False}),
    "gru": (GRUConfig(d_hidden=16, d_output=12), {}),
    "gru_one_layer": (GRUConfig(d_hidden=8, n_layers=1, d_output=12, norm="none"), {}),
    "lstm": (LSTMConfig(d_hidden=16, d_output=12), {}),
    "lstm_one_layer": (LSTMConfig(d_hidden=8, n_layers=1, d_output=12, norm="none"), {}),
    "mamba": (MambaConfig(d_model=16, d_state=4, n_layers=2), {}),
    "mamba_odd_sizes": (MambaConfig(d_model=10, d_state=3, d_conv=2, expand=1, n_layers=1, norm="rmsnorm"), {}),
    "min_gru": (MinGRUConfig(d_model=16, n_layers=2), {}),
    "lru": (LRUConfig(d_model=16, n_layers=2), {}),
    "lru_odd_sizes": (LRUConfig(d_model=9, d_state=5, n_layers=1), {}),
    **{
        f"transformer_{positions}_{'sigma' if sigma else 'plain'}": (
            transformer(positions=positions, sigma_reparam=sigma, normformer_norms=sigma, head_scaling=sigma),
            {"time_offset": "invariant" if positions == "rotary" else "sensitive"},
        )
        for positions in ("fixed", "learnable", "rotary")
        for sigma in (True, False)
    },
    "transformer_reference": (transformer(attention_backend="reference"), {}),
    "transformer_window": (transformer(window=2), {}),
    "transformer_sink": (transformer(window=3, sink=2), {}),
    "transformer_sink_bias": (transformer(window=2, sink=1, sink_bias=1.5, positions="rotary"), {}),
    "transformer_sink_in_a_full_window": (transformer(sink=2, sink_bias=-1.0), {}),
    "transformer_logit_clip": (transformer(logit_clip=0.5), {}),
    "transformer_everything": (transformer(window=3, sink=1, sink_bias=0.5, logit_clip=0.5, positions="rotary"), {}),
    "transformer_rmsnorm_gelu": (transformer(norm="rmsnorm", activation="gelu", n_layers=1), {}),
}
DROPOUTS = {
    "ff": (FFConfig(d_model=16, dropout=0.3), {"memory": False}),
    "min_gru": (MinGRUConfig(d_model=16, n_layers=2, dropout=0.3), {}),
    "lru": (LRUConfig(d_model=16, n_layers=2, dropout=0.3), {}),
    "transformer_ff": (transformer(dropout_ff=0.3), {}),
    "transformer_emb": (transformer(dropout_emb=0.3), {}),
    "transformer_attn": (transformer(dropout_attn=0.3), {}),
    "transformer_qkv": (transformer(dropout_qkv=0.3), {}),
}
COMPILED = {
    "identity": (IdentityConfig(), {"memory": False}),
    "ff": (FFConfig(d_model=4), {"memory": False}),
    "gru": (GRUConfig(d_hidden=4, n_layers=1, d_output=4), {}),
    "lstm": (LSTMConfig(d_hidden=4, n_layers=1, d_output=4), {}),
    "mamba": (MambaConfig(d_model=4, d_state=2, n_layers=1), {}),
    "min_gru": (MinGRUConfig(d_model=4, n_layers=1), {}),
    "lru": (LRUConfig(d_model=4, n_layers=1), {}),
    "transformer": (transformer(d_model=4, n_layers=1, d_ff=8), {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(name, dtype):
    config, options = BACKBONES[name]
    check_backbone(config.build, dtype=dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_on_the_gpu(name, dtype):
    config, options = BACKBONES[name]
    tolerance = 1e-4 if dtype == torch.float32 else None
    with torch.backends.cudnn.flags(allow_tf32=False):
        check_backbone(config.build, device="cuda", dtype=dtype, tolerance=tolerance, **options)


@pytest.mark.parametrize("max_seq_len", [1, 2, 40])
@pytest.mark.parametrize(
    "name", ["gru", "lstm", "mamba", "min_gru", "lru", "transformer_fixed_sigma", "transformer_rotary_plain"]
)
def test_other_context_lengths(name, max_seq_len):
    check_backbone(BACKBONES[name][0].build, max_seq_len=max_seq_len, length=19, lanes=3)


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout(name):
    config, options = DROPOUTS[name]
    check_backbone(config.build, dropout=True, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training(name):
    config, options = COMPILED[name]
    check_backbone(config.build, in_dim=3, max_seq_len=3, length=6, lanes=3, compile=True, **options)


@pytest.mark.parametrize("name", BACKBONES)
def test_recurrent_memory_is_never_narrow(name):
    module = BACKBONES[name][0].build(6, 7)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        floats = {k: v for k, v in module.to(dtype).initial_state(3).tensors.items() if v.is_floating_point()}
        for key, value in floats.items():
            wide = dtype if key in ("keys", "values") else torch.promote_types(dtype, torch.float32)
            assert value.dtype == wide, key


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    check_backbone(FFConfig(d_model=8).build, memory=False)
    assert torch.equal(torch.rand(1), expected)


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


@pytest.mark.parametrize("backbone", FAULTS)
def test_a_broken_backbone_fails(backbone):
    with pytest.raises(AssertionError, match=rf"^{FAULTS[backbone]} "):
        check_backbone(backbone)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backbone", "memory"), [(BreaksTheGraph, True), (ComputesSomethingElseCompiled, False)])
def test_a_backbone_that_does_not_compile_fails(backbone, memory):
    with pytest.raises(AssertionError, match="^P14 "):
        check_backbone(backbone, in_dim=3, max_seq_len=3, length=6, lanes=3, memory=memory, compile=True)


@pytest.mark.parametrize("backbone", [backbone for backbone in FAULTS if backbone not in SUBTLE])
def test_a_broken_backbone_fails_in_bfloat16(backbone):
    with pytest.raises(AssertionError, match=rf"^{FAULTS[backbone]} "):
        check_backbone(backbone, dtype=torch.bfloat16)


def test_a_wrong_claim_about_memory_fails():
    with pytest.raises(AssertionError, match="^P11"):
        check_backbone(FFConfig(d_model=8).build)
    with pytest.raises(AssertionError, match="^P11"):
        check_backbone(GRUConfig(d_hidden=8, d_output=8).build, memory=False)


def test_a_state_that_cannot_select_fails():
    with pytest.raises((AssertionError, ValueError)):
        check_backbone(SelectsNothing)


@pytest.mark.parametrize(("claim", "positions"), [("sensitive", "rotary"), ("invariant", "fixed")])
def test_a_wrong_claim_about_time_fails(claim, positions):
    with pytest.raises(AssertionError, match="^P9"):
        check_backbone(transformer(positions=positions).build, time_offset=claim)


@pytest.mark.parametrize("wrong", [{"dropout": True}, {}])
def test_a_wrong_claim_about_dropout_fails(wrong):
    config = FFConfig(d_model=8, dropout=0.0 if wrong else 0.5)
    with pytest.raises(AssertionError, match="^P8"):
        check_backbone(config.build, memory=False, **wrong)


def test_arguments_are_checked():
    build = FFConfig(d_model=8).build
    with pytest.raises(ValueError, match="lanes=2"):
        check_backbone(build, lanes=2)
    with pytest.raises(ValueError, match="time_offset='some'"):
        check_backbone(build, time_offset="some")
    with pytest.raises(ValueError, match="length=3"):
        check_backbone(build, length=3)
    with pytest.raises(ValueError, match="dtype=torch.float16"):
        check_backbone(build, dtype=torch.float16)
    with pytest.raises(ValueError, match="compile=True"):
        check_backbone(build, dropout=True, compile=True)
    assert issubclass(Broken, TrajEncoder)
