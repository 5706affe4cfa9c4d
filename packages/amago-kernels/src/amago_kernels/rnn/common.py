"""What the recurrent layers share: checks, dtypes, resets, and the products that are not recurrent.

Everything is time-major here: `[L, B, ...]` keeps one timestep in one piece of memory.

Dimensions: `B` batch, `L` timesteps, `D` inputs, `U` hidden units, `G` gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..inputs import check_devices, check_floats, check_reset, check_shape

Weights = tuple[Tensor, Tensor, Tensor, Tensor]
CANDIDATES: dict[str, Callable[[Tensor], str | None]] = {"fused": lambda x: None, "reference": lambda x: None}


def check_layer(x: Tensor, states: Mapping[str, Tensor], weights: Weights, reset: Tensor | None, gates: int) -> None:
    """Checks what a recurrent layer is called with.

    Args:
        x: `[B, L, D]`.
        states: name to initial state `[B, U]`.
        weights: input weights `[G * U, D]`, recurrent weights `[G * U, U]`, and a bias `[G * U]` of each.
        reset: `[B, L]` bool, or None.
        gates: `G`.

    Raises:
        ValueError: naming the argument, what it is and what it should be.
    """
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; give [B, L, D] with L >= 1")
    size = weights[1].shape[-1]
    given = {**states, **dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=True))}
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (gates * size, x.shape[2]), "weight_hh": (gates * size, size)}
    shapes |= {"bias_ih": (gates * size,), "bias_hh": (gates * size,)}
    for name, tensor in given.items():
        check_shape(name, tensor, shapes.get(name, (x.shape[0], size)))
    check_floats(x=x, **given)
    check_reset(reset, x.shape[0], x.shape[1])
    check_devices(x=x, reset=reset)


def resets_at(reset: Tensor | None, length: int) -> list[bool]:
    """Says which timesteps may hold a reset.

    Args:
        reset: `[L, B]` bool, or None.
        length: `L`.

    Returns:
        One bool per timestep. On accelerators looking would cost a synchronisation: with resets they are all True.
    """
    if reset is None:
        return [False] * length
    return reset.any(dim=1).tolist() if reset.device.type == "cpu" else [True] * length


def input_products(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`[L, B, G * U]`, the part of every gate that does not depend on the past."""
    length, batch, _ = x.shape
    return torch.addmm(bias, x.flatten(0, 1), weight.t()).unflatten(0, (length, batch))


def states_before(initial: Tensor, states: Tensor, reset: Tensor | None) -> Tensor:
    """`[L, B, U]`, the state that every timestep started from.

    Args:
        initial: `[B, U]`.
        states: `[L, B, U]`, the state after every timestep.
        reset: `[L, B]` bool, or None.

    Returns:
        A new tensor; zero where there was a reset.
    """
    before = torch.cat([initial.unsqueeze(0), states[:-1]])
    return before if reset is None else before.masked_fill_(reset.unsqueeze(-1), 0.0)


def sigmoid_slope(factor: Tensor, value: Tensor, *, into: Tensor) -> None:
    """Writes `factor * s'` where `value` is what the sigmoid `s` returned: one pass over memory."""
    torch.ops.aten.sigmoid_backward.grad_input(factor, value, grad_input=into)


def tanh_slope(factor: Tensor, value: Tensor, *, into: Tensor | None = None) -> Tensor:
    """`factor * tanh'` where `value` is what the tanh returned: one pass over memory, written to `into` if given."""
    into = torch.empty_like(value) if into is None else into
    return torch.ops.aten.tanh_backward.grad_input(factor, value, grad_input=into)
