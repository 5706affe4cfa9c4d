from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from amago_nets.cnn import CNNConfig, DrQCNNConfig, GridworldCNNConfig, ImpalaCNNConfig, NatureCNNConfig
from amago_nets.registry import lookup, name_of, names
from amago_nets.specs import ActionSpec, ArraySpec
from amago_nets.tstep_encoders import (
    CNNTstepEncoder,
    CNNTstepEncoderConfig,
    ImageEncoder,
    ImageEncoderConfig,
    symlog,
)

ALL = {
    "nature": NatureCNNConfig(),
    "drq": DrQCNNConfig(),
    "gridworld": GridworldCNNConfig(),
    "impala": ImpalaCNNConfig(),
}
ACTION = ActionSpec("discrete", 5)
TINY = NatureCNNConfig(channels=(4, 6), kernels=(3, 2), strides=(2, 1))


def image_spec(*shape: int, dtype: str = "uint8", **options: Any) -> ArraySpec:
    return ArraySpec(shape=shape, dtype=dtype, kind="image", **options)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "size", "out_shape", "parameters"),
    [
        ("nature", 64, (64, 4, 4), 75_936),
        ("nature", 84, (64, 7, 7), 75_936),
        ("drq", 64, (32, 25, 25), 28_640),
        ("drq", 84, (32, 35, 35), 28_640),
        ("gridworld", 64, (48, 61, 61), 8_480),
        ("gridworld", 84, (48, 81, 81), 8_480),
        ("gridworld", 7, (48, 4, 4), 8_480),
        ("gridworld", 5, (48, 2, 2), 8_480),
        ("gridworld", 9, (48, 6, 6), 8_480),
        ("impala", 64, (32, 7, 7), 97_920),
        ("impala", 84, (32, 9, 9), 97_920),
    ],
)
def test_sizes(name: str, size: int, out_shape: tuple[int, int, int], parameters: int) -> None:
    cnn = ALL[name].build((size, size, 3))
    assert cnn.out_shape == out_shape
    assert cnn.out_dim == math.prod(out_shape)
    assert count(cnn) == parameters
    assert cnn(torch.rand(1, size, size, 3)).shape == (1, cnn.out_dim)


@pytest.mark.parametrize("depths", [(16, 32, 32), (20, 36, 64)])
def test_impala_depths_and_norm(depths: tuple[int, ...]) -> None:
    with_norm = ImpalaCNNConfig(depths=depths).build((16, 16, 3))
    without = ImpalaCNNConfig(depths=depths, post_group_norm=False).build((16, 16, 3))
    assert count(with_norm) - count(without) == sum(2 * 2 * depth for depth in depths)


@pytest.mark.parametrize("config", [NatureCNNConfig(activation="gelu"), DrQCNNConfig(), GridworldCNNConfig()])
def test_stack_is_convolutions_and_activations(config: Any) -> None:
    torch.manual_seed(0)
    cnn = config.build((37, 41, 3)).double()
    images = torch.rand(2, 37, 41, 3, dtype=torch.float64)
    y = images.permute(0, 3, 1, 2)
    weights = list(cnn.parameters())
    for i, stride in enumerate(config.strides):
        y = F.conv2d(y, weights[2 * i], weights[2 * i + 1], stride=stride)
        y = F.gelu(y) if config.activation == "gelu" else F.leaky_relu(y, 0.01)
    torch.testing.assert_close(cnn(images), y.flatten(1))


@pytest.mark.parametrize("post_group_norm", [True, False])
def test_impala_by_hand(post_group_norm: bool) -> None:
    torch.manual_seed(0)
    cnn = ImpalaCNNConfig(depths=(4, 8), post_group_norm=post_group_norm).build((13, 11, 3)).double()
    images = torch.rand(2, 13, 11, 3, dtype=torch.float64)
    weights = iter(cnn.parameters())
    y = images.permute(0, 3, 1, 2)
    for _ in range(2):
        y = F.max_pool2d(F.conv2d(y, next(weights), next(weights), padding=1), 3, stride=2)
        for _ in range(2):
            inner = F.conv2d(F.leaky_relu(y, 0.01), next(weights), next(weights), padding=1)
            y = y + F.conv2d(F.leaky_relu(inner, 0.01), next(weights), next(weights), padding=1)
            if post_group_norm:
                y = F.group_norm(y, 4, next(weights), next(weights))
    assert next(weights, None) is None
    torch.testing.assert_close(cnn(images), y.flatten(1))


