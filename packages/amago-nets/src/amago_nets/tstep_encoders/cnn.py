"""Encoders of images.

Dimensions: `A` action size, `H` and `W` pixels, `C` channels. `...` stands for any leading axes: `[B, L]` in training,
`[B]` when acting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from ..augmentation import RandomShift, ShiftPer
from ..cnn import CNN, AnyCNNConfig, CNNConfig, GridworldCNNConfig, NatureCNNConfig
from ..norms import ACTIVATIONS, NORMS, make_activation, make_norm
from ..registry import register
from ..specs import ActionSpec, ArraySpec, check_action_spec
from ..validation import check_bool, check_choice, check_float, check_int
from .base import (
    MetaEncoder,
    ObsEncoder,
    ObsEncoderConfig,
    TstepEncoder,
    TstepEncoderConfig,
    check_inputs,
    raw_dtype,
    select_specs,
)

_NATURE_MIN_SIZE = 36
_MOST_CHANNELS = 16


def guess_channels_first(image_shape: tuple[int, ...]) -> bool:
    """Whether an image looks like `(C, H, W)`: at most 16 entries in the first axis, more in both others."""
    return image_shape[0] <= _MOST_CHANNELS < min(image_shape[1:])


def default_cnn(image_shape: tuple[int, ...], *, channels_first: bool) -> AnyCNNConfig:
    """Chooses a stack by the size of the image: gridworld below 36 pixels, else nature."""
    height, width = image_shape[1:] if channels_first else image_shape[:2]
    return GridworldCNNConfig() if min(height, width) < _NATURE_MIN_SIZE else NatureCNNConfig()


@dataclass(frozen=True, kw_only=True)
class _ImageOptions:
    channels_first: bool | None = None
    augment: bool = False
    shift_pad: int = 4
    shift_share: float = 0.75
    shift_per: ShiftPer = "frame"

    def _check_image_options(self) -> None:
        if self.channels_first is not None:
            check_bool("channels_first", self.channels_first)
        check_bool("augment", self.augment)
        check_int("shift_pad", self.shift_pad)
        check_float("shift_share", self.shift_share, low=0.0, high=1.0)
        check_choice("shift_per", self.shift_per, get_args(ShiftPer))


@register("image")
@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig(_ImageOptions, ObsEncoderConfig):
    """Options of `ImageEncoder`.

    Attributes:
        cnn: the convolutional stack; None chooses by size, see `default_cnn`.
        d_output: size of the output.
        channels_first: images are `(C, H, W)`, not `(H, W, C)`; None guesses, see `guess_channels_first`.
        augment: shift images at random in training, see `amago_nets.augmentation.random_shift`.
        shift_pad: largest shift in pixels.
        shift_share: share of the batch to shift.
        shift_per: one shift for each "frame", or one for each "sequence".

    Raises:
        ValueError: if a field is not allowed.
    """

    cnn: AnyCNNConfig | None = None
    d_output: int = 256

    def __post_init__(self) -> None:
        _check_cnn(self.cnn, optional=True)
        check_int("d_output", self.d_output)
        self._check_image_options()

    def build(self, spec: ArraySpec, *, key: str = "observation") -> ImageEncoder:
        """Builds the part; see the base class."""
        return ImageEncoder(self, spec, key=key)


def _check_cnn(cnn: object, *, optional: bool) -> None:
    if not (isinstance(cnn, CNNConfig) or (optional and cnn is None)):
        raise ValueError(f"cnn={cnn!r} is not allowed; give a CNNConfig, such as NatureCNNConfig()")


class ImageEncoder(ObsEncoder):
    """One image through a convolutional stack and a linear layer.

    uint8 images become `x / 128 - 1`. Others are mapped to [-1, 1] if the spec has finite bounds, else left alone.

    Args:
        config: options.
        spec: the image of one timestep; three axes, of kind "image" or "vector".
        key: name of the observation, for error messages.

    Raises:
        ValueError: if the observation is no image, or too small for the stack.
    """

    def __init__(self, config: ImageEncoderConfig, spec: ArraySpec, *, key: str = "observation") -> None:
        super().__init__(spec, key=key)
        if len(spec.shape) != 3 or spec.kind == "tokens":
            raise ValueError(
                f"obs[{key!r}] is a {spec.kind} observation of shape {spec.shape}, which is not allowed where an image "
                "is expected; give three axes, of kind 'image' or 'vector'"
            )
        self.config = config
        self.out_dim = config.d_output
        guess = guess_channels_first(spec.shape)
        self.channels_first = guess if config.channels_first is None else config.channels_first
        cnn = config.cnn or default_cnn(spec.shape, channels_first=self.channels_first)
        try:
            self.cnn: CNN = cnn.build(spec.shape, channels_first=self.channels_first)
        except ValueError as error:
            raise ValueError(f"obs[{key!r}]: {error}") from None
        self.linear = nn.Linear(self.cnn.out_dim, config.d_output)
        self.shift = (
            RandomShift(
                pad=config.shift_pad,
                share=config.shift_share,
                per=config.shift_per,
                channels_first=self.channels_first,
            )
            if config.augment
            else None
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps images `[..., H, W, C]`, or `[..., C, H, W]`, to `[..., out_dim]`; see the base class."""
        # No number under the padding of a uint8 image can spread: there is neither NaN nor a statistic.
        x = self._take(x, None if self.spec.dtype == "uint8" and x.dtype == torch.uint8 else mask)
        if self.shift is not None:
            x = self.shift(x)
        return self.linear(self.cnn(self._scaled(x)))

    def _scaled(self, x: Tensor) -> Tensor:
        dtype = self.linear.weight.dtype
        if self.spec.dtype == "uint8":
            # Exact in bfloat16 too: 8 bits.
            return x.to(dtype) * (1 / 128) - 1
        low, high = self.spec.low, self.spec.high
        x = x.to(raw_dtype(dtype))
        if low is not None and high is not None and math.isfinite(high - low) and high > low:
            x = (x - low) * (2 / (high - low)) - 1
        return x.to(dtype)


