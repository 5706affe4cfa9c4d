"""Values of states and actions, for critics that list all actions and for critics that take one as input.

Dimensions: `...` batch dimensions, D width, C critics, G discounts, A action, K action samples. All results are raw
critic outputs `[..., C, G]`, before any value normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from amago_core.losses.critic import discrete_action_values, discrete_state_values
from amago_nets.distributions import Discrete, PolicyDistribution


@dataclass(frozen=True)
class StateValues:
    """What the losses need to know about one batch of states.

    Attributes:
        q_taken: `[..., C, G]` value of the action that was taken; carries gradient to critics and state.
        v_policy: `[..., C, G]` value of the policy's actions; carries gradient to the policy only, if to anything.
    """

    q_taken: Tensor
    v_policy: Tensor


class ListedActionValues:
    """Critics that return the values of all A discrete actions at once: expectations are exact, K is 1."""

    def target(self, critics: nn.Module, state: Tensor, policy: PolicyDistribution, num_samples: int) -> Tensor:
        """Expected value of `policy` at `state` `[..., D]`, as `[..., C, G]`."""
        return discrete_state_values(critics(state), _probs(policy))

    def evaluate(
        self, critics: nn.Module, state: Tensor, action: Tensor, policy: PolicyDistribution, num_samples: int
    ) -> StateValues:
        """Values at `state` `[..., D]` of `action` `[...]` int64 and of `policy`.

        The policy's value uses the same critic output with its gradient cut, which is what a frozen copy of the
        critics, fed a detached state, would return.
        """
        q_all = critics(state)
        return StateValues(
            q_taken=discrete_action_values(q_all, action),
            v_policy=discrete_state_values(q_all.detach(), _probs(policy)),
        )


def _probs(policy: PolicyDistribution) -> Tensor:
    assert isinstance(policy, Discrete)
    return policy.probs


class SampledActionValues:
    """Critics that take one action as input: the policy's value is a mean over K sampled actions.

    Args:
        differentiable: whether samples of the policy carry gradient to it.
    """

    def __init__(self, *, differentiable: bool = True) -> None:
        self.differentiable = differentiable

    def target(self, critics: nn.Module, state: Tensor, policy: PolicyDistribution, num_samples: int) -> Tensor:
        """Mean value at `state` `[..., D]` of `num_samples` actions of `policy`, as `[..., C, G]`."""
        actions = torch.stack([policy.sample() for _ in range(num_samples)])
        return critics(state, actions).mean(0)

    def evaluate(
        self, critics: nn.Module, state: Tensor, action: Tensor, policy: PolicyDistribution, num_samples: int
    ) -> StateValues:
        """Values at `state` `[..., D]` of `action` `[..., A]` and of sampled actions of `policy`."""
        draw = policy.rsample if self.differentiable else policy.sample
        samples = torch.stack([draw() for _ in range(num_samples)])
        taken = action.unsqueeze(-2).expand(*action.shape[:-1], samples.shape[-2], action.shape[-1])
        frozen = {name: value.detach() for name, value in critics.named_parameters()}
        v_policy = functional_call(critics, frozen, (state.detach(), samples)).mean(0)
        return StateValues(q_taken=critics(state, taken), v_policy=v_policy)
