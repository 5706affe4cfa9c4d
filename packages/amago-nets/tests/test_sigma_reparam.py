"""Sigma-reparametrisation: numbers by hand, exact start, and buffers that only the explicit call changes."""

from __future__ import annotations

import copy

import pytest
import torch

from amago_nets.sigma_reparam import SigmaReparamLinear, make_linear, update_spectral_norms
from amago_nets.traj_encoders import TransformerConfig


def example() -> SigmaReparamLinear:
    layer = SigmaReparamLinear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0]]))
        layer.bias.zero_()
        layer.u.copy_(torch.tensor([1.0, 0.0, 0.0]))
        layer.v.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    return layer


def sigma_of(layer: SigmaReparamLinear) -> float:
    return float((layer.gamma / layer.gain()).detach())


def test_by_hand():
    layer = example()
    x = torch.ones(2, 4)
    sigmas, outputs = [], []
    for _ in range(3):
        update_spectral_norms(layer)
        sigmas.append(sigma_of(layer))
        outputs.append(layer(x)[0].tolist())
    assert sigmas == pytest.approx([2.2360680, 2.4140390, 2.4142137], abs=1e-6)
    assert outputs[0] == pytest.approx([1.3416407, 0.4472136, 0.2236068], abs=1e-6)
    assert outputs[2] == pytest.approx([1.2426406, 0.4142135, 0.2071068], abs=1e-6)


def test_starts_with_spectral_norm_one():
    layer = SigmaReparamLinear(24, 16)
    effective = (layer.weight * layer.gain()).detach()
    assert float(torch.linalg.matrix_norm(effective, 2)) == pytest.approx(1.0, abs=1e-5)
    assert 0.015 < float(layer.weight.detach().std()) < 0.025
    assert float(layer.bias.detach().abs().max()) <= 24**-0.5
    assert layer.u.is_contiguous() and layer.v.is_contiguous()
    assert layer.u.stride() == (1,) and layer.v.stride() == (1,)


def test_the_two_formulas_of_forward_agree():
    layer = SigmaReparamLinear(6, 5)
    x = torch.randn(7, 6)
    with torch.no_grad():
        few = layer(x)
    torch.testing.assert_close(few, layer(x))
    torch.testing.assert_close(few, layer(x.view(1, 7, 6))[0])
    plain = SigmaReparamLinear(6, 5, bias=False)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), plain(x.view(1, 7, 6))[0])


def test_gradient_flows_through_sigma():
    """u and v are constants; the gradient of the weight contains that of sigma."""
    layer = SigmaReparamLinear(4, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    weight, gamma = layer.weight.detach().clone().requires_grad_(), torch.ones((), dtype=torch.float64)
    gamma.requires_grad_()
    sigma = layer.u @ weight @ layer.v
    expected = torch.autograd.grad((x @ (weight * gamma / sigma).t()).square().sum(), [weight, gamma])
    loss = (layer(x) - layer.bias).square().sum()
    for got, want in zip(torch.autograd.grad(loss, [layer.weight, layer.gamma]), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_only_the_explicit_call_changes_buffers():
    model = TransformerConfig(d_model=8, n_heads=2, n_layers=1).build(3, 4).train()
    addresses = [buffer.data_ptr() for buffer in model.buffers()]
    before = copy.deepcopy(dict(model.named_buffers()))
    assert len(before) == 8
    x, time_idx = torch.randn(2, 4, 3), torch.arange(4).expand(2, 4)
    model(x, time_idx)[0].sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    update_spectral_norms(model)
    assert all(not torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert [buffer.data_ptr() for buffer in model.buffers()] == addresses
    for _ in range(200):
        update_spectral_norms(model)
    layer = model.layers[0].ff1
    assert sigma_of(layer) == pytest.approx(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)), rel=1e-3)


def test_fast_init_and_plain():
    layer = SigmaReparamLinear(8, 4, fast_init=True)
    assert float(layer.u.norm()) == pytest.approx(1.0, abs=1e-6)
    assert isinstance(make_linear(3, 2), torch.nn.Linear)
    assert make_linear(3, 2, bias=False).bias is None
    assert make_linear(3, 2, bias=False, sigma_reparam=True).bias is None
    assert "out_features=4" in repr(layer)
