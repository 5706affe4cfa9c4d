"""The operators behind the return functions; none of them has a gradient.

Dimensions: `B` batch, `T` transitions, `G` discounts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Transitions
from .vectorised import blocked_returns

_INPUTS = "Tensor rewards, Tensor terminated, Tensor? truncated, Tensor? next_values, Tensor gammas, Tensor mask"


@torch.library.custom_op(
    "amago_kernels::lambda_returns", mutates_args=(), schema=f"({_INPUTS}, float lambda_) -> Tensor"
)
def lambda_blocked(
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    next_values: Tensor | None,
    gammas: Tensor,
    mask: Tensor,
    lambda_: float,
) -> Tensor:
    """`blocked_returns` with inputs of any dtype, one call to the compiler."""
    transitions = Transitions(rewards, terminated, truncated, next_values, gammas, mask)
    return blocked_returns(transitions.widened(), lambda_).to(transitions.dtype)


@torch.library.custom_op(
    "amago_kernels::lambda_returns_triton", mutates_args=(), schema=f"({_INPUTS}, float lambda_) -> Tensor"
)
def lambda_triton(
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    next_values: Tensor | None,
    gammas: Tensor,
    mask: Tensor,
    lambda_: float,
) -> Tensor:
    """`triton_returns.launch_lambda`."""
    from .triton_returns import launch_lambda

    return launch_lambda(Transitions(rewards, terminated, truncated, next_values, gammas, mask), lambda_)


@torch.library.custom_op(
    "amago_kernels::n_step_targets_triton", mutates_args=(), schema=f"({_INPUTS}, int n) -> Tensor"
)
def n_step_triton(
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    next_values: Tensor | None,
    gammas: Tensor,
    mask: Tensor,
    n: int,
) -> Tensor:
    """`triton_returns.launch_n_step`."""
    from .triton_returns import launch_n_step

    return launch_n_step(Transitions(rewards, terminated, truncated, next_values, gammas, mask), n)


def _fake(
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    next_values: Tensor | None,
    gammas: Tensor,
    mask: Tensor,
    option: float,
) -> Tensor:
    transitions = Transitions(rewards, terminated, truncated, next_values, gammas, mask)
    return rewards.new_empty(transitions.shape, dtype=transitions.dtype)


for _operator in (lambda_blocked, lambda_triton, n_step_triton):
    _operator.register_fake(_fake)
