"""An LSTM layer over windows that may hold several episodes.

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


def lstm_layer(
    x: Tensor,
    initial_hidden: Tensor,
    initial_cell: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One LSTM layer with `torch.nn.LSTM`'s equations and weights, and resets at any timestep.

    Half precision is computed in float32, whatever autocast says.

    Args:
        x: `[B, L, D]`.
        initial_hidden: `[B, U]`; give float32 to keep the state of a half-precision model exact.
        initial_cell: `[B, U]`; likewise.
        weight_ih: `[4U, D]`; rows are the input gate, the forget gate, the candidate and the output gate.
        weight_hh: `[4U, U]`, in the same order.
        bias_ih: `[4U]`.
        bias_hh: `[4U]`.
        reset: `[B, L]` bool; True takes hidden state and cell before that timestep as zero.
        backend: "auto", "reference" or "fused". The fused backend does all products that are not recurrent in one
            piece, in the backward pass as well; `torch.compile` takes it as one operation. It has no second
            derivative; the reference has.

    Returns:
        Hidden states `[B, L, U]` in the dtype of `initial_hidden`, the last one is the final one; and the final cell
        `[B, U]` in the dtype of `initial_cell`.

    Raises:
        ValueError: if shapes disagree, or the backend cannot serve the call.

    Source: Hochreiter & Schmidhuber (1997), with the forget gate of Gers et al. (2000) and no peepholes.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    check_layer(x, {"initial_hidden": initial_hidden, "initial_cell": initial_cell}, weights, reset, gates=4)
    fused = choose("lstm_layer", backend, x, CANDIDATES) == "fused"
    dtype = accumulation_dtype(x, initial_hidden, initial_cell, *weights)
    by_time, resets = x.transpose(0, 1).to(dtype), None if reset is None else reset.t()
    start = initial_hidden.to(dtype), initial_cell.to(dtype)
    wide: Weights = (weight_ih.to(dtype), weight_hh.to(dtype), bias_ih.to(dtype), bias_hh.to(dtype))
    if fused:
        hidden, cells, _ = _forward_op(by_time, *start, *wide, resets)
        cell = cells[-1]
    else:
        hidden, cell = _reference(by_time, *start, wide, resets)
    return hidden.transpose(0, 1).to(initial_hidden.dtype), cell.to(initial_cell.dtype)


def _reference(
    x: Tensor, hidden: Tensor, cell: Tensor, weights: Weights, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    outputs = []
    with without_autocast(x.device):
        for t in range(x.shape[0]):
            if reset is not None:
                hidden = torch.where(reset[t, :, None], 0.0, hidden)
                cell = torch.where(reset[t, :, None], 0.0, cell)
            gates = x[t] @ weight_ih.t() + bias_ih + hidden @ weight_hh.t() + bias_hh
            i, f, g, o = gates.chunk(4, dim=-1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
            outputs.append(hidden)
    return torch.stack(outputs), cell


def _forward(
    x: Tensor,
    initial_hidden: Tensor,
    initial_cell: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole window.

    Returns:
        Hidden states and cells `[L, B, U]`; and i, f, g and o after their nonlinearities, `[L, B, 4U]`.
    """
    with without_autocast(x.device):
        length, batch, _ = x.shape
        size = weight_hh.shape[1]
        gates = input_products(x, weight_ih, bias_ih + bias_hh)
        hidden, cells = x.new_empty(length, batch, size), x.new_empty(length, batch, size)
        may_reset = resets_at(reset, length)
        # Views are made once, all at a time: the loop below is bound by the number of calls.
        i_f, i = gates[..., : 2 * size].unbind(0), gates[..., :size].unbind(0)
        f, g = gates[..., size : 2 * size].unbind(0), gates[..., 2 * size : 3 * size].unbind(0)
        o, all_gates = gates[..., 3 * size :].unbind(0), gates.unbind(0)
        hidden_t, cells_t = hidden.unbind(0), cells.unbind(0)
        transposed = weight_hh.t().contiguous()
        before, cell = initial_hidden, initial_cell
        for t in range(length):
            if may_reset[t] and reset is not None:
                before = torch.where(reset[t, :, None], 0.0, before)
                cell = torch.where(reset[t, :, None], 0.0, cell)
            all_gates[t].addmm_(before, transposed)
            i_f[t].sigmoid_()
            o[t].sigmoid_()
            cell = torch.mul(f[t], cell, out=cells_t[t]).addcmul_(i[t], g[t].tanh_())
            before = torch.tanh(cell, out=hidden_t[t]).mul_(o[t])
    return hidden, cells, gates


