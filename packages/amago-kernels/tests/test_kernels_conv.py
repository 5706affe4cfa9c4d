"""`causal_conv1d`: every backend against a loop over taps in float64, with every gradient."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from reset_patterns import PATTERNS, make_reset
from triton_devices import without_triton

from amago_kernels import causal_conv1d, causal_conv1d_step
from amago_kernels.external import WindowCall, conv_refusal, package_conv
from amago_kernels.testing import assert_close_ratio, poisoned

BACKENDS = tuple(name for name in without_triton("causal_conv1d") if name != "causal_conv1d")


def make_inputs(batch, length, channels, taps):
    """x, weight, bias, initial state."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, channels), (channels, taps), (channels,), (batch, channels, taps - 1)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def loop(x, weight, bias, state, reset, silu):
    """Lane by lane, timestep by timestep: the history since the last reset, zeros before it."""
    kept = state.shape[-1]
    lanes, lasts = [], []
    for lane in range(x.shape[0]):
        history, outputs = list(state[lane].unbind(-1)), []
        for t in range(x.shape[1]):
            if reset is not None and reset[lane, t]:
                history = [torch.zeros_like(x[lane, t])] * kept
            history = [*history, x[lane, t]]
            outputs.append(bias + sum(weight[:, w] * history[len(history) - kept - 1 + w] for w in range(kept + 1)))
        lanes.append(torch.stack(outputs))
        lasts.append(torch.stack(history[len(history) - kept :], -1) if kept else state[lane])
    y = torch.stack(lanes)
    return (y * torch.sigmoid(y) if silu else y), torch.stack(lasts)


def scalar(y, last):
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, last)]
    return (y.double() * weights[0]).sum() + (last.double() * weights[1]).sum()


