"""Return targets over many discounts at once, for windows that may hold several episodes and padding.

Dimensions: `B` batch, `T` transitions, `G` discounts.
"""

from __future__ import annotations

from torch import Tensor

from .call import Transitions, choose_backend
from .operators import lambda_blocked, lambda_triton, n_step_triton
from .reference import discounted_reference, lambda_reference, n_step_reference
from .vectorised import n_step_by_doubling

__all__ = ["discounted_returns", "lambda_returns", "n_step_targets"]


def n_step_targets(
    rewards: Tensor,
    terminated: Tensor,
    next_values: Tensor,
    gammas: Tensor,
    mask: Tensor,
    *,
    n: int = 1,
    truncated: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """n-step TD targets for every transition and discount in parallel.

    `y_t = sum_{i<k} g^i r_{t+i} + g^k V(s_{t+k})`, where k is n, or less: a terminated transition is the last one used
    and is not bootstrapped from; the sum also ends with a truncated transition and before the first masked one,
    bootstrapping from where it is.

    Args:
        rewards: `[B, T]` float, environment units.
        terminated: `[B, T]` bool; True stops the bootstrap.
        next_values: `[B, T, G]` float; `[:, t]` is V(s_{t+1}), at a truncated transition the value of the last state.
        gammas: `[G]` float in [0, 1], which is checked on the CPU only: elsewhere, looking would stall the host.
        mask: `[B, T]` bool; True is a real transition.
        n: horizon in transitions, >= 1.
        truncated: `[B, T]` bool; None if the window goes on in one episode after any transition that is not terminated.
            Where both are set, terminated wins.
        backend: "auto", "reference", "fused" (few calls whatever n), or "triton". The last two carry no gradient and
            refuse inputs that require one while gradients are enabled; "auto" then takes the reference.

    Returns:
        `[B, T, G]` in the dtype of `next_values`; undefined where `mask` is False. What lies under the mask, or in
        `next_values` under a terminated transition, never reaches a defined entry.

    Raises:
        ValueError: if `n < 1`, shapes, dtypes or devices disagree, a discount is out of range, or the backend cannot
            serve the call.

    Source: Sutton & Barto (2018), section 7.1.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n={n} is not allowed; give an integer >= 1")
    transitions = Transitions(rewards, terminated, truncated, next_values, gammas, mask)
    transitions.check(valued=True)
    chosen = choose_backend("n_step_targets", backend, transitions)
    if 0 in transitions.shape:
        return next_values.new_empty(transitions.shape)
    length = rewards.shape[1]
    if chosen == "reference":
        return n_step_reference(transitions.widened(), n).to(transitions.dtype)
    if 1 < length <= n:
        # No horizon cuts the sums.
        whole = lambda_triton if chosen == "triton" else lambda_blocked
        return whole(*transitions.flat(), 1.0)
    if chosen == "triton":
        return n_step_triton(*transitions.flat(), min(n, length))
    return n_step_by_doubling(transitions.widened(), min(n, length)).to(transitions.dtype)


def lambda_returns(
    rewards: Tensor,
    terminated: Tensor,
    next_values: Tensor,
    gammas: Tensor,
    mask: Tensor,
    *,
    lambda_: float,
    truncated: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """TD(lambda) returns, for every transition and discount.

    `y_t = r_t + g ((1 - lambda) V(s_{t+1}) + lambda y_{t+1})`; the bracket is 0 after a terminated transition, and
    V(s_{t+1}) after a truncated one and where the next transition is masked or beyond the window.

    Args:
        rewards: `[B, T]` float, environment units.
        terminated: `[B, T]` bool; True stops the bootstrap.
        next_values: `[B, T, G]` float; `[:, t]` is V(s_{t+1}), at a truncated transition the value of the last state.
        gammas: `[G]` float in [0, 1], which is checked on the CPU only: elsewhere, looking would stall the host.
        mask: `[B, T]` bool; True is a real transition.
        lambda_: weight of longer returns in [0, 1]: 0 gives one-step targets, 1 bootstraps from ends only.
        truncated: `[B, T]` bool; None if the window goes on in one episode after any transition that is not terminated.
            Where both are set, terminated wins.
        backend: "auto", "reference", "blocked" (one recurrence, many transitions side by side), or "triton". The last
            two carry no gradient and refuse inputs that require one while gradients are enabled; "auto" then takes the
            reference.

    Returns:
        `[B, T, G]` in the dtype of `next_values`; undefined where `mask` is False. What lies under the mask, or in
        `next_values` under a terminated transition, never reaches a defined entry.

    Raises:
        ValueError: if `lambda_` is not allowed, shapes, dtypes or devices disagree, a discount is out of range, or the
            backend cannot serve the call.

    Source: Sutton & Barto (2018), chapter 12; Hafner et al. (2020), "Dream to Control", equation 6.
    """
    if isinstance(lambda_, bool) or not isinstance(lambda_, (int, float)) or not 0.0 <= lambda_ <= 1.0:
        raise ValueError(f"lambda_={lambda_!r} is not allowed; give a number in [0, 1]")
    transitions = Transitions(rewards, terminated, truncated, next_values, gammas, mask)
    transitions.check(valued=True)
    chosen = choose_backend("lambda_returns", backend, transitions)
    if 0 in transitions.shape:
        return next_values.new_empty(transitions.shape)
    if chosen == "reference":
        return lambda_reference(transitions.widened(), float(lambda_)).to(transitions.dtype)
    operator = lambda_triton if chosen == "triton" else lambda_blocked
    return operator(*transitions.flat(), float(lambda_))


def discounted_returns(
    rewards: Tensor,
    terminated: Tensor,
    gammas: Tensor,
    mask: Tensor,
    *,
    next_values: Tensor | None = None,
    truncated: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Discounted sums of rewards to the end of the episode, for every transition and discount.

    `y_t = r_t + g y_{t+1}` inside an episode; nothing is added after a terminated transition. After a truncated one,
    and where the next transition is masked or beyond the window, `g V(s_{t+1})` is added if values are given.

    Args:
        rewards: `[B, T]` float, environment units.
        terminated: `[B, T]` bool.
        gammas: `[G]` float in [0, 1], which is checked on the CPU only: elsewhere, looking would stall the host.
        mask: `[B, T]` bool; True is a real transition.
        next_values: `[B, T, G]` float or None; `[:, t]` is V(s_{t+1}). Only the ends named above are read.
        truncated: `[B, T]` bool; None if the window goes on in one episode after any transition that is not terminated.
            Where both are set, terminated wins.
        backend: "auto", "reference", "blocked" (one recurrence, many transitions side by side), or "triton". The last
            two carry no gradient and refuse inputs that require one while gradients are enabled; "auto" then takes the
            reference.

    Returns:
        `[B, T, G]` in the dtype of `next_values`, without them in that of `rewards`, at least float32; undefined where
        `mask` is False. What lies under the mask never reaches a defined entry.

    Raises:
        ValueError: if shapes, dtypes or devices disagree, a discount is out of range, or the backend cannot serve the
            call.
    """
    transitions = Transitions(rewards, terminated, truncated, next_values, gammas, mask)
    transitions.check(valued=False)
    chosen = choose_backend("discounted_returns", backend, transitions)
    if 0 in transitions.shape:
        return rewards.new_empty(transitions.shape, dtype=transitions.dtype)
    if chosen == "reference":
        return discounted_reference(transitions.widened()).to(transitions.dtype)
    operator = lambda_triton if chosen == "triton" else lambda_blocked
    return operator(*transitions.flat(), 1.0)
