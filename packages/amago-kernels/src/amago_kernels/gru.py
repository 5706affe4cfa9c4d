"""A GRU layer over windows that may hold several episodes.

Dimensions: `B` batch, `L` timesteps, `D` inputs, `U` hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import choose


def _fused_refusal(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"it is a loop over timesteps on the host, and x is on {x.device}"
    if x.dtype not in (torch.float32, torch.float64):
        return f"it would accumulate in {x.dtype}"
    if torch.compiler.is_compiling():
        return "it looks at the values of reset"
    return None


_CANDIDATES: dict[str, Callable[[Tensor], str | None]] = {
    "fused": _fused_refusal,
    "reference": lambda x: None,
}


def gru_layer(
    x: Tensor,
    initial_state: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One GRU layer with `torch.nn.GRU`'s equations and weights, and resets at any timestep.

    Args:
        x: `[B, L, D]`.
        initial_state: `[B, U]`.
        weight_ih: `[3U, D]`; rows are the reset gate, the update gate and the candidate.
        weight_hh: `[3U, U]`, in the same order.
        bias_ih: `[3U]`.
        bias_hh: `[3U]`.
        reset: `[B, L]` bool; True takes the state before that timestep as zero.
        backend: "auto", "reference" or "fused". The fused backend (CPU, float32 and float64) does all products that
            are not recurrent in one piece, in the backward pass as well, and needs no split at resets.

    Returns:
        Hidden states `[B, L, U]`; the last one is the final state.

    Raises:
        ValueError: if shapes disagree, or the backend cannot serve the call.

    Source: Cho et al. (2014), with the reset gate after the recurrent product.
    """
    _check(x, initial_state, weight_ih, weight_hh, bias_ih, bias_hh, reset)
    by_time = x.transpose(0, 1)
    resets = None if reset is None else reset.t()
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    if choose("gru_layer", backend, x, _CANDIDATES) == "fused":
        with torch.autocast("cpu", enabled=False):
            if resets is not None and not bool(resets.any()):
                resets = None
            return _FusedGRU.apply(by_time, initial_state, *weights, resets).transpose(0, 1)
    return _reference(by_time, initial_state, *weights, resets).transpose(0, 1)


def _reference(
    x: Tensor,
    hidden: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reset: Tensor | None,
) -> Tensor:
    outputs = []
    for t in range(x.shape[0]):
        if reset is not None:
            hidden = torch.where(reset[t, :, None], 0.0, hidden)
        from_input = (x[t] @ weight_ih.t() + bias_ih).chunk(3, dim=-1)
        from_hidden = (hidden @ weight_hh.t() + bias_hh).chunk(3, dim=-1)
        r = torch.sigmoid(from_input[0] + from_hidden[0])
        z = torch.sigmoid(from_input[1] + from_hidden[1])
        candidate = torch.tanh(from_input[2] + r * from_hidden[2])
        hidden = (1 - z) * candidate + z * hidden
        outputs.append(hidden)
    return torch.stack(outputs)


