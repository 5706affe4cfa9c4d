"""What every agent offers to the learner and to the policy.

Dimensions: B batch, L timesteps, T = L-1 transitions, D width, G discounts, A action, P distribution parameters.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from amago_nets.distributions import DistributionConfig, PolicyDistribution
from amago_nets.specs import ActionSpec
from amago_nets.traj_encoders import TrajEncoder
from amago_nets.tstep_encoders import TstepEncoder
from amago_offline.batch import Batch


@dataclass(frozen=True)
class LossOutput:
    """The scalar to minimise, and what to log about it.

    Attributes:
        total: `[]` float32, differentiable.
        metrics: name to `[]` tensor, detached; nothing here is needed to train.
    """

    total: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class BaseAgent(nn.Module, abc.ABC):
    """A timestep encoder, a trajectory encoder and heads, trained together by one loss.

    Subclasses set `tstep_encoder`, `traj_encoder`, `actor`, `policy_config` and `action_spec`, and implement `loss` and
    `update_targets`. Whatever is trained must be returned by `trained_modules`.
    """

    tstep_encoder: TstepEncoder
    traj_encoder: TrajEncoder
    actor: nn.Module
    policy_config: DistributionConfig
    action_spec: ActionSpec

    @abc.abstractmethod
    def loss(self, batch: Batch, *, detailed: bool = False) -> LossOutput:
        """Loss of one batch of windows.

        Args:
            batch: windows of `[B, L]` timesteps on the agent's device.
            detailed: also compute the metrics that cost something.

        Returns:
            The total loss and its metrics.
        """

    @abc.abstractmethod
    def update_targets(self) -> None:
        """Move the target networks; the learner calls it once after each optimizer step."""

    @abc.abstractmethod
    def trained_modules(self) -> dict[str, nn.Module]:
        """The modules the optimizer may touch, by the name their gradient norms are logged under."""

    def encode(self, batch: Batch) -> Tensor:
        """States of every timestep of a batch.

        Args:
            batch: windows of `[B, L]` timesteps.

        Returns:
            `[B, L, D]` float; rows of padding hold finite garbage.
        """
        prev_action = self.action_spec.encode(batch.prev_action)
        embedded = self.tstep_encoder(_as_dict(batch.obs), prev_action, batch.prev_reward, batch.timestep_mask)
        states, _ = self.traj_encoder(embedded, batch.time_idx, _inner_resets(batch.reset))
        return states

    def policy_step(
        self, obs: dict[str, Tensor], prev_action: Tensor, prev_reward: Tensor, time_idx: Tensor, state: Any
    ) -> PolicyDistribution:
        """Advance the policy by one timestep in every lane.

        Args:
            obs: name to `[B, ...]`.
            prev_action: `[B]` int64 (-1: none) or `[B, A]` float32.
            prev_reward: `[B]` float32.
            time_idx: `[B]` int64.
            state: of `traj_encoder.initial_state(B)`; advanced in place.

        Returns:
            The distribution over actions of the acting (last) discount.
        """
        embedded = self.tstep_encoder(obs, self.action_spec.encode(prev_action), prev_reward, None)
        hidden = self.traj_encoder.step(embedded, time_idx, state)
        return self.policy_config.build(self.actor(hidden)[..., -1, :])

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device


def _inner_resets(reset: Tensor) -> Tensor | None:
    """`[B, L]` bool, or None if no episode begins inside a window: recurrent models are faster without.

    Finding out would stall an accelerator, and break a compiled graph.
    """
    if reset.device.type != "cpu" or torch.compiler.is_compiling() or bool(reset[:, 1:].any()):
        return reset
    return None


def _as_dict(obs: Any) -> dict[str, Tensor]:
    return obs if isinstance(obs, dict) else {key: obs[key] for key in obs.keys()}
