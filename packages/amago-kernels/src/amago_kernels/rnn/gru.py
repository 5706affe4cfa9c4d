"""A GRU layer over windows that may hold several episodes.

Dimensions: `B` batch, `L` timesteps, `D` inputs, `U` hidden units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose
from ..inputs import accumulation_dtype, without_autocast
from .common import (
    CANDIDATES,
    Weights,
    check_layer,
    input_products,
    resets_at,
    sigmoid_slope,
    states_before,
    tanh_slope,
)


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

    Half precision is computed in float32, whatever autocast says.

    Args:
        x: `[B, L, D]`.
        initial_state: `[B, U]`; give float32 to keep the state of a half-precision model exact.
        weight_ih: `[3U, D]`; rows are the reset gate, the update gate and the candidate.
        weight_hh: `[3U, U]`, in the same order.
        bias_ih: `[3U]`.
        bias_hh: `[3U]`.
        reset: `[B, L]` bool; True takes the state before that timestep as zero.
        backend: "auto", "reference" or "fused". The fused backend does all products that are not recurrent in one
            piece, in the backward pass as well; `torch.compile` takes it as one operation. It has no second
            derivative; the reference has.

    Returns:
        Hidden states `[B, L, U]` in the dtype of `initial_state`; the last one is the final state.

    Raises:
        ValueError: if shapes disagree, or the backend cannot serve the call.

    Source: Cho et al. (2014), with the reset gate after the recurrent product.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    check_layer(x, {"initial_state": initial_state}, weights, reset, gates=3)
    fused = choose("gru_layer", backend, x, CANDIDATES) == "fused"
    dtype = accumulation_dtype(x, initial_state, *weights)
    by_time, resets = x.transpose(0, 1).to(dtype), None if reset is None else reset.t()
    wide: Weights = (weight_ih.to(dtype), weight_hh.to(dtype), bias_ih.to(dtype), bias_hh.to(dtype))
    if fused:
        hidden = _forward_op(by_time, initial_state.to(dtype), *wide, resets)[0]
    else:
        hidden = _reference(by_time, initial_state.to(dtype), wide, resets)
    return hidden.transpose(0, 1).to(initial_state.dtype)


def _reference(x: Tensor, hidden: Tensor, weights: Weights, reset: Tensor | None) -> Tensor:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    outputs = []
    with without_autocast(x.device):
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


def _forward(
    x: Tensor,
    initial_state: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole window.

    Returns:
        Hidden states `[L, B, U]`; r, z and the candidate n after their nonlinearities, `[L, B, 3U]`; and the recurrent
        products, of the same shape.
    """
    with without_autocast(x.device):
        length, batch, _ = x.shape
        size = weight_hh.shape[1]
        gates = input_products(x, weight_ih, bias_ih)
        # Not `contiguous()`: with one row that would be the bias itself.
        recurrent = bias_hh.expand_as(gates).clone(memory_format=torch.contiguous_format)
        hidden = x.new_empty(length, batch, size)
        may_reset = resets_at(reset, length)
        # Views are made once, all at a time: the loop below is bound by the number of calls.
        rz, r = gates[..., : 2 * size].unbind(0), gates[..., :size].unbind(0)
        z, n = gates[..., size : 2 * size].unbind(0), gates[..., 2 * size :].unbind(0)
        recurrent_t, recurrent_rz = recurrent.unbind(0), recurrent[..., : 2 * size].unbind(0)
        recurrent_n, hidden_t = recurrent[..., 2 * size :].unbind(0), hidden.unbind(0)
        transposed = weight_hh.t().contiguous()
        before = initial_state
        for t in range(length):
            if may_reset[t] and reset is not None:
                before = torch.where(reset[t, :, None], 0.0, before)
            recurrent_t[t].addmm_(before, transposed)
            rz[t].add_(recurrent_rz[t]).sigmoid_()
            n[t].addcmul_(r[t], recurrent_n[t]).tanh_()
            before = torch.lerp(n[t], before, z[t], out=hidden_t[t])
    return hidden, gates, recurrent


