"""Convolutional stacks from one image to one vector.

Dimensions: `N` images, `H` and `W` pixels, `C` channels. `...` stands for any leading axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .norms import ACTIVATIONS, make_activation
from .registry import register
from .validation import check_bool, check_choice, check_int

_GROUPS = 4


class CNN(nn.Module, ABC):
    """Base class of convolutional stacks.

    Args:
        image_shape: `(H, W, C)`, or `(C, H, W)` if `channels_first`.
        channels_first: the order of the axes.
        min_size: smallest height and width the stack can take.

    Attributes:
        in_channels: `C`.
        out_shape: channels, height and width of the result before it is flattened.
        out_dim: size of the flattened result.

    Raises:
        ValueError: if `image_shape` is not allowed, or too small.
    """

    out_shape: tuple[int, int, int]
    layers: nn.Module

    def __init__(self, image_shape: Sequence[int], *, channels_first: bool, min_size: int) -> None:
        super().__init__()
        check_bool("channels_first", channels_first)
        order = "(C, H, W)" if channels_first else "(H, W, C)"
        shape = tuple(image_shape) if isinstance(image_shape, Sequence) else ()
        if len(shape) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
            raise ValueError(f"image_shape={image_shape!r} is not allowed; give {order}, integers >= 1")
        self.image_shape = shape
        self.channels_first = channels_first
        self.in_channels, self.height, self.width = shape if channels_first else (shape[2], shape[0], shape[1])
        if min(self.height, self.width) < min_size:
            raise ValueError(
                f"image_shape={shape} is not allowed for {type(self).__name__}; give at least {min_size} pixels in "
                f"height and width; read as {order} with channels_first={channels_first}"
            )

    @property
    def out_dim(self) -> int:
        """Size of the flattened result."""
        channels, height, width = self.out_shape
        return channels * height * width

    def forward(self, images: Tensor) -> Tensor:
        """Maps float images `[..., H, W, C]` (`[..., C, H, W]` if `channels_first`) to `[..., out_dim]`.

        Raises:
            ValueError: if the last three axes are wrong, or the images are not floats.
        """
        if images.shape[-3:] != self.image_shape or not images.is_floating_point():
            shape = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"images of shape {tuple(images.shape)} and dtype {images.dtype} are not allowed; give floats "
                f"[..., {shape}]"
            )
        flat = images.reshape(-1, *images.shape[-3:])
        # Channels closest together in memory is the fast order (twice as fast for ImpalaCNN on a CPU), and free for
        # images that are stored so.
        planes = flat if self.channels_first else flat.permute(0, 3, 1, 2)
        y = self.layers(planes.contiguous(memory_format=torch.channels_last))
        return y.flatten(1).reshape(*images.shape[:-3], self.out_dim)


@dataclass(frozen=True, kw_only=True)
class CNNConfig(ABC):
    """Base class of the options of convolutional stacks."""

    registry_kind: ClassVar[str] = "cnn"

    @abstractmethod
    def build(self, image_shape: Sequence[int], *, channels_first: bool = False) -> CNN:
        """Builds the stack.

        Args:
            image_shape: `(H, W, C)`, or `(C, H, W)` if `channels_first`.
            channels_first: the order of the axes.

        Returns:
            A module with random weights.

        Raises:
            ValueError: if the image is too small.
        """


def _check_sizes(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not value:
        raise ValueError(f"{name}={value!r} is not allowed; give a tuple of one or more integers >= 1")
    for i, item in enumerate(value):
        check_int(f"{name}[{i}]", item)
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class ConvStackConfig(CNNConfig):
    """Options common to plain stacks of convolutions.

    Attributes:
        channels: output channels of each convolution.
        kernels: kernel size of each convolution.
        strides: stride of each convolution.
        activation: after every convolution, see `amago_nets.norms.ACTIVATIONS`.

    Raises:
        ValueError: if a field is not allowed.
    """

    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    activation: str = "leaky_relu"

    def __post_init__(self) -> None:
        for name in ("channels", "kernels", "strides"):
            object.__setattr__(self, name, _check_sizes(name, getattr(self, name)))
        if not len(self.channels) == len(self.kernels) == len(self.strides):
            lengths = (len(self.channels), len(self.kernels), len(self.strides))
            raise ValueError(f"channels, kernels and strides have {lengths} entries; give as many of each")
        check_choice("activation", self.activation, ACTIVATIONS)


class ConvStack(CNN):
    """Convolutions without padding, an activation after each.

    Args:
        config: options.
        image_shape: `(H, W, C)`, or `(C, H, W)` if `channels_first`.
        channels_first: the order of the axes.

    Raises:
        ValueError: if `image_shape` is not allowed, or too small.
    """

    def __init__(self, config: ConvStackConfig, image_shape: Sequence[int], *, channels_first: bool = False) -> None:
        min_size = 1
        for kernel, stride in zip(reversed(config.kernels), reversed(config.strides), strict=True):
            min_size = (min_size - 1) * stride + kernel
        super().__init__(image_shape, channels_first=channels_first, min_size=min_size)
        self.config = config
        layers: list[nn.Module] = []
        channels, height, width = self.in_channels, self.height, self.width
        for out, kernel, stride in zip(config.channels, config.kernels, config.strides, strict=True):
            layers += [
                nn.Conv2d(channels, out, kernel, stride),
                # The convolution's backward pass needs its input, not its output.
                make_activation(config.activation, inplace=True),
            ]
            channels, height, width = out, (height - kernel) // stride + 1, (width - kernel) // stride + 1
        self.layers = nn.Sequential(*layers)
        self.out_shape = (channels, height, width)


def init_delta_orthogonal(module: nn.Module) -> None:
    """Makes every convolution an orthogonal map of the pixel under the kernel's centre, every linear layer orthogonal.

    Args:
        module: its convolutions and linear layers are changed, at any depth. The gain is that of a leaky ReLU of slope
            0.01; biases become zero.

    Source: Xiao et al. (2018), "Dynamical Isometry and a Mean Field Theory of CNNs".
    """
    gain = nn.init.calculate_gain("leaky_relu", 0.01)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            centre = nn.init.orthogonal_(torch.empty(layer.out_channels, layer.in_channels), gain)
            with torch.no_grad():
                layer.weight.zero_()
                layer.weight[:, :, layer.kernel_size[0] // 2, layer.kernel_size[1] // 2] = centre
        elif isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


@register("nature")
@dataclass(frozen=True, kw_only=True)
class NatureCNNConfig(ConvStackConfig):
    """Options of `NatureCNN`; see `ConvStackConfig`."""

    channels: tuple[int, ...] = (32, 64, 64)
    kernels: tuple[int, ...] = (8, 4, 3)
    strides: tuple[int, ...] = (4, 2, 1)

    def build(self, image_shape: Sequence[int], *, channels_first: bool = False) -> NatureCNN:
        """Builds the stack; see the base class."""
        return NatureCNN(self, image_shape, channels_first=channels_first)


class NatureCNN(ConvStack):
    """Three strided convolutions, from at least 36 pixels; see `ConvStack`.

    Source: Mnih et al. (2015), "Human-level control through deep reinforcement learning".
    """

    def __init__(self, config: NatureCNNConfig, image_shape: Sequence[int], *, channels_first: bool = False) -> None:
        super().__init__(config, image_shape, channels_first=channels_first)
        init_delta_orthogonal(self)


@register("drq")
@dataclass(frozen=True, kw_only=True)
class DrQCNNConfig(ConvStackConfig):
    """Options of `DrQCNN`; see `ConvStackConfig`."""

    channels: tuple[int, ...] = (32, 32, 32, 32)
    kernels: tuple[int, ...] = (3, 3, 3, 3)
    strides: tuple[int, ...] = (2, 1, 1, 1)

    def build(self, image_shape: Sequence[int], *, channels_first: bool = False) -> DrQCNN:
        """Builds the stack; see the base class."""
        return DrQCNN(self, image_shape, channels_first=channels_first)


class DrQCNN(ConvStack):
    """Four small convolutions that keep many positions; see `ConvStack`.

    Source: Yarats et al. (2021), "Mastering Visual Continuous Control" (DrQ-v2).
    """

    def __init__(self, config: DrQCNNConfig, image_shape: Sequence[int], *, channels_first: bool = False) -> None:
        super().__init__(config, image_shape, channels_first=channels_first)
        init_delta_orthogonal(self)


@register("gridworld")
@dataclass(frozen=True, kw_only=True)
class GridworldCNNConfig(ConvStackConfig):
    """Options of `GridworldCNN`; see `ConvStackConfig`."""

    channels: tuple[int, ...] = (16, 32, 48)
    kernels: tuple[int, ...] = (2, 2, 2)
    strides: tuple[int, ...] = (1, 1, 1)

    def build(self, image_shape: Sequence[int], *, channels_first: bool = False) -> GridworldCNN:
        """Builds the stack; see the base class."""
        return GridworldCNN(self, image_shape, channels_first=channels_first)


class GridworldCNN(ConvStack):
    """Three convolutions of 2 by 2 for maps of a few cells, PyTorch's initialisation; see `ConvStack`."""

    def __init__(self, config: GridworldCNNConfig, image_shape: Sequence[int], *, channels_first: bool = False) -> None:
        super().__init__(config, image_shape, channels_first=channels_first)