@register("cnn")
@dataclass(frozen=True, kw_only=True)
class CNNTstepEncoderConfig(_ImageOptions, TstepEncoderConfig):
    """Options of `CNNTstepEncoder`.

    Attributes:
        cnn: the convolutional stack.
        d_image: size of the linear layer after the stack.
        d_meta: size of the linear layer of previous reward and action.
        d_output: size of the output.
        activation: before the last layer, see `amago_nets.norms.ACTIVATIONS`; the stack has its own.
        out_norm: norm of the output, see `amago_nets.norms.NORMS`.
        obs_key: the image; None is the only observation there is.
        hide_prev_action: feed zeros instead of the previous action.
        hide_prev_reward: feed zeros instead of the previous reward.
        channels_first: images are `(C, H, W)`, not `(H, W, C)`; None guesses, see `guess_channels_first`.
        augment: shift images at random in training, see `amago_nets.augmentation.random_shift`.
        shift_pad: largest shift in pixels.
        shift_share: share of the batch to shift.
        shift_per: one shift for each "frame", or one for each "sequence".

    Raises:
        ValueError: if a field is not allowed.
    """

    cnn: AnyCNNConfig = NatureCNNConfig()
    d_image: int = 256
    d_meta: int = 12
    d_output: int = 256
    activation: str = "leaky_relu"
    out_norm: str = "layer"
    obs_key: str | None = None
    hide_prev_action: bool = False
    hide_prev_reward: bool = False

    def __post_init__(self) -> None:
        _check_cnn(self.cnn, optional=False)
        for name in ("d_image", "d_meta", "d_output"):
            check_int(name, getattr(self, name))
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("out_norm", self.out_norm, NORMS)
        for name in ("hide_prev_action", "hide_prev_reward"):
            check_bool(name, getattr(self, name))
        if self.obs_key is not None and not isinstance(self.obs_key, str):
            raise ValueError(f"obs_key={self.obs_key!r} is not allowed; give None or a name")
        self._check_image_options()

    def build(self, obs_specs: Mapping[str, ArraySpec], action_spec: ActionSpec) -> CNNTstepEncoder:
        """Builds the encoder; see the base class.

        Raises:
            ValueError: if there is no such observation, or it is no image, or too small for the stack.
        """
        return CNNTstepEncoder(self, obs_specs, action_spec)

    def image_config(self) -> ImageEncoderConfig:
        """Options of the part that encodes the image."""
        return ImageEncoderConfig(
            cnn=self.cnn,
            d_output=self.d_image,
            channels_first=self.channels_first,
            augment=self.augment,
            shift_pad=self.shift_pad,
            shift_share=self.shift_share,
            shift_per=self.shift_per,
        )


class CNNTstepEncoder(TstepEncoder):
    """One image through a convolutional stack, previous reward and action through `symlog`, both merged.

    Args:
        config: options.
        obs_specs: one spec for each observation key.
        action_spec: the action of one timestep.

    Raises:
        ValueError: if there is no such observation, or it is no image, or too small for the stack.
    """

    def __init__(
        self, config: CNNTstepEncoderConfig, obs_specs: Mapping[str, ArraySpec], action_spec: ActionSpec
    ) -> None:
        super().__init__()
        check_action_spec(action_spec)
        if config.obs_key is None and len(obs_specs) != 1:
            raise ValueError(
                f"obs_key=None is not allowed with the observations {sorted(obs_specs)}; name the image "
                "(the others are then left out), or use DictTstepEncoderConfig"
            )
        self._specs = select_specs(obs_specs, None if config.obs_key is None else (config.obs_key,))
        (self.obs_key,) = self._specs
        self._action_size = action_spec.size
        self.config = config
        self.out_dim = config.d_output
        self.image = config.image_config().build(self._specs[self.obs_key], key=self.obs_key)
        self.meta = MetaEncoder(
            action_spec,
            config.d_meta,
            hide_prev_action=config.hide_prev_action,
            hide_prev_reward=config.hide_prev_reward,
        )
        self.merge = nn.Sequential(
            make_activation(config.activation),
            nn.Linear(config.d_image + config.d_meta, config.d_output),
            make_norm(config.out_norm, config.d_output),
        )

    def forward(
        self,
        obs: Mapping[str, Tensor],
        prev_action: Tensor,
        prev_reward: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Encodes every timestep on its own; see the base class.

        Args:
            obs: images `[..., H, W, C]`, or `[..., C, H, W]`, as they are stored.
            prev_action: `[..., A]` float.
            prev_reward: `[...]` float.
            mask: `[...]` bool, True is a real timestep; None is all real.

        Returns:
            `[..., out_dim]`.

        Raises:
            ValueError: if the image is missing or a shape is wrong.
        """
        check_inputs(self._specs, self._action_size, obs, prev_action, prev_reward, mask)
        image = self.image(obs[self.obs_key], mask)
        return self.merge(torch.cat([image, self.meta(prev_action, prev_reward, mask)], dim=-1))
