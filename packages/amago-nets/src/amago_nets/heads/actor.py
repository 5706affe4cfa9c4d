"""Actor heads: distribution parameters for every discount at once.

Dimensions: `D` state size, `G` discounts, `P` parameters of one action distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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

    def build(self, in_dim: int, param_size: int, num_gammas: int) -> Actor:
        """Builds the head.

        Args:
            in_dim: state size `D`.
            param_size: parameters `P` of one distribution, see `DistributionConfig.param_size`.
            num_gammas: number of discounts `G`.

        Returns:
            A module with random weights.
        """
        return Actor(self, in_dim, param_size, num_gammas)


class Actor(nn.Module):
    """An MLP from states to `G` blocks of distribution parameters.

    Args:
        config: options.
        in_dim: state size `D`.
        param_size: parameters `P` of one distribution.
        num_gammas: number of discounts `G`.

    Raises:
        ValueError: if a size is below 1.
    """

    def __init__(self, config: ActorConfig, in_dim: int, param_size: int, num_gammas: int) -> None:
        super().__init__()
        check_int("param_size", param_size)
        check_int("num_gammas", num_gammas)
        self.config = config
        self.in_dim = in_dim
        self.param_size = param_size
        self.num_gammas = num_gammas
        self.mlp = MLP(
            in_dim,
            config.d_hidden,
            num_gammas * param_size,
            n_layers=config.n_layers,
            activation=config.activation,
            dropout=config.dropout,
        )

    def forward(self, state: Tensor) -> Tensor:
        """Maps states `[..., D]` to parameters `[..., G, P]`."""
        return self.mlp(state).unflatten(-1, (self.num_gammas, self.param_size))