@register("impala")
@dataclass(frozen=True, kw_only=True)
class ImpalaCNNConfig(CNNConfig):
    """Options of `ImpalaCNN`.

    Attributes:
        depths: output channels of each block.
        post_group_norm: a group norm of 4 groups after every residual unit; depths must then be multiples of 4.
        activation: before every convolution of the residual units, see `amago_nets.norms.ACTIVATIONS`.

    Raises:
        ValueError: if a field is not allowed.
    """

    depths: tuple[int, ...] = (16, 32, 32)
    post_group_norm: bool = True
    activation: str = "leaky_relu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", _check_sizes("depths", self.depths))
        check_bool("post_group_norm", self.post_group_norm)
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.post_group_norm and any(depth % _GROUPS for depth in self.depths):
            raise ValueError(
                f"depths={self.depths} is not allowed with post_group_norm=True; give multiples of {_GROUPS}"
            )

    def build(self, image_shape: Sequence[int], *, channels_first: bool = False) -> ImpalaCNN:
        """Builds the stack; see the base class."""
        return ImpalaCNN(self, image_shape, channels_first=channels_first)


class _ResidualUnit(nn.Module):
    def __init__(self, channels: int, activation: str, group_norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.activation1 = make_activation(activation)
        self.activation2 = make_activation(activation, inplace=True)
        self.norm = nn.GroupNorm(_GROUPS, channels) if group_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.activation2(self.conv1(self.activation1(x))))
        return self.norm(x + y)


