from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from amago_nets.distributions import TanhGaussianConfig
from amago_nets.heads import ActorConfig, ResidualActorConfig
from amago_nets.registry import lookup


def test_parameter_count() -> None:
    actor = ResidualActorConfig().build(256, TanhGaussianConfig().param_size(4), 7)
    assert sum(p.numel() for p in actor.parameters()) == 674_872


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_matches_the_formula(norm: str) -> None:
    torch.manual_seed(0)
    actor = ResidualActorConfig(d_feature=8, d_hidden=12, norm=norm).build(6, 3, 2).double()
    for p in actor.parameters():
        torch.nn.init.normal_(p)
    state = torch.randn(2, 5, 6, dtype=torch.float64)
    linear = [m for m in actor.modules() if isinstance(m, torch.nn.Linear)]
    norms = [m for m in actor.modules() if isinstance(m, torch.nn.LayerNorm)]
    # In the order in which modules are made: two into the stream, two for each block, one out.
    assert (len(linear), len(norms)) == (7, 4 if norm == "layer" else 0)

    def scale(i: int, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], norms[i].weight, norms[i].bias, 1e-5) if norm == "layer" else x

    x = linear[1](F.leaky_relu(linear[0](state), 0.01))
    for block in range(2):
        hidden = F.leaky_relu(scale(2 * block, linear[2 + 2 * block](x)), 0.01)
        x = x + scale(2 * block + 1, linear[3 + 2 * block](hidden))
    torch.testing.assert_close(actor(state), linear[-1](x).view(2, 5, 2, 3))


def test_dropout_only_in_training() -> None:
    torch.manual_seed(0)
    actor = ResidualActorConfig(d_feature=8, d_hidden=8, dropout=0.5).build(6, 3, 2)
    state = torch.randn(4, 6)
    assert not torch.equal(actor(state), actor(state))
    actor.eval()
    assert torch.equal(actor(state), actor(state))


@pytest.mark.parametrize("config", [ActorConfig(d_hidden=8), ResidualActorConfig(d_feature=8, d_hidden=8)])
def test_extra_inputs_are_appended_to_the_state(config: ActorConfig | ResidualActorConfig) -> None:
    torch.manual_seed(0)
    actor = config.build(4, 3, 2, extra_dim=2)
    torch.manual_seed(0)
    wide = config.build(6, 3, 2)
    state, extra = torch.randn(5, 7, 4), torch.tensor([1, 0], dtype=torch.int8).expand(5, 7, 2)
    expected = wide(torch.cat([state, extra.float()], -1))
    assert torch.equal(actor(state, extra), expected)
    assert actor(state, extra).shape == (5, 7, 2, 3)
    with pytest.raises(ValueError, match=r"extra has shape None.*\[\.\.\., 2\]"):
        actor(state)
    with pytest.raises(ValueError, match=r"extra has shape \(5, 7, 1\)"):
        actor(state, extra[..., :1])
    with pytest.raises(ValueError, match="give None"):
        wide(torch.zeros(5, 7, 6), extra)
    with pytest.raises(ValueError, match="extra_dim=-1"):
        config.build(4, 3, 2, extra_dim=-1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_blocks": 0}, "n_blocks=0"),
        ({"d_feature": 2.0}, "d_feature=2.0"),
        ({"d_hidden": 0}, "d_hidden=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"activation": "swish"}, "activation='swish'"),
    ],
)
def test_config_refuses(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ResidualActorConfig(**options)


def test_build_refuses() -> None:
    with pytest.raises(ValueError, match="param_size=0"):
        ResidualActorConfig().build(6, 0, 2)


def test_registered() -> None:
    assert lookup("actor", "residual") is ResidualActorConfig
