"""Every backbone against the contract, and broken backbones that must fail it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amago_nets.testing import check_backbone
from amago_nets.traj_encoders import FFConfig, GRUConfig, GRUTrajEncoder, State, TrajEncoder, TransformerConfig

SMALL = {"d_model": 16, "n_heads": 2, "d_ff": 24, "n_layers": 2, "dropout_ff": 0.0, "dropout_emb": 0.0}


def transformer(**options) -> TransformerConfig:
    return TransformerConfig(**{**SMALL, "max_time_idx": 64, **options})


BACKBONES = {
    "ff": (FFConfig(d_model=16, n_layers=2), {}),
    "gru": (GRUConfig(d_hidden=16, d_output=12), {}),
    "gru_one_layer": (GRUConfig(d_hidden=8, n_layers=1, d_output=12, norm="none"), {}),
    **{
        f"transformer_{positions}_{'sigma' if sigma else 'plain'}": (
            transformer(positions=positions, sigma_reparam=sigma, normformer_norms=sigma, head_scaling=sigma),
            {"time_offset": "invariant" if positions == "rotary" else "sensitive"},
        )
        for positions in ("fixed", "learnable", "rotary")
        for sigma in (True, False)
    },
    "transformer_reference": (transformer(attention_backend="reference"), {}),
    "transformer_rmsnorm_gelu": (transformer(norm="rmsnorm", activation="gelu", n_layers=1), {}),
}
DROPOUTS = {
    "ff": FFConfig(d_model=16, dropout=0.3),
    "transformer_ff": transformer(dropout_ff=0.3),
    "transformer_emb": transformer(dropout_emb=0.3),
    "transformer_attn": transformer(dropout_attn=0.3),
    "transformer_qkv": transformer(dropout_qkv=0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(name, dtype):
    config, options = BACKBONES[name]
    check_backbone(config.build, dtype=dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_on_the_gpu(name):
    config, options = BACKBONES[name]
    with torch.backends.cudnn.flags(allow_tf32=False):
        check_backbone(config.build, device="cuda", tolerance=1e-4, **options)


@pytest.mark.parametrize("max_seq_len", [1, 2, 40])
@pytest.mark.parametrize("name", ["gru", "transformer_fixed_sigma", "transformer_rotary_plain"])
def test_other_context_lengths(name, max_seq_len):
    check_backbone(BACKBONES[name][0].build, max_seq_len=max_seq_len, length=19, lanes=3)


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout(name):
    check_backbone(DROPOUTS[name].build, dropout=True)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    check_backbone(FFConfig(d_model=8).build)
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
    Moves: "P10",
    Grows: "P10",
    SnapshotsAreViews: "P10",
    WrongWidth: "P1",
}


@pytest.mark.parametrize("backbone", FAULTS)
def test_a_broken_backbone_fails(backbone):
    with pytest.raises(AssertionError, match=rf"^{FAULTS[backbone]} "):
        check_backbone(backbone)


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
        check_backbone(config.build, **wrong)


def test_arguments_are_checked():
    build = FFConfig(d_model=8).build
    with pytest.raises(ValueError, match="lanes=2"):
        check_backbone(build, lanes=2)
    with pytest.raises(ValueError, match="time_offset='some'"):
        check_backbone(build, time_offset="some")
    with pytest.raises(ValueError, match="length=3"):
        check_backbone(build, length=3)
    assert issubclass(Broken, TrajEncoder)
