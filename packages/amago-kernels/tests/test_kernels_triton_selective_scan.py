"""The Triton kernels of the selective scan against the reference in float64, with every gradient."""

from __future__ import annotations

import pytest
import torch
from quick_interpreter import hurry
from reset_patterns import PATTERNS, make_reset
from triton_devices import DEVICES

from amago_kernels import selective_scan, selective_scan_step
from amago_kernels.scan.selective_ops import compiled_scan, launch_step, triton_step
from amago_kernels.testing import assert_close_ratio, poisoned

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    hurry(monkeypatch)


def make_inputs(batch, length, channels, states, without=()):
    generator = torch.Generator().manual_seed(0)
    wide, narrow = (batch, length, channels), (batch, length, states)
    shapes = (wide, wide, (channels, states), narrow, narrow, (channels,), wide, (channels,), (batch, channels, states))
    inputs = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in zip(NAMES, shapes, strict=True)
    }
    inputs["A"] = -inputs["A"].exp()
    return {name: x for name, x in inputs.items() if name not in without}


def run(inputs, reset, backend, softplus=True):
    options = dict(list(inputs.items())[5:])
    return selective_scan(*list(inputs.values())[:5], **options, delta_softplus=softplus, reset=reset, backend=backend)


def scalar(y, last):
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device) for x in (y, last)]
    return (y.double() * weights[0]).sum() + (last.double() * weights[1]).sum()


def results(inputs, reset, backend, softplus=True):
    given = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, last = run(given, reset, backend, softplus)
    grads = torch.autograd.grad(scalar(y, last), list(given.values()), materialize_grads=True)
    return {"y": y, "final state": last} | dict(zip(given, grads, strict=True))


def compare(inputs, reset, device, dtype=torch.float32, tolerance=1e-5, softplus=True):
    """`inputs` are rounded to `dtype` first, but for what layers keep in float32."""
    kept = ("A", "D", "delta_bias", "initial_state")
    cast = {name: x.to(device, torch.float32 if name in kept else dtype) for name, x in inputs.items()}
    exact = {name: x.double().cpu() for name, x in cast.items()}
    wanted = results(exact, reset, "reference", softplus)
    got = results(cast, None if reset is None else reset.to(device), "triton", softplus)
    assert got["y"].dtype == dtype and got["final state"].dtype == torch.float32
    for name, one in got.items():
        assert name in ("y", "final state") or one.dtype == cast[name].dtype
        assert_close_ratio(one.cpu(), wanted[name], tolerance, name)


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("device", DEVICES)
def test_output_state_and_gradients(device, kind):
    for batch, length, channels, states in ((3, 1, 5, 3), (2, 20, 12, 3), (1, 67, 12, 3)):
        compare(make_inputs(batch, length, channels, states), make_reset(kind, batch, length), device)