class _FusedGRU(torch.autograd.Function):
    """Time-major GRU; see `gru_layer`. `gates` holds r, z and the candidate n after their nonlinearities."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        initial_state: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        reset: Tensor | None,
    ) -> Tensor:
        length, batch, _ = x.shape
        size = weight_hh.shape[1]
        gates = torch.addmm(bias_ih, x.reshape(length * batch, -1), weight_ih.t()).view(length, batch, 3 * size)
        recurrent = torch.empty_like(gates)
        hidden = torch.empty(length, batch, size, dtype=x.dtype)
        resets_at = [False] * length if reset is None else reset.any(dim=1).tolist()
        # Views are made once, all at a time: the loop below is bound by the number of calls.
        rz, r = gates[..., : 2 * size].unbind(0), gates[..., :size].unbind(0)
        z, n = gates[..., size : 2 * size].unbind(0), gates[..., 2 * size :].unbind(0)
        recurrent_t, recurrent_rz = recurrent.unbind(0), recurrent[..., : 2 * size].unbind(0)
        recurrent_n, hidden_t = recurrent[..., 2 * size :].unbind(0), hidden.unbind(0)
        transposed = weight_hh.t()
        before = initial_state
        for t in range(length):
            if resets_at[t] and reset is not None:
                before = torch.where(reset[t, :, None], 0.0, before)
            torch.addmm(bias_hh, before, transposed, out=recurrent_t[t])
            rz[t].add_(recurrent_rz[t]).sigmoid_()
            n[t].addcmul_(r[t], recurrent_n[t]).tanh_()
            before = torch.lerp(n[t], before, z[t], out=hidden_t[t])
        ctx.resets_at = resets_at
        ctx.save_for_backward(x, initial_state, weight_ih, weight_hh, gates, recurrent, hidden, reset)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, initial_state, weight_ih, weight_hh, gates, recurrent, hidden, reset = ctx.saved_tensors
        length, batch, size = hidden.shape
        before = torch.cat([initial_state.unsqueeze(0), hidden[:-1]])
        if reset is not None:
            before.masked_fill_(reset.unsqueeze(-1), 0.0)
        r, z, n = gates.chunk(3, dim=-1)
        # d(gates before nonlinearity) = slope * d(hidden); n_slope is for the input side of the candidate, which the
        # reset gate multiplies on the recurrent side only.
        n_slope = (1 - z) * (1 - n * n)
        slope = torch.empty_like(gates)
        slope[..., :size] = n_slope * recurrent[..., 2 * size :] * r * (1 - r)
        slope[..., size : 2 * size] = (before - n) * z * (1 - z)
        torch.mul(n_slope, r, out=slope[..., 2 * size :])
        grad_hidden = grad.clone(memory_format=torch.contiguous_format)
        grad_initial = _backward_in_time(grad_hidden, slope, z, weight_hh, reset, ctx.resets_at)
        by_gate = slope.view(length * batch, 3 * size)
        grad_weight_hh = by_gate.t() @ before.view(length * batch, size)
        grad_bias_hh = by_gate.sum(0)
        torch.mul(grad_hidden, n_slope, out=slope[..., 2 * size :])
        grad_weight_ih = by_gate.t() @ x.reshape(length * batch, -1)
        grad_x = (by_gate @ weight_ih).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_initial, grad_weight_ih, grad_weight_hh, by_gate.sum(0), grad_bias_hh, None


def _backward_in_time(
    grad_hidden: Tensor, slope: Tensor, z: Tensor, weight_hh: Tensor, reset: Tensor | None, resets_at: list[bool]
) -> Tensor:
    """Turns `d(output)` into the whole `d(hidden)`, and slopes into `d(gates)`, both in place.

    Returns:
        `[B, U]`, the gradient of the initial state.
    """
    length, batch, size = grad_hidden.shape
    grad_initial = torch.zeros_like(grad_hidden[0])
    into = [grad_initial, *grad_hidden.unbind(0)]
    per_gate, flat, keep = slope.view(length, batch, 3, size).unbind(0), slope.unbind(0), z.unbind(0)
    for t in range(length - 1, -1, -1):
        current, previous = into[t + 1], into[t]
        per_gate[t].mul_(current.unsqueeze(1))
        if resets_at[t] and reset is not None:
            passed = torch.addmm(current * keep[t], flat[t], weight_hh)
            previous.add_(passed.masked_fill_(reset[t, :, None], 0.0))
        else:
            previous.addcmul_(current, keep[t]).addmm_(flat[t], weight_hh)
    return grad_initial


def _check(
    x: Tensor,
    initial_state: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reset: Tensor | None,
) -> None:
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; give [B, L, D] with L >= 1")
    size = weight_hh.shape[-1]
    expected = {
        "initial_state": (initial_state, (x.shape[0], size)),
        "weight_ih": (weight_ih, (3 * size, x.shape[2])),
        "weight_hh": (weight_hh, (3 * size, size)),
        "bias_ih": (bias_ih, (3 * size,)),
        "bias_hh": (bias_hh, (3 * size,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give {shape}")
    if reset is not None and (reset.dtype != torch.bool or reset.shape != x.shape[:2]):
        raise ValueError(f"reset is {reset.dtype} {tuple(reset.shape)}; give torch.bool {tuple(x.shape[:2])}")
