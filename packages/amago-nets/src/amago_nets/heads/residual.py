"""An actor head with residual blocks.

Dimensions: `D` state size, `X` extra inputs, `F` width of the residual stream, `G` discounts, `P` parameters of one
action distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..mlp import MLP
from ..norms import ACTIVATIONS, NORMS, make_norm
from ..registry import register
from ..validation import check_choice, check_dropout, check_int
from .actor import ActorHead


@register("residual")
@dataclass(frozen=True, kw_only=True)
class ResidualActorConfig:
    """Options of `ResidualActor`.

    Attributes:
        n_blocks: number of residual blocks.
        d_feature: width `F` of the residual stream.
        d_hidden: hidden size of a block.
        dropout: probability after each activation.
        norm: inside each block, see `amago_nets.norms.NORMS`.
        activation: see `amago_nets.norms.ACTIVATIONS`.

    Raises:
        ValueError: if a field is not allowed.
    """

    registry_kind: ClassVar[str] = "actor"

    n_blocks: int = 2
    d_feature: int = 256
    d_hidden: int = 512
    dropout: float = 0.0
    norm: str = "layer"
    activation: str = "leaky_relu"

    def __post_init__(self) -> None:
        for name in ("n_blocks", "d_feature", "d_hidden"):
            check_int(name, getattr(self, name))
        check_dropout("dropout", self.dropout)
        check_choice("norm", self.norm, NORMS)
        check_choice("activation", self.activation, ACTIVATIONS)

    def build(self, in_dim: int, param_size: int, num_gammas: int, *, extra_dim: int = 0) -> ResidualActor:
        """Builds the head.

        Args:
            in_dim: state size `D`.
            param_size: parameters `P` of one distribution, see `DistributionConfig.param_size`.
            num_gammas: number of discounts `G`.
            extra_dim: features `X` that the head sees beside the state.

        Returns:
            A module with random weights.
        """
        return ResidualActor(self, in_dim, param_size, num_gammas, extra_dim=extra_dim)


class ResidualBlock(nn.Module):
    """`x + norm(W2 act(norm(W1 x)))`.

    Args:
        config: options.
    """

    def __init__(self, config: ResidualActorConfig) -> None:
        super().__init__()
        self.mlp = MLP(
            config.d_feature,
            config.d_hidden,
            config.d_feature,
            n_layers=1,
            activation=config.activation,
            norm=config.norm,
            dropout=config.dropout,
        )
        self.norm = make_norm(config.norm, config.d_feature)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., F]` to `[..., F]`."""
        return x + self.norm(self.mlp(x))


class ResidualActor(ActorHead):
    """A deeper actor: two layers into a residual stream, blocks that add to it, one layer out.

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
        self, config: ResidualActorConfig, in_dim: int, param_size: int, num_gammas: int, *, extra_dim: int = 0
    ) -> None:
        super().__init__(in_dim, param_size, num_gammas, extra_dim=extra_dim)
        self.config = config
        width = config.d_feature
        self.input = MLP(
            in_dim + extra_dim,
            width,
            width,
            n_layers=1,
            activation=config.activation,
            dropout=config.dropout,
        )
        self.blocks = nn.ModuleList(ResidualBlock(config) for _ in range(config.n_blocks))
        self.output = nn.Linear(width, num_gammas * param_size)

    def parameters_of(self, inputs: Tensor) -> Tensor:
        """Maps `[..., D + X]` to `[..., G P]`."""
        x = self.input(inputs)
        for block in self.blocks:
            x = block(x)
        return self.output(x)