@pytest.mark.parametrize("name", ["nature", "drq"])
def test_delta_orthogonal_init(name: str) -> None:
    cnn = ALL[name].build((40, 40, 3))
    convolutions = [layer for layer in cnn.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(convolutions) == (3 if name == "nature" else 4)
    for layer in convolutions:
        k = layer.kernel_size[0]
        centre = layer.weight[:, :, k // 2, k // 2]
        gram = centre.T @ centre if centre.shape[0] >= centre.shape[1] else centre @ centre.T
        torch.testing.assert_close(gram, torch.eye(gram.shape[0]) * 1.4141429**2)
        assert layer.weight.count_nonzero() == centre.count_nonzero()
        assert layer.bias is not None and layer.bias.eq(0).all()


@pytest.mark.parametrize("name", ["gridworld", "impala"])
def test_pytorch_init(name: str) -> None:
    for layer in ALL[name].build((40, 40, 3)).modules():
        if isinstance(layer, torch.nn.Conv2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            assert layer.weight.count_nonzero() == layer.weight.numel()
            assert 0.8 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
def test_channels_first_and_leading_axes(name: str, lead: tuple[int, ...]) -> None:
    last = ALL[name].build((38, 36, 2))
    first = ALL[name].build((2, 38, 36), channels_first=True)
    first.load_state_dict(last.state_dict())
    images = torch.rand(*lead, 38, 36, 2)
    y = last(images)
    assert y.shape == (*lead, last.out_dim)
    assert first.out_shape == last.out_shape
    torch.testing.assert_close(first(images.movedim(-1, -3)), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "smallest"), [("nature", 36), ("drq", 15), ("gridworld", 4), ("impala", 15)])
def test_smallest_image(name: str, smallest: int) -> None:
    cnn = ALL[name].build((smallest, smallest, 1))
    assert cnn(torch.rand(2, smallest, smallest, 1)).shape == (2, cnn.out_dim)
    assert cnn.out_shape[1:] == (1, 1)
    for shape in ((smallest - 1, smallest, 1), (smallest, smallest - 1, 1)):
        with pytest.raises(ValueError, match=rf"image_shape=\({shape[0]}, {shape[1]}, 1\).*at least {smallest} pixels"):
            ALL[name].build(shape)


@pytest.mark.parametrize("images", [torch.zeros(2, 44, 36, 3), torch.zeros(2, 36, 44), torch.zeros(2, 36, 44, 4)])
def test_stack_refuses_other_images(images: torch.Tensor) -> None:
    # The first has as many features as the right ones, behind the convolutions.
    stack = NatureCNNConfig().build((36, 44, 3))
    with pytest.raises(ValueError, match=r"images of shape .* give floats \[\.\.\., 36, 44, 3\]"):
        stack(images)
    with pytest.raises(ValueError, match=r"dtype torch\.uint8"):
        stack(torch.zeros(2, 36, 44, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="image_shape=36 is not allowed"):
        NatureCNNConfig().build(36)  # type: ignore[arg-type]


def test_stack_options() -> None:
    cnn = GridworldCNNConfig(channels=(8, 12), kernels=(3, 2), strides=(2, 1)).build((9, 9, 3))
    assert cnn.out_shape == (12, 3, 3)
    assert count(cnn) == 8 * (27 + 1) + 12 * (32 + 1)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: NatureCNNConfig(channels=()), r"channels=\(\)"),
        (lambda: NatureCNNConfig(channels=(32, 64)), r"\(2, 3, 3\) entries"),
        (lambda: NatureCNNConfig(kernels=(8, 0, 3)), r"kernels\[1\]=0.*>= 1"),
        (lambda: NatureCNNConfig(activation="tanh"), "activation='tanh'"),
        (lambda: ImpalaCNNConfig(depths=(16, 30)), r"depths=\(16, 30\).*multiples of 4"),
        (lambda: ImpalaCNNConfig(depths=16), "depths=16"),
        (lambda: NatureCNNConfig().build((84, 84)), r"image_shape=\(84, 84\)"),
        (lambda: ImageEncoderConfig(cnn="nature"), "cnn='nature'.*NatureCNNConfig"),
        (lambda: CNNTstepEncoderConfig(cnn=None), "cnn=None"),
        (lambda: CNNTstepEncoderConfig(d_meta=0), "d_meta=0"),
        (lambda: CNNTstepEncoderConfig(obs_key=1), "obs_key=1"),
        (lambda: CNNTstepEncoderConfig(shift_per="row"), "shift_per='row'"),
    ],
)
def test_configs_refuse(build: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()


def test_registered() -> None:
    assert names("cnn") == ("drq", "gridworld", "impala", "nature")
    assert all(lookup("cnn", name) is type(config) for name, config in ALL.items())
    assert issubclass(lookup("cnn", "impala"), CNNConfig)
    assert name_of(CNNTstepEncoderConfig) == ("tstep_encoder", "cnn")
    assert name_of(ImageEncoderConfig) == ("obs_encoder", "image")


@pytest.mark.parametrize(("cnn", "expected"), [(NatureCNNConfig(), 948_468), (ImpalaCNNConfig(), 831_188)])
def test_encoder_parameter_count(cnn: Any, expected: int) -> None:
    encoder = CNNTstepEncoderConfig(cnn=cnn).build({"observation": image_spec(84, 84, 3)}, ACTION)
    assert count(encoder) == expected


def tiny(**options: Any) -> CNNTstepEncoder:
    torch.manual_seed(0)
    config = CNNTstepEncoderConfig(**{"cnn": TINY, "d_image": 10, "d_meta": 4, "d_output": 8, **options})
    return config.build({"observation": image_spec(9, 8, 3)}, ACTION)


def inputs(*lead: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (*lead, 9, 8, 3), generator=generator, dtype=torch.uint8)
    action = torch.randint(-1, 5, lead, generator=generator)
    return {"observation": images}, ACTION.encode(action), torch.randn(lead, generator=generator) * 10


def test_encoder_by_hand() -> None:
    encoder = tiny().double()
    obs, action, reward = inputs(2, 3)
    x = obs["observation"].double() / 128 - 1
    assert x.min() >= -1 and x.max() <= 0.9921875
    image = encoder.image.linear(encoder.image.cnn(x))
    meta = encoder.meta.linear(symlog(torch.cat([reward[..., None], action], -1).double()))
    linear, norm = encoder.merge[1], encoder.merge[2]
    y = linear(F.leaky_relu(torch.cat([image, meta], -1), 0.01))
    torch.testing.assert_close(encoder(obs, action, reward), norm(y))


def test_uint8_scaling_is_exact_in_bfloat16() -> None:
    encoder = ImageEncoderConfig(cnn=GridworldCNNConfig(), channels_first=False).build(image_spec(16, 16, 1))
    every = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1)
    exact = every.double() / 128 - 1
    assert torch.equal(encoder.to(torch.bfloat16)._scaled(every).double(), exact)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [((0.0, 1.0), [-1.0, 0.0, 1.0]), ((None, None), [0.0, 0.5, 1.0]), ((0.0, math.inf), [0.0, 0.5, 1.0])],
)
def test_float_images_are_scaled_by_their_bounds(bounds: tuple[Any, Any], expected: list[float]) -> None:
    spec = image_spec(4, 4, 3, dtype="float32", low=bounds[0], high=bounds[1])
    encoder = ImageEncoderConfig().build(spec)
    torch.testing.assert_close(encoder._scaled(torch.tensor([0.0, 0.5, 1.0])), torch.tensor(expected))


