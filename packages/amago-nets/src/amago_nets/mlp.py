"""A plain multi-layer perceptron."""

from __future__ import annotations

from torch import Tensor, nn

from .norms import make_activation, make_norm
from .validation import check_dropout, check_int


class MLP(nn.Module):
    """`n_layers` hidden layers (linear, norm, activation, dropout) and a linear output layer.

    Args:
        in_dim: size of the input.
        d_hidden: size of every hidden layer.
        out_dim: size of the output.
        n_layers: number of hidden layers, >= 1.
        activation: see `amago_nets.norms.ACTIVATIONS`.
        norm: see `amago_nets.norms.NORMS`; applied before each activation.
        dropout: probability in [0, 1), after each activation.

    Raises:
        ValueError: if an argument is not allowed.
    """

    def __init__(
        self,
        in_dim: int,
        d_hidden: int,
        out_dim: int,
        *,
        n_layers: int,
        activation: str = "leaky_relu",
        norm: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_int("in_dim", in_dim)
        check_int("d_hidden", d_hidden)
        check_int("out_dim", out_dim)
        check_int("n_layers", n_layers)
        check_dropout("dropout", dropout)
        layers: list[nn.Module] = []
        for i in range(n_layers):
            layers.append(nn.Linear(in_dim if i == 0 else d_hidden, d_hidden))
            if norm != "none":
                layers.append(make_norm(norm, d_hidden))
            layers.append(make_activation(activation))
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(d_hidden, out_dim))
        self.layers = nn.Sequential(*layers)
        self.in_dim = in_dim
        self.out_dim = out_dim

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., in_dim]` to `[..., out_dim]`."""
        return self.layers(x)
