"""Backbones beyond the contract: parameter counts, numbers by hand, configs, states, errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

from amago_nets.registry import lookup
from amago_nets.traj_encoders import FFConfig, GRUConfig, TrajEncoderConfig, TransformerConfig

PLAIN = {"sigma_reparam": False, "normformer_norms": False, "head_scaling": False}
COUNTS = [
    (TransformerConfig(), 256, 2_440_996, 2_440_996),
    (TransformerConfig(sigma_reparam=False), 256, 2_440_984, 2_440_984),
    (TransformerConfig(**PLAIN), 256, 2_433_304, 2_433_280),
    (TransformerConfig(d_model=128, n_layers=2, d_ff=512), 64, 406_936, 406_936),
    (TransformerConfig(d_model=320, n_layers=3, d_ff=1280), 256, 3_788_516, 3_788_516),
    (TransformerConfig(positions="rotary"), 256, 2_440_996, 2_440_996),
    (TransformerConfig(positions="learnable", max_time_idx=10), 256, 2_440_996 + 2560, 2_440_996 + 2560),
    (FFConfig(), 256, 657_664, 657_664),
    (FFConfig(n_layers=3), 256, 1_708_800, 1_708_800),
    (GRUConfig(), 256, 855_808, 855_808),
]
SMALL = {
    "ff": FFConfig(d_model=8),
    "gru": GRUConfig(d_hidden=8, d_output=8),
    "transformer": TransformerConfig(d_model=8, n_heads=2, n_layers=2),
}


@pytest.mark.parametrize(("config", "in_dim", "total", "trained"), COUNTS)
def test_parameter_counts(config, in_dim, total, trained):
    model = config.build(in_dim, 16)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert model.out_dim == (config.d_output if isinstance(config, GRUConfig) else config.d_model)


@pytest.mark.parametrize("name", SMALL)
def test_configs(name):
    config = SMALL[name]
    assert isinstance(config, TrajEncoderConfig)
    assert lookup("traj_encoder", name) is type(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layers = 3
    with pytest.raises(TypeError):
        type(config)(8)
    with pytest.raises(ValueError, match="in_dim=0"):
        config.build(0, 4)
    with pytest.raises(ValueError, match="max_seq_len=0"):
        config.build(3, 0)


BAD_CONFIGS = {
    "d_model=10 is not allowed with n_heads=4": (TransformerConfig, {"d_model": 10, "n_heads": 4}),
    "d_model=9 is not allowed with positions='fixed'": (TransformerConfig, {"d_model": 9, "n_heads": 3}),
    "even d_model / n_heads": (TransformerConfig, {"d_model": 9, "n_heads": 3, "positions": "rotary"}),
    "max_time_idx=None": (TransformerConfig, {"positions": "learnable"}),
    "positions='learned'": (TransformerConfig, {"positions": "learned"}),
    "norm='batch'": (TransformerConfig, {"norm": "batch"}),
    "attention_backend='fast'": (TransformerConfig, {"attention_backend": "fast"}),
    "activation='tanh'": (TransformerConfig, {"activation": "tanh"}),
    "dropout_qkv=1.0": (TransformerConfig, {"dropout_qkv": 1.0}),
    "d_ff=0": (TransformerConfig, {"d_ff": 0}),
    "head_scaling=1": (TransformerConfig, {"head_scaling": 1}),
    "n_layers=0": (GRUConfig, {"n_layers": 0}),
    "d_hidden=-1": (GRUConfig, {"d_hidden": -1}),
    "norm='group'": (GRUConfig, {"norm": "group"}),
    "dropout=2": (FFConfig, {"dropout": 2}),
    "out_norm='x'": (FFConfig, {"out_norm": "x"}),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs_are_refused_at_once(message):
    config, options = BAD_CONFIGS[message]
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_an_attention_backend_that_cannot_serve_is_refused():
    model = TransformerConfig(d_model=8, n_heads=2, n_layers=1, attention_backend="triton").build(3, 4)
    with pytest.raises(ValueError, match="backend='triton' cannot serve"):
        model(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64))


def test_gru_by_hand():
    model = GRUConfig(d_hidden=1, n_layers=1, d_output=1, norm="none").build(1, 4).eval()
    with torch.no_grad():
        for name, value in (("weight_ih", 1.0), ("weight_hh", 0.5), ("bias_ih", 0.0), ("bias_hh", 0.0)):
            getattr(model.gru, f"{name}_l0").fill_(value)
        model.gru.bias_hh_l0[2] = 0.1
        model.output.weight.fill_(1.0)
        model.output.bias.zero_()
    x = torch.tensor([[[1.0], [-1.0]]])
    out, _ = model(x, torch.arange(2)[None])
    torch.testing.assert_close(out.flatten(), torch.tensor([0.2126327, -0.4600436]))


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_exact(name):
    """Every parameter, against finite differences, with a reset inside the window."""
    torch.manual_seed(0)
    model = SMALL[name].build(3, 4).double().eval()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[1, 3] = True
    time_idx = torch.arange(6).expand(2, 6)

    def loss():
        weights = torch.arange(1.0, 9.0, dtype=torch.float64)
        return (model(x, time_idx, reset)[0].square() * weights).mean()

    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss(), list(parameters.values()))
    for (which, parameter), grad in zip(parameters.items(), grads, strict=True):
        flat = parameter.data.view(-1)
        index = int(torch.randint(flat.numel(), ()))
        kept, sides = float(flat[index]), []
        for moved in (kept + 1e-6, kept - 1e-6):
            flat[index] = moved
            with torch.no_grad():
                sides.append(float(loss()))
        flat[index] = kept
        assert float(grad.flatten()[index]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-7), which


def test_beyond_the_context_older_keys_are_carried():
    """With two layers a banded window is not the same as encoding the last timesteps alone; with one layer it is."""
    torch.manual_seed(0)
    x, time_idx = torch.randn(1, 12, 3), torch.arange(12)[None]
    for layers, same in ((1, True), (2, False)):
        model = TransformerConfig(d_model=8, n_heads=2, n_layers=layers).build(3, 4).eval()
        whole = model(x, time_idx)[0][:, -1]
        last = model(x[:, -4:], time_idx[:, -4:])[0][:, -1]
        assert torch.allclose(whole, last, atol=1e-5) is same


def test_ring_slots_are_as_many_as_max_seq_len():
    model = SMALL["transformer"].build(3, 5).eval()
    state = model.initial_state(2)
    assert state["keys"].shape == (2, 2, 2, 5, 4)
    x, time_idx = torch.randn(2, 9, 3), torch.arange(9).expand(2, 9)
    for t in range(9):
        model.step(x[:, t], time_idx[:, t], state)
    assert state["length"].tolist() == [9, 9]
    state["keys"].fill_(float("nan"))
    state["values"].fill_(float("nan"))
    model.reset_state(state, torch.tensor([True, False]))
    out = model.step(x[:, 0], time_idx[:, 0], state)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_poisoned_memory_never_leaks_into_a_prefill():
    model = SMALL["transformer"].build(3, 5).eval()
    state = model.initial_state(2)
    state["keys"].fill_(float("nan"))
    state["values"].fill_(float("inf"))
    x, time_idx = torch.randn(2, 7, 3), torch.arange(7).expand(2, 7)
    out, _ = model(x, time_idx, None, state)
    torch.testing.assert_close(out, model(x, time_idx)[0])
    assert state["keys"].isfinite().all() and state["values"].isfinite().all()


def test_a_reset_forgets_nan_in_memory_before_a_window():
    model = SMALL["transformer"].build(3, 5).eval()
    state, x, time_idx = model.initial_state(2), torch.randn(2, 7, 3), torch.arange(7).expand(2, 7)
    model.step(torch.full((2, 3), float("nan")), time_idx[:, 0], state)
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[:, 0] = True
    out, _ = model(x, time_idx, reset, state)
    torch.testing.assert_close(out, model(x, time_idx)[0])
    assert state["keys"].isfinite().all() and state["values"].isfinite().all()


@pytest.mark.parametrize("positions", ["fixed", "learnable"])
def test_no_lanes(positions):
    model = dataclasses.replace(SMALL["transformer"], positions=positions, max_time_idx=9).build(3, 5).eval()
    state, x, time_idx = model.initial_state(0), torch.zeros(0, 7, 3), torch.zeros(0, 7, dtype=torch.int64)
    assert model(x, time_idx)[0].shape == model(x, time_idx, None, state)[0].shape == (0, 7, 8)
    assert model.step(x[:, 0], time_idx[:, 0], state).shape == (0, 8)


@pytest.mark.parametrize("name", SMALL)
def test_copies_of_a_state_go_on_alike(name):
    """Copies made by Python: all that is in them still belongs together."""
    model = SMALL[name].build(3, 4).eval()
    state, x, time_idx = model.initial_state(2), torch.randn(2, 9, 3), torch.arange(9).expand(2, 9)
    model(x[:, :6], time_idx[:, :6], None, state)
    copies = [copy.deepcopy(state), pickle.loads(pickle.dumps(state))]
    expected = model.step(x[:, 6], time_idx[:, 6], state)
    for other in copies:
        assert torch.equal(model.step(x[:, 6], time_idx[:, 6], other), expected)
        for key, value in state.state_dict().items():
            assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["gru", "transformer"])
def test_training_from_a_given_state(name):
    """Gradients reach the window and the weights, none reaches the state, and the state holds no graph."""
    model = SMALL[name].build(3, 4)
    state = model.initial_state(2)
    x, time_idx = torch.randn(2, 6, 3, requires_grad=True), torch.arange(6).expand(2, 6)
    model(x.detach()[:, :2], time_idx[:, :2], None, state)
    out, _ = model(x, time_idx, None, state)
    out.square().sum().backward()
    assert x.grad is not None and bool(x.grad[:, 0].any())
    assert not any(tensor.requires_grad for tensor in state.tensors.values())


@pytest.mark.parametrize("name", SMALL)
def test_state_keeps_its_device_dtype_and_lanes(name):
    model = SMALL[name].build(3, 4).eval()
    state = model.initial_state(3, device="cpu", dtype=torch.float64)
    assert state.lanes == 3
    assert all(t.dtype in (torch.float64, torch.int64) for t in state.tensors.values())
    with torch.inference_mode():
        made_inside = model.initial_state(2)
        model.step(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), made_inside)
    model.step(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), made_inside)
    picked = made_inside.select(torch.tensor([1, 1, 0]))
    assert picked.lanes == 3
    model.step(torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64), picked)


@pytest.mark.parametrize("name", SMALL)
def test_wrong_shapes_are_refused(name):
    model = SMALL[name].build(3, 4)
    state = model.initial_state(2)
    x, time_idx = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"give \[B, L, 3\]"):
        model(x[..., :2], time_idx)
    with pytest.raises(ValueError, match="L=0"):
        model(x[:, :0], time_idx[:, :0])
    with pytest.raises(ValueError, match="time_idx has shape"):
        model(x, time_idx[..., None])
    with pytest.raises(ValueError, match="reset is torch.int64"):
        model(x, time_idx, time_idx)
    with pytest.raises(ValueError, match="state has 2 lanes"):
        model(x[:1], time_idx[:1], None, state)
    with pytest.raises(ValueError, match="x .* and time_idx"):
        model.step(x[:1, 0], time_idx[:1, 0], state)
    with pytest.raises(ValueError, match="lanes is torch.int64"):
        model.reset_state(state, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="state_dict has the entries"):
        state.load_state_dict({"other": x})


def test_a_state_of_other_size_is_refused():
    for name in ("gru", "transformer"):
        model = SMALL[name].build(3, 4)
        with pytest.raises(ValueError, match="has shape"):
            model.initial_state(2).load_state_dict(model.initial_state(3).state_dict())
    with pytest.raises(ValueError, match="state is a State"):
        SMALL["transformer"].build(3, 4)(
            torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64), None, SMALL["ff"].build(3, 4).initial_state(2)
        )


@pytest.mark.parametrize("name", SMALL)
def test_a_run_continues_bit_for_bit_from_a_snapshot(name):
    """Across the first wrap of the ring, where the number of slots looked at changes."""
    model = SMALL[name].build(3, 6).eval()
    x = torch.randn(2, 14, 3)
    state, outputs, snapshot = model.initial_state(2), [], None
    for t in range(14):
        if t == 4:
            snapshot = {key: value.clone() for key, value in state.state_dict().items()}
        outputs.append(model.step(x[:, t], torch.full((2,), t), state))
    restored = model.initial_state(2)
    restored.load_state_dict(snapshot)
    for t in range(4, 14):
        assert torch.equal(model.step(x[:, t], torch.full((2,), t), restored), outputs[t])


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16(name):
    model = SMALL[name].build(3, 6).eval()
    half = SMALL[name].build(3, 6).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    x, time_idx = torch.randn(2, 9, 3), torch.arange(9).expand(2, 9)
    with torch.no_grad():
        expected = model(x, time_idx)[0]
        out = half(x.bfloat16(), time_idx)[0]
        state = half.initial_state(2)
        steps = torch.stack([half.step(x[:, t].bfloat16(), time_idx[:, t], state) for t in range(9)], dim=1)
    assert out.dtype == steps.dtype == torch.bfloat16
    assert float((out.detach().float() - expected.detach()).norm() / expected.detach().norm()) < 0.05
    assert float((steps.float() - expected.detach()).norm() / expected.detach().norm()) < 0.05


@pytest.mark.parametrize("name", SMALL)
def test_autocast(name):
    model = SMALL[name].build(3, 6)
    x, time_idx = torch.randn(2, 9, 3), torch.arange(9).expand(2, 9)
    expected = model.eval()(x, time_idx)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, time_idx)[0]
        state = model.initial_state(2)
        steps = torch.stack([model.step(x[:, t], time_idx[:, t], state) for t in range(9)], dim=1)
    assert float((out.detach().float() - expected.detach()).norm() / expected.detach().norm()) < 0.05
    assert float((steps.float() - expected.detach()).norm() / expected.detach().norm()) < 0.05
    out.float().square().sum().backward()
