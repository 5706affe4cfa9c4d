from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from amago_nets.heads import NCritics, NCriticsConfig, discount_feature
from amago_nets.heads.critic import EnsembleLinear
from amago_nets.registry import lookup
from amago_nets.specs import ActionSpec

GAMMAS = (0.1, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999)
PHI = (0.7472144, 2.3978953, 3.0445224, 3.5361167, 4.6151205, 5.3033049, 6.9087548)


def build(kind: str, size: int = 3, in_dim: int = 6, gammas: Sequence[float] = (0.5, 0.9), **options: Any) -> NCritics:
    torch.manual_seed(0)
    config = NCriticsConfig(**{"num_critics": 3, "d_hidden": 16, **options})
    return config.build(in_dim, ActionSpec(kind, size), gammas).double()  # type: ignore[arg-type]


def loop_reference(critics: NCritics, c: int, row: torch.Tensor) -> torch.Tensor:
    """One critic, one row, no batching."""
    layers = [critics.first, *critics.rest]
    for i, layer in enumerate(layers):
        row = row @ layer.weight[c] + layer.bias[c]
        if i < len(layers) - 1:
            row = F.leaky_relu(row, 0.01)
    return row


@pytest.mark.parametrize(
    ("in_dim", "kind", "size", "expected"),
    [(256, "discrete", 5, 562_316), (256, "continuous", 4, 532_484), (128, "discrete", 5, 431_244)],
)
def test_parameter_count(in_dim: int, kind: str, size: int, expected: int) -> None:
    critics = NCriticsConfig().build(in_dim, ActionSpec(kind, size), GAMMAS)  # type: ignore[arg-type]
    assert sum(p.numel() for p in critics.parameters()) == expected


def test_discount_feature() -> None:
    phi = discount_feature(GAMMAS)
    torch.testing.assert_close(phi, torch.tensor(PHI, dtype=torch.float64), rtol=1e-7, atol=1e-7)
    assert discount_feature([1.0]).item() == pytest.approx(13.8155116)
    critics = NCriticsConfig().build(8, ActionSpec("continuous", 2), GAMMAS)
    assert critics.phi.dtype == torch.float32
    torch.testing.assert_close(critics.phi, torch.tensor(PHI), rtol=1e-7, atol=1e-6)
    assert "phi" not in critics.state_dict()


@pytest.mark.parametrize("gammas", [[], [1.5], [-0.1], [[0.9]], [float("nan")]])
def test_discount_feature_refuses(gammas: list) -> None:
    with pytest.raises(ValueError, match="gammas="):
        discount_feature(gammas)


@pytest.mark.parametrize("lead", [(), (4,), (2, 5)])
def test_discrete_values_match_a_loop(lead: tuple[int, ...]) -> None:
    critics = build("discrete")
    state = torch.randn(*lead, 6, dtype=torch.float64)
    values = critics(state)
    assert values.shape == (*lead, 3, 2, 3)
    flat = values.reshape(-1, 3, 2, 3)
    for n, row in enumerate(state.reshape(-1, 6)):
        for c in range(3):
            torch.testing.assert_close(flat[n, c], loop_reference(critics, c, row).view(2, 3))


@pytest.mark.parametrize("kind", ["continuous", "multi_binary"])
@pytest.mark.parametrize("lead", [(), (4,), (2, 5)])
@pytest.mark.parametrize("samples", [(), (3,), (2, 1)])
def test_action_values_match_a_loop(kind: str, lead: tuple[int, ...], samples: tuple[int, ...]) -> None:
    critics = build(kind)
    state = torch.randn(*lead, 6, dtype=torch.float64)
    action = 1.5 * torch.randn(*samples, *lead, 2, 3, dtype=torch.float64)
    values = critics(state, action)
    assert values.shape == (*samples, *lead, 3, 2)
    states = state.expand(*samples, *lead, 6).reshape(-1, 6)
    actions, flat = action.reshape(-1, 2, 3), values.reshape(-1, 3, 2)
    phi = critics.phi.double()
    for n in range(len(states)):
        for g in range(2):
            row = torch.cat([states[n], phi[g : g + 1], actions[n, g].clamp(-0.999, 0.999)])
            for c in range(3):
                torch.testing.assert_close(flat[n, c, g], loop_reference(critics, c, row)[0])


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_every_gradient_matches_a_loop(kind: str) -> None:
    grads = []
    for fast in (True, False):
        critics = build(kind)
        generator = torch.Generator().manual_seed(3)
        state = torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_()
        action = (torch.rand(4, 2, 3, generator=generator, dtype=torch.float64) * 2 - 1).requires_grad_()
        inputs = [state, *critics.parameters()] + ([action] if kind == "continuous" else [])
        if kind == "discrete":
            loop = torch.stack([torch.stack([loop_reference(critics, c, row) for c in range(3)]) for row in state])
            values = critics(state).flatten(-2) if fast else loop
        else:
            phi = critics.phi.double()
            rows = torch.cat([state[:, None].expand(4, 2, 6), phi.view(1, 2, 1).expand(4, 2, 1), action], -1)
            loop = torch.stack([loop_reference(critics, c, rows)[..., 0] for c in range(3)], 1)
            values = critics(state, action) if fast else loop
        grads.append(torch.autograd.grad(values.square().sum(), inputs))
    for fast_grad, loop_grad in zip(*grads, strict=True):
        torch.testing.assert_close(fast_grad, loop_grad)


