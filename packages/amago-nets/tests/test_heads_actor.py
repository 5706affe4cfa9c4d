from __future__ import annotations

from typing import Any

import pytest
import torch

from amago_nets.heads import ActorConfig, ResidualActorConfig
from amago_nets.registry import lookup


@pytest.mark.parametrize(
    ("in_dim", "param_size", "expected"),
    [(256, 5, 140_579), (256, 2 * 4, 145_976), (128, 5, 107_811)],
)
def test_parameter_count(in_dim: int, param_size: int, expected: int) -> None:
    actor = ActorConfig().build(in_dim, param_size, 7)
    assert sum(p.numel() for p in actor.parameters()) == expected


def test_output_is_discount_major() -> None:
    torch.manual_seed(0)
    actor = ActorConfig(n_layers=1, d_hidden=16).build(6, 3, 2)
    state = torch.randn(2, 5, 6)
    params = actor(state)
    assert params.shape == (2, 5, 2, 3)
    assert torch.equal(params.flatten(-2), actor.mlp(state))
    assert actor(state[0, 0]).shape == (2, 3)


def test_dropout_only_in_training() -> None:
    torch.manual_seed(0)
    actor = ActorConfig(dropout=0.5).build(6, 3, 2)
    state = torch.randn(4, 6)
    assert not torch.equal(actor(state), actor(state))
    actor.eval()
    assert torch.equal(actor(state), actor(state))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_layers": -1}, "n_layers=-1"),
        ({"d_hidden": True}, "d_hidden=True"),
        ({"dropout": 1}, r"dropout=1 .*\[0, 1\)"),
        ({"activation": "swish"}, "activation='swish'"),
    ],
)
def test_config_refuses(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ActorConfig(**options)


def test_build_refuses() -> None:
    with pytest.raises(ValueError, match="param_size=0"):
        ActorConfig().build(6, 0, 2)
    with pytest.raises(ValueError, match="num_gammas=0"):
        ActorConfig().build(6, 3, 0)


@pytest.mark.parametrize("config", [ActorConfig(d_hidden=8), ResidualActorConfig(d_feature=8, d_hidden=8)])
def test_wrong_inputs_are_refused(config: Any) -> None:
    actor = config.build(6, 3, 2, extra_dim=2)
    with pytest.raises(ValueError, match=r"state\.shape=\(4, 5\) .*\[\.\.\., 6\]"):
        actor(torch.zeros(4, 5), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"extra has shape \(2,\).*\(4, 2\)"):
        actor(torch.zeros(4, 6), torch.zeros(2))
    with pytest.raises(ValueError, match=r"extra has shape None.*\(4, 2\)"):
        actor(torch.zeros(4, 6))


def test_registered() -> None:
    assert lookup("actor", "mlp") is ActorConfig
