"""What the backbones with a recurrence that is linear in its state have in common.

Dimensions: `B` batch or lanes, `L` timesteps, `D` model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype a recurrence runs in: float64 for float64, float32 for all others.

    A decay of 0.999 is 1 in bfloat16, and a sum over hundreds of timesteps stops growing.
    """
    return torch.promote_types(dtype, torch.float32)


class RecurrenceParameters(nn.Module):
    """Base of the modules that hold the parameters of a recurrence: decays, timescales, gains.

    They stay in float32 at least, whatever `module.to(...)` asks for, and carry the attribute `_no_weight_decay =
    True`: shrinking them would change how long the model remembers, not how large its weights are.
    """

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Adds a parameter, marked as one without weight decay."""
        super().register_parameter(name, param)
        if param is not None:
            param._no_weight_decay = True  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # copy.deepcopy of a parameter loses its attributes.
        self._mark()

    def _mark(self) -> None:
        for param in self._parameters.values():
            if param is not None:
                param._no_weight_decay = True  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RecurrenceParameters:
        def convert(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if not out.is_floating_point() or out.dtype == at_least_float32(out.dtype):
                return out
            # From the unrounded tensor: only the device is taken over.
            return tensor.to(device=out.device, dtype=torch.float32)

        super()._apply(convert, recurse)
        # Off the meta device, for one, come new parameters.
        self._mark()
        return self


class RecurrentMixer(nn.Module):
    """A layer that mixes timesteps through a memory of fixed size.

    A memory is a mapping from names to tensors `[B, ...]`, in float32 at least.
    """

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of what is remembered of one lane."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, memory: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mixes windows.

        Args:
            x: `[B, L, D]`.
            memory: what was remembered before; left as it is. None: nothing.
            reset: `[B, L]` bool; True forgets what was before that timestep.

        Returns:
            `[B, L, D]`, and the memory after the last timestep.
        """
        raise NotImplementedError

    def step(self, x: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
        """Mixes one timestep of every lane.

        Args:
            x: `[B, D]`.
            memory: updated in place.

        Returns:
            `[B, D]`.
        """
        raise NotImplementedError