def _backward(
    grad: Tensor,
    x: Tensor,
    initial_state: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    hidden: Tensor,
    gates: Tensor,
    recurrent: Tensor,
    reset: Tensor | None,
    for_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs of `_forward`, in its order; that of `x` is empty unless `for_x`."""
    with without_autocast(x.device):
        length, batch, size = hidden.shape
        before = states_before(initial_state, hidden, reset)
        r, z, n = gates.chunk(3, dim=-1)
        # d(gates before nonlinearity) = slope * d(hidden); n_slope is for the input side of the candidate, which the
        # reset gate multiplies on the recurrent side only.
        n_slope = tanh_slope(1 - z, n)
        slope = torch.empty_like(gates)
        sigmoid_slope(n_slope * recurrent[..., 2 * size :], r, into=slope[..., :size])
        sigmoid_slope(before - n, z, into=slope[..., size : 2 * size])
        torch.mul(n_slope, r, out=slope[..., 2 * size :])
        grad_hidden = grad.clone(memory_format=torch.contiguous_format)
        grad_initial = _backward_in_time(grad_hidden, slope, z, weight_hh, reset)
        by_gate = slope.view(length * batch, 3 * size)
        grad_weight_hh = by_gate.t() @ before.view(length * batch, size)
        grad_bias_hh = by_gate.sum(0)
        torch.mul(grad_hidden, n_slope, out=slope[..., 2 * size :])
        grad_weight_ih = by_gate.t() @ x.flatten(0, 1)
        grad_x = (by_gate @ weight_ih).view(x.shape) if for_x else x.new_empty(0)
        return grad_x, grad_initial, grad_weight_ih, grad_weight_hh, by_gate.sum(0), grad_bias_hh


def _backward_in_time(grad_hidden: Tensor, slope: Tensor, z: Tensor, weight_hh: Tensor, reset: Tensor | None) -> Tensor:
    """Turns `d(output)` into the whole `d(hidden)`, and slopes into `d(gates)`, both in place.

    Returns:
        `[B, U]`, the gradient of the initial state.
    """
    length, batch, size = grad_hidden.shape
    may_reset = resets_at(reset, length)
    grad_initial = torch.zeros_like(grad_hidden[0])
    into = [grad_initial, *grad_hidden.unbind(0)]
    per_gate, flat, keep = slope.view(length, batch, 3, size).unbind(0), slope.unbind(0), z.unbind(0)
    for t in range(length - 1, -1, -1):
        current, previous = into[t + 1], into[t]
        per_gate[t].mul_(current.unsqueeze(1))
        if may_reset[t] and reset is not None:
            passed = torch.addmm(current * keep[t], flat[t], weight_hh)
            previous.add_(passed.masked_fill_(reset[t, :, None], 0.0))
        else:
            previous.addcmul_(current, keep[t]).addmm_(flat[t], weight_hh)
    return grad_initial


_forward_op = torch.library.custom_op(
    "amago_kernels::gru_forward",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor initial_state, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh, "
    "Tensor? reset) -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "amago_kernels::gru_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor initial_state, Tensor weight_ih, Tensor weight_hh, Tensor hidden, "
    "Tensor gates, Tensor recurrent, Tensor? reset, bool for_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(
    x: Tensor,
    initial_state: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    length, batch, _ = x.shape
    size = weight_hh.shape[1]
    gates = x.new_empty(length, batch, 3 * size)
    return x.new_empty(length, batch, size), gates, torch.empty_like(gates)


@_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    initial_state: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    hidden: Tensor,
    gates: Tensor,
    recurrent: Tensor,
    reset: Tensor | None,
    for_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias = (weight_hh.shape[0],)
    grad_x = x.new_empty(x.shape if for_x else 0)
    weights = x.new_empty(weight_ih.shape), x.new_empty(weight_hh.shape)
    return grad_x, x.new_empty(initial_state.shape), *weights, x.new_empty(bias), x.new_empty(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, initial_state, weight_ih, weight_hh, _, _, reset = inputs
    hidden, gates, recurrent = output
    ctx.mark_non_differentiable(gates, recurrent)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, initial_state, weight_ih, weight_hh, hidden, gates, recurrent, reset)


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    for_x = ctx.needs_input_grad[0]
    grad_x, *others = _backward_op(grad, *ctx.saved_tensors, for_x)
    return grad_x if for_x else None, *others, None


_forward_op.register_autograd(_gradients, setup_context=_setup_context)