@pytest.mark.parametrize("device", DEVICES)
def test_several_chunks_and_blocks(device):
    compare(make_inputs(1, 130, 12, 9), make_reset("some", 1, 130, share=0.05), device)
    compare(make_inputs(1, 7, 60, 16), make_reset("some", 1, 7), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(device, dtype):
    compare(make_inputs(2, 20, 12, 4), make_reset("some", 2, 20), device, dtype, 1e-2)


@pytest.mark.parametrize("states", [1, 16, 40, 256])
@pytest.mark.parametrize("device", DEVICES)
def test_states_per_channel(device, states):
    compare(make_inputs(1, 5, 10, states), make_reset("some", 1, 5), device)


@pytest.mark.parametrize(
    "without",
    [("D",), ("z",), ("delta_bias",), ("initial_state",), ("D", "z", "delta_bias", "initial_state")],
    ids="-".join,
)
@pytest.mark.parametrize("device", DEVICES)
def test_everything_optional_may_be_left_out(device, without):
    inputs = make_inputs(2, 9, 5, 3, without)
    inputs["delta"] = inputs["delta"].abs()
    compare(inputs, None, device, softplus="delta_bias" in without)


@pytest.mark.parametrize("device", DEVICES)
def test_every_configuration(device, monkeypatch):
    from amago_kernels.scan.triton_selective import _FORWARD
    from amago_kernels.scan.triton_selective_backward import BACKWARD

    for kernels, states in ((0, 3), (1, 33)):
        inputs, reset = make_inputs(1, 13, 10, states), make_reset("some", 1, 13)
        sides = _FORWARD[kernels], BACKWARD[kernels]
        for number in range(max(len(kernel.configs) for kernel in sides)):
            with monkeypatch.context() as patch:
                for kernel in sides:
                    patch.setattr(kernel, "configs", kernel.configs[number % len(kernel.configs) :])
                compare(inputs, reset, device)


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_outputs_that_are_used_are_differentiated(device):
    inputs = {name: x.float().to(device) for name, x in make_inputs(2, 9, 5, 3).items()}
    for place in (0, 1):
        sides = []
        for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
            given = [x.detach().to(dtype).requires_grad_() for x in inputs.values()]
            out = run(dict(zip(NAMES, given, strict=True)), None, backend)[place].square().sum()
            sides.append(torch.autograd.grad(out, given, materialize_grads=True))
        for name, one, other in zip(NAMES, sides[1], sides[0], strict=True):
            assert_close_ratio(one, other, 1e-5, name)


@pytest.mark.parametrize("device", DEVICES)
def test_keeps_nothing_without_gradients(device):
    inputs = {name: x.float().to(device) for name, x in make_inputs(1, 9, 5, 3).items()}
    arguments = (*inputs.values(), None, True, False)
    assert compiled_scan(*arguments, False)[2].numel() == 0
    y, last, starts = compiled_scan(*arguments, True)
    assert starts.shape == (1, 1, 3, 5)
    assert torch.equal(run(inputs, None, "triton")[0], y)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_before_a_reset_is_forgotten(device):
    for length, at in ((1, 0), (9, 4), (21, 17)):
        inputs = {name: x.float().to(device) for name, x in make_inputs(2, length, 4, 3).items()}
        reset = torch.zeros(2, length, dtype=torch.bool, device=device)
        reset[0, at] = True
        for name in ("u", "delta", "B", "C", "z"):
            inputs[name][0, :at] = float("nan")
        inputs["initial_state"][0] = poisoned((4, 3))
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
        y, last = run(inputs, reset, "triton")
        assert y[0, :at].isnan().all()
        assert y[0, at:].isfinite().all() and y[1].isfinite().all() and last.isfinite().all()
        grads = torch.autograd.grad(y[:, at:].sum(), [inputs[name] for name in ("u", "delta", "B", "C", "z")])
        for grad in grads:
            assert grad[0, at:].isfinite().all() and grad[1].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_states_that_grow_are_no_nan_where_the_reference_has_none(device):
    """Decays whose products are beyond the largest float32, on states that are zero until the last timestep."""
    inputs = {name: x.float().to(device) for name, x in make_inputs(1, 20, 4, 3, ("initial_state",)).items()}
    inputs["A"].fill_(20.0)
    inputs["delta"].fill_(2.0)
    inputs["delta_bias"].fill_(0.0)
    inputs["u"][:, :-1] = 0.0
    y, last = run(inputs, None, "triton")
    expected, expected_last = run(inputs, None, "reference")
    assert_close_ratio(y, expected, 1e-5)
    assert_close_ratio(last, expected_last, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides(device):
    inputs = {name: x.float().to(device) for name, x in make_inputs(3, 9, 4, 5).items()}
    reset = make_reset("some", 3, 9, device=device)
    expected = results(inputs, reset, "triton")
    turned = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    halves = dict(inputs)
    for name in ("u", "delta", "z", "B", "C"):
        halves[name] = torch.cat([inputs[name], inputs[name]], dim=-1).chunk(2, dim=-1)[1]
    for twisted in (turned, halves):
        for name, one in results(twisted, reset.t().contiguous().t(), "triton").items():
            assert_close_ratio(one, expected[name], 1e-6, name)


@pytest.mark.parametrize("device", DEVICES)
def test_no_lanes(device):
    inputs = {name: x.float().to(device) for name, x in make_inputs(0, 7, 5, 3).items()}
    for one in results(inputs, None, "triton").values():
        assert not one.any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_backward_pass_that_was_not_foreseen(device):
    """As of a program that was exported with inputs that wanted no gradients."""
    inputs = [x.float().to(device) for x in make_inputs(1, 9, 5, 3).values()]
    sides = []
    for keep in (False, True):
        given = [x.clone().requires_grad_() for x in inputs]
        y, last, _ = compiled_scan(*given, None, True, False, keep)
        sides.append(torch.autograd.grad(y.sum() + last.sum(), given))
    for one, other in zip(*sides, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    inputs = {name: x.float().to(device).requires_grad_() for name, x in make_inputs(2, 5, 4, 3).items()}
    arguments = list(inputs.values())
    operators = torch.ops.amago_kernels
    reset = make_reset("some", 2, 5, device=device)
    torch.library.opcheck(operators.selective_scan.default, (*arguments, reset, True, False, True))
    plain = [x.detach() for x in arguments]
    bare = [*plain[:5], None, None, None, None, None, False, False]
    torch.library.opcheck(operators.selective_scan.default, (*bare, False))
    y, last, starts = operators.selective_scan(*bare, True)
    for grads in ((torch.randn_like(y), None), (None, torch.randn_like(last))):
        torch.library.opcheck(operators.selective_scan_backward.default, (*grads, starts, *bare))
    first = [x[:, 0] if x.dim() == 3 and place != 8 else x for place, x in enumerate(plain)]
    torch.library.opcheck(operators.selective_scan_step_triton.default, (*first, True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_in_one_piece(device):
    torch._dynamo.reset()
    inputs = {name: x.float().to(device) for name, x in make_inputs(2, 5, 4, 3).items()}
    reset = make_reset("some", 2, 5, device=device)

    def loss(*given):
        y, last = run(dict(zip(NAMES, given, strict=True)), reset, "triton")
        return y.square().sum() + last.sum()

    sides = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        given = [x.detach().requires_grad_() for x in inputs.values()]
        out = function(*given)
        sides.append([out, *torch.autograd.grad(out, given)])
    for one, other in zip(*sides, strict=True):
        assert_close_ratio(one, other, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_one_timestep(device):
    for without in ((), ("D", "z", "delta_bias")):
        given = {name: x.float().to(device) for name, x in make_inputs(2, 6, 20, 3, without).items()}
        y, last = run({name: x.double() for name, x in given.items()}, None, "reference")
        state, per_step = given.pop("initial_state"), ("u", "delta", "B", "C", "z")
        memory = poisoned((3, 20, 2, 3), device=device)
        memory[1:, :, 1] = state
        held = memory[1:, :, 1]
        for t in range(6):
            now = {name: x[:, t] if name in per_step else x for name, x in given.items()}
            options = [now.get(name) for name in ("D", "z", "delta_bias")]
            step, version = (triton_step, launch_step)[t % 2], held._version
            out = step(*list(now.values())[:5], *options, held, True)
            assert_close_ratio(out, y[:, t], 1e-5)
            assert held._version > version
        assert_close_ratio(held, last, 1e-5)
        assert memory[0].isnan().all() and memory[:, :, 0].isnan().all()
        halves = [x[:, 0].bfloat16() for x in list(given.values())[:2]]
        out = triton_step(*halves, given["A"], given["B"][:, 0], given["C"][:, 0], None, None, None, held, True)
        assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES)
def test_refusals_say_why(device):
    inputs = {name: x.to(device) for name, x in make_inputs(1, 2, 4, 3).items()}
    with pytest.raises(ValueError, match="backend='triton' cannot serve.*not torch.float64"):
        run(inputs, None, "triton")
    with pytest.raises(ValueError, match="not torch.float64"):
        run({name: x if name == "D" else x.float() for name, x in inputs.items()}, None, "triton")
    many = {name: x.float().to(device) for name, x in make_inputs(1, 2, 4, 257).items()}
    with pytest.raises(ValueError, match="at most 256 states per channel, and A asks for 257"):
        run(many, None, "triton")


def test_needs_a_device_outside_of_the_interpreter(monkeypatch):
    monkeypatch.setattr("amago_kernels.dispatch.INTERPRETING", False)
    with pytest.raises(ValueError, match="Triton kernels run on CUDA devices, and the input is on cpu|not installed"):
        run({name: x.float() for name, x in make_inputs(1, 2, 4, 3).items()}, None, "triton")


@pytest.mark.gpu
def test_replays_in_a_graph():
    inputs = {name: x.float().cuda().requires_grad_() for name, x in make_inputs(2, 130, 40, 16).items()}
    reset = make_reset("some", 2, 130, device="cuda")

    def all_results():
        y, last = run(inputs, reset, "auto")
        return y, last, *torch.autograd.grad(y.square().sum() + last.sum(), list(inputs.values()))

    state = torch.zeros(2, 40, 16, device="cuda")

    def one_step():
        now = [inputs[name].detach()[:, 0] for name in ("u", "delta")]
        maps = [inputs[name].detach()[:, 0] for name in ("B", "C")]
        return selective_scan_step(*now, inputs["A"].detach(), *maps, state, delta_softplus=True)

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
        compare(make_inputs(8, 1024, 96, 16), reset, "cuda")
        compare(make_inputs(8, 1024, 96, 16), reset, "cuda", torch.bfloat16, 1e-2)