class ImpalaCNN(CNN):
    """Blocks of a convolution, a max-pool that halves the image, and two residual units.

    Args:
        config: options.
        image_shape: `(H, W, C)`, or `(C, H, W)` if `channels_first`; at least 15 pixels with three blocks.
        channels_first: the order of the axes.

    Raises:
        ValueError: if `image_shape` is not allowed, or too small.

    Source: Espeholt et al. (2018), "IMPALA: Scalable Distributed Deep-RL".
    """

    def __init__(self, config: ImpalaCNNConfig, image_shape: Sequence[int], *, channels_first: bool = False) -> None:
        # Pooling by 3 with stride 2 needs 2 n + 1 pixels for n: from 1 backwards that is 3, 7, 15.
        super().__init__(image_shape, channels_first=channels_first, min_size=2 ** (len(config.depths) + 1) - 1)
        self.config = config
        layers: list[nn.Module] = []
        channels, height, width = self.in_channels, self.height, self.width
        for depth in config.depths:
            layers += [nn.Conv2d(channels, depth, 3, padding=1), nn.MaxPool2d(3, stride=2)]
            layers += [_ResidualUnit(depth, config.activation, config.post_group_norm) for _ in range(2)]
            channels, height, width = depth, (height - 3) // 2 + 1, (width - 3) // 2 + 1
        self.layers = nn.Sequential(*layers)
        self.out_shape = (channels, height, width)


AnyCNNConfig = NatureCNNConfig | ImpalaCNNConfig | GridworldCNNConfig | DrQCNNConfig
