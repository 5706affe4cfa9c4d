from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from amago_nets.registry import lookup, name_of
from amago_nets.specs import ActionSpec, ArraySpec
from amago_nets.tstep_encoders import (
    DictTstepEncoderConfig,
    FFTstepEncoder,
    FFTstepEncoderConfig,
    TstepEncoder,
    symlog,
)

SPECS = {
    "b": ArraySpec(shape=(2, 2), dtype="float32"),
    "a": ArraySpec(shape=(), dtype="int64", kind="tokens", num_classes=9),
    "image": ArraySpec(shape=(2, 3, 1), dtype="uint8", kind="image"),
}
ACTION = ActionSpec("discrete", 3)


def build(**options: Any) -> FFTstepEncoder:
    torch.manual_seed(0)
    return FFTstepEncoderConfig(**{"d_hidden": 16, "d_output": 8, **options}).build(SPECS, ACTION)


def inputs(*lead: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    obs = {
        "image": torch.randint(0, 256, (*lead, 2, 3, 1), generator=generator, dtype=torch.uint8),
        "a": torch.randint(0, 9, lead, generator=generator),
        "b": torch.randn(*lead, 2, 2, generator=generator),
    }
    action = torch.randint(-1, 3, lead, generator=generator)
    return obs, ACTION.encode(action), torch.randn(lead, generator=generator)


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 400_128), ({"n_layers": 1, "d_hidden": 128, "d_output": 64}, 9_792)]
)
def test_parameter_count(options: dict[str, int], expected: int) -> None:
    specs = {"observation": ArraySpec(shape=(4,), dtype="float32")}
    encoder = FFTstepEncoderConfig(**options).build(specs, ActionSpec("discrete", 5))
    assert sum(p.numel() for p in encoder.parameters()) == expected


@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
def test_shapes(lead: tuple[int, ...]) -> None:
    encoder = build()
    obs, action, reward = inputs(*lead)
    y = encoder(obs, action, reward)
    assert y.shape == (*lead, encoder.out_dim) == (*lead, 8)
    assert y.dtype == torch.float32


def test_order_of_features() -> None:
    encoder = build()
    obs, action, reward = inputs(2, 5)
    x = encoder.features(obs, action, reward)
    expected = [obs["a"][..., None], obs["b"].flatten(2), obs["image"].flatten(2), reward[..., None], action]
    assert torch.equal(x, torch.cat([part.float() for part in expected], -1))
    assert encoder.in_dim == x.shape[-1] == 1 + 4 + 6 + 1 + 3


def test_forward_is_norm_mlp_norm() -> None:
    encoder = build(norm="layer").eval()
    obs, action, reward = inputs(2, 5)
    x = encoder.features(obs, action, reward)
    assert encoder.input_norm is not None
    torch.testing.assert_close(encoder(obs, action, reward), encoder.out_norm(encoder.mlp(encoder.input_norm(x))))


def test_timesteps_do_not_mix() -> None:
    encoder = build().eval()
    obs, action, reward = inputs(2, 5)
    whole = encoder(obs, action, reward)
    for t in range(5):
        one = encoder({key: value[:, t] for key, value in obs.items()}, action[:, t], reward[:, t])
        torch.testing.assert_close(one, whole[:, t])


def test_obs_keys() -> None:
    encoder = build(obs_keys=("b",))
    obs, action, reward = inputs(4)
    assert encoder.in_dim == 4 + 1 + 3
    assert encoder({"b": obs["b"]}, action, reward).shape == (4, 8)
    with pytest.raises(ValueError, match=r"obs_keys=\('goal',\).*'image'"):
        build(obs_keys=("goal",))


@pytest.mark.parametrize(
    ("option", "columns"), [("hide_prev_reward", slice(11, 12)), ("hide_prev_action", slice(12, 15))]
)
def test_hidden_inputs_reach_nothing(option: str, columns: slice) -> None:
    encoder = build(**{option: True})
    obs, action, reward = inputs(2, 5)
    y = encoder(obs, action, reward)
    assert encoder.input_norm is not None
    assert encoder.input_norm.mu[columns].eq(0).all()
    assert encoder.features(obs, action, reward)[..., columns].eq(0).all()
    other = build(**{option: True})
    if option == "hide_prev_reward":
        assert torch.equal(y, other(obs, action, reward + 1))
    else:
        assert torch.equal(y, other(obs, action + 1, reward))


def test_auto_scale() -> None:
    encoder = build(auto_scale=True)
    assert encoder.out_dim == encoder.in_dim == 15
    assert encoder(*inputs(3)).shape == (3, 15)
    assert build(auto_scale=True, d_output=64).out_dim == 64


