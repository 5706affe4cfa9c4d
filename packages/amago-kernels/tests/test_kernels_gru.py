"""`gru_layer`: every backend against `torch.nn.GRU` and the reference in float64, with every gradient."""

from __future__ import annotations

import pytest
import torch

from amago_kernels import available, gru_layer
from amago_kernels.testing import assert_close_ratio

BACKENDS = ("auto", *available()["gru_layer"])


def make_inputs(batch, length, inputs, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (batch, length, inputs),
        (batch, size),
        (3 * size, inputs),
        (3 * size, size),
        (3 * size,),
        (3 * size,),
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def make_reset(kind, batch, length):
    reset = torch.zeros(batch, length, dtype=torch.bool)
    if kind == "first":
        reset[:, 0] = True
    elif kind == "last":
        reset[:, -1] = True
    elif kind == "all":
        reset[:] = True
    elif kind == "some":
        reset[:] = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < 0.2
    return None if kind == "none" else reset


def weigh(out):
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torch(backend):
    layer = torch.nn.GRU(5, 7, batch_first=True, dtype=torch.float64)
    x, hidden = make_inputs(3, 11, 5, 7)[:2]
    expected, last = layer(x, hidden.unsqueeze(0))
    weights = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0]
    wanted = torch.autograd.grad(weigh(expected), [x, hidden, *weights])
    out = gru_layer(x, hidden, *weights, backend=backend)
    assert_close_ratio(out, expected, 1e-12)
    assert_close_ratio(out[:, -1], last[0], 1e-12)
    for got, want in zip(torch.autograd.grad(weigh(out), [x, hidden, *weights]), wanted, strict=True):
        assert_close_ratio(got, want, 1e-12)


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (3, 63, 5, 8), (1, 130, 4, 3)])
@pytest.mark.parametrize("kind", ["none", "first", "last", "all", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients(dtype, kind, shape):
    exact, inputs = make_inputs(*shape), make_inputs(*shape, dtype=dtype)
    reset = make_reset(kind, *shape[:2])
    expected = gru_layer(*exact, reset=reset, backend="reference")
    out = gru_layer(*inputs, reset=reset, backend="fused")
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close_ratio(out, expected, tolerance)
    wanted = torch.autograd.grad(weigh(expected), exact)
    for got, want in zip(torch.autograd.grad(weigh(out.double()), inputs), wanted, strict=True):
        assert_close_ratio(got, want, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reset_equals_a_fresh_start(backend):
    x, hidden, *weights = make_inputs(2, 9, 3, 4)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 4] = True
    out = gru_layer(x, hidden, *weights, reset=reset, backend=backend)
    fresh = gru_layer(x[:1, 4:], torch.zeros(1, 4, dtype=torch.float64), *weights, backend=backend)
    assert_close_ratio(out[:1, 4:], fresh, 1e-12)
    assert_close_ratio(out[1:], gru_layer(x[1:], hidden[1:], *weights, backend=backend), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_before_a_reset_is_forgotten(backend):
    x, hidden, *weights = (t.detach() for t in make_inputs(2, 9, 3, 4))
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 4] = True
    x[0, :4] = float("nan")
    out = gru_layer(x, hidden, *weights, reset=reset, backend=backend)
    assert out[0, :4].isnan().all()
    assert out[0, 4:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """One unit, input weights 1, recurrent weights .5, recurrent candidate bias .1, inputs 1 and -1."""
    x = torch.tensor([[[1.0], [-1.0]]])
    bias = torch.tensor([0.0, 0.0, 0.1])
    out = gru_layer(
        x, torch.zeros(1, 1), torch.ones(3, 1), torch.full((3, 1), 0.5), torch.zeros(3), bias, backend=backend
    )
    torch.testing.assert_close(out.flatten(), torch.tensor([0.2126327, -0.4600436]))


def test_any_strides_and_no_gradient_for_x():
    x, hidden, *weights = make_inputs(3, 6, 4, 5)
    out = gru_layer(x, hidden, *weights, backend="fused")
    twisted = x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    again = gru_layer(twisted, hidden.t().contiguous().t(), *weights, backend="fused")
    assert_close_ratio(again, out, 1e-14)
    wanted = torch.autograd.grad(weigh(out), weights)
    for got, want in zip(torch.autograd.grad(weigh(again), weights), wanted, strict=True):
        assert_close_ratio(got, want, 1e-12)


def test_float32_under_autocast():
    inputs = make_inputs(2, 5, 3, 4, torch.float32)
    expected = gru_layer(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gru_layer(*inputs)
    assert torch.equal(out, expected)


def test_refusals_say_why():
    x, hidden, *weights = make_inputs(2, 5, 3, 4)
    with pytest.raises(ValueError, match="x has shape"):
        gru_layer(x[0], hidden, *weights)
    with pytest.raises(ValueError, match="initial_state has shape"):
        gru_layer(x, hidden[:1], *weights)
    with pytest.raises(ValueError, match="weight_ih has shape"):
        gru_layer(x[..., :2], hidden, *weights)
    with pytest.raises(ValueError, match="reset is torch.int64"):
        gru_layer(x, hidden, *weights, reset=torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="backend='cudnn' is not known"):
        gru_layer(x, hidden, *weights, backend="cudnn")
    half = [tensor.half() for tensor in (x, hidden, *weights)]
    with pytest.raises(ValueError, match="accumulate in torch.float16"):
        gru_layer(*half, backend="fused")
