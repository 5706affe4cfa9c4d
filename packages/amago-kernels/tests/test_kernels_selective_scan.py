"""`selective_scan`: every backend against a loop over lanes and timesteps in float64, with every gradient."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from reset_patterns import PATTERNS, make_reset
from triton_devices import without_triton

from amago_kernels import selective_scan, selective_scan_step
from amago_kernels.external import WindowCall, mamba_ssm_scan, selective_scan_refusal
from amago_kernels.scan import tiled
from amago_kernels.testing import assert_close_ratio, poisoned

BACKENDS = tuple(name for name in without_triton("selective_scan") if name != "mamba_ssm")
LEAN = tuple(name for name in BACKENDS if name != "reference")
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def make_inputs(batch, length, channels, states):
    generator = torch.Generator().manual_seed(0)
    wide, narrow = (batch, length, channels), (batch, length, states)
    shapes = (wide, wide, (channels, states), narrow, narrow, (channels,), wide, (channels,), (batch, channels, states))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[2] = -tensors[2].exp()
    return dict(zip(NAMES, tensors, strict=True))


def loop(u, delta, A, B, C, D, z, delta_bias, initial_state, reset):
    """Lane by lane, timestep by timestep; the equations as they stand in the docstring."""
    lanes, lasts = [], []
    for lane in range(u.shape[0]):
        h, outputs = initial_state[lane], []
        for t in range(u.shape[1]):
            if reset is not None and reset[lane, t]:
                h = torch.zeros_like(h)
            size = F.softplus(delta[lane, t] + delta_bias)[:, None]
            h = torch.exp(size * A) * h + size * B[lane, t] * u[lane, t, :, None]
            outputs.append((h @ C[lane, t] + D * u[lane, t]) * z[lane, t] * torch.sigmoid(z[lane, t]))
        lanes.append(torch.stack(outputs))
        lasts.append(h)
    return torch.stack(lanes), torch.stack(lasts)


def run(inputs, reset, backend):
    positional, optional = list(inputs.values())[:5], dict(list(inputs.items())[5:])
    return selective_scan(*positional, **optional, delta_softplus=True, reset=reset, backend=backend)


def scalar(y, last):
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, last)]
    return (y.double() * weights[0]).sum() + (last.double() * weights[1]).sum()


def compare(inputs, reset, backend, dtype, tolerance):
    exact = {name: x.requires_grad_() for name, x in inputs.items()}
    cast = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    expected, expected_last = loop(**exact, reset=reset)
    y, last = run(cast, reset, backend)
    assert y.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close_ratio(y, expected, tolerance, "y")
    assert_close_ratio(last, expected_last, tolerance, "final state")
    wanted = torch.autograd.grad(scalar(expected, expected_last), list(exact.values()), materialize_grads=True)
    got = torch.autograd.grad(scalar(y, last), list(cast.values()))
    for name, one, other in zip(NAMES, got, wanted, strict=True):
        assert_close_ratio(one, other, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_state_and_gradients(backend, kind):
    for batch, length in ((3, 1), (3, 63), (2, 130)):
        compare(make_inputs(batch, length, 5, 3), make_reset(kind, batch, length), backend, torch.float64, 1e-12)


@pytest.mark.parametrize("kind", ["none", "some"])
def test_tiles_in_float32(kind, monkeypatch):
    """A lane at a time, two at a time, all at once; chunks that do and do not divide the window."""
    for chunk, lanes in ((16, 1), (13, 2), (64, 3)):
        for name in ("_CPU_TILE", "_LONG_CPU_TILE"):
            monkeypatch.setattr(tiled, name, (chunk, chunk * lanes * 60 * 4))
        compare(make_inputs(3, 65, 60, 4), make_reset(kind, 3, 65), "blocked", torch.float32, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_accumulates_in_float32(backend):
    inputs = {name: x.bfloat16().double() for name, x in make_inputs(2, 40, 8, 4).items()}
    compare(inputs, make_reset("some", 2, 40), backend, torch.bfloat16, 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_lanes(backend):
    inputs = {name: x.requires_grad_() for name, x in make_inputs(0, 20, 5, 3).items()}
    y, last = run(inputs, make_reset("all", 0, 20), backend)
    assert y.shape == (0, 20, 5) and last.shape == (0, 5, 3)
    assert not any(grad.any() for grad in torch.autograd.grad(scalar(y, last), list(inputs.values())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_optional_may_be_left_out(backend):
    inputs = make_inputs(2, 20, 5, 3)
    u, delta, A, B, C = list(inputs.values())[:5]
    y, last = selective_scan(u, delta.abs(), A, B, C, backend=backend)
    zeros = {"D": torch.zeros(5), "delta_bias": torch.zeros(5), "initial_state": torch.zeros(2, 5, 3)}
    again, last_again = selective_scan(u, delta.abs(), A, B, C, **zeros, backend=backend)
    assert torch.equal(y, again) and torch.equal(last, last_again)
    gated, _ = selective_scan(u, delta.abs(), A, B, C, z=inputs["z"], backend=backend)
    assert_close_ratio(gated, y * F.silu(inputs["z"]), 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    u, one = torch.tensor([[[2.0], [1.0]]]), torch.ones(1, 2, 1)
    for delta, softplus in ((math.log(2.0), False), (0.0, True)):
        y, last = selective_scan(
            u,
            torch.full_like(u, delta),
            -torch.ones(1, 1),
            one,
            one,
            D=torch.ones(1),
            delta_softplus=softplus,
            backend=backend,
        )
        torch.testing.assert_close(y.flatten(), torch.tensor([3.3862944, 2.3862944]))
        torch.testing.assert_close(last.flatten(), torch.tensor([1.3862944]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_before_a_reset_is_forgotten(backend):
    for length, at in ((1, 0), (9, 4), (40, 0), (40, 17)):
        inputs = make_inputs(2, length, 4, 3)
        reset = torch.zeros(2, length, dtype=torch.bool)
        reset[0, at] = True
        for name in ("u", "delta", "B", "C", "z"):
            inputs[name][0, :at] = float("nan")
        inputs["initial_state"][0] = poisoned((4, 3))
        y, last = run(inputs, reset, backend)
        assert y[0, :at].isnan().all()
        assert y[0, at:].isfinite().all() and y[1].isfinite().all() and last.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_crosses_a_reset(backend):
    inputs = {name: x.requires_grad_() for name, x in make_inputs(1, 40, 4, 3).items()}
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 25] = True
    y, _ = run(inputs, reset, backend)
    names = ("u", "delta", "B", "C", "z", "initial_state")
    for name, grad in zip(names, torch.autograd.grad(y[:, 25:].sum(), [inputs[n] for n in names]), strict=True):
        assert not grad[:, :25].any(), name
        assert name == "initial_state" or grad[:, 25:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    inputs = make_inputs(3, 20, 4, 5)
    reset = make_reset("some", 3, 20)
    results = []
    for twist in (False, True):
        given = {
            name: (x.transpose(0, -1).contiguous().transpose(0, -1) if twist else x).detach().requires_grad_()
            for name, x in inputs.items()
        }
        y, last = run(given, reset.t().contiguous().t() if twist else reset, backend)
        results.append([y, last, *torch.autograd.grad(scalar(y, last), list(given.values()))])
    for one, other in zip(*results, strict=True):
        assert_close_ratio(one, other, 1e-13)


def test_steps_equal_the_scan():
    inputs = {name: x.float() for name, x in make_inputs(2, 30, 5, 3).items()}
    y, last = run(inputs, None, "auto")
    state = inputs["initial_state"].clone()
    address = state.data_ptr()
    for t in range(30):
        u, delta, B, C, z = (inputs[name][:, t] for name in ("u", "delta", "B", "C", "z"))
        options = {"D": inputs["D"], "z": z, "delta_bias": inputs["delta_bias"], "delta_softplus": True}
        out = selective_scan_step(u, delta, inputs["A"], B, C, state, **options)
        assert_close_ratio(out, y[:, t], 1e-5)
    assert_close_ratio(state, last, 1e-5)
    half = [x.bfloat16() for x in (u, delta, B, C)]
    out = selective_scan_step(half[0], half[1], inputs["A"], *half[2:], state)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32 and state.data_ptr() == address


@pytest.mark.parametrize("backend", LEAN)
def test_never_holds_all_states_of_the_window(backend):
    """The buffers inside of the operation, and all it hands out or keeps for the backward pass, are smaller."""
    inputs = {name: x.float().requires_grad_() for name, x in make_inputs(1, 2048, 16, 16).items()}
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else (out,):
                if isinstance(one, torch.Tensor):
                    largest = max(largest, one.untyped_storage().nbytes() // one.element_size())
            return out

    with Watch():
        sum(x.sum() for x in run(inputs, None, backend)).backward()
    assert 0 < largest <= 2048 * 16 * 16 // 4
    assert tiled._tiles(inputs["u"], inputs["A"], 4)[2].numel() <= 2048 * 16 * 16 // 4


@pytest.mark.filterwarnings("ignore")
def test_registration():
    inputs = {name: x.float().requires_grad_() for name, x in make_inputs(2, 20, 4, 3).items()}
    arguments = [inputs[name] for name in ("u", "delta", "A", "B", "C", "initial_state")]
    for reset in (None, make_reset("some", 2, 20)):
        torch.library.opcheck(torch.ops.amago_kernels.selective_scan_tiled.default, (*arguments, reset))
    plain = [x.detach() for x in arguments]
    _, last, starts = torch.ops.amago_kernels.selective_scan_tiled(*plain, reset)
    torch.library.opcheck(
        torch.ops.amago_kernels.selective_scan_tiled_backward.default,
        (torch.randn(2, 20, 4), torch.randn_like(last), *plain[:5], starts, reset),
    )


@pytest.mark.parametrize("backend", LEAN)
def test_float32_under_autocast(backend):
    inputs = {name: x.float().requires_grad_() for name, x in make_inputs(2, 20, 4, 3).items()}
    expected = torch.autograd.grad(scalar(*run(inputs, None, backend)), list(inputs.values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scalar(*run(inputs, None, backend))
        got = torch.autograd.grad(out, list(inputs.values()))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_refusals_say_why():
    inputs = make_inputs(2, 5, 4, 3)
    for name, wrong in (("delta", 3), ("A", 3), ("B", 2), ("C", 2), ("z", 3), ("D", 3), ("initial_state", 2)):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            run({**inputs, name: inputs[name][..., :wrong] if name != "A" else inputs[name][:wrong]}, None, "auto")
    with pytest.raises(ValueError, match="u has shape"):
        run({**inputs, "u": inputs["u"][0]}, None, "auto")
    with pytest.raises(ValueError, match="reset is torch.bool"):
        run(inputs, torch.zeros(5, 2, dtype=torch.bool), "auto")
    with pytest.raises(ValueError, match="backend='cuda' is not known"):
        run(inputs, None, "cuda")
    with pytest.raises(ValueError, match="backend='mamba_ssm' cannot serve.*'reference'"):
        run(inputs, None, "mamba_ssm")
    for name in ("u", "D", "initial_state"):
        with pytest.raises(ValueError, match=f"{name} is torch.int64; give a floating dtype"):
            run({**inputs, name: inputs[name].long()}, None, "auto")
    with pytest.raises(ValueError, match="A is on meta and u on cpu; give one device"):
        run({**inputs, "A": inputs["A"].to("meta")}, None, "auto")
    with pytest.raises(ValueError, match="N >= 1"):
        run({**inputs, "A": inputs["A"][:, :0]}, None, "auto")


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_steps_are_checked(name):
    """On a GPU nothing else would keep the kernel from reading beyond the end of a tensor."""
    shapes = {"u": (2, 4), "delta": (2, 4), "A": (4, 3), "B": (2, 3), "C": (2, 3), "state": (2, 4, 3)}
    shapes |= {"D": (4,), "z": (2, 4), "delta_bias": (4,)}
    inputs = {key: torch.zeros(shape) for key, shape in shapes.items()}
    selective_scan_step(**inputs)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        selective_scan_step(**{**inputs, name: inputs[name][..., 1:]})
    with pytest.raises(ValueError, match=f"{name} is on meta and state on cpu"):
        selective_scan_step(**{**inputs, name: inputs[name].to("meta")})
    with pytest.raises(ValueError, match=f"{name} is torch.int64"):
        selective_scan_step(**{**inputs, name: inputs[name].long()})


def test_what_mamba_ssm_refuses():
    call = {"device_type": "cuda", "dtype": torch.float32, "resumed": False, "resets": False, "width": 16}
    assert selective_scan_refusal(WindowCall(**call)) is None
    wrong = {"device_type": "cpu", "dtype": torch.float64, "resumed": True, "resets": True, "width": 300}
    words = {"device_type": "on cpu", "dtype": "float64", "resumed": "initial_state", "resets": "reset", "width": "256"}
    for name, value in wrong.items():
        assert words[name] in selective_scan_refusal(WindowCall(**{**call, name: value}))


def test_layout_for_mamba_ssm(monkeypatch):
    """A stand-in with the package's interface, `[B, D, L]`, gets what it needs to give the same."""

    def stand_in(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        assert return_last_state and {x.dtype for x in (u, delta, B, C, z)} == {torch.bfloat16}
        assert {x.dtype for x in (A, D, delta_bias)} == {torch.float32}
        turned = [x.transpose(1, 2) for x in (u, delta)], [x.transpose(1, 2) for x in (B, C, z)]
        y, last = selective_scan(
            *turned[0], A, *turned[1][:2], D=D, z=turned[1][2], delta_bias=delta_bias, delta_softplus=delta_softplus
        )
        return y.transpose(1, 2), last

    module = "mamba_ssm.ops.selective_scan_interface"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(selective_scan_fn=stand_in))
    inputs = {name: x.bfloat16() for name, x in make_inputs(2, 20, 5, 3).items() if name != "initial_state"}
    for name in ("A", "D", "delta_bias"):
        inputs[name] = inputs[name].float()
    expected, expected_last = run(inputs, None, "reference")
    y, last = mamba_ssm_scan(**inputs, delta_softplus=True)
    assert_close_ratio(y, expected, 1e-2)
    assert_close_ratio(last, expected_last, 1e-5)


@pytest.mark.gpu
def test_mamba_ssm_on_cuda():
    pytest.importorskip("mamba_ssm")
    inputs = {name: x.float().cuda() for name, x in make_inputs(2, 130, 16, 8).items() if name != "initial_state"}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    results = []
    for backend in ("blocked", "mamba_ssm"):
        y, last = run(inputs, None, backend)
        results.append([y, last, *torch.autograd.grad(y.square().sum(), list(inputs.values()))])
    for one, other in zip(*results, strict=True):
        assert_close_ratio(one, other, 1e-3)
