"""The Triton kernels of the causal convolution against the reference in float64, with every gradient."""

from __future__ import annotations

import pytest
import torch
from quick_interpreter import hurry
from reset_patterns import PATTERNS, make_reset
from triton_devices import DEVICES

from amago_kernels import causal_conv1d, causal_conv1d_step
from amago_kernels.conv import _launch_step
from amago_kernels.testing import assert_close_ratio, poisoned

NAMES = ("x", "weight", "bias", "initial_state")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    hurry(monkeypatch)


def make_inputs(batch, length, channels, taps, without=()):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, length, channels), (channels, taps), (channels,), (batch, channels, taps - 1))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return {name: x for name, x in zip(NAMES, inputs, strict=True) if name not in without}


def run(inputs, reset, backend, activation):
    return causal_conv1d(**inputs, reset=reset, activation=activation, backend=backend)


def scalar(y, last):
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device) for x in (y, last)]
    return (y.double() * weights[0]).sum() + (last.double() * weights[1]).sum()


def results(inputs, reset, backend, activation):
    given = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, last = run(given, reset, backend, activation)
    grads = torch.autograd.grad(scalar(y, last), list(given.values()), materialize_grads=True)
    return {"y": y, "final state": last} | dict(zip(given, grads, strict=True))


def compare(inputs, reset, device, dtype=torch.float32, tolerance=1e-5, activation="silu"):
    cast = {name: x.to(device, dtype if name == "x" else torch.float32) for name, x in inputs.items()}
    wanted = results({name: x.double().cpu() for name, x in cast.items()}, reset, "reference", activation)
    got = results(cast, None if reset is None else reset.to(device), "triton", activation)
    assert got["y"].dtype == dtype and got["final state"].dtype == torch.float32
    for name, one in got.items():
        assert name in ("y", "final state") or one.dtype == cast[name].dtype
        assert_close_ratio(one.cpu(), wanted[name], tolerance, name)


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("device", DEVICES)
def test_output_state_and_gradients(device, kind):
    for length, taps, activation in ((1, 4, "silu"), (2, 3, None), (63, 2, None), (66, 4, "silu")):
        compare(make_inputs(2, length, 40, taps), make_reset(kind, 2, length), device, activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(device, dtype):
    compare(make_inputs(1, 130, 60, 4), make_reset("some", 1, 130), device, dtype, 1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_one_tap(device):
    compare(make_inputs(2, 9, 5, 1), make_reset("some", 2, 9), device)


@pytest.mark.parametrize("without", [("bias",), ("initial_state",), ("bias", "initial_state")], ids="-".join)
@pytest.mark.parametrize("device", DEVICES)
def test_everything_optional_may_be_left_out(device, without):
    for length in (2, 70):
        compare(make_inputs(2, length, 5, 4, without), make_reset("some", 2, length), device)


@pytest.mark.parametrize("device", DEVICES)
def test_every_configuration(device, monkeypatch):
    from amago_kernels import triton_conv

    for kernel in (triton_conv.forward_kernel, triton_conv.backward_kernel):
        for number in range(len(kernel.configs)):
            with monkeypatch.context() as patch:
                patch.setattr(kernel, "configs", kernel.configs[number:])
                compare(make_inputs(1, 70, 40, 4), make_reset("some", 1, 70), device)


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_outputs_that_are_used_are_differentiated(device):
    inputs = make_inputs(2, 9, 5, 4)
    for place in (0, 1):
        sides = []
        for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
            given = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
            out = run(given, None, backend, "silu")[place].square().sum()
            sides.append(torch.autograd.grad(out, list(given.values()), materialize_grads=True))
        for name, one, other in zip(NAMES, sides[1], sides[0], strict=True):
            assert_close_ratio(one, other, 1e-5, name)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_before_a_reset_is_forgotten(device):
    for length, at in ((1, 0), (9, 4), (9, 8), (9, 0)):
        inputs = {name: x.float().to(device) for name, x in make_inputs(2, length, 4, 4).items()}
        reset = torch.zeros(2, length, dtype=torch.bool, device=device)
        reset[0, at] = True
        inputs["x"][0, :at] = float("nan")
        inputs["initial_state"][0] = poisoned((4, 3))
        given = {name: x.requires_grad_() for name, x in inputs.items()}
        y, last = run(given, reset, "triton", "silu")
        assert y[0, :at].isnan().all()
        assert y[0, at:].isfinite().all() and y[1].isfinite().all() and last.isfinite().all()
        grad_x, grad_state = torch.autograd.grad(y[:, at:].sum(), [given["x"], given["initial_state"]])
        assert grad_x[:, at:].isfinite().all() and grad_state[1].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_dropped_nan_state_is_in_no_gradient(device):
    inputs = {name: x.float().to(device) for name, x in make_inputs(2, 9, 4, 4).items()}
    reset = torch.zeros(2, 9, dtype=torch.bool, device=device)
    reset[:, 0] = True
    sides = []
    for state in (poisoned((2, 4, 3), device=device), torch.zeros(2, 4, 3, device=device)):
        sides.append(results(inputs | {"initial_state": state}, reset, "triton", "silu"))
    for name, one in sides[0].items():
        assert torch.equal(one, sides[1][name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides(device):
    inputs = {name: x.float().to(device) for name, x in make_inputs(3, 20, 4, 3).items()}
    reset = make_reset("some", 3, 20, device=device)
    expected = results(inputs, reset, "triton", "silu")
    turned = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    half = inputs | {"x": torch.cat([inputs["x"], inputs["x"]], dim=-1).chunk(2, dim=-1)[1]}
    for twisted in (turned, half):
        for name, one in results(twisted, reset.t().contiguous().t(), "triton", "silu").items():
            assert_close_ratio(one, expected[name], 1e-6, name)


@pytest.mark.parametrize("device", DEVICES)
def test_no_lanes(device):
    inputs = {name: x.float().to(device) for name, x in make_inputs(0, 7, 5, 3).items()}
    for one in results(inputs, None, "triton", "silu").values():
        assert not one.any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    inputs = [x.float().to(device).requires_grad_() for x in make_inputs(2, 5, 4, 3).values()]
    operators = torch.ops.amago_kernels
    torch.library.opcheck(
        operators.causal_conv1d_triton.default, (*inputs, make_reset("some", 2, 5, device=device), True)
    )
    plain = [x.detach() for x in inputs]
    bare = [*plain[:2], None, None, None, False]
    torch.library.opcheck(operators.causal_conv1d_triton.default, bare)
    y, last = operators.causal_conv1d_triton(*bare)
    for grads in ((torch.randn_like(y), None), (None, torch.randn_like(last))):
        torch.library.opcheck(operators.causal_conv1d_triton_backward.default, (*grads, *bare))
    torch.library.opcheck(
        operators.causal_conv1d_step_triton.default, (plain[0][:, 0], *plain[1:3], plain[3].clone(), True)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_in_one_piece(device):
    torch._dynamo.reset()
    inputs = {name: x.float().to(device) for name, x in make_inputs(2, 5, 4, 3).items()}
    reset = make_reset("some", 2, 5, device=device)

    def loss(*given):
        y, last = run(dict(zip(NAMES, given, strict=True)), reset, "triton", "silu")
        return y.square().sum() + last.square().sum()

    sides = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        given = [x.detach().requires_grad_() for x in inputs.values()]
        out = function(*given)
        sides.append([out, *torch.autograd.grad(out, given)])
    for one, other in zip(*sides, strict=True):
        assert_close_ratio(one, other, 1e-5)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_one_timestep(device, taps):
    x, weight, bias, state = (x.float().to(device) for x in make_inputs(2, 6, 70, taps).values())
    y, last = causal_conv1d(x, weight, bias, initial_state=state, activation="silu", backend="reference")
    memory = poisoned((3, 70, 2, taps - 1), device=device)
    memory[1:, :, 1] = state
    held = memory[1:, :, 1]
    step = torch.ops.amago_kernels.causal_conv1d_step_triton
    for t in range(6):
        version = held._version
        out = (step, _launch_step)[t % 2](x[:, t], weight, bias, held, True)
        assert_close_ratio(out, y[:, t], 1e-5)
        assert held._version > version
    assert torch.equal(held, last)
    assert memory[0].isnan().all() and memory[:, :, 0].isnan().all()
    out = step(x[:, 0].bfloat16(), weight.bfloat16(), None, held, False)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES)
def test_refusals_say_why(device):
    inputs = {name: x.to(device) for name, x in make_inputs(1, 2, 4, 4).items()}
    with pytest.raises(ValueError, match="backend='triton' cannot serve.*not torch.float64"):
        run(inputs, None, "triton", None)
    many = {name: x.float().to(device) for name, x in make_inputs(1, 2, 4, 5).items()}
    with pytest.raises(ValueError, match="1 to 4 taps, and weight has 5"):
        run(many, None, "triton", None)


def test_needs_a_device_outside_of_the_interpreter(monkeypatch):
    monkeypatch.setattr("amago_kernels.dispatch.INTERPRETING", False)
    with pytest.raises(ValueError, match="Triton kernels run on CUDA devices, and the input is on cpu|not installed"):
        run({name: x.float() for name, x in make_inputs(1, 2, 4, 3).items()}, None, "triton", None)


@pytest.mark.gpu
def test_replays_in_a_graph():
    inputs = {name: x.float().cuda().requires_grad_() for name, x in make_inputs(2, 130, 40, 4).items()}
    reset = make_reset("some", 2, 130, device="cuda")
    state = torch.zeros(2, 40, 3, device="cuda")

    def all_results():
        y, last = run(inputs, reset, "auto", "silu")
        grads = torch.autograd.grad(y.square().sum() + last.sum(), list(inputs.values()))
        return y, last, *grads

    def one_step():
        x, weight, bias = (inputs[name].detach() for name in ("x", "weight", "bias"))
        return causal_conv1d_step(x[:, 0], weight, bias, state)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Without their graph, whose nodes belong to this stream.
        expected = [x.detach().clone() for x in all_results()]
        one_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, out = all_results(), one_step()
    state.zero_()
    graph.replay()
    for one, other in zip(got, expected, strict=True):
        assert_close_ratio(one, other, 1e-5)
    once = out.clone()
    graph.replay()
    assert not torch.equal(out, once)


@pytest.mark.gpu
def test_larger_sizes():
    for reset in (None, make_reset("some", 8, 1024, share=0.02)):
        compare(make_inputs(8, 1024, 200, 4), reset, "cuda")
        compare(make_inputs(8, 1024, 200, 4), reset, "cuda", torch.bfloat16, 1e-2)