def test_float_images_of_kind_vector_are_taken() -> None:
    # Only uint8 boxes are recognised as images; an override may know better.
    spec = ArraySpec(shape=(5, 5, 2), dtype="float32")
    assert ImageEncoderConfig().build(spec)(torch.rand(3, 5, 5, 2)).shape == (3, 256)


@pytest.mark.parametrize(
    ("shape", "channels_first", "stack"),
    [
        ((84, 84, 3), False, "NatureCNN"),
        ((4, 84, 84), True, "NatureCNN"),
        ((3, 210, 160), True, "NatureCNN"),
        ((36, 36, 3), False, "NatureCNN"),
        ((35, 64, 3), False, "GridworldCNN"),
        ((7, 7, 3), False, "GridworldCNN"),
        ((9, 9, 20), False, "GridworldCNN"),
    ],
)
def test_order_and_stack_are_chosen_by_the_shape(shape: tuple[int, ...], channels_first: bool, stack: str) -> None:
    encoder = ImageEncoderConfig(d_output=2).build(image_spec(*shape))
    assert encoder.channels_first == channels_first
    assert type(encoder.cnn).__name__ == stack


def test_channels_first_option_wins() -> None:
    encoder = ImageEncoderConfig(channels_first=True).build(image_spec(20, 8, 8))
    assert encoder.cnn.in_channels == 20
    with pytest.raises(ValueError, match=r"obs\['observation'\]: image_shape=\(3, 84, 84\).*channels_first=False"):
        ImageEncoderConfig(channels_first=False).build(image_spec(3, 84, 84))