def _backward(
    grad: Tensor,
    grad_cells: Tensor,
    x: Tensor,
    initial_hidden: Tensor,
    initial_cell: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    hidden: Tensor,
    cells: Tensor,
    gates: Tensor,
    reset: Tensor | None,
    for_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs of `_forward`, in its order; one bias stands for both.

    That of `x` is empty unless `for_x`.
    """
    with without_autocast(x.device):
        length, batch, size = hidden.shape
        i, f, g, o = gates.chunk(4, dim=-1)
        squashed = torch.tanh(cells)
        # d(gates before nonlinearity) = slope * d(cell), for the output gate slope * d(hidden).
        slope = torch.empty_like(gates)
        sigmoid_slope(g, i, into=slope[..., :size])
        sigmoid_slope(states_before(initial_cell, cells, reset), f, into=slope[..., size : 2 * size])
        tanh_slope(i, g, into=slope[..., 2 * size : 3 * size])
        sigmoid_slope(squashed, o, into=slope[..., 3 * size :])
        into_cell = tanh_slope(o, squashed)
        grad_hidden, grad_cell = (g.clone(memory_format=torch.contiguous_format) for g in (grad, grad_cells))
        starts = _backward_in_time(grad_hidden, grad_cell, slope, into_cell, f, weight_hh, reset)
        by_gate = slope.view(length * batch, 4 * size)
        before = states_before(initial_hidden, hidden, reset)
        grad_weight_hh = by_gate.t() @ before.view(length * batch, size)
        grad_weight_ih = by_gate.t() @ x.flatten(0, 1)
        grad_x = (by_gate @ weight_ih).view(x.shape) if for_x else x.new_empty(0)
        return grad_x, *starts, grad_weight_ih, grad_weight_hh, by_gate.sum(0)


def _backward_in_time(
    grad_hidden: Tensor,
    grad_cell: Tensor,
    slope: Tensor,
    into_cell: Tensor,
    forget: Tensor,
    weight_hh: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Turns `d(outputs)` into the whole `d(hidden)` and `d(cell)`, and slopes into `d(gates)`, all in place.

    Returns:
        `[B, U]` each, the gradients of the initial hidden state and cell.
    """
    length, batch, size = grad_hidden.shape
    may_reset = resets_at(reset, length)
    starts = torch.zeros_like(grad_hidden[0]), torch.zeros_like(grad_cell[0])
    hidden_at, cell_at = [starts[0], *grad_hidden.unbind(0)], [starts[1], *grad_cell.unbind(0)]
    by_cell = slope[..., : 3 * size].view(length, batch, 3, size).unbind(0)
    by_hidden, flat = slope[..., 3 * size :].unbind(0), slope.unbind(0)
    into_cell_t, forget_t = into_cell.unbind(0), forget.unbind(0)
    for t in range(length - 1, -1, -1):
        d_hidden, d_cell = hidden_at[t + 1], cell_at[t + 1]
        d_cell.addcmul_(d_hidden, into_cell_t[t])
        by_cell[t].mul_(d_cell.unsqueeze(1))
        by_hidden[t].mul_(d_hidden)
        if may_reset[t] and reset is not None:
            here = reset[t, :, None]
            hidden_at[t].add_((flat[t] @ weight_hh).masked_fill_(here, 0.0))
            cell_at[t].add_((d_cell * forget_t[t]).masked_fill_(here, 0.0))
        else:
            hidden_at[t].addmm_(flat[t], weight_hh)
            cell_at[t].addcmul_(d_cell, forget_t[t])
    return starts


_forward_op = torch.library.custom_op(
    "amago_kernels::lstm_forward",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor initial_hidden, Tensor initial_cell, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, "
    "Tensor bias_hh, Tensor? reset) -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "amago_kernels::lstm_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor grad_cells, Tensor x, Tensor initial_hidden, Tensor initial_cell, Tensor weight_ih, "
    "Tensor weight_hh, Tensor hidden, Tensor cells, Tensor gates, Tensor? reset, bool for_x) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(
    x: Tensor,
    initial_hidden: Tensor,
    initial_cell: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    length, batch, _ = x.shape
    size = weight_hh.shape[1]
    hidden = x.new_empty(length, batch, size)
    return hidden, torch.empty_like(hidden), x.new_empty(length, batch, 4 * size)


@_backward_op.register_fake
def _(
    grad: Tensor,
    grad_cells: Tensor,
    x: Tensor,
    initial_hidden: Tensor,
    initial_cell: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    hidden: Tensor,
    cells: Tensor,
    gates: Tensor,
    reset: Tensor | None,
    for_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if for_x else 0)
    starts = x.new_empty(initial_hidden.shape), x.new_empty(initial_cell.shape)
    weights = x.new_empty(weight_ih.shape), x.new_empty(weight_hh.shape)
    return grad_x, *starts, *weights, x.new_empty(weight_hh.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, initial_hidden, initial_cell, weight_ih, weight_hh, _, _, reset = inputs
    hidden, cells, gates = output
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, initial_hidden, initial_cell, weight_ih, weight_hh, hidden, cells, gates, reset)


def _gradients(ctx: Any, grad: Tensor | None, grad_cells: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    # Gradient checkpointing allows one look at them.
    saved = ctx.saved_tensors
    for_x, like = ctx.needs_input_grad[0], saved[5]
    grads = (torch.zeros_like(like) if given is None else given for given in (grad, grad_cells))
    grad_x, *others, grad_bias = _backward_op(*grads, *saved, for_x)
    return grad_x if for_x else None, *others, grad_bias, grad_bias.clone(), None


_forward_op.register_autograd(_gradients, setup_context=_setup_context)
