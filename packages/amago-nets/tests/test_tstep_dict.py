"""`DictTstepEncoder`, the choice by specs, and what holds for every timestep encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from amago_nets.cnn import GridworldCNNConfig, ImpalaCNNConfig, NatureCNNConfig
from amago_nets.registry import name_of
from amago_nets.specs import ActionSpec, ArraySpec
from amago_nets.tstep_encoders import (
    CNNTstepEncoder,
    CNNTstepEncoderConfig,
    DictTstepEncoder,
    DictTstepEncoderConfig,
    FFGoalEmbedderConfig,
    FFTstepEncoder,
    FFTstepEncoderConfig,
    ImageEncoder,
    ImageEncoderConfig,
    TokenEncoder,
    TokenEncoderConfig,
    TokenGoalEmbedder,
    TokenGoalEmbedderConfig,
    TstepEncoder,
    VectorEncoder,
    VectorEncoderConfig,
    default_config,
    symlog,
)

ACTION = ActionSpec("discrete", 3)
SPECS = {
    "camera": ArraySpec(shape=(7, 7, 3), dtype="uint8", kind="image"),
    "depth": ArraySpec(shape=(6, 5, 1), dtype="float32", kind="image"),
    "goal": ArraySpec(shape=(3, 2), dtype="float32"),
    # Names a module container could not take.
    "keys": ArraySpec(shape=(2,), dtype="float32"),
    "b.c": ArraySpec(shape=(2, 2), dtype="float64"),
    "scalar": ArraySpec(shape=(), dtype="float32"),
    "mission": ArraySpec(shape=(4,), dtype="int8", kind="tokens", num_classes=9),
}
FLOATS = ("depth", "goal", "keys", "b.c", "scalar")
SMALL: dict[str, Any] = {
    "image": ImageEncoderConfig(cnn=GridworldCNNConfig(channels=(4, 4, 4)), d_output=6),
    "vector": VectorEncoderConfig(d_hidden=8, d_output=5),
    "tokens": TokenEncoderConfig(d_embed=3, d_output=4, pool="gru", d_hidden=4, pad_token=0),
    "overrides": {"goal": TokenGoalEmbedderConfig(d_output=8, d_hidden=4)},
    "d_meta": 4,
    "d_output": 8,
}


def build_dict(**options: Any) -> DictTstepEncoder:
    torch.manual_seed(0)
    return DictTstepEncoderConfig(**{**SMALL, **options}).build(SPECS, ACTION)


def build_cnn(**options: Any) -> CNNTstepEncoder:
    torch.manual_seed(0)
    config = CNNTstepEncoderConfig(
        **{"cnn": ImpalaCNNConfig(depths=(4,)), "d_image": 6, "d_output": 8, "obs_key": "depth", **options}
    )
    return config.build(SPECS, ACTION)


def build_ff(**options: Any) -> FFTstepEncoder:
    torch.manual_seed(0)
    return FFTstepEncoderConfig(**{"d_hidden": 16, "d_output": 8, **options}).build(SPECS, ACTION)


ENCODERS: list[Callable[..., TstepEncoder]] = [build_ff, build_cnn, build_dict]
every_encoder = pytest.mark.parametrize("build", ENCODERS)

Inputs = tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]


def inputs(*lead: int) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    obs = {}
    for key, spec in SPECS.items():
        shape = (*lead, *spec.shape)
        if spec.kind == "tokens":
            obs[key] = torch.randint(0, 9, shape, generator=generator, dtype=torch.int8)
        elif spec.dtype == "uint8":
            obs[key] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        else:
            obs[key] = torch.randn(shape, generator=generator, dtype=getattr(torch, spec.dtype))
    action = torch.randint(-1, 3, lead, generator=generator)
    return obs, ACTION.encode(action), torch.randn(lead, generator=generator)


def spoil(args: Inputs, mask: torch.Tensor, fill: float) -> Inputs:
    """Replaces everything under the padding: floats by `fill`, pixels by 255, tokens by one out of range."""
    obs, action, reward = ({key: value.clone() for key, value in args[0].items()}, args[1].clone(), args[2].clone())
    for key, value in obs.items():
        value[~mask] = fill if key in FLOATS else (100 if key == "mission" else 255)
    action[~mask] = fill
    reward[~mask] = fill
    return obs, action, reward


@every_encoder
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
def test_leading_axes_and_timesteps_do_not_mix(build: Any, lead: tuple[int, ...]) -> None:
    encoder = build().eval()
    obs, action, reward = inputs(*lead)
    y = encoder(obs, action, reward)
    assert y.shape == (*lead, 8)
    assert encoder.out_dim == 8
    for index in torch.cartesian_prod(*(torch.arange(n) for n in lead)).reshape(-1, len(lead)) if lead else []:
        at = tuple(index.tolist())
        one = encoder({key: value[at] for key, value in obs.items()}, action[at], reward[at])
        torch.testing.assert_close(one, y[at], atol=1e-5, rtol=1e-5)


@every_encoder
@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_padding_changes_nothing(build: Any, garbage: float) -> None:
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    results = []
    for fill in (0.0, garbage):
        encoder = build()
        y = encoder(*spoil(inputs(2, 5), mask, fill), mask)
        assert y.isfinite().all()
        y[mask].square().sum().backward()
        results.append((y[mask], dict(encoder.named_buffers()), [p.grad for p in encoder.parameters()]))
    (y0, buffers0, grads0), (y1, buffers1, grads1) = results
    assert torch.equal(y0, y1)
    assert all(torch.equal(buffers0[name], buffers1[name]) for name in buffers0)
    assert all(grad is not None and grad.isfinite().all() for grad in grads0)
    assert all(torch.equal(g0, g1) for g0, g1 in zip(grads0, grads1, strict=True))


@every_encoder
def test_a_batch_of_nothing_but_padding(build: Any) -> None:
    encoder = build()
    before = copy.deepcopy(encoder.state_dict())
    mask = torch.zeros(2, 5, dtype=torch.bool)
    y = encoder(*spoil(inputs(2, 5), mask, float("nan")), mask)
    assert y.isfinite().all()
    (y * mask.unsqueeze(-1)).sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@every_encoder
def test_evaluation_changes_nothing_and_repeats_itself(build: Any) -> None:
    encoder = build().eval()
    before, args = copy.deepcopy(encoder.state_dict()), inputs(2, 5)
    first = encoder(*args)
    assert torch.equal(encoder(*args), first)
    with torch.no_grad():
        assert torch.equal(encoder(*args), first)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@every_encoder
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_weight_dtypes(build: Any, dtype: torch.dtype) -> None:
    encoder = build().to(dtype)
    y = encoder(*inputs(2, 5))
    assert y.dtype == dtype
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in encoder.parameters())
    torch.testing.assert_close(y.float(), build()(*inputs(2, 5)), atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=0)


@every_encoder
@pytest.mark.parametrize("option", ["hide_prev_reward", "hide_prev_action"])
def test_hidden_inputs_reach_nothing(build: Any, option: str) -> None:
    obs, action, reward = inputs(2, 5)
    other = (action, reward * torch.nan) if option == "hide_prev_reward" else (action * torch.nan, reward)
    encoders = [build(**{option: True}) for _ in range(2)]
    assert torch.equal(encoders[0](obs, action, reward), encoders[1](obs, *other))
    first, second = (encoder.state_dict() for encoder in encoders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.allclose(build()(obs, action, reward), build(**{option: True})(obs, action, reward))


@every_encoder
def test_wrong_inputs_are_named(build: Any) -> None:
    encoder = build()
    obs, action, reward = inputs(2, 5)
    missing = {key: value for key, value in obs.items() if key != "depth"}
    with pytest.raises(ValueError, match=r"'depth' is missing"):
        encoder(missing, action, reward)
    with pytest.raises(ValueError, match=r"obs\['depth'\].shape=\(2, 5, 30\).*give \(2, 5, 6, 5, 1\).*image"):
        encoder({**obs, "depth": obs["depth"].flatten(2)}, action, reward)
    with pytest.raises(ValueError, match=r"obs\['depth'\].shape=\(2, 4, 6, 5, 1\).*prev_reward, \(2, 5\)"):
        encoder({**obs, "depth": obs["depth"][:, 1:]}, action, reward)
    with pytest.raises(ValueError, match=r"prev_action.shape=\(2, 5, 2\).*give \(2, 5, 3\)"):
        encoder(obs, action[..., 1:], reward)
    with pytest.raises(ValueError, match=r"mask.shape=\(2, 5, 1\).*give \(2, 5\)"):
        encoder(obs, action, reward, torch.ones(2, 5, 1, dtype=torch.bool))


def test_an_image_where_a_vector_is_expected() -> None:
    obs, action, reward = inputs(2, 5)
    with pytest.raises(ValueError, match=r"obs\['keys'\].shape=\(2, 5, 7, 7, 3\).*one vector observation, \(2,\)"):
        build_dict()({**obs, "keys": obs["camera"]}, action, reward)


@pytest.mark.parametrize("build", [build_cnn, build_dict])
@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_graph_break(build: Any) -> None:
    args, mask = inputs(2, 3), torch.tensor([[True] * 3, [True, False, False]])
    results = []
    for compiled in (False, True):
        encoder = build()
        y = (torch.compile(encoder, fullgraph=True) if compiled else encoder)(*args, mask)
        y[mask].square().sum().backward()
        results.append([y[mask], *(p.grad for p in encoder.parameters()), *encoder.buffers()])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, atol=1e-4, rtol=1e-4)


def test_parts_suit_their_observations() -> None:
    encoder = build_dict()
    assert encoder.obs_keys == ("b.c", "camera", "depth", "goal", "keys", "mission", "scalar")
    assert encoder.part_keys == ("camera", "depth", "goal", "mission")
    assert encoder.vector_keys == ("b.c", "keys", "scalar")
    kinds = [type(part) for part in encoder.parts]
    assert kinds == [ImageEncoder, ImageEncoder, TokenGoalEmbedder, TokenEncoder]
    assert isinstance(encoder.vector, VectorEncoder)
    assert encoder.vector.input_norm is not None and encoder.vector.input_norm.dim == 4 + 2 + 1


def test_dict_by_hand() -> None:
    encoder = build_dict().double()
    obs, action, reward = inputs(2, 5)
    parts = [part(obs[key]) for key, part in zip(encoder.part_keys, encoder.parts, strict=True)]
    assert encoder.vector is not None and encoder.vector.input_norm is not None
    vector = torch.cat([obs["b.c"].flatten(2), obs["keys"].double(), obs["scalar"].double().unsqueeze(-1)], -1)
    norm = copy.deepcopy(encoder.vector.input_norm)
    parts.append(encoder.vector.mlp(norm(vector)))
    meta = torch.cat([reward.unsqueeze(-1), action], -1).double()
    parts.append(symlog(meta) @ encoder.meta.linear.weight.T + encoder.meta.linear.bias)
    linear = encoder.merge[1]
    y = F.leaky_relu(torch.cat(parts, -1), 0.01) @ linear.weight.T + linear.bias
    torch.testing.assert_close(encoder(obs, action, reward), F.layer_norm(y, (8,)))
    # The forward pass updated the statistics just as the copy did.
    torch.testing.assert_close(encoder.vector.input_norm.mu, norm.mu)


def test_vector_symlog() -> None:
    plain, squashed = (VectorEncoderConfig(symlog_inputs=flag).build(SPECS["b.c"]) for flag in (False, True))
    squashed.load_state_dict(plain.state_dict())
    x = torch.randn(3, 2, 2)
    torch.testing.assert_close(squashed.eval()(x), plain.eval()(symlog(x)))


@pytest.mark.parametrize("dtype", ["bool", "uint16", "uint32", "int8", "float16"])
def test_vectors_of_any_dtype(dtype: str) -> None:
    spec = ArraySpec(shape=(3,), dtype=dtype)
    x = torch.tensor([[1, 0, 1], [1, 1, 0]]).to(getattr(torch, dtype))
    mask = torch.tensor([True, False])
    part = VectorEncoderConfig().build(spec)
    assert part(x, mask).isfinite().all()
    assert part.input_norm is not None
    torch.testing.assert_close(part.input_norm.mu, torch.tensor([0.5000250, 0.0, 0.5000250]).double())
    config = DictTstepEncoderConfig(overrides={"b": VectorEncoderConfig()})
    encoder = config.build({"a": spec, "b": spec}, ACTION)
    assert encoder({"a": x, "b": x}, torch.zeros(2, 3), torch.zeros(2), mask).isfinite().all()


def test_obs_keys() -> None:
    encoder = build_dict(obs_keys=("keys", "camera"), overrides={})
    obs, action, reward = inputs(2, 5)
    assert encoder.obs_keys == ("camera", "keys")
    assert encoder({key: obs[key] for key in ("camera", "keys")}, action, reward).shape == (2, 5, 8)
    assert build_dict(obs_keys=("camera",), overrides={}).vector is None
    with pytest.raises(ValueError, match=r"obs_keys=\('sound',\).*'mission'"):
        build_dict(obs_keys=("sound",))
    with pytest.raises(ValueError, match=r"overrides names \['goal'\].*\['camera'\]"):
        build_dict(obs_keys=("camera",))


def test_overrides() -> None:
    overrides = {"camera": VectorEncoderConfig(d_output=3), "keys": FFGoalEmbedderConfig(d_output=2)}
    encoder = build_dict(overrides=overrides)
    assert encoder.part_keys == ("camera", "depth", "keys", "mission")
    assert encoder.vector_keys == ("b.c", "goal", "scalar")
    assert encoder(*inputs(2, 5)).shape == (2, 5, 8)
    with pytest.raises(ValueError, match=r"num_classes=None.*obs\['keys'\], a vector observation"):
        build_dict(overrides={"keys": TokenEncoderConfig()})
    with pytest.raises(ValueError, match=r"obs\['keys'\] is a vector observation of shape \(2,\)"):
        build_dict(overrides={"keys": ImageEncoderConfig()})


def test_overrides_are_copied_and_hashable() -> None:
    mine: dict[str, Any] = {}
    config = DictTstepEncoderConfig(overrides=mine)
    mine["camera"] = VectorEncoderConfig()
    assert config.overrides == {}
    assert hash(config) == hash(DictTstepEncoderConfig())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image": VectorEncoderConfig()}, "image=.*ImageEncoderConfig"),
        ({"overrides": {"a": FFTstepEncoderConfig()}}, "overrides=.*mapping"),
        ({"overrides": None}, "overrides=None"),
        ({"d_meta": 0}, "d_meta=0"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"out_norm": "batch"}, "out_norm='batch'"),
        ({"obs_keys": "a"}, "obs_keys='a'"),
        ({"hide_prev_action": None}, "hide_prev_action=None"),
    ],
)
def test_config_refuses(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DictTstepEncoderConfig(**options)


def test_registered() -> None:
    assert name_of(DictTstepEncoderConfig) == ("tstep_encoder", "dict")


VECTOR = ArraySpec(shape=(4,), dtype="float32")
TOKEN = ArraySpec(shape=(1,), dtype="int8", kind="tokens", num_classes=16)


def image(*shape: int) -> ArraySpec:
    return ArraySpec(shape=shape, dtype="uint8", kind="image", low=0.0, high=255.0)


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ({"observation": VECTOR}, FFTstepEncoderConfig()),
        ({"a": VECTOR, "b": VECTOR}, FFTstepEncoderConfig()),
        ({"observation": image(84, 84, 3)}, CNNTstepEncoderConfig(cnn=NatureCNNConfig(), channels_first=False)),
        ({"observation": image(4, 84, 84)}, CNNTstepEncoderConfig(cnn=NatureCNNConfig(), channels_first=True)),
        ({"observation": image(7, 7, 3)}, CNNTstepEncoderConfig(cnn=GridworldCNNConfig(), channels_first=False)),
        ({"observation": image(3, 3, 2)}, FFTstepEncoderConfig()),
        ({"observation": TOKEN}, DictTstepEncoderConfig()),
        ({"image": image(7, 7, 3), "direction": TOKEN}, DictTstepEncoderConfig()),
        ({"image": image(7, 7, 3), "speed": VECTOR}, DictTstepEncoderConfig()),
    ],
)
def test_choice_by_specs(specs: dict[str, ArraySpec], expected: Any) -> None:
    assert default_config(specs) == expected
    encoder = TstepEncoder.for_spec(specs, ACTION, d_output=32)
    assert encoder.config == default_config(specs, d_output=32)
    obs = {key: torch.zeros(2, 3, *spec.shape, dtype=getattr(torch, spec.dtype)) for key, spec in specs.items()}
    assert encoder(obs, torch.zeros(2, 3, 3), torch.zeros(2, 3)).shape == (2, 3, 32)


def test_choice_needs_an_observation() -> None:
    with pytest.raises(ValueError, match="obs_specs"):
        TstepEncoder.for_spec({}, ACTION)


@pytest.mark.gpu
@every_encoder
def test_on_a_gpu(build: Any) -> None:
    encoder, mask = build(), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    obs, action, reward = spoil(inputs(2, 5), mask, float("nan"))
    on_cpu = copy.deepcopy(encoder)(obs, action, reward, mask)
    moved = {key: value.cuda() for key, value in obs.items()}
    y = encoder.cuda()(moved, action.cuda(), reward.cuda(), mask.cuda())
    torch.testing.assert_close(y[mask.cuda()].cpu(), on_cpu[mask], atol=1e-3, rtol=1e-3)