def test_no_gradient_beyond_the_action_limit() -> None:
    critics = build("continuous")
    action = torch.tensor([0.5, 0.9995, -1.0], dtype=torch.float64).repeat(2, 1).requires_grad_()
    critics(torch.ones(6, dtype=torch.float64), action).sum().backward()
    assert action.grad is not None
    assert action.grad[:, 0].ne(0).all()
    assert action.grad[:, 1:].eq(0).all()


def test_critics_are_independent() -> None:
    critics = build("discrete")
    critics(torch.randn(5, 6, dtype=torch.float64))[:, 1].sum().backward()
    for p in critics.parameters():
        assert p.grad is not None
        assert p.grad[1].ne(0).any()
        assert p.grad[[0, 2]].eq(0).all()


def test_initial_weights() -> None:
    torch.manual_seed(0)
    layer = EnsembleLinear(4, 261, 256)
    assert layer.weight.shape == (4, 261, 256)
    assert layer.bias.shape == (4, 256)
    assert layer.weight.abs().max().item() == pytest.approx(0.1072113, rel=1e-3)
    assert layer.bias.abs().max().item() == pytest.approx(0.0618984, rel=1e-2)
    assert layer.weight.abs().max() <= 0.1072114
    assert layer.bias.abs().max() <= 0.0618985
    assert layer.weight.var().item() == pytest.approx(1 / 261, rel=0.02)
    critics = NCriticsConfig().build(256, ActionSpec("continuous", 4), GAMMAS)
    assert critics.first.weight.shape == (4, 261, 256)
    assert critics.first.weight.abs().max().item() == pytest.approx(0.1072113, rel=1e-3)


def test_dropout_only_in_training() -> None:
    critics = build("discrete", dropout=0.5)
    state = torch.randn(4, 6, dtype=torch.float64)
    assert not torch.equal(critics(state), critics(state))
    critics.eval()
    assert torch.equal(critics(state), critics(state))
    assert torch.equal(critics(state), build("discrete").eval()(state))


def test_every_layer_has_an_activation_of_its_own() -> None:
    critics = build("discrete", activation="adaptive")
    assert sum(p.numel() for p in critics.activations.parameters()) == 2 * 10
    assert critics(torch.randn(4, 6, dtype=torch.float64)).shape == (4, 3, 2, 3)


def test_multi_discrete_actions_are_inputs() -> None:
    spec = ActionSpec("multi_discrete", 5, nvec=(3, 2))
    critics = NCriticsConfig(d_hidden=8).build(6, spec, (0.5, 0.9))
    action = spec.encode(torch.tensor([[2, 0], [-1, -1]]))
    assert critics(torch.zeros(6), action).shape == (4, 2)


def test_wrong_actions_are_refused() -> None:
    state = torch.zeros(4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="must be None"):
        build("discrete")(state, torch.zeros(4, 2, 3))
    critics = build("continuous")
    with pytest.raises(ValueError, match=r"shape None.*\[\.\.\., 4, 2, 3\]"):
        critics(state)
    with pytest.raises(ValueError, match=r"shape \(4, 3\)"):
        critics(state, torch.zeros(4, 3))


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
@pytest.mark.parametrize("size", [3, 12])
def test_wrong_states_are_refused(kind: str, size: int) -> None:
    # Half the size once passed for half as many states, with two action samples each.
    action = None if kind == "discrete" else torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match=rf"state\.shape=\(4, {size}\) .*\[\.\.\., 6\]"):
        build(kind)(torch.zeros(4, size, dtype=torch.float64), action)


@pytest.mark.parametrize("gammas", [0.9, "0.9", ("0.9",), None, ()])
def test_wrong_discounts_are_refused(gammas: Any) -> None:
    for kind in ("discrete", "continuous"):
        with pytest.raises(ValueError, match=r"gammas=.* is not allowed; .* numbers in \[0, 1\]"):
            NCriticsConfig().build(6, ActionSpec(kind, 3), gammas)  # type: ignore[arg-type]


def test_discount_features_survive_other_dtypes() -> None:
    gammas = (0.5, 0.99, 0.9999)
    critics = NCriticsConfig(d_hidden=8).build(6, ActionSpec("continuous", 3), gammas)
    before = critics.phi.clone()
    assert torch.equal(critics.bfloat16().float().phi, before)
    assert torch.equal(critics.double().phi, discount_feature(gammas))


def test_an_action_spec_is_wanted() -> None:
    with pytest.raises(ValueError, match="action_spec=5 is not allowed"):
        NCriticsConfig().build(6, 5, (0.9,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_critics": 0}, "num_critics=0"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"d_hidden": "256"}, "d_hidden='256'"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"activation": ""}, "activation=''"),
    ],
)
def test_config_refuses(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NCriticsConfig(**options)


def test_registered() -> None:
    assert lookup("critic", "ensemble") is NCriticsConfig
