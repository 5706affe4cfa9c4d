"""Temporal-difference targets from an ensemble of critics.

Dimensions: B batch, T transitions, C critics, G discounts.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from amago_core.losses.masking import fill_masked
from amago_kernels import n_step_targets

__all__ = ["reduce_ensemble", "td_targets"]

# Above this many subsets a table of them costs more than drawing keys and sorting.
_MAX_TABLE_ROWS = 4096


def reduce_ensemble(
    next_values: Tensor,
    *,
    num_subset: int,
    mode: Literal["min", "mean"] = "min",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Reduce the critics to one value, over a random subset drawn per (batch, step, discount).

    The critics of a subset are distinct and all subsets are equally likely. Nothing is drawn if `num_subset == C`.

    Args:
        next_values: `[B, T, C, G]` float (or any leading dimensions).
        num_subset: number of critics per subset, in `1..C`.
        mode: `"min"` (pessimistic, for policies that follow the critic's gradient) or `"mean"`.
        generator: source of randomness on the device of `next_values`; None uses torch's global generator.

    Returns:
        `[B, T, G]` float32 (the same leading dimensions).

    Raises:
        ValueError: if a shape, `num_subset` or `mode` is not one of the allowed values.

    Source: Chen et al., "Randomized Ensembled Double Q-Learning" (ICLR 2021), algorithm 1 (subsets without
    replacement).
    """
    if next_values.ndim < 2:
        raise ValueError(f"next_values: expected shape [..., C, G], got {tuple(next_values.shape)}")
    *lead, C, G = next_values.shape
    if not 1 <= num_subset <= C:
        raise ValueError(f"num_subset: got {num_subset}, allowed are 1 to the number of critics, {C}")
    if mode not in ("min", "mean"):
        raise ValueError(f"mode: got {mode!r}, allowed are 'min' and 'mean'")
    values = next_values.float()
    if num_subset == C:
        return values.amin(-2) if mode == "min" else values.mean(-2)

    num_subsets = math.comb(C, num_subset)
    if num_subsets > _MAX_TABLE_ROWS:
        keys = torch.rand(values.shape, generator=generator, device=values.device)
        members = values.gather(-2, keys.topk(num_subset, dim=-2).indices)
        return members.amin(-2) if mode == "min" else members.mean(-2)

    # One draw chooses the whole subset; gathering one member at a time keeps every intermediate at [..., 1, G].
    choice = torch.randint(num_subsets, (*lead, 1, G), generator=generator, device=values.device)
    table = _subset_table(C, num_subset, values.device)
    result = values.gather(-2, table[0].take(choice))
    for slot in range(1, num_subset):
        member = values.gather(-2, table[slot].take(choice))
        result = torch.minimum(result, member) if mode == "min" else result + member
    return (result if mode == "min" else result / num_subset).squeeze(-2)


def _subset_table(num_critics: int, num_subset: int, device: torch.device) -> Tensor:
    """All subsets as columns: `[num_subset, comb(num_critics, num_subset)]` int64 on `device`."""
    if torch.compiler.is_compiling():
        return _build_subset_table(num_critics, num_subset, device)
    return _cached_subset_table(num_critics, num_subset, device)


def _build_subset_table(num_critics: int, num_subset: int, device: torch.device) -> Tensor:
    subsets = list(itertools.combinations(range(num_critics), num_subset))
    return torch.tensor(list(zip(*subsets, strict=True)), dtype=torch.int64, device=device)


# Cached because copying the table to a GPU at every update would synchronise the stream.
_cached_subset_table = functools.lru_cache(maxsize=64)(_build_subset_table)


def td_targets(
    rewards: Tensor,
    terminated: Tensor,
    next_values: Tensor,
    gammas: Tensor,
    mask: Tensor,
    *,
    reward_multiplier: float = 10.0,
    n: int = 1,
) -> Tensor:
    """n-step TD targets in multiplied reward units, without gradient.

    `y_t = sum_{i<k} g^i * multiplier * r_{t+i} + g^k * prod_{i<k} (1 - terminated_{t+i}) * V(s_{t+k})`, where `k <= n`
    stops after the first terminated step and before the first masked one. Truncation does not stop the bootstrap.

    Args:
        rewards: `[B, T]` float, environment units.
        terminated: `[B, T]` bool.
        next_values: `[B, T, G]` float in multiplied units; `[:, t]` is V(s_{t+1}), from `reduce_ensemble`.
        gammas: `[G]` float in [0, 1).
        mask: `[B, T]` bool; True is a real transition.
        reward_multiplier: factor on the rewards.
        n: horizon in transitions, >= 1.

    Returns:
        `[B, T, G]` float32, 0 where `mask` is False.

    Raises:
        ValueError: if `n < 1` or leading dimensions disagree.
    """
    with torch.no_grad():
        # Cleaned on the way in and out, so that padding can hold anything, NaN included.
        scaled = fill_masked(rewards.float(), mask) * reward_multiplier
        bootstrap = fill_masked(next_values.float(), mask)
        targets = n_step_targets(scaled, terminated, bootstrap, gammas.float(), mask, n=n)
        return fill_masked(targets, mask)
