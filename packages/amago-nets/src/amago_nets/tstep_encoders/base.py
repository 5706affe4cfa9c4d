"""What timestep encoders have in common, and the parts they are made of.

Dimensions: `A` action size, `F` features. `...` stands for any leading axes: `[B, L]` in training, `[B]` when acting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amago_kernels import symlog

from ..specs import ActionSpec, ArraySpec


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

    @classmethod
    def for_spec(
        cls, obs_specs: Mapping[str, ArraySpec], action_spec: ActionSpec, *, d_output: int = 256
    ) -> TstepEncoder:
        """Builds an encoder that suits the observations, with default options.

        Args:
            obs_specs: one spec for each observation key.
            action_spec: the action of one timestep.
            d_output: size of the output.

        Returns:
            The encoder of `default_config`.

        Raises:
            ValueError: if there is no observation, or tokens have no known number of classes.
        """
        from .multi import default_config

        return default_config(obs_specs, d_output=d_output).build(obs_specs, action_spec)


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


class ObsEncoder(nn.Module, ABC):
    """Base class of the parts that encode one observation array; timestep encoders are made of them.

    Args:
        spec: the observation of one timestep.
        key: name of the observation, for error messages.

    Attributes:
        out_dim: size of the output vector.
    """

    out_dim: int

    def __init__(self, spec: ArraySpec, *, key: str = "observation") -> None:
        super().__init__()
        self.spec = spec
        self.key = key

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encodes every timestep on its own.

        Args:
            x: `[..., *shape]`, as the spec says.
            mask: `[...]` bool, True is a real timestep; None is all real. What lies elsewhere can change neither
                statistics nor gradients.

        Returns:
            `[..., out_dim]` in the dtype of the weights; undefined, but finite, where `mask` is False.

        Raises:
            ValueError: if the shape is wrong.
        """

    def _take(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Checks the shape, and zeros what lies under padding."""
        lead = x.shape[: x.ndim - len(self.spec.shape)]
        if x.shape != lead + self.spec.shape or (mask is not None and mask.shape != lead):
            also = "" if mask is None else f" with mask.shape={tuple(mask.shape)}"
            raise ValueError(
                f"obs[{self.key!r}].shape={tuple(x.shape)} is not allowed{also}; give leading axes, the same for the "
                f"mask, then the shape {self.spec.shape} of one {self.spec.kind} observation"
            )
        # PyTorch computes little with wide unsigned integers.
        x = x.long() if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x
        return zero_padding(x, mask, len(self.spec.shape))


@dataclass(frozen=True, kw_only=True)
class ObsEncoderConfig(ABC):
    """Base class of the configs of parts."""

    registry_kind: ClassVar[str] = "obs_encoder"

    @abstractmethod
    def build(self, spec: ArraySpec, *, key: str = "observation") -> ObsEncoder:
        """Builds the part.

        Args:
            spec: the observation of one timestep.
            key: name of the observation, for error messages.

        Returns:
            A module with random weights.

        Raises:
            ValueError: if the part cannot encode such an observation.
        """


class MetaEncoder(nn.Module):
    """Previous reward and action, in this order, squashed by `symlog`, through one linear layer.

    Args:
        action_spec: the action of one timestep.
        out_dim: size of the output.
        hide_prev_action: feed zeros instead of the previous action.
        hide_prev_reward: feed zeros instead of the previous reward.
    """

    def __init__(
        self, action_spec: ActionSpec, out_dim: int, *, hide_prev_action: bool = False, hide_prev_reward: bool = False
    ) -> None:
        super().__init__()
        self.out_dim = out_dim
        self.hide_prev_action = hide_prev_action
        self.hide_prev_reward = hide_prev_reward
        self.linear = nn.Linear(1 + action_spec.size, out_dim)

    def forward(self, prev_action: Tensor, prev_reward: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps `[..., A]` and `[...]` to `[..., out_dim]`; padding counts as zeros."""
        dtype = self.linear.weight.dtype
        meta = meta_features(prev_action, prev_reward, raw_dtype(dtype), self.hide_prev_action, self.hide_prev_reward)
        return self.linear(symlog(zero_padding(meta, mask)).to(dtype))


def meta_features(
    prev_action: Tensor, prev_reward: Tensor, dtype: torch.dtype, hide_prev_action: bool, hide_prev_reward: bool
) -> Tensor:
    """Concatenates the previous reward and action to `[..., 1 + A]`; what is hidden becomes zeros."""
    reward = prev_reward.unsqueeze(-1).to(dtype)
    action = prev_action.to(dtype)
    reward = torch.zeros_like(reward) if hide_prev_reward else reward
    return torch.cat([reward, torch.zeros_like(action) if hide_prev_action else action], dim=-1)


def zero_padding(x: Tensor, mask: Tensor | None, axes: int = 1) -> Tensor:
    """Zeros where `mask` is False, for `x` with `axes` axes more than the mask.

    Raises:
        ValueError: if the mask is not bool.
    """
    if mask is None:
        return x
    if mask.dtype != torch.bool:
        raise ValueError(f"mask.dtype={mask.dtype} is not allowed; give torch.bool")
    # Not only for the statistics: a NaN under the padding times a zero gradient is a NaN in the weights.
    return x.masked_fill(~mask.reshape(*mask.shape, *(1,) * axes), 0)


def raw_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """Dtype in which raw features are kept before they meet the weights: never less than float32."""
    return torch.float64 if weight_dtype == torch.float64 else torch.float32


def flatten_tail(x: Tensor, ndim: int) -> Tensor:
    """Flattens the last `ndim` axes into one; a scalar gets an axis of size 1."""
    if ndim == 0:
        return x.unsqueeze(-1)
    return x if ndim == 1 else x.flatten(-ndim)


def check_obs_keys(obs_keys: Any) -> tuple[str, ...] | None:
    """Refuses anything but None and one or more names; returns them as a tuple.

    Args:
        obs_keys: the field of a config.

    Raises:
        ValueError: if it is something else.
    """
    if obs_keys is None:
        return None
    is_sequence = isinstance(obs_keys, (tuple, list))
    if not is_sequence or not obs_keys or any(not isinstance(key, str) for key in obs_keys):
        raise ValueError(f"obs_keys={obs_keys!r} is not allowed; give None or a tuple of one or more names")
    return tuple(obs_keys)


def check_obs_specs(obs_specs: Any) -> None:
    """Refuses anything but a mapping from one name or more to specs.

    Args:
        obs_specs: value to check.

    Raises:
        ValueError: if it is something else.
    """
    is_mapping = isinstance(obs_specs, Mapping) and len(obs_specs) > 0
    if not is_mapping or any(
        not isinstance(key, str) or not isinstance(spec, ArraySpec) for key, spec in obs_specs.items()
    ):
        raise ValueError(
            f"obs_specs={obs_specs!r} is not allowed; give a mapping from one name or more, such as 'observation', to "
            "ArraySpec"
        )


def select_specs(obs_specs: Mapping[str, ArraySpec], obs_keys: tuple[str, ...] | None) -> dict[str, ArraySpec]:
    """The specs an encoder uses, keys sorted.

    Args:
        obs_specs: one spec for each observation key.
        obs_keys: keys to use; None is all of them.

    Raises:
        ValueError: if a key does not exist, or there is none, or something is no spec.
    """
    check_obs_specs(obs_specs)
    keys = tuple(obs_specs) if obs_keys is None else obs_keys
    if not keys or any(key not in obs_specs for key in keys):
        raise ValueError(f"obs_keys={keys!r} is not allowed; give a subset of {sorted(obs_specs)}")
    return {key: obs_specs[key] for key in sorted(set(keys))}


def check_inputs(
    specs: Mapping[str, ArraySpec],
    action_size: int,
    obs: Mapping[str, Tensor],
    prev_action: Tensor,
    prev_reward: Tensor,
    mask: Tensor | None,
) -> None:
    """Compares the inputs of a forward pass with the specs; the leading axes are those of `prev_reward`.

    Args:
        specs: observations the encoder uses.
        action_size: `A`.
        obs: see `TstepEncoder.forward`.
        prev_action: see `TstepEncoder.forward`.
        prev_reward: see `TstepEncoder.forward`.
        mask: see `TstepEncoder.forward`.

    Raises:
        ValueError: if a key is missing or a shape is wrong.
    """
    if isinstance(obs, Tensor):
        raise ValueError(
            f"obs is a tensor of shape {tuple(obs.shape)}, which is not allowed; give a mapping from "
            f"{sorted(specs)} to tensors"
        )
    _check_tensor("prev_action", prev_action)
    _check_tensor("prev_reward", prev_reward)
    lead = prev_reward.shape
    for key, spec in specs.items():
        if key not in obs:
            raise ValueError(f"obs has the keys {sorted(obs.keys())}; {key!r} is missing, give {sorted(specs)}")
        _check_tensor(f"obs[{key!r}]", obs[key])
        if obs[key].shape != lead + spec.shape:
            raise ValueError(
                f"obs[{key!r}].shape={tuple(obs[key].shape)} is not allowed; give {(*lead, *spec.shape)}: the shape of "
                f"prev_reward, {tuple(lead)}, then that of one {spec.kind} observation, {spec.shape}"
            )
    if prev_action.shape != (*lead, action_size):
        raise ValueError(
            f"prev_action.shape={tuple(prev_action.shape)} is not allowed; give {(*lead, action_size)}: the shape of "
            "prev_reward, then the action size"
        )
    if mask is not None and mask.shape != lead:
        raise ValueError(f"mask.shape={tuple(mask.shape)} is not allowed; give {tuple(lead)}, as prev_reward")


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, which is not allowed; give a tensor")
