"""Actor heads: distribution parameters for every discount at once.

Dimensions: `D` state size, `X` extra inputs, `G` discounts, `P` parameters of one action distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..mlp import MLP
from ..norms import ACTIVATIONS
from ..registry import register
from ..validation import check_choice, check_dropout, check_int


@register("mlp")
@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """Options of `Actor`.

    Attributes:
        n_layers: number of hidden layers.
        d_hidden: size of every hidden layer.
        dropout: probability after each activation.
        activation: see `amago_nets.norms.ACTIVATIONS`.

    Raises:
        ValueError: if a field is not allowed.
    """

    registry_kind: ClassVar[str] = "actor"

    n_layers: int = 2
    d_hidden: int = 256
    dropout: float = 0.0
    activation: str = "leaky_relu"

    def __post_init__(self) -> None:
        check_int("n_layers", self.n_layers)
        check_int("d_hidden", self.d_hidden)
        check_dropout("dropout", self.dropout)
        check_choice("activation", self.activation, ACTIVATIONS)

    def build(self, in_dim: int, param_size: int, num_gammas: int, *, extra_dim: int = 0) -> Actor:
        """Builds the head.

        Args:
            in_dim: state size `D`.
            param_size: parameters `P` of one distribution, see `DistributionConfig.param_size`.
            num_gammas: number of discounts `G`.
            extra_dim: features `X` that the head sees beside the state.

        Returns:
            A module with random weights.
        """
        return Actor(self, in_dim, param_size, num_gammas, extra_dim=extra_dim)


def check_state(state: Tensor, in_dim: int) -> None:
    """Refuses states of another size than the head was built for.

    Args:
        state: `[..., D]`.
        in_dim: `D`.

    Raises:
        ValueError: if the last axis is not `D`.
    """
    if state.shape[-1:] != (in_dim,):
        raise ValueError(f"state.shape={tuple(state.shape)} is not allowed; give [..., {in_dim}]")


class ActorHead(nn.Module):
    """What actor heads share: extra inputs, and outputs by discount. A subclass implements `parameters_of`.

    Extra inputs are raw observation entries that should not have to pass the sequence model, such as a mask of the
    actions that are allowed now. They are appended to the state.

    Args:
        in_dim: state size `D`.
        param_size: parameters `P` of one distribution.
        num_gammas: number of discounts `G`.
        extra_dim: features `X` beside the state.

    Raises:
        ValueError: if a size is not allowed.
    """

    def __init__(self, in_dim: int, param_size: int, num_gammas: int, *, extra_dim: int = 0) -> None:
        super().__init__()
        check_int("in_dim", in_dim)
        check_int("param_size", param_size)
        check_int("num_gammas", num_gammas)
        check_int("extra_dim", extra_dim, low=0)
        self.in_dim = in_dim
        self.param_size = param_size
        self.num_gammas = num_gammas
        self.extra_dim = extra_dim

    def forward(self, state: Tensor, extra: Tensor | None = None) -> Tensor:
        """Maps states to distribution parameters.

        Args:
            state: `[..., D]`.
            extra: `[..., X]`; None if `X` is 0.

        Returns:
            `[..., G, P]`.

        Raises:
            ValueError: if the last axis of `state` is wrong, or `extra` is missing, not wanted, or of the wrong shape.
        """
        check_state(state, self.in_dim)
        shape = (*state.shape[:-1], self.extra_dim) if self.extra_dim else None
        seen = None if extra is None else tuple(extra.shape)
        if seen != shape:
            wanted = f"[..., {self.extra_dim}] with the leading axes of the state: {shape}" if shape else "None"
            raise ValueError(f"extra has shape {seen}, which is not allowed; give {wanted}")
        inputs = state if extra is None else torch.cat([state, extra.to(state.dtype)], dim=-1)
        return self.parameters_of(inputs).unflatten(-1, (self.num_gammas, self.param_size))

    def parameters_of(self, inputs: Tensor) -> Tensor:
        """Maps `[..., D + X]` to `[..., G P]`."""
        raise NotImplementedError


class Actor(ActorHead):
    """An MLP from states to `G` blocks of distribution parameters.

    Args:
        config: options.
        in_dim: state size `D`.
        param_size: parameters `P` of one distribution.
        num_gammas: number of discounts `G`.
        extra_dim: features `X` beside the state, see `ActorHead`.

    Raises:
        ValueError: if a size is below 1.
    """

    def __init__(
        self, config: ActorConfig, in_dim: int, param_size: int, num_gammas: int, *, extra_dim: int = 0
    ) -> None:
        super().__init__(in_dim, param_size, num_gammas, extra_dim=extra_dim)
        self.config = config
        self.mlp = MLP(
            in_dim + extra_dim,
            config.d_hidden,
            num_gammas * param_size,
            n_layers=config.n_layers,
            activation=config.activation,
            dropout=config.dropout,
        )

    def parameters_of(self, inputs: Tensor) -> Tensor:
        """Maps `[..., D + X]` to `[..., G P]`."""
        return self.mlp(inputs)
