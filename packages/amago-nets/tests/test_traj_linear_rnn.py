"""The minGRU and LRU backbones: the contract, their equations, sizes, initialisation, precision, compilation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from amago_nets.linear_recurrence import LRUMixer, LRUParameters, MinGRUMixer, UpdateGateBias
from amago_nets.registry import lookup
from amago_nets.testing import check_backbone
from amago_nets.traj_encoders import LRUConfig, MinGRUConfig

SMALL = {
    "min_gru": MinGRUConfig(d_model=16, n_layers=2, max_timescale=16.0),
    "lru": LRUConfig(d_model=16, n_layers=2),
}
CONTRACT = {
    **SMALL,
    "min_gru_narrow": MinGRUConfig(d_model=8, expand=1, n_layers=1, norm="none", activation="leaky_relu"),
    "lru_wide": LRUConfig(d_model=8, d_state=11, n_layers=1, norm="rmsnorm", activation="mish", r_min=0.5),
}


def windows(lanes=2, length=9, in_dim=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(lanes, length, in_dim, generator=generator, dtype=torch.float64).to(dtype)
    reset = torch.zeros(lanes, length, dtype=torch.bool)
    reset[0, 4] = reset[1, 2] = reset[1, 3] = reset[1, -1] = True
    return x, torch.arange(length).expand(lanes, length), reset


def gelu(x):
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def slow_min_gru(mixer, x, reset, h):
    """The equations on the weights of a mixer, timestep after timestep."""
    outputs, units = [], mixer.units
    for t in range(x.shape[1]):
        h = h * (~reset[:, t, None]).to(h.dtype)
        z = 1.0 / (1.0 + torch.exp(-(x[:, t] @ mixer.update.weight.T + mixer.update_bias.bias)))
        candidate = x[:, t] @ mixer.candidate.weight[:units].T + mixer.candidate.bias[:units]
        gate = x[:, t] @ mixer.candidate.weight[units:].T + mixer.candidate.bias[units:]
        h = (1.0 - z) * h + z * candidate
        centred = h - h.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        normed = normed * mixer.norm.weight + mixer.norm.bias
        outputs.append((normed * gelu(gate)) @ mixer.output.weight.T + mixer.output.bias)
    return torch.stack(outputs, dim=1), h


def slow_lru(mixer, x, reset, h):
    """The equations in complex numbers on the weights of a mixer, timestep after timestep."""
    ring = mixer.recurrence
    eigenvalues = torch.exp(torch.complex(-torch.exp(ring.nu), torch.exp(ring.theta)))
    gains = torch.exp(ring.log_gamma)
    size, width = mixer.d_state, x.shape[-1]
    b = torch.view_as_complex(mixer.B.weight.view(size, 2, width).transpose(1, 2).contiguous())
    c = torch.view_as_complex(mixer.C.weight.view(width, size, 2)).conj()
    h, outputs = torch.view_as_complex(h), []
    for t in range(x.shape[1]):
        h = torch.where(reset[:, t, None], torch.zeros_like(h), h)
        h = eigenvalues * h + gains * (x[:, t].to(b.dtype) @ b.T)
        out = gelu((h @ c.T).real + mixer.D * x[:, t])
        gate = out @ mixer.gate.weight.T + mixer.gate.bias
        outputs.append(out / (1.0 + torch.exp(-gate)))
    return torch.stack(outputs, dim=1), torch.view_as_real(h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONTRACT)
def test_contract(name, dtype):
    check_backbone(CONTRACT[name].build, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONTRACT)
def test_contract_on_the_gpu(name):
    check_backbone(CONTRACT[name].build, device="cuda", tolerance=1e-4)


@pytest.mark.parametrize("config", [MinGRUConfig(d_model=16, dropout=0.3), LRUConfig(d_model=16, dropout=0.3)])
def test_dropout(config):
    check_backbone(config.build, dropout=True)


@pytest.mark.parametrize("name", SMALL)
def test_equations(name):
    """Outputs, memory and every gradient, from a given memory and with resets."""
    torch.manual_seed(0)
    if name == "min_gru":
        mixer, slow = MinGRUMixer(5, 7, activation="gelu", norm="layer", max_timescale=16.0).double(), slow_min_gru
    else:
        mixer, slow = LRUMixer(5, 7, activation="gelu", r_min=0.5, r_max=0.9, max_phase=3.0).double(), slow_lru
    x, _, reset = windows(in_dim=5, dtype=torch.float64)
    x.requires_grad_()
    h = torch.randn(2, *mixer.memory_shapes()["h"], dtype=torch.float64, requires_grad=True)
    out, memory = mixer(x, {"h": h}, reset)
    expected, last = slow(mixer, x, reset, h)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(memory["h"], last)
    inputs = {"x": x, "h": h, **dict(mixer.named_parameters())}
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum() + memory["h"].square().sum(), list(inputs.values()))
    wanted = torch.autograd.grad((expected * weights).sum() + last.square().sum(), list(inputs.values()))
    for which, grad, reference in zip(inputs, grads, wanted, strict=True):
        assert bool(grad.any()), which
        torch.testing.assert_close(grad, reference, msg=lambda text, which=which: f"{which}: {text}")


@pytest.mark.parametrize(("name", "slow"), [("min_gru", slow_min_gru), ("lru", slow_lru)])
def test_the_stack_is_a_residual_stream(name, slow):
    torch.manual_seed(1)
    model = SMALL[name].build(3, 4).double()
    x, time_idx, reset = windows(dtype=torch.float64)
    hidden = F.linear(x, model.input.weight, model.input.bias)
    for mixer, norm in zip(model.mixers, model.norms, strict=True):
        zeros = torch.zeros(2, *mixer.memory_shapes()["h"], dtype=torch.float64)
        hidden = hidden + slow(mixer, norm(hidden), reset, zeros)[0]
    torch.testing.assert_close(model(x, time_idx, reset)[0], model.norm(hidden))


def test_parameter_counts():
    """Layers: minGRU `W_z, W_c, W_g, W_o` with all biases, norm of `h`; LRU `3 N` dynamics, `B`, `C`, skip, gate."""
    min_gru = 4 * 256 * 512 + 3 * 512 + 256 + 2 * 512 + 2 * 256
    lru = 3 * 256 + 2 * 2 * 256 * 256 + 256 + 256 * 256 + 256 + 2 * 256
    for config, layer in ((MinGRUConfig(), min_gru), (LRUConfig(), lru)):
        model = config.build(100, 16)
        assert sum(p.numel() for p in model.parameters()) == 100 * 256 + 256 + 3 * layer + 2 * 256
        assert model.out_dim == 256
    assert (min_gru, lru) == (527_616, 329_472)


def test_update_gates_start_with_log_uniform_time_constants():
    torch.manual_seed(0)
    bias = UpdateGateBias(2000, 256.0).bias.detach().double()
    tau = 1.0 / torch.sigmoid(bias)
    assert 1.999 < float(tau.min()) < 2.1 and 245.0 < float(tau.max()) < 256.1
    expected = 0.5 * math.log(2.0 * 256.0)
    assert abs(float(tau.log().mean()) - expected) < 4 * math.log(128.0) / math.sqrt(12 * 2000)


def test_eigenvalues_start_in_the_ring():
    torch.manual_seed(0)
    ring = LRUParameters(2000, r_min=0.9, r_max=0.999, max_phase=1.0)
    eigenvalues = torch.view_as_complex(ring.eigenvalues().detach().double())
    radius, phase = eigenvalues.abs(), eigenvalues.angle()
    assert 0.8999 < float(radius.min()) < 0.901 and 0.998 < float(radius.max()) < 0.99901
    assert 0.0 < float(phase.min()) < 0.01 and 0.99 < float(phase.max()) < 1.0001
    # Uniform over the area of the ring: the squared radius is uniform.
    middle, width = (0.9**2 + 0.999**2) / 2, 0.999**2 - 0.9**2
    assert abs(float(radius.square().mean()) - middle) < 4 * width / math.sqrt(12 * 2000)
    gains = ring.gains().detach().double().squeeze(-1)
    torch.testing.assert_close(gains, (1.0 - radius.square()).sqrt(), rtol=1e-3, atol=0.0)


def test_a_fresh_lru_neither_grows_nor_fades():
    """White noise of variance 1 gives states and a linear readout of variance 1."""
    torch.manual_seed(0)
    mixer = LRUMixer(64, 64, activation="gelu", r_min=0.9, r_max=0.99, max_phase=2 * math.pi)
    with torch.no_grad():
        h = mixer(torch.randn(64, 500, 64))[1]["h"]
        readout = mixer.C(h.flatten(-2))
    assert 0.9 < float(h.square().sum(-1).mean()) < 1.1
    assert 0.9 < float(readout.square().mean()) < 1.1


@pytest.mark.parametrize("name", SMALL)
def test_dynamics_stay_in_float32_and_without_weight_decay(name):
    model = SMALL[name].build(3, 4)
    dynamics = {"min_gru": ("update_bias.bias",), "lru": tuple(f"recurrence.{n}" for n in ("nu", "theta", "log_gamma"))}
    wanted = {f"mixers.{i}.{parameter}" for i in range(2) for parameter in dynamics[name]}
    for twin in (model, copy.deepcopy(model), copy.deepcopy(model).to("meta").to_empty(device="cpu")):
        assert {n for n, p in twin.named_parameters() if getattr(p, "_no_weight_decay", False)} == wanted
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.to(torch.bfloat16)
    for n, p in model.named_parameters():
        assert p.dtype == (torch.float32 if n in wanted else torch.bfloat16), n
        assert n not in wanted or torch.equal(p, before[n])
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16(name):
    """Within 2 % of a float32 model with the same rounded weights; the state stays in float32."""
    torch.manual_seed(0)
    half = SMALL[name].build(3, 4).to(torch.bfloat16).eval()
    model = copy.deepcopy(half).float()
    x, time_idx, reset = windows(length=40, dtype=torch.bfloat16)
    out = half(x, time_idx, reset)[0]
    expected = model(x.float(), time_idx, reset)[0].detach()
    state, steps = half.initial_state(2), []
    assert state["h"].dtype == torch.float32
    for t in range(40):
        half.reset_state(state, reset[:, t])
        steps.append(half.step(x[:, t], time_idx[:, t], state))
    assert state["h"].dtype == torch.float32
    for result in (out.detach(), torch.stack(steps, dim=1)):
        assert result.dtype == torch.bfloat16
        assert float((result.float() - expected).norm() / expected.norm()) < 0.02
    out.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in half.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_autocast(name):
    torch.manual_seed(0)
    model = SMALL[name].build(3, 4).eval()
    x, time_idx, reset = windows(length=40)
    expected = model(x, time_idx, reset)[0].detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, time_idx, reset)[0]
        first = model.step(x[:, 0], time_idx[:, 0], model.initial_state(2))
    assert float((out.detach().float() - expected).norm() / expected.norm()) < 0.02
    assert float((first.float() - expected[:, 0]).norm() / expected[:, 0].norm()) < 0.02
    out.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config", [MinGRUConfig(d_model=8, n_layers=1), LRUConfig(d_model=8, n_layers=1)], ids=["min_gru", "lru"]
)
def test_compiles_to_one_graph(config):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = config.build(3, 4)
    x, time_idx, reset = windows(length=5)
    # Without resets only the graph is checked; generating code twice would take too long.
    for resets, backend in ((None, "aot_eager"), (reset, "inductor")):
        compiled, grads = torch.compile(model, fullgraph=True, backend=backend), []
        for run in (model, compiled):
            out = run(x, time_idx, resets)[0]
            grads.append([out, *torch.autograd.grad((out**3).sum(), list(model.parameters()))])
        for ours, eager in zip(*grads, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "shape"), [("min_gru", (2, 2, 32)), ("lru", (2, 2, 16, 2))])
def test_a_step_costs_the_same_after_any_history(name, shape):
    model = SMALL[name].build(3, 4).eval()
    x, time_idx, _ = windows(length=30)
    state, costs = model.initial_state(2), []
    for t in range(30):
        with FlopCounterMode(display=False) as counter:
            model.step(x[:, t], time_idx[:, t], state)
        costs.append(counter.get_total_flops())
    assert costs[0] > 0 and set(costs) == {costs[0]}
    assert {n: tuple(tensor.shape) for n, tensor in state.tensors.items()} == {"h": shape}


@pytest.mark.parametrize("name", SMALL)
def test_the_state_goes_where_it_is_asked_for(name):
    model = SMALL[name].build(3, 4)
    assert model.initial_state(2, device="meta")["h"].is_meta
    assert model.initial_state(2, dtype=torch.bfloat16)["h"].dtype == torch.float32
    state = model.initial_state(2, dtype=torch.float64)
    out = model.step(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), state)
    assert state["h"].dtype == torch.float64 and out.dtype == torch.float32


@pytest.mark.parametrize("name", SMALL)
def test_training_from_a_given_state(name):
    model = SMALL[name].build(3, 4)
    x, time_idx, _ = windows(length=6)
    x.requires_grad_()
    state = model.initial_state(2)
    model(x.detach(), time_idx, None, state)
    out, _ = model(x, time_idx, None, state)
    out.square().mul(torch.arange(1.0, 17.0)).sum().backward()
    assert bool(x.grad[:, 0].any())
    assert not state["h"].requires_grad


BAD_CONFIGS = {
    "d_model=0": (MinGRUConfig, {"d_model": 0}),
    "expand=0": (MinGRUConfig, {"expand": 0}),
    "n_layers=-1": (MinGRUConfig, {"n_layers": -1}),
    "max_timescale=1.5": (MinGRUConfig, {"max_timescale": 1.5}),
    "dropout=1.0": (MinGRUConfig, {"dropout": 1.0}),
    "activation='tanh'": (MinGRUConfig, {"activation": "tanh"}),
    "norm='batch'": (MinGRUConfig, {"norm": "batch"}),
    "d_state=0": (LRUConfig, {"d_state": 0}),
    "n_layers=0": (LRUConfig, {"n_layers": 0}),
    "r_max=1.0": (LRUConfig, {"r_max": 1.0}),
    "r_min=0.9 is .* in .*0.5": (LRUConfig, {"r_max": 0.5}),
    "r_min=0.0": (LRUConfig, {"r_min": 0.0}),
    "max_phase=7.0": (LRUConfig, {"max_phase": 7.0}),
    "dropout=-0.1": (LRUConfig, {"dropout": -0.1}),
    "activation='silu'": (LRUConfig, {"activation": "silu"}),
    "norm='group'": (LRUConfig, {"norm": "group"}),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs_are_refused_at_once(message):
    config, options = BAD_CONFIGS[message]
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_configs():
    assert lookup("traj_encoder", "min_gru") is MinGRUConfig
    assert lookup("traj_encoder", "lru") is LRUConfig
    assert LRUConfig(d_model=8).build(3, 4).initial_state(2)["h"].shape == (3, 2, 8, 2)
