"""The GRU layer: ours beside torch.nn.GRU.

Dimensions: `B` batch, `L` timesteps, `D` inputs, `U` hidden units.
"""

from __future__ import annotations

from functools import partial

import costs
import torch
from cases import Case, Inputs, Operation
from contenders import lineup, plain
from torch import Tensor

from amago_kernels import gru_layer

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _case(sizes: tuple[int, int, int, int], device: torch.device) -> Case:
    batch, length, width, units = sizes

    def make() -> Inputs:
        layer = torch.nn.GRU(width, units, device=device)
        weights = {name: getattr(layer, f"{name}_l0").detach() for name in _WEIGHTS}
        x, state = torch.randn(batch, length, width, device=device), torch.zeros(batch, units, device=device)
        return {"x": x, "initial_state": state, **weights}

    def call(inputs: Inputs, backend: str) -> Tensor:
        return gru_layer(**inputs, backend=backend)

    def by_torch(inputs: Inputs) -> Tensor:
        weights = [inputs[name] for name in _WEIGHTS]
        state = inputs["initial_state"].unsqueeze(0)
        # What torch.nn.GRU calls: biases, one layer, no dropout, training, one direction, batch first.
        return torch.gru(inputs["x"], state, weights, True, 1, 0.0, True, False, True)[0]

    return Case(
        kind="no resets",
        sizes=dict(zip("BLDU", sizes, strict=True)),
        dtype=torch.float32,
        make=make,
        reference=partial(call, backend="reference"),
        contenders=lineup("gru_layer", call, [plain("torch.nn.GRU", by_torch)]),
        cost=lambda inputs: costs.gru(*sizes, 4),
        auto=partial(call, backend="auto"),
        differentiable=("x", *_WEIGHTS),
        shared=frozenset(_WEIGHTS),
    )


def operation(device: torch.device, quick: bool) -> Operation:
    """What is measured.

    Args:
        device: where.
        quick: a few small shapes.

    Returns:
        The operation.
    """
    shapes = [(24, 129, 64, 128)]
    if not quick:
        shapes += [(24, 65, 64, 128), (64, 81, 64, 128), (24, 129, 256, 256)]
    return Operation(
        name="gru",
        cases=[_case(sizes, device) for sizes in shapes],
        targets=[],
        bound="matmul",
        axis="L",
        notes=("Without resets, which torch.nn.GRU does not know.",),
    )
