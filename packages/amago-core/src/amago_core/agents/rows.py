"""Leaving padding out of the heads.

Windows of one batch differ in length, and the heads (not the sequence model) take most of the arithmetic. Picking the
real transitions before the heads saves what the padding would cost; a dense layout keeps every shape static, as
`torch.compile` and CUDA graphs want it. Both give the same loss.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TransitionRows:
    """The transitions of a batch, all `B*T` of them or only the real ones.

    Args:
        mask: `[B, T]` bool; True is a real transition.
        compact: pick the real transitions (`[1, N, ...]`, N depends on the data) instead of keeping `[B, T, ...]`.
    """

    def __init__(self, mask: Tensor, *, compact: bool) -> None:
        self.dense_mask = mask
        self._shape = mask.shape
        self._index = mask.flatten().nonzero().squeeze(-1) if compact else None
        self.mask = mask if self._index is None else mask.new_ones((1, len(self._index)))

    def take(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` to the layout of the heads, `[B, T, ...]` or `[1, N, ...]`."""
        if self._index is None:
            return x
        return x.reshape(-1, *x.shape[2:]).index_select(0, self._index)[None]

    def put(self, x: Tensor) -> Tensor:
        """The inverse of `take`; padding becomes zero."""
        if self._index is None:
            return x
        flat = torch.zeros((self._shape.numel(), *x.shape[2:]), dtype=x.dtype, device=x.device)
        return flat.index_copy(0, self._index, x[0]).reshape(*self._shape, *x.shape[2:])
