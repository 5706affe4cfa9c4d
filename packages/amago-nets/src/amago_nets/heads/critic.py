"""Ensembles of critics evaluated together.

Dimensions: `D` state size, `A` action size, `G` discounts, `C` critics, `N` rows (all leading axes flattened).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import ACTIVATIONS, make_activation
from ..registry import register
from ..specs import ActionSpec
from ..validation import check_choice, check_dropout, check_int

_ACTION_LIMIT = 0.999


def discount_feature(gammas: Sequence[float] | Tensor) -> Tensor:
    """How an action-input critic sees a discount: `ln(1 + 1 / clamp(1 - gamma, 1e-6, 1))`.

    Args:
        gammas: `[G]` discounts in [0, 1]; give Python floats or float64, because `1 - gamma` cancels in float32.

    Returns:
        `[G]` float64.

    Raises:
        ValueError: if `gammas` is empty, not one-dimensional, or has an entry outside [0, 1].
    """
    values = torch.as_tensor(gammas, dtype=torch.float64)
    if values.ndim != 1 or values.numel() == 0 or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"gammas={gammas!r} is not allowed; give a non-empty sequence of numbers in [0, 1]")
    return (1.0 - values).clamp(1e-6, 1.0).reciprocal().log1p()


@register("ensemble")
@dataclass(frozen=True, kw_only=True)
class NCriticsConfig:
    """Options of `NCritics`.

    Attributes:
        num_critics: number of critics `C`.
        n_layers: number of hidden layers.
        d_hidden: size of every hidden layer.
        dropout: probability after each activation.
        activation: see `amago_nets.norms.ACTIVATIONS`.

    Raises:
        ValueError: if a field is not allowed.
    """

    registry_kind: ClassVar[str] = "critic"

    num_critics: int = 4
    n_layers: int = 2
    d_hidden: int = 256
    dropout: float = 0.0
    activation: str = "leaky_relu"

    def __post_init__(self) -> None:
        for name in ("num_critics", "n_layers", "d_hidden"):
            check_int(name, getattr(self, name))
        check_dropout("dropout", self.dropout)
        check_choice("activation", self.activation, ACTIVATIONS)

    def build(self, in_dim: int, action_spec: ActionSpec, gammas: Sequence[float] | Tensor) -> NCritics:
        """Builds the ensemble.

        Args:
            in_dim: state size `D`.
            action_spec: the action of one timestep; discrete actions become outputs, others become inputs.
            gammas: `[G]` discounts.

        Returns:
            A module with random weights.
        """
        return NCritics(self, in_dim, action_spec, gammas)


class EnsembleLinear(nn.Module):
    """One linear layer for each of `C` critics, as one batched matrix product.

    Args:
        num_critics: number of critics `C`.
        in_dim: inputs of one critic.
        out_dim: outputs of one critic.

    Attributes:
        weight: `[C, in_dim, out_dim]`, drawn from U(-sqrt(3 / in_dim), sqrt(3 / in_dim)).
        bias: `[C, out_dim]`, drawn from U(-sqrt(1 / in_dim), sqrt(1 / in_dim)).
    """

    def __init__(self, num_critics: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_critics, in_dim, out_dim))
        self.bias = nn.Parameter(torch.empty(num_critics, out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights."""
        fan_in = self.weight.shape[1]
        nn.init.uniform_(self.weight, -math.sqrt(3.0 / fan_in), math.sqrt(3.0 / fan_in))
        nn.init.uniform_(self.bias, -math.sqrt(1.0 / fan_in), math.sqrt(1.0 / fan_in))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[C, N, in_dim]`, or `[N, in_dim]` shared by all critics, to `[C, N, out_dim]`."""
        if x.ndim == 2:
            # A stride of 0 costs nothing: measured as fast as one wide [N, in] x [in, C * out] product, without
            # having to reorder weights and outputs.
            x = x.expand(self.weight.shape[0], -1, -1)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)


class NCritics(nn.Module):
    """`C` independent MLPs that give values for `G` discounts.

    With discrete actions a critic maps the state to one value for each discount and action. Otherwise the discount
    and the action are inputs, in the order state, discount feature, action clamped to [-0.999, 0.999]. The part of
    the first layer that sees the state is then computed once for all discounts and action samples.

    Args:
        config: options.
        in_dim: state size `D`.
        action_spec: the action of one timestep.
        gammas: `[G]` discounts.

    Attributes:
        phi: `[G]` float32 discount features, not part of the state dict.

    Raises:
        ValueError: if `in_dim < 1` or `gammas` is not allowed.
    """

    phi: Tensor

    def __init__(
        self, config: NCriticsConfig, in_dim: int, action_spec: ActionSpec, gammas: Sequence[float] | Tensor
    ) -> None:
        super().__init__()
        check_int("in_dim", in_dim)
        self.register_buffer("phi", discount_feature(gammas).float(), persistent=False)
        self.config = config
        self.in_dim = in_dim
        self.action_spec = action_spec
        self.num_critics = config.num_critics
        self.num_gammas = self.phi.shape[0]
        self.action_input = not action_spec.is_discrete
        fan_in = in_dim + 1 + action_spec.size if self.action_input else in_dim
        out_dim = 1 if self.action_input else self.num_gammas * action_spec.size
        sizes = [fan_in] + [config.d_hidden] * config.n_layers + [out_dim]
        self.first = EnsembleLinear(config.num_critics, sizes[0], sizes[1])
        self.rest = nn.ModuleList(
            EnsembleLinear(config.num_critics, n_in, n_out) for n_in, n_out in zip(sizes[1:-1], sizes[2:], strict=True)
        )
        self.activation = make_activation(config.activation, inplace=True)

    def forward(self, state: Tensor, action: Tensor | None = None) -> Tensor:
        """Values of states, or of states and actions.

        Args:
            state: `[..., D]`.
            action: None for discrete actions, else `[..., G, A]`; may have further leading axes (such as `K` action
                samples), over which the state is repeated.

        Returns:
            `[..., C, G, A]` for discrete actions; otherwise `[..., C, G]` with the leading axes of `action`.

        Raises:
            ValueError: if `action` is missing, not wanted, or of the wrong shape.
        """
        if not self.action_input:
            if action is not None:
                raise ValueError("action must be None: with discrete actions every action's value is an output")
            values = self._head(self.first(state.reshape(-1, self.in_dim))).transpose(0, 1)
            return values.reshape(*state.shape[:-1], self.num_critics, self.num_gammas, self.action_spec.size)
        rows = self._check_action(state, action)
        lead = rows.shape[:-2]
        values = self._head(self._action_input_layer(state, rows))
        return values.reshape(self.num_critics, *lead, self.num_gammas).movedim(0, -2)

    def _check_action(self, state: Tensor, action: Tensor | None) -> Tensor:
        lead = state.shape[:-1]
        tail = (*lead, self.num_gammas, self.action_spec.size)
        if action is None or action.ndim < len(tail) or action.shape[action.ndim - len(tail) :] != tail:
            seen = None if action is None else tuple(action.shape)
            raise ValueError(f"action has shape {seen}, which is not allowed; give [..., {', '.join(map(str, tail))}]")
        return action

    def _action_input_layer(self, state: Tensor, action: Tensor) -> Tensor:
        """First layer before its activation: `[C, N, hidden]`, rows ordered samples, states, discounts."""
        size, count, hidden = self.action_spec.size, self.num_critics, self.config.d_hidden
        weight, bias = self.first.weight, self.first.bias.unsqueeze(1)
        rows = action.to(weight.dtype).clamp(-_ACTION_LIMIT, _ACTION_LIMIT).reshape(-1, self.num_gammas, size)
        phi = self.phi.to(rows.dtype).view(1, -1, 1).expand(rows.shape[0], -1, -1)
        inputs = torch.cat([phi, rows], dim=-1).view(-1, 1 + size)
        states = state.reshape(-1, self.in_dim)
        from_state = torch.baddbmm(bias, states.expand(count, -1, -1), weight[:, : self.in_dim])
        from_action = torch.bmm(inputs.expand(count, -1, -1), weight[:, self.in_dim :])
        samples = rows.shape[0] // max(states.shape[0], 1)
        total = from_action.view(count, samples, states.shape[0], self.num_gammas, hidden)
        return (total + from_state[:, None, :, None]).view(count, -1, hidden)

    def _head(self, hidden: Tensor) -> Tensor:
        """Everything after the first layer: `[C, N, hidden]` to `[C, N, out]`."""
        for layer in self.rest:
            # In place is safe: a matrix product does not need its own result for its gradient.
            hidden = self.activation(hidden)
            hidden = layer(F.dropout(hidden, self.config.dropout, self.training))
        return hidden
