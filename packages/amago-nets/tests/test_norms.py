from __future__ import annotations

import pytest
import torch

from amago_nets.mlp import MLP
from amago_nets.norms import ACTIVATIONS, NORMS, SimNorm, make_activation, make_norm

VALUES = {
    "layer": (1.3834375, 2.0344670, -0.5696507),
    "rmsnorm": (1.6970534, 2.2627380, 0.0),
    "unitball": (0.5999988, 0.7999984, 0.0),
    "unitball-detach": (0.5999988, 0.7999984, 0.0),
    "hypersphere": (1.6970563, 2.2627417, 0.0),
    "simnorm": (0.2489417, 0.6766937, 0.0123941),
    "none": (3.0, 4.0, 0.0),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_values(name: str) -> None:
    first, second, others = VALUES[name]
    x = torch.tensor([3.0, 4.0] + [0.0] * 6).expand(2, 3, 8)
    expected = torch.tensor([first, second] + [others] * 6).expand(2, 3, 8)
    torch.testing.assert_close(make_norm(name, 8)(x), expected, rtol=1e-6, atol=1e-6)


def test_unitball_detach_changes_only_the_gradient() -> None:
    grads = {}
    for name in ("unitball", "unitball-detach"):
        x = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
        make_norm(name, 2)(x).sum().backward()
        grads[name] = x.grad
    torch.testing.assert_close(grads["unitball-detach"], torch.full((2,), 1 / 5.00001, dtype=torch.float64))
    # d/dx_i of sum(x) / n = (1 - x_i sum(x) / n^2) / n
    torch.testing.assert_close(
        grads["unitball"], torch.tensor([4 / 125, -3 / 125], dtype=torch.float64), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", ["unitball", "hypersphere"])
def test_zero_vector_stays_finite(name: str) -> None:
    assert torch.equal(make_norm(name, 8)(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_simnorm_groups() -> None:
    y = make_norm("simnorm", 16)(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(y.view(3, 2, 8).sum(-1), torch.ones(3, 2))
    assert SimNorm(2)(torch.zeros(4)).tolist() == [0.5] * 4
    with pytest.raises(ValueError, match="dim=12.*multiple of 8"):
        make_norm("simnorm", 12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("leaky_relu", (-0.02, -0.005, 0.0, 1.0, 3.0)),
        ("relu", (0.0, 0.0, 0.0, 1.0, 3.0)),
        ("gelu", (-0.0455003, -0.1542688, 0.0, 0.8413447, 2.9959497)),
        ("mish", (-0.2525015, -0.2207438, 0.0, 0.8650984, 2.9865351)),
        ("adaptive", (-0.0178311, 0.0017627, 0.0297928, 1.0007833, 2.9964871)),
    ],
)
def test_activation_values(name: str, expected: tuple[float, ...]) -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])
    torch.testing.assert_close(make_activation(name)(x), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert x[0] == -2.0
    torch.testing.assert_close(make_activation(name, inplace=True)(x), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_adaptive_learns_its_own_coefficients() -> None:
    first, second = make_activation("adaptive"), make_activation("adaptive", inplace=True)
    assert sum(p.numel() for p in first.parameters()) == 10
    assert not list(make_activation("mish").parameters())
    x = torch.tensor([-2.0, 0.5, 3.0])
    first(x).sum().backward()
    assert all(p.grad is not None and p.grad.ne(0).all() for p in first.parameters())
    assert all(p.grad is None for p in second.parameters())
    assert torch.equal(x, torch.tensor([-2.0, 0.5, 3.0]))
    half = first.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), second(x), rtol=0.02, atol=0.02)
    wide = make_activation("adaptive").double()
    assert torch.autograd.gradcheck(wide, torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="norm='batch'.*'layer'"):
        make_norm("batch", 4)
    with pytest.raises(ValueError, match="activation='tanh'.*'mish'"):
        make_activation("tanh")
    with pytest.raises(ValueError, match="dim=0"):
        make_norm("layer", 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation: str) -> None:
    mlp = MLP(3, 8, 2, n_layers=2, activation=activation, norm="layer", dropout=0.5)
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    assert mlp(x).shape == (4, 5, 2)
    mlp.eval()
    first, second, last = (layer for layer in mlp.layers if isinstance(layer, torch.nn.Linear))
    act, norm = make_activation(activation), make_norm("layer", 8)
    torch.testing.assert_close(mlp(x), last(act(norm(second(act(norm(first(x))))))))
    with pytest.raises(ValueError, match=r"dropout=1.0.*\[0, 1\)"):
        MLP(3, 8, 2, n_layers=1, dropout=1.0)
