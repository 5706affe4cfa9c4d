"""Ensembles of critics that give values.

Dimensions: `D` state size, `A` action size, `G` discounts, `C` critics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..registry import register
from ..specs import ActionSpec, check_action_spec
from .ensemble import CriticEnsemble, CriticEnsembleConfig, EnsembleLinear, discount_feature

__all__ = ["EnsembleLinear", "NCritics", "NCriticsConfig", "discount_feature"]


@register("ensemble")
@dataclass(frozen=True, kw_only=True)
class NCriticsConfig(CriticEnsembleConfig):
    """Options of `NCritics`: those of `CriticEnsembleConfig`."""

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


class NCritics(CriticEnsemble):
    """`C` independent MLPs that give values for `G` discounts.

    With discrete actions a critic maps the state to one value for each discount and action. Otherwise the discount
    and the action are inputs, see `CriticEnsemble`.

    Args:
        config: options.
        in_dim: state size `D`.
        action_spec: the action of one timestep.
        gammas: `[G]` discounts.

    Raises:
        ValueError: if `in_dim < 1` or `gammas` is not allowed.
    """

    def __init__(
        self, config: NCriticsConfig, in_dim: int, action_spec: ActionSpec, gammas: Sequence[float] | Tensor
    ) -> None:
        check_action_spec(action_spec)
        listed = action_spec.is_discrete
        super().__init__(
            config,
            in_dim,
            action_spec,
            gammas,
            action_input=not listed,
            out_dim=len(discount_feature(gammas)) * action_spec.size if listed else 1,
        )
        self.config = config

    def forward(self, state: Tensor, action: Tensor | None = None) -> Tensor:
        """Values of states, or of states and actions.

        Args:
            state: `[..., D]`.
            action: None for discrete actions, else `[..., G, A]`; may have further leading axes (such as `K` action
                samples), over which the state is repeated.

        Returns:
            `[..., C, G, A]` for discrete actions; otherwise `[..., C, G]` with the leading axes of `action`.

        Raises:
            ValueError: if the last axis of `state` is wrong, or `action` is missing, not wanted, or of the wrong shape.
        """
        if self.action_input:
            return self.evaluate_actions(state, action).squeeze(-1).movedim(0, -2)
        if action is not None:
            raise ValueError("action must be None: with discrete actions every action's value is an output")
        values = self.evaluate_states(state).movedim(0, -2)
        return values.unflatten(-1, (self.num_gammas, self.action_spec.size))
