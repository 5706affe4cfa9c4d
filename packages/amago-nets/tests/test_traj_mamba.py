"""The Mamba backbone: the contract, its equations, sizes, initialisation, precision, compilation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from amago_kernels import selective_scan
from amago_nets.mamba import MambaMixer
from amago_nets.registry import lookup
from amago_nets.testing import check_backbone
from amago_nets.traj_encoders import MambaConfig

SMALL = MambaConfig(d_model=16, d_state=4, n_layers=2)


def windows(lanes=2, length=9, in_dim=3, dtype=torch.float32, resets=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(lanes, length, in_dim, generator=generator, dtype=torch.float64).to(dtype)
    reset = torch.zeros(lanes, length, dtype=torch.bool)
    if resets:
        reset[0, 4] = reset[1, 2] = reset[1, 3] = reset[1, -1] = True
    return x, torch.arange(length).expand(lanes, length), reset


def silu(x):
    return x / (1.0 + torch.exp(-x))


def slow_mixer(mixer, x, reset, conv, h):
    """The equations, one lane, timestep and channel after the other, on the weights of a mixer."""
    lanes, length, _ = x.shape
    size, states, rank, taps = mixer.channels, mixer.d_state, mixer.rank, mixer.d_conv
    in_w, x_w = mixer.in_proj.weight, mixer.x_proj.weight
    rates = -torch.exp(mixer.scan.A_log)
    rows = []
    for lane in range(lanes):
        history, hidden, outputs = [conv[lane, :, i] for i in range(taps - 1)], h[lane], []
        for t in range(length):
            if reset[lane, t]:
                history, hidden = [torch.zeros_like(past) for past in history], torch.zeros_like(hidden)
            u, z = in_w[:size] @ x[lane, t], in_w[size:] @ x[lane, t]
            history = [*history, u]
            u = mixer.conv_bias + sum(mixer.conv_weight[:, i] * past for i, past in enumerate(history))
            u, history = silu(u), history[1:]
            low_rank, b, c = x_w[:rank] @ u, x_w[rank : rank + states] @ u, x_w[rank + states :] @ u
            delta = torch.log1p(torch.exp(mixer.dt_proj.weight @ low_rank + mixer.dt_proj.bias))
            hidden = torch.stack(
                [torch.exp(delta[i] * rates[i]) * hidden[i] + delta[i] * b * u[i] for i in range(size)]
            )
            y = torch.stack([c @ hidden[i] + mixer.scan.D[i] * u[i] for i in range(size)])
            outputs.append(mixer.out_proj.weight @ (y * silu(z)))
        rows.append((torch.stack(outputs), torch.stack(history, dim=-1), hidden))
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"n_layers": 1, "d_conv": 2, "expand": 1, "norm": "rmsnorm"}])
def test_contract(dtype, options):
    check_backbone(MambaConfig(**{"d_model": 16, "d_state": 4, "n_layers": 2, **options}).build, dtype=dtype)


@pytest.mark.gpu
def test_contract_on_the_gpu():
    check_backbone(SMALL.build, device="cuda", tolerance=1e-4)


def test_parameter_counts():
    model = MambaConfig().build(256, 16)
    assert sum(p.numel() for p in model.parameters()) == 1_381_120
    assert sum(p.numel() for p in model.mixers[0].parameters()) == 437_760
    assert model.out_dim == 256
    assert model.mixers[0].rank == 16 and SMALL.build(3, 4).mixers[0].rank == 1


def test_equations():
    """Outputs, memory and every gradient, from a given memory and with resets."""
    torch.manual_seed(0)
    mixer = MambaMixer(5, d_state=3, d_conv=3, expand=2).double()
    with torch.no_grad():
        mixer.scan.D.normal_()
        mixer.scan.A_log.normal_()
    x, _, reset = windows(in_dim=5, length=6, dtype=torch.float64)
    x.requires_grad_()
    conv = torch.randn(2, 10, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    out, memory = mixer(x, {"conv": conv, "h": h}, reset)
    expected, expected_conv, expected_h = slow_mixer(mixer, x, reset, conv, h)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(memory["conv"], expected_conv)
    torch.testing.assert_close(memory["h"], expected_h)
    inputs = {"x": x, "conv": conv, "h": h, **dict(mixer.named_parameters())}
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum() + memory["h"].square().sum(), list(inputs.values()))
    wanted = torch.autograd.grad((expected * weights).sum() + expected_h.square().sum(), list(inputs.values()))
    for name, grad, reference in zip(inputs, grads, wanted, strict=True):
        assert bool(grad.any()), name
        torch.testing.assert_close(grad, reference, msg=lambda text, name=name: f"{name}: {text}")


def test_the_stack_is_a_residual_stream():
    """Input layer, `x + mamba(norm(x))` per layer, norm; from the formulas of layer norm and of the mixer."""
    torch.manual_seed(1)
    model = MambaConfig(d_model=6, d_state=2, n_layers=2).build(3, 4).double()
    x, time_idx, reset = windows(dtype=torch.float64)

    def norm(layer, value):
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    hidden = x @ model.input.weight.T + model.input.bias
    for mixer, layer in zip(model.mixers, model.norms, strict=True):
        conv, h = (torch.zeros(2, *shape, dtype=torch.float64) for shape in mixer.memory_shapes().values())
        hidden = hidden + slow_mixer(mixer, norm(layer, hidden), reset, conv, h)[0]
    torch.testing.assert_close(model(x, time_idx, reset)[0], norm(model.norm, hidden))


def test_scalar_check():
    ones = torch.ones(1, 2, 1)
    y, last = selective_scan(
        torch.tensor([[[2.0], [1.0]]]), ones * math.log(2.0), -torch.ones(1, 1), ones, ones, D=torch.ones(1)
    )
    torch.testing.assert_close(y.flatten(), torch.tensor([3.3862944, 2.3862944]))
    torch.testing.assert_close(last.flatten(), torch.tensor([1.3862944]))


def test_initialisation():
    torch.manual_seed(0)
    mixer = MambaMixer(64, d_state=16, d_conv=4, expand=2)
    expected = torch.arange(1.0, 17.0).log().expand(128, 16)
    torch.testing.assert_close(mixer.scan.A_log.detach(), expected, rtol=0, atol=0)
    assert bool((mixer.scan.D == 1.0).all())
    dt = F.softplus(mixer.dt_proj.bias.detach().double())
    assert 0.00099 < float(dt.min()) < 0.0012 and 0.085 < float(dt.max()) < 0.1001
    # Log-uniform: the mean logarithm is that of the middle of the range, within 4 standard errors.
    assert abs(float(dt.log().mean()) - 0.5 * math.log(1e-4)) < 4 * math.log(100.0) / math.sqrt(12 * 128)
    for weight, bound in ((mixer.dt_proj.weight, 0.5), (mixer.conv_weight, 0.5), (mixer.conv_bias, 0.5)):
        assert 0.9 * bound < float(weight.detach().abs().max()) <= bound
    assert mixer.in_proj.bias is None and mixer.x_proj.bias is None and mixer.out_proj.bias is None


def test_only_decays_and_skips_are_without_weight_decay():
    model = SMALL.build(3, 4)
    for twin in (model, copy.deepcopy(model), copy.deepcopy(model).to("meta").to_empty(device="cpu")):
        marked = {name for name, p in twin.named_parameters() if getattr(p, "_no_weight_decay", False)}
        assert marked == {f"mixers.{i}.scan.{name}" for i in range(2) for name in ("A_log", "D")}


def test_decays_and_skips_stay_in_float32():
    model = SMALL.build(3, 4)
    before = model.mixers[0].scan.A_log.detach().clone()
    model(*windows())[0].square().mean().backward()
    model.to(torch.bfloat16)
    scan = model.mixers[0].scan
    assert scan.A_log.dtype == scan.D.dtype == scan.A_log.grad.dtype == torch.float32
    assert model.mixers[0].in_proj.weight.dtype == model.mixers[0].in_proj.weight.grad.dtype == torch.bfloat16
    assert torch.equal(scan.A_log, before)
    assert scan.A_log._no_weight_decay
    model.half()
    assert scan.A_log.dtype == torch.float32 and model.input.weight.dtype == torch.float16
    model.double()
    assert scan.A_log.dtype == torch.float64 and model.initial_state(2)["h"].dtype == torch.float64
    model.to(torch.bfloat16)
    assert scan.A_log.dtype == torch.float32
    model.to("meta")
    assert scan.A_log.device.type == "meta"


def test_bfloat16():
    """Within 2 % of a float32 model with the same rounded weights; the states stay in float32."""
    torch.manual_seed(0)
    half = SMALL.build(3, 4).to(torch.bfloat16).eval()
    model = copy.deepcopy(half).float()
    x, time_idx, reset = windows(length=40, dtype=torch.bfloat16)
    out = half(x, time_idx, reset)[0]
    expected = model(x.float(), time_idx, reset)[0].detach()
    state, steps = half.initial_state(2), []
    assert all(tensor.dtype == torch.float32 for tensor in state.tensors.values())
    for t in range(40):
        half.reset_state(state, reset[:, t])
        steps.append(half.step(x[:, t], time_idx[:, t], state))
    assert all(tensor.dtype == torch.float32 for tensor in state.tensors.values())
    for result in (out.detach(), torch.stack(steps, dim=1)):
        assert result.dtype == torch.bfloat16
        assert float((result.float() - expected).norm() / expected.norm()) < 0.02
    out.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in half.parameters())


def test_autocast():
    torch.manual_seed(0)
    model = SMALL.build(3, 4).eval()
    x, time_idx, reset = windows(length=40)
    expected = model(x, time_idx, reset)[0].detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, time_idx, reset)[0]
        state = model.initial_state(2)
        first = model.step(x[:, 0], time_idx[:, 0], state)
    assert float((out.detach().float() - expected).norm() / expected.norm()) < 0.02
    assert float((first.float() - expected[:, 0]).norm() / expected[:, 0].norm()) < 0.02
    out.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_compiles_to_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MambaConfig(d_model=8, d_state=2, n_layers=1).build(3, 4)
    x, time_idx, reset = windows(length=5)
    # Without resets only the graph is checked; generating code twice would take too long.
    for resets, backend in ((None, "aot_eager"), (reset, "inductor")):
        compiled, grads = torch.compile(model, fullgraph=True, backend=backend), []
        for run in (model, compiled):
            out = run(x, time_idx, resets)[0]
            grads.append([out, *torch.autograd.grad((out**3).sum(), list(model.parameters()))])
        for ours, eager in zip(*grads, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_a_step_costs_the_same_after_any_history():
    model = SMALL.build(3, 4).eval()
    x, time_idx, _ = windows(length=30)
    state, costs = model.initial_state(2), []
    assert {name: tuple(tensor.shape) for name, tensor in state.tensors.items()} == {
        "conv": (2, 2, 32, 3),
        "h": (2, 2, 32, 4),
    }
    sizes = [tensor.numel() for tensor in state.tensors.values()]
    for t in range(30):
        with FlopCounterMode(display=False) as counter:
            model.step(x[:, t], time_idx[:, t], state)
        costs.append(counter.get_total_flops())
    assert costs[0] > 0 and set(costs) == {costs[0]}
    assert [tensor.numel() for tensor in state.tensors.values()] == sizes


def test_the_state_goes_where_it_is_asked_for():
    model = SMALL.build(3, 4)
    assert all(tensor.is_meta for tensor in model.initial_state(2, device="meta").tensors.values())
    assert model.initial_state(2, dtype=torch.float64)["conv"].dtype == torch.float64
    assert model.initial_state(2, dtype=torch.bfloat16)["conv"].dtype == torch.float32
    model.train()
    model.step(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), model.initial_state(2, dtype=torch.float64))


def test_training_from_a_given_state():
    model = SMALL.build(3, 4)
    x, time_idx, _ = windows(length=6)
    x.requires_grad_()
    state = model.initial_state(2)
    model(x.detach(), time_idx, None, state)
    out, _ = model(x, time_idx, None, state)
    out.square().mul(torch.arange(1.0, 17.0)).sum().backward()
    assert bool(x.grad[:, 0].any())
    assert not any(tensor.requires_grad for tensor in state.tensors.values())


BAD_CONFIGS = {
    "d_model=0": {"d_model": 0},
    "d_state=True": {"d_state": True},
    "d_conv=1": {"d_conv": 1},
    "d_conv=5": {"d_conv": 5},
    "expand=1.5": {"expand": 1.5},
    "n_layers=0": {"n_layers": 0},
    "norm='batch'": {"norm": "batch"},
    "scan_backend='cuda'": {"scan_backend": "cuda"},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs_are_refused_at_once(message):
    with pytest.raises(ValueError, match=message):
        MambaConfig(**BAD_CONFIGS[message])


def test_config():
    assert lookup("traj_encoder", "mamba") is MambaConfig
    assert MambaConfig() == MambaConfig(
        d_model=256, d_state=16, d_conv=4, expand=2, n_layers=3, norm="layer", scan_backend="auto"
    )


def test_backends_are_passed_on():
    """The reference serves everything; mamba_ssm knows no resets, and is missed only when it is used."""
    torch.manual_seed(0)
    x, time_idx, reset = windows()
    reference = MambaConfig(d_model=8, n_layers=1, scan_backend="reference").build(3, 4)
    other = MambaConfig(d_model=8, n_layers=1).build(3, 4)
    other.load_state_dict(reference.state_dict())
    torch.testing.assert_close(other(x, time_idx, reset)[0], reference(x, time_idx, reset)[0])
    with pytest.raises(ValueError, match="backend='mamba_ssm' cannot serve"):
        MambaConfig(d_model=8, n_layers=1, scan_backend="mamba_ssm").build(3, 4)(x, time_idx, reset)
