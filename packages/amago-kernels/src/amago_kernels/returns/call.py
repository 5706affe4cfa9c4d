"""What one call of a return function is made of, checked before anything runs.

Dimensions: `B` batch, `T` transitions, `G` discounts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import choose, triton_refusal
from ..inputs import accumulation_dtype, check_devices, check_floats


@dataclass(frozen=True)
class Transitions:
    """The transitions of a batch of windows.

    Attributes:
        rewards: `[B, T]` float.
        terminated: `[B, T]` bool.
        truncated: `[B, T]` bool or None.
        next_values: `[B, T, G]` float or None; `[:, t]` is V(s_{t+1}).
        gammas: `[G]` float.
        mask: `[B, T]` bool.
    """

    rewards: Tensor
    terminated: Tensor
    truncated: Tensor | None
    next_values: Tensor | None
    gammas: Tensor
    mask: Tensor

    def check(self, *, valued: bool) -> None:
        """Refuses shapes, dtypes and devices that do not fit, and discounts that are none.

        Args:
            valued: whether there must be values.

        Raises:
            ValueError: if one does not.
        """
        if valued and self.next_values is None:
            raise ValueError("next_values=None is not allowed; give [B, T, G]")
        check_floats(rewards=self.rewards, next_values=self.next_values, gammas=self.gammas)
        check_devices(rewards=self.rewards, terminated=self.terminated, truncated=self.truncated, mask=self.mask)
        shape = tuple(self.rewards.shape)
        if len(shape) != 2:
            raise ValueError(f"rewards has shape {shape}; give [B, T]")
        for name in ("terminated", "truncated", "mask"):
            flags = getattr(self, name)
            if flags is not None and (flags.dtype != torch.bool or tuple(flags.shape) != shape):
                raise ValueError(f"{name} is {flags.dtype} {tuple(flags.shape)}; give torch.bool {shape}, like rewards")
        if self.gammas.dim() != 1:
            raise ValueError(f"gammas has shape {tuple(self.gammas.shape)}; give [G]")
        values = self.next_values
        if values is not None and tuple(values.shape) != (*shape, self.gammas.shape[0]):
            raise ValueError(
                f"next_values {tuple(values.shape)} and gammas {tuple(self.gammas.shape)} do not fit rewards {shape}; "
                "give [B, T, G] and [G]"
            )
        # Elsewhere, looking would stall the host.
        if self.gammas.device.type == "cpu" and not torch.compiler.is_compiling():
            if not bool(((self.gammas >= 0.0) & (self.gammas <= 1.0)).all()):
                raise ValueError(f"gammas={self.gammas.tolist()} is not allowed; give numbers in [0, 1]")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the result: that of `next_values`; without them that of `rewards`, at least float32."""
        if self.next_values is not None:
            return self.next_values.dtype
        return torch.promote_types(self.rewards.dtype, torch.float32)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(B, T, G)`."""
        batch, length = self.rewards.shape
        return batch, length, self.gammas.shape[0]

    def widened(self) -> Transitions:
        """The same in the dtype to compute in."""
        wide = accumulation_dtype(self.rewards, self.next_values, self.gammas)
        values = None if self.next_values is None else self.next_values.to(wide)
        return Transitions(
            self.rewards.to(wide), self.terminated, self.truncated, values, self.gammas.to(wide), self.mask
        )

    def flat(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        """In the order in which operators take them."""
        return self.rewards, self.terminated, self.truncated, self.next_values, self.gammas, self.mask


@dataclass(frozen=True)
class _Call:
    """What decides which backend serves.

    Attributes:
        device_type: where the inputs are, for example "cuda".
        dtypes: of the floating inputs.
        differentiated: a gradient is wanted.
    """

    device_type: str
    dtypes: tuple[torch.dtype, ...]
    differentiated: bool


def choose_backend(operation: str, backend: str, transitions: Transitions) -> str:
    """Resolves `backend` for one call.

    Args:
        operation: key of `dispatch.OPERATIONS`.
        backend: "auto" or a backend name.
        transitions: the inputs.

    Returns:
        Name of a backend that serves the call.
    """
    inputs = [x for x in (transitions.rewards, transitions.next_values, transitions.gammas) if x is not None]
    call = _Call(
        transitions.rewards.device.type,
        tuple(x.dtype for x in inputs),
        torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
    )
    vectorised = "fused" if operation == "n_step_targets" else "blocked"
    candidates: dict[str, Callable[[_Call], str | None]] = {
        "triton": lambda call: triton_refusal(call.device_type, *call.dtypes) or _no_gradient(call),
        vectorised: _no_gradient,
        "reference": lambda call: None,
    }
    return choose(operation, backend, call, candidates)


def _no_gradient(call: _Call) -> str | None:
    if call.differentiated:
        return "it carries no gradient, and an input requires one (detach the inputs, or use torch.no_grad)"
    return None
