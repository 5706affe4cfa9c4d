"""What all critic ensembles share: `C` independent MLPs as batched matrix products.

Dimensions: `D` state size, `A` action size, `G` discounts, `C` critics, `R` rows (all leading axes flattened), `O`
outputs of one critic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import ACTIVATIONS, make_activation
from ..specs import ActionSpec, check_action_spec
from ..validation import check_choice, check_dropout, check_int
from .actor import check_state

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
    try:
        values = torch.as_tensor(gammas, dtype=torch.float64)
    except (TypeError, ValueError):
        values = torch.empty(0)
    if values.ndim != 1 or values.numel() == 0 or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"gammas={gammas!r} is not allowed; give a non-empty sequence of numbers in [0, 1]")
    return (1.0 - values).clamp(1e-6, 1.0).reciprocal().log1p()


@dataclass(frozen=True, kw_only=True)
class CriticEnsembleConfig:
    """Options that all critic ensembles have.

    Attributes:
        num_critics: number of critics `C`.
        n_layers: number of hidden layers.
        d_hidden: size of every hidden layer.
        dropout: probability after each activation.
        activation: see `amago_nets.norms.ACTIVATIONS`; parameters of an activation are shared by all critics.

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
        """Maps `[C, R, in_dim]`, or `[R, in_dim]` shared by all critics, to `[C, R, out_dim]`."""
        if x.ndim == 2:
            # A stride of 0 costs nothing: measured as fast as one wide [R, in] x [in, C * out] product, without
            # having to reorder weights and outputs.
            x = x.expand(self.weight.shape[0], -1, -1)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)


class CriticEnsemble(nn.Module):
    """`C` MLPs that see the state, or the state, a discount and an action.

    With action inputs, a row is state, discount feature, action clamped to [-0.999, 0.999], in that order. The part of
    the first layer that sees the state is computed once for all discounts and action samples.

    Args:
        config: options.
        in_dim: state size `D`.
        action_spec: the action of one timestep.
        gammas: `[G]` discounts.
        action_input: whether the discount and the action are inputs.
        out_dim: outputs `O` of one critic.

    Attributes:
        phi: `[G]` discount features, at least float32; not part of the state dict.

    Raises:
        ValueError: if `in_dim < 1`, or `action_spec` or `gammas` is not allowed.
    """

    phi: Tensor

    def __init__(
        self,
        config: CriticEnsembleConfig,
        in_dim: int,
        action_spec: ActionSpec,
        gammas: Sequence[float] | Tensor,
        *,
        action_input: bool,
        out_dim: int,
    ) -> None:
        super().__init__()
        check_int("in_dim", in_dim)
        check_action_spec(action_spec)
        self._features = discount_feature(gammas).tolist()
        self.register_buffer("phi", torch.tensor(self._features, dtype=torch.float32), persistent=False)
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.action_spec = action_spec
        self.action_input = action_input
        self.num_critics = config.num_critics
        self.num_gammas = self.phi.shape[0]
        self.dropout = config.dropout
        fan_in = in_dim + 1 + action_spec.size if action_input else in_dim
        sizes = [fan_in] + [config.d_hidden] * config.n_layers + [out_dim]
        self.first = EnsembleLinear(config.num_critics, sizes[0], sizes[1])
        self.rest = nn.ModuleList(
            EnsembleLinear(config.num_critics, n_in, n_out) for n_in, n_out in zip(sizes[1:-1], sizes[2:], strict=True)
        )
        self.activations = nn.ModuleList(make_activation(config.activation, inplace=True) for _ in self.rest)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # What half precision has rounded no state dict would restore.
        dtype = torch.promote_types(self.phi.dtype, torch.float32)
        self.phi = torch.tensor(self._features, dtype=dtype, device=self.phi.device)
        return self

    def evaluate_states(self, state: Tensor) -> Tensor:
        """Outputs of all critics for states `[..., D]`: `[C, ..., O]`.

        Raises:
            ValueError: if the last axis of `state` is wrong.
        """
        check_state(state, self.in_dim)
        outputs = self._after_first(self.first(state.reshape(-1, self.in_dim)))
        return outputs.reshape(self.num_critics, *state.shape[:-1], self.out_dim)

    def evaluate_actions(self, state: Tensor, action: Tensor | None) -> Tensor:
        """Outputs of all critics for states and actions.

        Args:
            state: `[..., D]`.
            action: `[..., G, A]`; may have further leading axes (such as `K` action samples), over which the state is
                repeated.

        Returns:
            `[C, ..., G, O]` with the leading axes of `action`.

        Raises:
            ValueError: if the last axis of `state` is wrong, or `action` is missing or of the wrong shape.
        """
        check_state(state, self.in_dim)
        tail = (*state.shape[:-1], self.num_gammas, self.action_spec.size)
        if action is None or action.ndim < len(tail) or action.shape[action.ndim - len(tail) :] != tail:
            seen = None if action is None else tuple(action.shape)
            raise ValueError(f"action has shape {seen}, which is not allowed; give [..., {', '.join(map(str, tail))}]")
        outputs = self._after_first(self._first_with_actions(state, action))
        return outputs.reshape(self.num_critics, *action.shape[:-1], self.out_dim)

    def _first_with_actions(self, state: Tensor, action: Tensor) -> Tensor:
        """First layer before its activation: `[C, R, hidden]`, rows ordered samples, states, discounts."""
        weight, bias = self.first.weight, self.first.bias.unsqueeze(1)
        count, hidden, size = self.num_critics, weight.shape[-1], self.action_spec.size
        rows = action.to(weight.dtype).clamp(-_ACTION_LIMIT, _ACTION_LIMIT).reshape(-1, self.num_gammas, size)
        phi = self.phi.to(rows.dtype).view(1, -1, 1).expand(rows.shape[0], -1, -1)
        inputs = torch.cat([phi, rows], dim=-1).view(-1, 1 + size)
        states = state.reshape(-1, self.in_dim)
        from_state = torch.baddbmm(bias, states.expand(count, -1, -1), weight[:, : self.in_dim])
        from_action = torch.bmm(inputs.expand(count, -1, -1), weight[:, self.in_dim :])
        samples = rows.shape[0] // max(states.shape[0], 1)
        total = from_action.view(count, samples, states.shape[0], self.num_gammas, hidden)
        return (total + from_state[:, None, :, None]).view(count, -1, hidden)

    def _after_first(self, hidden: Tensor) -> Tensor:
        """Everything after the first layer: `[C, R, hidden]` to `[C, R, O]`."""
        for activation, layer in zip(self.activations, self.rest, strict=True):
            # In place is safe: a matrix product does not need its own result for its gradient.
            hidden = activation(hidden)
            hidden = layer(F.dropout(hidden, self.dropout, self.training))
        return hidden