def test_symlog_inputs() -> None:
    x = torch.tensor([0.0, 1.0, 9.0, 100.0, -9.0])
    torch.testing.assert_close(symlog(x), torch.tensor([0.0, 0.6931472, 2.3025851, 4.6151205, -2.3025851]))
    obs, action, reward = inputs(3)
    plain, squashed = build(), build(symlog_inputs=True)
    assert torch.equal(squashed.features(obs, action, reward), symlog(plain.features(obs, action, reward)))


@pytest.mark.parametrize("garbage", [7.0, float("nan")])
def test_padding_changes_neither_statistics_outputs_nor_gradients(garbage: float) -> None:
    obs, action, reward = inputs(2, 5)
    results = []
    for fill in (0.0, garbage):
        encoder = build()
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        padded = {key: value.clone() for key, value in obs.items()}
        padded["b"][1, 3:] = fill
        padded_action, padded_reward = action.clone(), reward.clone()
        padded_action[1, 3:] = fill
        padded_reward[1, 3:] = fill
        y = encoder(padded, padded_action, padded_reward, mask)
        assert y.isfinite().all()
        y[mask].square().sum().backward()
        results.append((y[mask], dict(encoder.named_buffers()), [p.grad for p in encoder.parameters()]))
    (y0, buffers0, grads0), (y1, buffers1, grads1) = results
    assert torch.equal(y0, y1)
    assert all(torch.equal(buffers0[name], buffers1[name]) for name in buffers0)
    assert all(torch.equal(g0, g1) for g0, g1 in zip(grads0, grads1, strict=True))


def test_statistics_move_in_training_only() -> None:
    encoder = build()
    obs, action, reward = inputs(2, 5)
    encoder.eval()
    before = copy.deepcopy(encoder.state_dict())
    encoder(obs, action, reward)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    encoder.train()
    encoder(obs, action, reward)
    assert not torch.equal(encoder.state_dict()["input_norm.mu"], before["input_norm.mu"])
    assert build(normalize_inputs=False).input_norm is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_weight_dtypes(dtype: torch.dtype) -> None:
    encoder = build().to(dtype)
    y = encoder(*inputs(2, 5))
    assert y.dtype == dtype
    assert y.isfinite().all()


def test_state_dict_round_trip() -> None:
    encoder, other = build(), build(obs_keys=None)
    encoder(*inputs(2, 5))
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder.eval()(*inputs(3)), other.eval()(*inputs(3)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_layers": 0}, "n_layers=0.*>= 1"),
        ({"d_hidden": 1.5}, "d_hidden=1.5"),
        ({"activation": "tanh"}, "activation='tanh'.*'gelu'"),
        ({"norm": "batch"}, "norm='batch'.*'rmsnorm'"),
        ({"out_norm": None}, "out_norm=None"),
        ({"auto_scale": 1}, "auto_scale=1.*True or False"),
        ({"obs_keys": "b"}, "obs_keys='b'"),
        ({"obs_keys": ()}, r"obs_keys=\(\)"),
    ],
)
def test_config_refuses(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FFTstepEncoderConfig(**options)


def test_inputs_of_another_type_are_refused() -> None:
    encoder = build()
    obs, action, reward = inputs(2, 5)
    for mask in (torch.ones(2, 5), torch.ones(2, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"mask\.dtype=torch\..* give torch\.bool"):
            encoder(obs, action, reward, mask)
    with pytest.raises(ValueError, match=r"obs is a tensor of shape \(2, 5, 2, 2\).*'b'"):
        encoder(obs["b"], action, reward)
    with pytest.raises(ValueError, match=r"obs\['b'\] is a list"):
        encoder({**obs, "b": obs["b"].tolist()}, action, reward)
    with pytest.raises(ValueError, match="prev_reward is a list"):
        encoder(obs, action, reward.tolist())


@pytest.mark.parametrize("specs", [SPECS["b"], {}, {"b": (4,)}, {3: SPECS["b"]}])
def test_specs_of_another_type_are_refused(specs: Any) -> None:
    for build_from in (FFTstepEncoderConfig().build, TstepEncoder.for_spec):
        with pytest.raises(ValueError, match=r"obs_specs=.*ArraySpec"):
            build_from(specs, ActionSpec("discrete", 3))


def test_an_action_spec_is_wanted() -> None:
    for config in (FFTstepEncoderConfig(), DictTstepEncoderConfig()):
        with pytest.raises(ValueError, match="action_spec=3 is not allowed"):
            config.build(SPECS, 3)  # type: ignore[arg-type]


def test_registered() -> None:
    assert lookup("tstep_encoder", "ff") is FFTstepEncoderConfig
    assert name_of(FFTstepEncoderConfig) == ("tstep_encoder", "ff")
