"""GRU and LSTM backbones: the contract, numbers by hand, PyTorch's modules, precision, compiled training."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from amago_nets.registry import lookup
from amago_nets.testing import check_backbone
from amago_nets.traj_encoders import GRUConfig, LSTMConfig, TrajEncoderConfig

CONFIGS = {"gru": GRUConfig, "lstm": LSTMConfig}
TORCH = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
ENTRIES = {"gru": {"hidden"}, "lstm": {"hidden", "cell"}}


def build(kind, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return CONFIGS[kind](**{"d_hidden": 8, "d_output": 6, **options}).build(3, 4).to(dtype)


def make_window(dtype=torch.float32, lanes=3, length=9):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(lanes, length, 3, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.arange(length).expand(lanes, length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"n_layers": 1, "norm": "none"}, {"n_layers": 3, "norm": "rmsnorm"}])
@pytest.mark.parametrize("kind", CONFIGS)
def test_contract(kind, options, dtype):
    check_backbone(CONFIGS[kind](d_hidden=16, d_output=12, **options).build, dtype=dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "dtype"), [("gru", torch.float32), ("lstm", torch.float32), ("lstm", torch.bfloat16)])
def test_compiled_training(kind, dtype):
    factory = CONFIGS[kind](d_hidden=8, d_output=6).build
    check_backbone(factory, dtype=dtype, max_seq_len=2, lanes=3, length=6, compile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_contract_on_the_gpu(kind, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else None
    with torch.backends.cudnn.flags(allow_tf32=False):
        factory = CONFIGS[kind](d_hidden=16, d_output=12).build
        check_backbone(factory, dtype=dtype, device="cuda", tolerance=tolerance)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CONFIGS)
def test_compiled_training_on_the_gpu(kind):
    with torch.backends.cudnn.flags(allow_tf32=False):
        factory = CONFIGS[kind](d_hidden=8, d_output=6).build
        check_backbone(factory, max_seq_len=2, lanes=3, length=6, device="cuda", tolerance=1e-4, compile=True)


def parameters_by_hand(gates, inputs, size, layers, outputs):
    first = gates * (size * inputs + size * size + 2 * size)
    others = gates * (size * size + size * size + 2 * size)
    linear, norm = size * outputs + outputs, 2 * outputs
    return first + (layers - 1) * others + linear + norm


@pytest.mark.parametrize(
    ("kind", "options", "inputs", "expected"),
    [
        ("gru", {}, 256, 855_808),
        ("lstm", {}, 256, 1_118_976),
        ("lstm", {"d_hidden": 64, "n_layers": 3, "d_output": 32}, 10, 19_456 + 2 * 33_280 + 2_080 + 64),
    ],
)
def test_parameter_counts(kind, options, inputs, expected):
    config = CONFIGS[kind](**options)
    counted = sum(parameter.numel() for parameter in config.build(inputs, 16).parameters())
    gates = {"gru": 3, "lstm": 4}[kind]
    by_hand = parameters_by_hand(gates, inputs, config.d_hidden, config.n_layers, config.d_output)
    assert counted == expected == by_hand


def test_lstm_by_hand():
    """One unit, input weights 1, recurrent weights .5, forget bias 1, inputs 1 and -1."""
    model = LSTMConfig(d_hidden=1, n_layers=1, d_output=1, norm="none").build(1, 4).eval()
    with torch.no_grad():
        for name, value in (("weight_ih", 1.0), ("weight_hh", 0.5), ("bias_ih", 0.0), ("bias_hh", 0.0)):
            getattr(model.lstm, f"{name}_l0").fill_(value)
        model.lstm.bias_hh_l0[1] = 1.0
        model.output.weight.fill_(1.0)
        model.output.bias.zero_()
    x, time_idx = torch.tensor([[[1.0], [-1.0]]]), torch.arange(2)[None]
    expected = torch.tensor([0.3696064, 0.0298897])
    for reset in (None, torch.zeros(1, 2, dtype=torch.bool)):
        torch.testing.assert_close(model(x, time_idx, reset)[0].flatten(), expected)
    state = model.initial_state(1)
    steps = [model.step(x[:, t], time_idx[:, t], state).item() for t in range(2)]
    torch.testing.assert_close(torch.tensor(steps), expected)
    assert state["cell"].item() == pytest.approx(0.0977391, rel=1e-5)
    assert state["hidden"].item() == pytest.approx(expected[1].item(), rel=1e-5)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_are_those_of_torch(kind, resets):
    """The same names, the same initial values, the same outputs, whichever loop runs."""
    torch.manual_seed(3)
    model = CONFIGS[kind](d_hidden=8, d_output=6, norm="none").build(3, 4)
    torch.manual_seed(3)
    layers = TORCH[kind](3, 8, 2, batch_first=True)
    own = {name.removeprefix(f"{kind}."): value for name, value in model.state_dict().items() if kind in name}
    assert list(own) == list(layers.state_dict())
    assert all(torch.equal(own[name], value) for name, value in layers.state_dict().items())
    x, time_idx = make_window()
    reset = torch.zeros(3, 9, dtype=torch.bool) if resets else None
    torch.testing.assert_close(model(x, time_idx, reset)[0], model.output(layers(x)[0]))


@pytest.mark.parametrize("kind", CONFIGS)
def test_units_begin_with_the_timescales_asked_for(kind):
    size = 512
    layers = getattr(CONFIGS[kind](d_hidden=size, n_layers=2, max_timescale=50.0).build(3, 4), kind)
    for layer in range(2):
        _, _, bias, other = layers.weights(layer)
        keep = torch.sigmoid((bias + other)[size : 2 * size].detach())
        tau = 1 / (1 - keep)
        # Log-uniform: half of the units lie below the geometric mean of the ends, 10.
        assert 2.0 <= tau.min() < 2.2 and 45.0 < tau.max() <= 50.01 and 0.4 < (tau < 10.0).float().mean() < 0.6
        if kind == "lstm":  # What is not kept is written.
            torch.testing.assert_close(torch.sigmoid((bias + other)[:size]), 1 - keep)


@pytest.mark.parametrize("kind", CONFIGS)
def test_both_loops_have_the_same_gradients(kind):
    model = build(kind, torch.float64)
    x, time_idx = make_window(torch.float64)
    grads = []
    for reset in (None, torch.zeros(3, 9, dtype=torch.bool)):
        weights = torch.arange(1.0, 7.0, dtype=torch.float64)
        loss = (model(x, time_idx, reset)[0].square() * weights).sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", CONFIGS)
def test_states_are_float32_at_least(kind):
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        state = build(kind, dtype).initial_state(2)
        assert {name: value.dtype for name, value in state.tensors.items()} == dict.fromkeys(ENTRIES[kind], expected)
    asked = build(kind).initial_state(2, dtype=torch.bfloat16)
    assert all(value.dtype == torch.float32 for value in asked.tensors.values())


@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_rounds_nothing_inside_the_recurrence(kind):
    """The memory after 200 timesteps is that of the same weights in float64."""
    model = build(kind, torch.bfloat16)
    exact = copy.deepcopy(model).double()
    x, time_idx = make_window(torch.bfloat16, length=200)
    by_window, by_steps, expected = model.initial_state(3), model.initial_state(3), exact.initial_state(3)
    out, _ = model(x, time_idx, None, by_window)
    assert out.dtype == torch.bfloat16
    for t in range(200):
        assert model.step(x[:, t], time_idx[:, t], by_steps).dtype == torch.bfloat16
    exact(x.double(), time_idx, None, expected)
    for name in ENTRIES[kind]:
        for state in (by_window, by_steps):
            torch.testing.assert_close(state[name].double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_autocast_leaves_the_recurrence_in_float32(kind, grad, resets):
    model = build(kind)
    x, time_idx = make_window()
    reset = torch.zeros(3, 9, dtype=torch.bool) if resets else None
    plain, window, steps = (model.initial_state(3) for _ in range(3))
    model(x, time_idx, reset, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
        model(x, time_idx, reset, window)
        for t in range(9):
            model.step(x[:, t], time_idx[:, t], steps)
    for name in ENTRIES[kind]:
        torch.testing.assert_close(window[name], plain[name])
        torch.testing.assert_close(steps[name], plain[name])


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs(kind):
    config = CONFIGS[kind](d_hidden=8)
    assert isinstance(config, TrajEncoderConfig)
    assert lookup("traj_encoder", kind) is CONFIGS[kind]
    fields = ["d_hidden", "n_layers", "d_output", "norm", "max_timescale"]
    assert [field.name for field in dataclasses.fields(config)] == fields
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layers = 3
    with pytest.raises(TypeError):
        CONFIGS[kind](8)
    for options, message in (
        ({"d_hidden": 0}, "d_hidden=0"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"d_output": -1}, "d_output=-1"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"max_timescale": 1.0}, "max_timescale=1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            CONFIGS[kind](**options)
    with pytest.raises(ValueError, match="in_dim=0"):
        config.build(0, 4)


def test_a_state_without_a_cell_is_refused():
    x, time_idx = make_window()
    with pytest.raises(ValueError, match="cell"):
        build("lstm")(x, time_idx, None, build("gru").initial_state(3))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_state_in_another_dtype_stays_in_it(kind):
    model = build(kind)
    x, time_idx = make_window()
    state, usual = model.initial_state(3, dtype=torch.float64), model.initial_state(3)
    for t in range(4):
        model.step(x[:, t], time_idx[:, t], state)
        model.step(x[:, t], time_idx[:, t], usual)
    out, _ = model(x[:, 4:], time_idx[:, 4:], None, state)
    torch.testing.assert_close(out, model(x[:, 4:], time_idx[:, 4:], None, usual)[0])
    assert all(value.dtype == torch.float64 for value in state.tensors.values())
