"""Return targets for many discounts at once: ours beside compiled PyTorch.

Dimensions: `B` batch, `T` transitions, `G` discounts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import costs
import torch
from cases import FORWARD, REFERENCE, Case, Inputs, Operation, Rows, Target, least
from contenders import chunked_scan, compiled, lineup
from torch import Tensor

from amago_kernels import discounted_returns, lambda_returns, n_step_targets

_STEPS, _LAMBDA = 5, 0.95
_FUNCTIONS: dict[str, tuple[str, Callable[..., Tensor], dict[str, Any]]] = {
    "lambda": ("lambda_returns", lambda_returns, {"lambda_": _LAMBDA}),
    "discounted": ("discounted_returns", discounted_returns, {}),
    "n-step": ("n_step_targets", n_step_targets, {"n": _STEPS}),
}


def _reverse(a: Tensor, b: Tensor) -> Tensor:
    """`y_t = a_t y_{t+1} + b_t`."""
    return chunked_scan(a.flip(1), b.flip(1)).flip(1)


def _lambda_by_scan(inputs: Inputs) -> Tensor:
    reward, values = inputs["rewards"].unsqueeze(-1), inputs["next_values"]
    discount = torch.where(inputs["terminated"].unsqueeze(-1), 0.0, inputs["gammas"])
    weight = torch.full_like(values[:1, :, :1], _LAMBDA)
    weight[:, -1] = 0.0
    return _reverse(discount * weight, reward + discount * (1 - weight) * values)


def _discounted_by_scan(inputs: Inputs) -> Tensor:
    discount = torch.where(inputs["terminated"].unsqueeze(-1), 0.0, inputs["gammas"])
    return _reverse(discount, inputs["rewards"].unsqueeze(-1).expand_as(discount))


def _n_step_by_shifts(inputs: Inputs) -> Tensor:
    reward, values = inputs["rewards"].unsqueeze(-1), inputs["next_values"]
    discount = torch.where(inputs["terminated"].unsqueeze(-1), 0.0, inputs["gammas"])
    target = reward + discount * values
    for _ in range(_STEPS - 1):
        target = reward + discount * torch.cat([target[:, 1:], values[:, -1:]], dim=1)
    return target


_PLAIN = {
    "lambda": ("log-depth scan, compiled", _lambda_by_scan),
    "discounted": ("log-depth scan, compiled", _discounted_by_scan),
    "n-step": ("shifts, compiled", _n_step_by_shifts),
}


def _case(kind: str, sizes: tuple[int, int, int], device: torch.device, with_compiled: bool) -> Case:
    batch, length, discounts = sizes
    name, function, options = _FUNCTIONS[kind]
    has_values = kind != "discounted"

    def make() -> Inputs:
        inputs = {
            "rewards": torch.randn(batch, length, device=device),
            "terminated": torch.rand(batch, length, device=device) < 0.02,
            "gammas": torch.linspace(0.9, 0.999, discounts, device=device),
            "mask": torch.ones(batch, length, dtype=torch.bool, device=device),
        }
        if has_values:
            inputs["next_values"] = torch.randn(batch, length, discounts, device=device)
        return inputs

    def call(inputs: Inputs, backend: str) -> Tensor:
        return function(**inputs, **options, backend=backend)

    others = [compiled(*_PLAIN[kind])] if with_compiled else []
    return Case(
        kind=kind,
        sizes=dict(zip("BTG", sizes, strict=True)),
        dtype=torch.float32,
        make=make,
        reference=partial(call, backend="reference"),
        contenders=lineup(name, call, others, backward=False),
        cost=lambda inputs: costs.returns(batch * length, discounts, 4, has_values),
        auto=partial(call, backend="auto"),
        shared=frozenset({"gammas"}),
        directions=(FORWARD,),
        graph=True,
    )


def operation(device: torch.device, quick: bool) -> Operation:
    """What is measured.

    Args:
        device: where.
        quick: a few small shapes.

    Returns:
        The operation.
    """
    cuda = device.type == "cuda"
    batch, lengths = (64, (1024, 128, 512, 2048)) if cuda else (24, (512, 128))
    lengths = lengths[:1] if quick and cuda else lengths
    return Operation(
        name="returns",
        cases=[
            _case(kind, (batch, length, 7), device, with_compiled=cuda and length == 1024)
            for length in lengths
            for kind in _FUNCTIONS
        ],
        targets=[
            Target(f"{kind}, T=512: speed over the reference loop", 5.0, partial(_on_cpu, kind), device="cpu")
            for kind in ("lambda", "discounted", "n-step")
        ],
        bound="copy",
        axis="T",
        notes=(
            f"lambda: {_LAMBDA}; n-step: n={_STEPS}; one transition in 50 terminates; no gradients. To compile a "
            "Python loop over transitions takes minutes: a scan in log2(T) passes is compiled instead.",
        ),
        builds=("amago_kernels.returns.triton_returns",),
    )


def _on_cpu(kind: str, rows: Rows) -> float | None:
    return least([rows.where(kind=kind, T=512).speedup("ours", REFERENCE)])
