"""Feed-forward encoders of feature vectors.

Dimensions: `A` action size, `F` input features. `...` stands for any leading axes: `[B, L]` in training, `[B]` when
acting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..input_norm import MaskedInputNorm
from ..mlp import MLP
from ..norms import ACTIVATIONS, NORMS, make_norm
from ..registry import register
from ..specs import ActionSpec, ArraySpec, check_action_spec
from ..validation import check_bool, check_choice, check_int
from .base import (
    ObsEncoder,
    ObsEncoderConfig,
    TstepEncoder,
    TstepEncoderConfig,
    check_inputs,
    check_obs_keys,
    flatten_tail,
    meta_features,
    raw_dtype,
    select_specs,
    symlog,
    zero_padding,
)


@register("ff")
@dataclass(frozen=True, kw_only=True)
class FFTstepEncoderConfig(TstepEncoderConfig):
    """Options of `FFTstepEncoder`.

    Attributes:
        n_layers: number of hidden layers.
        d_hidden: size of every hidden layer.
        d_output: size of the output.
        activation: see `amago_nets.norms.ACTIVATIONS`.
        norm: norm before each hidden activation, see `amago_nets.norms.NORMS`.
        out_norm: norm of the output.
        normalize_inputs: running normalisation of the input features.
        obs_keys: observation keys to use; None is all of them.
        hide_prev_action: feed zeros instead of the previous action.
        hide_prev_reward: feed zeros instead of the previous reward.
        auto_scale: raise `d_hidden` and `d_output` to at least the number of input features.
        symlog_inputs: squash all features by `symlog` before anything else.

    Raises:
        ValueError: if a field is not allowed.
    """

    n_layers: int = 2
    d_hidden: int = 512
    d_output: int = 256
    activation: str = "leaky_relu"
    norm: str = "none"
    out_norm: str = "layer"
    normalize_inputs: bool = True
    obs_keys: tuple[str, ...] | None = None
    hide_prev_action: bool = False
    hide_prev_reward: bool = False
    auto_scale: bool = False
    symlog_inputs: bool = False

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_hidden", "d_output"):
            check_int(name, getattr(self, name))
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("out_norm", self.out_norm, NORMS)
        for name in ("normalize_inputs", "hide_prev_action", "hide_prev_reward", "auto_scale", "symlog_inputs"):
            check_bool(name, getattr(self, name))
        object.__setattr__(self, "obs_keys", check_obs_keys(self.obs_keys))

    def build(self, obs_specs: Mapping[str, ArraySpec], action_spec: ActionSpec) -> FFTstepEncoder:
        """Builds the encoder; see the base class.

        Raises:
            ValueError: if `obs_keys` names an observation that does not exist.
        """
        return FFTstepEncoder(self, obs_specs, action_spec)


class FFTstepEncoder(TstepEncoder):
    """Flattened observations, reward and action through a running input norm, an MLP and an output norm.

    Features are ordered: observation keys alphabetically, previous reward, previous action. Integer and boolean
    observations are cast, not embedded; images are flattened.

    Args:
        config: options.
        obs_specs: one spec for each observation key.
        action_spec: the action of one timestep.

    Raises:
        ValueError: if `config.obs_keys` names an observation that does not exist.
    """

    def __init__(
        self, config: FFTstepEncoderConfig, obs_specs: Mapping[str, ArraySpec], action_spec: ActionSpec
    ) -> None:
        super().__init__()
        check_action_spec(action_spec)
        self.config = config
        self._specs = select_specs(obs_specs, config.obs_keys)
        self._action_size = action_spec.size
        self.obs_keys = tuple(self._specs)
        self.in_dim = sum(spec.numel for spec in self._specs.values()) + 1 + action_spec.size
        floor = self.in_dim if config.auto_scale else 1
        self.out_dim = max(config.d_output, floor)
        self.input_norm = MaskedInputNorm(self.in_dim) if config.normalize_inputs else None
        self.mlp = MLP(
            self.in_dim,
            max(config.d_hidden, floor),
            self.out_dim,
            n_layers=config.n_layers,
            activation=config.activation,
            norm=config.norm,
        )
        self.out_norm = make_norm(config.out_norm, self.out_dim)

    def features(
        self, obs: Mapping[str, Tensor], prev_action: Tensor, prev_reward: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Concatenates the raw features of every timestep; zeros where `mask` is False.

        Args:
            obs: see `forward`.
            prev_action: see `forward`.
            prev_reward: see `forward`.
            mask: see `forward`.

        Returns:
            `[..., F]`, float64 if the weights are, else float32.

        Raises:
            ValueError: if an observation is missing or a shape is wrong.
        """
        check_inputs(self._specs, self._action_size, obs, prev_action, prev_reward, mask)
        dtype = raw_dtype(next(self.mlp.parameters()).dtype)
        parts = [flatten_tail(obs[key], len(spec.shape)).to(dtype) for key, spec in self._specs.items()]
        config = self.config
        parts.append(meta_features(prev_action, prev_reward, dtype, config.hide_prev_action, config.hide_prev_reward))
        x = zero_padding(torch.cat(parts, dim=-1), mask)
        return symlog(x) if config.symlog_inputs else x

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
            ValueError: if an observation is missing or a shape is wrong.
        """
        x = self.features(obs, prev_action, prev_reward, mask)
        if self.input_norm is not None:
            x = self.input_norm(x, mask)
        return self.out_norm(self.mlp(x.to(next(self.mlp.parameters()).dtype)))


@register("vector")
@dataclass(frozen=True, kw_only=True)
class VectorEncoderConfig(ObsEncoderConfig):
    """Options of `VectorEncoder`.

    Attributes:
        n_layers: number of hidden layers.
        d_hidden: size of every hidden layer.
        d_output: size of the output.
        activation: see `amago_nets.norms.ACTIVATIONS`.
        norm: norm before each hidden activation, see `amago_nets.norms.NORMS`.
        normalize_inputs: running normalisation of the input features.
        symlog_inputs: squash all features by `symlog` before anything else.

    Raises:
        ValueError: if a field is not allowed.
    """

    n_layers: int = 1
    d_hidden: int = 256
    d_output: int = 128
    activation: str = "leaky_relu"
    norm: str = "none"
    normalize_inputs: bool = True
    symlog_inputs: bool = False

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_hidden", "d_output"):
            check_int(name, getattr(self, name))
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)
        for name in ("normalize_inputs", "symlog_inputs"):
            check_bool(name, getattr(self, name))

    def build(self, spec: ArraySpec, *, key: str = "observation") -> VectorEncoder:
        """Builds the part; see the base class."""
        return VectorEncoder(self, spec, key=key)


class VectorEncoder(ObsEncoder):
    """One observation, cast and flattened, through a running input norm and an MLP.

    Args:
        config: options.
        spec: the observation of one timestep, of any kind.
        key: name of the observation, for error messages.
    """

    def __init__(self, config: VectorEncoderConfig, spec: ArraySpec, *, key: str = "observation") -> None:
        super().__init__(spec, key=key)
        self.config = config
        self.out_dim = config.d_output
        self.input_norm = MaskedInputNorm(spec.numel) if config.normalize_inputs else None
        self.mlp = MLP(
            spec.numel,
            config.d_hidden,
            config.d_output,
            n_layers=config.n_layers,
            activation=config.activation,
            norm=config.norm,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps `[..., *shape]` to `[..., out_dim]`; see the base class."""
        dtype = next(self.mlp.parameters()).dtype
        x = flatten_tail(self._take(x, mask), len(self.spec.shape)).to(raw_dtype(dtype))
        if self.config.symlog_inputs:
            x = symlog(x)
        if self.input_norm is not None:
            x = self.input_norm(x, mask)
        return self.mlp(x.to(dtype))
