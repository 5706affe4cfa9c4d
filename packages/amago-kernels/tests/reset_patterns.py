"""Resets for the tests of everything that runs over windows."""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = ("none", "first", "last", "all", "some")


def make_reset(pattern: str, batch: int, length: int, *, share: float = 0.2, device=None) -> Tensor | None:
    """`[batch, length]` bool; "some" has them at random, that share of all timesteps."""
    reset = torch.zeros(batch, length, dtype=torch.bool)
    if pattern == "none":
        return None
    if pattern == "some":
        reset[:] = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < share
    else:
        reset[:, {"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}[pattern]] = True
    return reset.to(device)
