"""Returns in few calls, for CPUs and wherever Triton is not; no gradients.

Dimensions: `B` batch, `T` transitions, `G` discounts, `K` blocks of `J` transitions, padded at the end. There are few
discounts, and loops over the last axis are what a CPU is fast at: discounts come first in here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Transitions
from .reference import going_on


def n_step_by_doubling(transitions: Transitions, n: int) -> Tensor:
    """n-step targets: sums over 1, 2, 4, ... transitions, joined to sums over n.

    Args:
        transitions: the inputs, with values.
        n: horizon in transitions, less than `T` or 1.

    Returns:
        `[B, T, G]`.
    """
    rewards, terminated, _, values, gammas, mask = transitions.flat()
    assert values is not None
    missing = n - 1
    if missing == 0:
        return torch.where(terminated.unsqueeze(-1), 0.0, values) * gammas + rewards.unsqueeze(-1)
    discount = gammas.view(-1, 1, 1)
    target = torch.where(terminated, 0.0, values.permute(2, 0, 1).contiguous()) * discount + rewards
    open_ended = going_on(terminated, transitions.truncated, mask)
    # The part of a sum that `span` transitions bring, with the bootstrap where the sum ends among them.
    part, span = torch.where(open_ended, rewards, target), 1
    while True:
        if missing & 1:
            target = _join(part, open_ended, discount, target, span)
        missing >>= 1
        if missing == 0:
            return target.permute(1, 2, 0).contiguous()
        part = _join(part, open_ended, discount, part, span)
        open_ended = open_ended & F.pad(open_ended[:, span:], (0, span))
        discount, span = discount * discount, 2 * span


def _join(part: Tensor, open_ended: Tensor, discount: Tensor, rest: Tensor, span: int) -> Tensor:
    """Sums whose first `span` transitions bring `part`, and that go on with `rest` where they are open."""
    joined = part.clone()
    joined[..., :-span].addcmul_(torch.where(open_ended[:, :-span], rest[..., span:], 0.0), discount)
    return joined


def blocked_returns(transitions: Transitions, lambda_: float) -> Tensor:
    """TD(lambda) returns as a linear recurrence back in time; discounted returns with `lambda_` 1.

    Blocks run side by side as if nothing came after them; what does come is added in the end.

    Args:
        transitions: the inputs; no values stand for zeros.
        lambda_: weight of longer returns.

    Returns:
        `[B, T, G]`.
    """
    batch, length, discounts = transitions.shape
    # As many transitions in a row as let the two loops below take the least calls.
    steps = 1 << max(round(math.log2(length / 2) / 2), 0)
    blocks = -(-length // steps)
    goes_on = going_on(transitions.terminated, transitions.truncated, transitions.mask)
    terms = _terms(transitions, goes_on, lambda_, steps, blocks)
    factors = _in_blocks(goes_on.to(terms.dtype), steps, blocks).unsqueeze(1)
    factors = factors * (transitions.gammas * lambda_).view(-1, 1, 1)
    # Where the host can see it without a stall: there is neither NaN nor infinity, and zeros may be multiplied by.
    tame = terms.device.type == "cpu" and math.isfinite(float(terms.sum()))
    _run_back(terms, factors, tame)
    across = factors.unbind(0)
    for j in reversed(range(steps - 1)):
        across[j].mul_(across[j + 1])
    ends = torch.zeros(blocks + 1, discounts, batch, dtype=terms.dtype, device=terms.device)
    ends[:-1] = terms[0].movedim(-1, 0)
    _run_back(ends, factors[0].movedim(-1, 0).contiguous(), tame)
    _add_product(terms, factors, ends[1:].movedim(0, -1).contiguous(), tame)
    return terms.permute(2, 3, 0, 1).reshape(batch, blocks * steps, discounts)[:, :length].contiguous()


def _terms(transitions: Transitions, goes_on: Tensor, lambda_: float, steps: int, blocks: int) -> Tensor:
    """What every transition adds to the recurrence: `[J, G, B, K]`, zeros under the mask."""
    rewards, terminated, _, values, gammas, mask = transitions.flat()
    rewards = _in_blocks(torch.where(mask, rewards, 0.0), steps, blocks).unsqueeze(1)
    if values is None:
        return rewards.repeat(1, gammas.shape[0], 1, 1)
    # Zeros by selection: what is not used may be NaN.
    unused = terminated | ~mask
    if lambda_ == 1.0:
        unused |= goes_on
    weight = 1.0 - lambda_ * goes_on.to(values.dtype)
    values = _in_blocks(values, steps, blocks).movedim(-1, 1)
    terms = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    torch.where(_in_blocks(unused, steps, blocks).unsqueeze(1), values.new_zeros(()), values, out=terms)
    terms *= gammas.view(-1, 1, 1)
    terms *= _in_blocks(weight, steps, blocks).unsqueeze(1)
    terms += rewards
    return terms


def _in_blocks(x: Tensor, steps: int, blocks: int) -> Tensor:
    """`[B, T, ...]` as `[J, B, K, ...]`."""
    missing = blocks * steps - x.shape[1]
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    x = x.unflatten(1, (blocks, steps)).movedim(2, 0)
    return x.contiguous() if x.dim() == 3 else x


def _run_back(terms: Tensor, factors: Tensor, tame: bool) -> None:
    """`terms_i += factors_i terms_{i+1}`, from the last but one to the first."""
    rows, factor_rows = terms.unbind(0), factors.unbind(0)
    for i in reversed(range(len(rows) - 1)):
        _add_product(rows[i], factor_rows[i], rows[i + 1], tame)


def _add_product(terms: Tensor, factors: Tensor, later: Tensor, tame: bool) -> None:
    if not tame:
        later = torch.where(factors == 0.0, 0.0, later)
    torch.addcmul(terms, factors, later, out=terms)
