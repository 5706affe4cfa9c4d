"""Timestep encoders: one vector per timestep from observation, previous reward and previous action.

Dimensions: `A` action size, `F` input features. `...` stands for any leading axes: `[B, L]` in
training, `[B]` when acting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .input_norm import MaskedInputNorm
from .mlp import MLP
from .norms import ACTIVATIONS, NORMS, make_norm
from .registry import register
from .specs import ActionSpec, ArraySpec
from .validation import check_bool, check_choice, check_int


def symlog(x: Tensor) -> Tensor:
    """Symmetric logarithm `sign(x) ln(1 + |x|)`; any shape.

    Source: Hafner et al. (2023), "Mastering Diverse Domains through World Models".
    """
    return x.sign() * x.abs().log1p()


class TstepEncoder(nn.Module, ABC):
    """Base class of timestep encoders: no mixing over time.

    Attributes:
        out_dim: size of the output vector.
    """

    out_dim: int

    @abstractmethod
    def forward(
        self,
        obs: Mapping[str, Tensor],
        prev_action: Tensor,
        prev_reward: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Encodes every timestep on its own.

        Args:
            obs: observation arrays, `[..., *shape]` each.
            prev_action: `[..., A]` float, see `ActionSpec.encode`.
            prev_reward: `[...]` float.
            mask: `[...]` bool, True is a real timestep; None is all real. What lies elsewhere can change neither
                statistics nor gradients.

        Returns:
            `[..., out_dim]`; undefined, but finite, where `mask` is False.
        """


@dataclass(frozen=True, kw_only=True)
class TstepEncoderConfig(ABC):
    """Base class of timestep encoder configs."""

    registry_kind: ClassVar[str] = "tstep_encoder"

    @abstractmethod
    def build(self, obs_specs: Mapping[str, ArraySpec], action_spec: ActionSpec) -> TstepEncoder:
        """Builds the encoder.

        Args:
            obs_specs: one spec for each observation key.
            action_spec: the action of one timestep.

        Returns:
            A module with random weights.
        """


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
        if self.obs_keys is not None:
            is_sequence = isinstance(self.obs_keys, (tuple, list))
            if not is_sequence or not self.obs_keys or any(not isinstance(key, str) for key in self.obs_keys):
                raise ValueError(
                    f"obs_keys={self.obs_keys!r} is not allowed; give None or a tuple of one or more names"
                )
            object.__setattr__(self, "obs_keys", tuple(self.obs_keys))

    def build(self, obs_specs: Mapping[str, ArraySpec], action_spec: ActionSpec) -> FFTstepEncoder:
        """Builds the encoder; see the base class.

        Raises:
            ValueError: if `obs_keys` names an observation that does not exist.
        """
        return FFTstepEncoder(self, obs_specs, action_spec)


class FFTstepEncoder(TstepEncoder):
    """Flattened observations, reward and action through a running input norm, an MLP and an output norm.

    Features are ordered: observation keys alphabetically, previous reward, previous action. Integer and boolean
    observations are cast, not embedded.

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
        keys = tuple(obs_specs) if config.obs_keys is None else config.obs_keys
        unknown = [key for key in keys if key not in obs_specs]
        if unknown or not keys:
            raise ValueError(f"obs_keys={keys!r} is not allowed; give a subset of {sorted(obs_specs)}")
        self.config = config
        self.obs_keys = tuple(sorted(set(keys)))
        self._obs_ndims = tuple(len(obs_specs[key].shape) for key in self.obs_keys)
        self.in_dim = sum(obs_specs[key].numel for key in self.obs_keys) + 1 + action_spec.size
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
        """
        weight_dtype = next(self.mlp.parameters()).dtype
        dtype = torch.float64 if weight_dtype == torch.float64 else torch.float32
        parts = [
            _flatten_tail(obs[key], ndim).to(dtype) for key, ndim in zip(self.obs_keys, self._obs_ndims, strict=True)
        ]
        reward = prev_reward.unsqueeze(-1).to(dtype)
        action = prev_action.to(dtype)
        parts.append(torch.zeros_like(reward) if self.config.hide_prev_reward else reward)
        parts.append(torch.zeros_like(action) if self.config.hide_prev_action else action)
        x = torch.cat(parts, dim=-1)
        if mask is not None:
            # Not only for the statistics: a NaN under the padding times a zero gradient is a NaN in the weights.
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        return symlog(x) if self.config.symlog_inputs else x

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
        """
        x = self.features(obs, prev_action, prev_reward, mask)
        if self.input_norm is not None:
            x = self.input_norm(x, mask)
        return self.out_norm(self.mlp(x.to(next(self.mlp.parameters()).dtype)))


def _flatten_tail(x: Tensor, ndim: int) -> Tensor:
    """Flattens the last `ndim` axes into one; a scalar gets an axis of size 1."""
    if ndim == 0:
        return x.unsqueeze(-1)
    return x if ndim == 1 else x.flatten(-ndim)
