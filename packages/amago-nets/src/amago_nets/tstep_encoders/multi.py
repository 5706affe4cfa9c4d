"""The encoder of several observations of different kinds, and the choice of an encoder from the specs alone.

Dimensions: `A` action size, `F` features. `...` stands for any leading axes: `[B, L]` in training, `[B]` when acting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..norms import ACTIVATIONS, NORMS, make_activation, make_norm
from ..registry import register
from ..specs import ActionSpec, ArraySpec, check_action_spec
from ..validation import check_bool, check_choice, check_int
from .base import (
    MetaEncoder,
    ObsEncoderConfig,
    TstepEncoder,
    TstepEncoderConfig,
    check_inputs,
    check_obs_keys,
    check_obs_specs,
    flatten_tail,
    raw_dtype,
    select_specs,
)
from .cnn import CNNTstepEncoderConfig, ImageEncoderConfig, default_cnn, guess_channels_first
from .ff import FFTstepEncoderConfig, VectorEncoder, VectorEncoderConfig
from .tokens import TokenEncoderConfig

# The smallest image a gridworld stack can take.
_SMALLEST_IMAGE = 4


@register("dict")
@dataclass(frozen=True, kw_only=True)
class DictTstepEncoderConfig(TstepEncoderConfig):
    """Options of `DictTstepEncoder`.

    Attributes:
        image: part of every image.
        vector: part of all vectors together.
        tokens: part of every array of tokens.
        overrides: other parts for some observations, by key; each is then encoded on its own.
        d_meta: size of the linear layer of previous reward and action.
        d_output: size of the output.
        activation: before the merging layer, see `amago_nets.norms.ACTIVATIONS`.
        out_norm: norm of the output, see `amago_nets.norms.NORMS`.
        obs_keys: observation keys to use; None is all of them.
        hide_prev_action: feed zeros instead of the previous action.
        hide_prev_reward: feed zeros instead of the previous reward.

    Raises:
        ValueError: if a field is not allowed.
    """

    image: ImageEncoderConfig = ImageEncoderConfig()
    vector: VectorEncoderConfig = VectorEncoderConfig()
    tokens: TokenEncoderConfig = TokenEncoderConfig()
    overrides: Mapping[str, ObsEncoderConfig] = field(default_factory=dict, hash=False)
    d_meta: int = 12
    d_output: int = 256
    activation: str = "leaky_relu"
    out_norm: str = "layer"
    obs_keys: tuple[str, ...] | None = None
    hide_prev_action: bool = False
    hide_prev_reward: bool = False

    def __post_init__(self) -> None:
        kinds = {"image": ImageEncoderConfig, "vector": VectorEncoderConfig, "tokens": TokenEncoderConfig}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; give a {kind.__name__}")
        if not isinstance(self.overrides, Mapping) or any(
            not isinstance(key, str) or not isinstance(part, ObsEncoderConfig) for key, part in self.overrides.items()
        ):
            raise ValueError(
                f"overrides={self.overrides!r} is not allowed; give a mapping from keys to ObsEncoderConfig"
            )
        # A copy, so that the caller's dictionary cannot change a frozen config.
        object.__setattr__(self, "overrides", dict(self.overrides))
        for name in ("d_meta", "d_output"):
            check_int(name, getattr(self, name))
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("out_norm", self.out_norm, NORMS)
        for name in ("hide_prev_action", "hide_prev_reward"):
            check_bool(name, getattr(self, name))
        object.__setattr__(self, "obs_keys", check_obs_keys(self.obs_keys))

    def build(self, obs_specs: Mapping[str, ArraySpec], action_spec: ActionSpec) -> DictTstepEncoder:
        """Builds the encoder; see the base class.

        Raises:
            ValueError: if `obs_keys` or `overrides` names an observation that does not exist or is not used, or a part
                cannot encode its observation.
        """
        return DictTstepEncoder(self, obs_specs, action_spec)


def _is_vector(spec: ArraySpec, config: ImageEncoderConfig) -> bool:
    if spec.kind != "image":
        return spec.kind == "vector"
    # An image of a few pixels, which no default stack takes, is as good as a vector.
    first = guess_channels_first(spec.shape) if config.channels_first is None else config.channels_first
    return config.cnn is None and min(spec.shape[1:] if first else spec.shape[:2]) < _SMALLEST_IMAGE


class DictTstepEncoder(TstepEncoder):
    """Every observation through a part that suits its kind, previous reward and action through `symlog`, all merged.

    Images go through convolutions and tokens through embeddings, each key on its own; all vectors together, in the
    alphabetical order of their keys, through a running input norm and an MLP. An activation, one linear layer and a
    norm merge them.

    Args:
        config: options.
        obs_specs: one spec for each observation key.
        action_spec: the action of one timestep.

    Attributes:
        obs_keys: the observations in use, sorted.
        part_keys: the observation of each part in `parts`.
        vector_keys: the observations of the part `vector`.

    Raises:
        ValueError: if `obs_keys` or `overrides` names an observation that does not exist or is not used, or a part
            cannot encode its observation.
    """

    def __init__(
        self, config: DictTstepEncoderConfig, obs_specs: Mapping[str, ArraySpec], action_spec: ActionSpec
    ) -> None:
        super().__init__()
        check_action_spec(action_spec)
        self.config = config
        self._specs = select_specs(obs_specs, config.obs_keys)
        self._action_size = action_spec.size
        self.obs_keys = tuple(self._specs)
        unknown = sorted(set(config.overrides) - set(self._specs))
        if unknown:
            raise ValueError(f"overrides names {unknown}, which is not allowed; give a subset of {list(self._specs)}")
        self.vector_keys = tuple(
            key for key, spec in self._specs.items() if key not in config.overrides and _is_vector(spec, config.image)
        )
        self.part_keys = tuple(key for key in self._specs if key not in self.vector_keys)
        parts = [self._part_config(key).build(self._specs[key], key=key) for key in self.part_keys]
        # No ModuleDict: its keys must not contain dots, nor be "keys" or "values".
        self.parts = nn.ModuleList(parts)
        self.vector: VectorEncoder | None = None
        if self.vector_keys:
            joint = ArraySpec(shape=(sum(self._specs[key].numel for key in self.vector_keys),), dtype="float32")
            self.vector = config.vector.build(joint, key=", ".join(self.vector_keys))
            parts.append(self.vector)
        self.meta = MetaEncoder(
            action_spec,
            config.d_meta,
            hide_prev_action=config.hide_prev_action,
            hide_prev_reward=config.hide_prev_reward,
        )
        self.out_dim = config.d_output
        self.merge = nn.Sequential(
            make_activation(config.activation),
            nn.Linear(sum(part.out_dim for part in parts) + config.d_meta, config.d_output),
            make_norm(config.out_norm, config.d_output),
        )

    def _part_config(self, key: str) -> ObsEncoderConfig:
        if key in self.config.overrides:
            return self.config.overrides[key]
        return self.config.image if self._specs[key].kind == "image" else self.config.tokens

    def forward(
        self,
        obs: Mapping[str, Tensor],
        prev_action: Tensor,
        prev_reward: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Encodes every timestep on its own; see the base class.

        Args:
            obs: observation arrays, `[..., *shape]` each, of any dtype.
            prev_action: `[..., A]` float.
            prev_reward: `[...]` float.
            mask: `[...]` bool, True is a real timestep; None is all real.

        Returns:
            `[..., out_dim]`.

        Raises:
            ValueError: if an observation is missing, a shape is wrong, or a token is out of range.
        """
        check_inputs(self._specs, self._action_size, obs, prev_action, prev_reward, mask)
        encoded = [part(obs[key], mask) for key, part in zip(self.part_keys, self.parts, strict=True)]
        if self.vector is not None:
            encoded.append(self.vector(self._joint_vector(obs), mask))
        encoded.append(self.meta(prev_action, prev_reward, mask))
        return self.merge(torch.cat(encoded, dim=-1))

    def _joint_vector(self, obs: Mapping[str, Tensor]) -> Tensor:
        dtype = raw_dtype(self.meta.linear.weight.dtype)
        return torch.cat(
            [flatten_tail(obs[key], len(self._specs[key].shape)).to(dtype) for key in self.vector_keys], dim=-1
        )


def default_config(obs_specs: Mapping[str, ArraySpec], *, d_output: int = 256) -> TstepEncoderConfig:
    """Chooses an encoder from the specs alone.

    Args:
        obs_specs: one spec for each observation key.
        d_output: size of the output.

    Returns:
        `FFTstepEncoderConfig` for vectors only, `CNNTstepEncoderConfig` for one image with the stack of `default_cnn`,
        else `DictTstepEncoderConfig`.

    Raises:
        ValueError: if there is no observation.
    """
    check_obs_specs(obs_specs)
    images = ImageEncoderConfig()
    if all(_is_vector(spec, images) for spec in obs_specs.values()):
        return FFTstepEncoderConfig(d_output=d_output)
    first = next(iter(obs_specs.values()))
    if len(obs_specs) == 1 and first.kind == "image":
        channels_first = guess_channels_first(first.shape)
        cnn = default_cnn(first.shape, channels_first=channels_first)
        return CNNTstepEncoderConfig(cnn=cnn, channels_first=channels_first, d_output=d_output)
    return DictTstepEncoderConfig(d_output=d_output)
