"""What every check of the contract works with: a module, inputs, and comparisons.

Dimensions: `B` lanes, `L` timesteps, `D` input features, `E` output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PATTERNS = ("none", "some", "first", "last", "all")


@dataclass
class Case:
    """A backbone in evaluation mode and random windows for it.

    Attributes:
        module: the backbone.
        x: `[B, L, D]`.
        time_idx: `[B, L]`, 0 to `L - 1` in every lane.
        tolerance: largest difference between two ways of computing the same.
        max_seq_len: what the backbone was built with.
        generator: where all random numbers come from.
    """

    module: Any
    x: Tensor
    time_idx: Tensor
    tolerance: float
    max_seq_len: int
    generator: torch.Generator

    @property
    def lanes(self) -> int:
        """`B`."""
        return self.x.shape[0]

    @property
    def length(self) -> int:
        """`L`."""
        return self.x.shape[1]

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape of `like`, the same in every dtype up to rounding."""
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(like)

    def resets(self, pattern: str) -> Tensor | None:
        """Flags `[B, L]` of one of `PATTERNS`."""
        reset = torch.zeros(self.lanes, self.length, dtype=torch.bool)
        if pattern == "none":
            return None
        if pattern == "first":
            reset[:, 0] = True
        elif pattern == "last":
            reset[:, -1] = True
        elif pattern == "all":
            reset[:] = True
        else:
            reset[:] = torch.rand(self.lanes, self.length, generator=self.generator) < 0.15
            # One lane without a reset, so that something goes beyond max_seq_len.
            reset[0] = False
        return reset.to(self.x.device)

    def no_resets(self) -> Tensor:
        """Flags `[B, L]`, all False."""
        return torch.zeros(self.lanes, self.length, dtype=torch.bool, device=self.x.device)

    def times(self, reset: Tensor | None) -> Tensor:
        """Times that start at 0 after every reset."""
        if reset is None:
            return self.time_idx
        start = torch.where(reset, self.time_idx, 0).cummax(dim=1).values
        return self.time_idx - start

    def window(self, x: Tensor, reset: Tensor | None = None) -> Tensor:
        """Outputs `[B, L, E]` of `forward` without a state."""
        return self.module(x, self.times(reset), reset)[0]

    def steps(self, x: Tensor, time_idx: Tensor, reset: Tensor | None, state: Any = None) -> Tensor:
        """Outputs `[B, L, E]` of `step`, timestep by timestep."""
        state = self.module.initial_state(x.shape[0]) if state is None else state
        outputs = []
        for t in range(x.shape[1]):
            if reset is not None:
                self.module.reset_state(state, reset[:, t])
            outputs.append(self.module.step(x[:, t], time_idx[:, t], state))
        return torch.stack(outputs, dim=1)

    def close(self, out: Tensor, ref: Tensor, message: str) -> None:
        """Demands equality up to the tolerance."""
        assert out.shape == ref.shape, f"{message}: shapes {tuple(out.shape)} and {tuple(ref.shape)} differ"
        assert bool(torch.isfinite(out).all()), f"{message}: NaN or infinite values"
        difference = float((out.detach() - ref.detach()).abs().max())
        limit = self.tolerance * max(1.0, float(ref.detach().abs().max()))
        assert difference <= limit, f"{message}: differs by {difference:.3g}, allowed is {limit:.3g}"

    def close_gradients(self, out: Tensor, ref: Tensor, message: str) -> None:
        """Demands equality of flat gradients up to a share of their norm."""
        assert bool(torch.isfinite(out).all()), f"{message}: NaN or infinite values"
        out, ref = out.double(), ref.double()
        error, size = float((out - ref).norm()), float(ref.norm())
        allowed = min(10 * self.tolerance, 0.1) * max(1.0, size)
        assert error <= allowed, f"{message}: an error of {error:.3g} in {size:.3g}, allowed is {allowed:.3g}"


def same(out: Tensor, ref: Tensor, message: str) -> None:
    """Demands equality bit for bit. Fair only between computations of the same shapes: others may round differently."""
    assert torch.equal(out, ref), f"{message}: differs by {float((out - ref).abs().max()):.3g}, allowed is nothing"


def loss(out: Tensor) -> Tensor:
    """A loss that no norm makes constant, unlike the plain sum or the sum of squares of a normalised output."""
    weights = torch.arange(1.0, out.shape[-1] + 1, device=out.device, dtype=out.dtype)
    return (out.square() * weights).mean()


def gradients(value: Tensor, leaves: list[Tensor]) -> Tensor:
    """Gradients of all leaves, flat, zeros where there is none."""
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    pairs = zip(grads, leaves, strict=True)
    return torch.cat([(torch.zeros_like(leaf) if grad is None else grad).flatten() for grad, leaf in pairs])


def trained(module: Any) -> list[Tensor]:
    """The parameters that get gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