def compare(inputs, reset, backend, dtype, tolerance, activation=None):
    exact = [x.requires_grad_() for x in inputs]
    cast = [x.detach().to(dtype).requires_grad_() for x in inputs]
    expected, expected_last = loop(*exact, reset, activation is not None)
    y, last = causal_conv1d(*cast[:3], initial_state=cast[3], reset=reset, activation=activation, backend=backend)
    assert y.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close_ratio(y, expected, tolerance, "y")
    assert_close_ratio(last, expected_last, 1e-7, "final state")
    wanted = torch.autograd.grad(scalar(expected, expected_last), exact, materialize_grads=True)
    got = torch.autograd.grad(scalar(y, last), cast)
    for name, one, other in zip(("x", "weight", "bias", "initial_state"), got, wanted, strict=True):
        assert_close_ratio(one, other, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_state_and_gradients(backend, kind):
    for length in (1, 2, 63):
        for taps in (1, 2, 4):
            inputs = make_inputs(3, length, 5, taps)
            compare(inputs, make_reset(kind, 3, length), backend, torch.float64, 1e-12, "silu" if taps == 4 else None)


@pytest.mark.parametrize("kind", ["none", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes(backend, dtype, kind):
    inputs = [x.to(dtype).double() for x in make_inputs(2, 130, 60, 4)]
    compare(inputs, make_reset(kind, 2, 130), backend, dtype, 1e-5 if dtype == torch.float32 else 1e-2, "silu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Taps 100, 10 and 1 spell out the last three inputs."""
    x = torch.arange(1.0, 7.0).reshape(1, 6, 1)
    reset = torch.tensor([[False, False, False, True, False, False]])
    state = torch.tensor([[[8.0, 9.0]]])
    y, last = causal_conv1d(x, torch.tensor([[100.0, 10.0, 1.0]]), initial_state=state, reset=reset, backend=backend)
    assert y.flatten().tolist() == [891.0, 912.0, 123.0, 4.0, 45.0, 456.0]
    assert last.flatten().tolist() == [5.0, 6.0]
    y, last = causal_conv1d(x[:, :1], torch.tensor([[100.0, 10.0, 1.0]]), torch.tensor([0.5]), backend=backend)
    assert y.item() == 1.5 and last.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_conv1d(backend):
    x, weight, bias, _ = make_inputs(2, 20, 6, 3)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), weight.unsqueeze(1), bias, groups=6).transpose(1, 2)
    assert_close_ratio(causal_conv1d(x, weight, bias, backend=backend)[0], expected, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_before_a_reset_is_forgotten(backend):
    for length, at in ((1, 0), (9, 4), (9, 8), (9, 0)):
        x, weight, bias, _ = make_inputs(2, length, 4, 4)
        reset = torch.zeros(2, length, dtype=torch.bool)
        reset[0, at] = True
        x[0, :at] = float("nan")
        state = torch.stack([poisoned((4, 3)), torch.zeros(4, 3)])
        y, last = causal_conv1d(x, weight, bias, initial_state=state, reset=reset, backend=backend)
        assert y[0, :at].isnan().all()
        assert y[0, at:].isfinite().all() and y[1].isfinite().all() and last.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_nan_state_is_in_no_gradient(backend):
    x, weight, bias, _ = (tensor.requires_grad_() for tensor in make_inputs(2, 9, 4, 4))
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 0] = True
    grads = []
    for state in (poisoned((2, 4, 3)), torch.zeros(2, 4, 3)):
        y, last = causal_conv1d(x, weight, bias, initial_state=state, reset=reset, backend=backend)
        grads.append(torch.autograd.grad(scalar(y, last), [x, weight, bias]))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_crosses_a_reset(backend):
    x, weight, bias, state = (x.requires_grad_() for x in make_inputs(1, 9, 4, 4))
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, 2] = True
    y, _ = causal_conv1d(x, weight, bias, initial_state=state, reset=reset, backend=backend)
    grad_x, grad_state = torch.autograd.grad(y[:, 2:].sum(), [x, state])
    assert not grad_x[:, :2].any() and not grad_state.any() and grad_x[:, 2:].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    reset = make_reset("some", 3, 20)
    results = []
    for twist in (False, True):
        given = [
            (x.transpose(0, -1).contiguous().transpose(0, -1) if twist else x).detach().requires_grad_()
            for x in make_inputs(3, 20, 4, 3)
        ]
        y, last = causal_conv1d(
            *given[:3], initial_state=given[3], reset=reset.t().contiguous().t() if twist else reset, backend=backend
        )
        results.append([y, last, *torch.autograd.grad(scalar(y, last), given)])
    for one, other in zip(*results, strict=True):
        assert_close_ratio(one, other, 1e-14)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_steps_equal_the_window(taps):
    x, weight, bias, state = (x.float() for x in make_inputs(2, 12, 5, taps))
    y, last = causal_conv1d(x, weight, bias, initial_state=state, activation="silu")
    address = state.data_ptr()
    for t in range(12):
        out = causal_conv1d_step(x[:, t], weight, bias, state, activation="silu")
        assert_close_ratio(out, y[:, t], 1e-6)
    assert torch.equal(state, last) and state.data_ptr() == address
    out = causal_conv1d_step(x[:, 0].bfloat16(), weight.bfloat16(), None, state)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
def test_registration():
    x, weight, _, state = (x.float().requires_grad_() for x in make_inputs(2, 9, 4, 3))
    for reset in (None, make_reset("some", 2, 9)):
        torch.library.opcheck(torch.ops.amago_kernels.causal_conv1d.default, (x, weight, state, reset))
    plain = [one.detach() for one in (x, weight, state)]
    arguments = (torch.randn(2, 9, 4), *plain, reset)
    torch.library.opcheck(torch.ops.amago_kernels.causal_conv1d_backward.default, arguments)


def test_refusals_say_why():
    x, weight, bias, state = make_inputs(2, 5, 4, 3)
    with pytest.raises(ValueError, match="x has shape"):
        causal_conv1d(x[0], weight, bias)
    with pytest.raises(ValueError, match="weight has shape"):
        causal_conv1d(x, weight[:3], bias)
    with pytest.raises(ValueError, match="bias has shape"):
        causal_conv1d(x, weight, bias[:3])
    with pytest.raises(ValueError, match="initial_state has shape"):
        causal_conv1d(x, weight, bias, initial_state=state[..., 1:])
    with pytest.raises(ValueError, match="reset is torch.bool"):
        causal_conv1d(x, weight, bias, reset=torch.zeros(5, 2, dtype=torch.bool))
    for call in (
        lambda: causal_conv1d(x, weight, activation="relu"),
        lambda: causal_conv1d_step(x[:, 0], weight, None, state, activation="relu"),
    ):
        with pytest.raises(ValueError, match="activation='relu' is not allowed"):
            call()
    with pytest.raises(ValueError, match="backend='causal_conv1d' cannot serve"):
        causal_conv1d(x, weight, bias, backend="causal_conv1d")
    with pytest.raises(ValueError, match="x is torch.int64; give a floating dtype"):
        causal_conv1d(x.long(), weight, bias)
    with pytest.raises(ValueError, match="weight is on meta and x on cpu; give one device"):
        causal_conv1d(x, weight.to("meta"), bias)


def test_steps_are_checked():
    """On a GPU nothing else would keep the kernel from reading beyond the end of a tensor."""
    inputs = dict(zip(("x", "weight", "bias", "state"), make_inputs(2, 5, 4, 3), strict=True))
    inputs["x"] = inputs["x"][:, 0]
    causal_conv1d_step(**inputs)
    for name, shape in (("x", (2, 3)), ("bias", (3,)), ("state", (2, 4, 3)), ("state", (1, 4, 2))):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            causal_conv1d_step(**{**inputs, name: torch.zeros(shape)})
    with pytest.raises(ValueError, match="state is torch.int64; give a floating dtype"):
        causal_conv1d_step(**{**inputs, "state": inputs["state"].long()})
    with pytest.raises(ValueError, match="state is on meta and x on cpu; give one device"):
        causal_conv1d_step(**{**inputs, "state": inputs["state"].to("meta")})


def test_what_the_package_refuses():
    call = {"device_type": "cuda", "dtype": torch.float16, "resumed": False, "resets": False, "width": 4}
    assert conv_refusal(WindowCall(**call)) is None
    wrong = {"device_type": "cpu", "dtype": torch.float64, "resumed": True, "resets": True, "width": 5}
    words = {"device_type": "on cpu", "dtype": "float64", "resumed": "initial_state", "resets": "reset", "width": "5"}
    for name, value in wrong.items():
        assert words[name] in conv_refusal(WindowCall(**{**call, name: value}))


def test_layout_for_the_package(monkeypatch):
    def stand_in(x, weight, bias, activation):
        assert x.is_contiguous() and bias.dtype == weight.dtype
        return causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation)[0].transpose(1, 2)

    monkeypatch.setitem(sys.modules, "causal_conv1d", SimpleNamespace(causal_conv1d_fn=stand_in))
    x, weight, bias, _ = (x.float() for x in make_inputs(2, 9, 4, 3))
    expected, _ = causal_conv1d(x, weight, bias, activation="silu", backend="reference")
    assert_close_ratio(package_conv(x, weight, bias.double(), "silu"), expected, 1e-6)


@pytest.mark.gpu
def test_package_on_cuda():
    pytest.importorskip("causal_conv1d")
    given = [x.float().cuda().requires_grad_() for x in make_inputs(2, 130, 16, 4)[:3]]
    results = []
    for backend in ("fused", "causal_conv1d"):
        y, last = causal_conv1d(*given, activation="silu", backend=backend)
        results.append([y, last, *torch.autograd.grad(y.square().sum(), given)])
    for one, other in zip(*results, strict=True):
        assert_close_ratio(one, other, 1e-4)