@pytest.mark.parametrize(("option", "other"), [("hide_prev_reward", "reward"), ("hide_prev_action", "action")])
def test_hidden_inputs_reach_nothing(option: str, other: str) -> None:
    encoder = tiny(**{option: True})
    obs, action, reward = inputs(2, 3)
    nan = torch.full_like(reward if other == "reward" else action, torch.nan)
    changed = encoder(obs, action, nan) if other == "reward" else encoder(obs, nan, reward)
    assert torch.equal(encoder(obs, action, reward), changed)
    assert not torch.equal(tiny()(obs, action, reward), encoder(obs, action, reward))
    assert count(encoder) == count(tiny())


def test_augmentation_in_training_only() -> None:
    encoder = tiny(augment=True, shift_share=1.0)
    args = inputs(4, 3)
    assert not torch.equal(encoder(*args), encoder(*args))
    encoder.eval()
    assert torch.equal(encoder(*args), encoder(*args))
    torch.testing.assert_close(encoder(*args), tiny()(*args))
    assert encoder.image.shift is not None
    assert (encoder.image.shift.pad, encoder.image.shift.per) == (4, "frame")
    assert tiny().image.shift is None


def test_which_observation() -> None:
    specs = {"a": image_spec(9, 8, 3), "b": ArraySpec(shape=(2,), dtype="float32")}
    with pytest.raises(ValueError, match=r"obs_key=None.*\['a', 'b'\].*DictTstepEncoderConfig"):
        CNNTstepEncoderConfig(cnn=TINY).build(specs, ACTION)
    with pytest.raises(ValueError, match=r"'c'.*\['a', 'b'\]"):
        CNNTstepEncoderConfig(cnn=TINY, obs_key="c").build(specs, ACTION)
    with pytest.raises(ValueError, match=r"obs\['b'\] is a vector observation of shape \(2,\).*three axes"):
        CNNTstepEncoderConfig(cnn=TINY, obs_key="b").build(specs, ACTION)
    encoder = CNNTstepEncoderConfig(cnn=TINY, obs_key="a").build(specs, ACTION)
    obs, action, reward = inputs(2, 3)
    assert encoder({"a": obs["observation"]}, action, reward).shape == (2, 3, 256)


def test_image_encoder_alone_checks_its_input() -> None:
    encoder: ImageEncoder = ImageEncoderConfig(cnn=TINY).build(image_spec(9, 8, 3), key="camera")
    with pytest.raises(ValueError, match=r"obs\['camera'\].shape=\(2, 8, 9, 3\).*\(9, 8, 3\)"):
        encoder(torch.zeros(2, 8, 9, 3))
    with pytest.raises(ValueError, match=r"mask.shape=\(2, 1\)"):
        encoder(torch.zeros(2, 9, 8, 3), torch.ones(2, 1, dtype=torch.bool))
