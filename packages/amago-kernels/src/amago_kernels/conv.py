"""Causal depthwise convolution over windows that may hold several episodes.

Dimensions: `B` batch, `L` timesteps, `D` channels, `W` taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import choose, triton_refusal, triton_unasked
from .external import WindowCall, conv_refusal, package_conv
from .inputs import (
    accumulation_dtype,
    check_devices,
    check_floats,
    check_reset,
    check_shape,
    drop_idle,
    mark_written,
)

_MOST_TAPS = 4


def _triton_refusal(call: WindowCall) -> str | None:
    if call.width > _MOST_TAPS:
        return f"it has 1 to {_MOST_TAPS} taps, and weight has {call.width}"
    return triton_refusal(call.device_type, *call.dtypes)


# "causal_conv1d" comes last, behind one that can always serve: only those who ask for the package get it.
_CANDIDATES: dict[str, Callable[[WindowCall], str | None]] = {
    "triton": _triton_refusal,
    "fused": lambda call: None,
    "reference": lambda call: None,
    "causal_conv1d": conv_refusal,
}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolution of every channel with the timesteps up to the present, with resets at any timestep.

    `y_t = bias + sum_w weight[:, w] x_{t - (W - 1) + w}`, over timesteps since the last reset.

    Args:
        x: `[B, L, D]`.
        weight: `[D, W]`; the last tap belongs to the present timestep.
        bias: `[D]` or None.
        initial_state: `[B, D, W - 1]`, the inputs before the first timestep, oldest first; zeros by default.
        reset: `[B, L]` bool; True takes inputs before that timestep as zero, the initial state included.
        activation: None or "silu".
        backend: "auto", "reference", "fused" (a multiply-add per tap), "triton" (one launch each way, 1 to 4 taps), or
            "causal_conv1d" (that package on CUDA devices, 2 to 4 taps, without resets and initial state).

    Returns:
        `y` `[B, L, D]` in the dtype of `x`, and the last `W - 1` inputs `[B, D, W - 1]`, oldest first and zero where
        they lie before the last reset, in the dtype that was computed in: float32, or float64 if an input is.

    Raises:
        ValueError: if shapes or devices disagree, one is no float, or the backend cannot serve the call.
    """
    _check(x, weight, bias, initial_state, reset, activation)
    dtypes = tuple(given.dtype for given in (x, weight, bias, initial_state) if given is not None)
    call = WindowCall(x.device.type, x.dtype, initial_state is not None, reset is not None, weight.shape[1], dtypes)
    chosen = choose("causal_conv1d", backend, call, _CANDIDATES)
    if chosen == "triton":
        y, last = _triton_conv(x, weight, bias, initial_state, reset, activation == "silu")
        return y, last
    dtype = accumulation_dtype(x, weight, initial_state)
    state = initial_state
    if state is None:
        state = torch.zeros(x.shape[0], x.shape[2], weight.shape[1] - 1, dtype=dtype, device=x.device)
    if chosen == "causal_conv1d":
        return package_conv(x, weight, bias, activation), _last_inputs(x, state, reset)
    inputs = (x.to(dtype), weight.to(dtype), state.to(dtype), reset)
    if chosen == "fused":
        y, last = _conv(*inputs), _last_inputs(inputs[0], inputs[2], reset)
    else:
        y, last = _reference(*inputs)
    return _output(y, bias, activation).to(x.dtype), last


@torch.no_grad()
def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None = None
) -> Tensor:
    """One timestep of `causal_conv1d`, for acting: no gradients.

    Args:
        x: `[B, D]`.
        weight: `[D, W]`.
        bias: `[D]` or None.
        state: `[B, D, W - 1]`, the inputs before this timestep, oldest first; updated in place.
        activation: None or "silu".

    Returns:
        `y` `[B, D]` in the dtype of `x`.

    Raises:
        ValueError: if shapes or devices disagree, or one is no float.
    """
    _check_step(x, weight, bias, state)
    _check_activation(activation)
    if _step_by_triton(x, weight, bias, state):
        # To call an operator takes longer than the kernel; it is there to be traced.
        step = _triton_step if torch.compiler.is_compiling() else _launch_step
        return step(x, weight, bias, state, activation == "silu")
    window = torch.cat([state, x.to(state.dtype).unsqueeze(-1)], dim=-1)
    state.copy_(window[..., 1:])
    y = (window * weight.to(state.dtype)).sum(-1)
    return _output(y, bias, activation).to(x.dtype)


def _step_by_triton(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    if x.device.type != "cuda" or weight.shape[1] > _MOST_TAPS or not triton_unasked():
        return False
    return triton_refusal("cuda", *[given.dtype for given in (x, weight, *others) if given is not None]) is None


def _reference(x: Tensor, weight: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(x.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None], 0.0, state)
        window = torch.cat([state, x[:, t, :, None]], dim=-1)
        outputs.append((window * weight).sum(-1))
        state = window[..., 1:]
    return torch.stack(outputs, dim=1), state


def _last_inputs(x: Tensor, state: Tensor, reset: Tensor | None) -> Tensor:
    """The last `W - 1` inputs `[B, D, W - 1]`, zero where they lie before the last reset."""
    length, kept = x.shape[1], state.shape[2]
    tail = x[:, max(length - kept, 0) :].transpose(1, 2)
    last = torch.cat([state[..., length:], tail.to(state.dtype)], dim=-1)
    if reset is None:
        return last
    age = _age(reset[:, -kept:], kept + 1)[:, -1, None, None]
    return torch.where(age < kept - 1 - torch.arange(kept, device=x.device), 0.0, last)


def _age(reset: Tensor, never: int) -> Tensor:
    """Timesteps since the last reset `[B, L]`; at least `never` where there was none."""
    index = torch.arange(reset.shape[1], device=reset.device)
    return index - torch.where(reset, index, -never).cummax(dim=1).values


@torch.library.custom_op(
    "amago_kernels::causal_conv1d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor state, Tensor? reset) -> Tensor",
)
def _conv(x: Tensor, weight: Tensor, state: Tensor, reset: Tensor | None) -> Tensor:
    length, taps = x.shape[1], weight.t().contiguous().unbind(0)
    reset = drop_idle(reset)
    age = None if reset is None else _age(reset, len(taps))
    inputs = torch.cat([state.transpose(1, 2), x], dim=1)
    y = torch.mul(inputs[:, -length:], taps[-1])
    for back in range(1, len(taps)):
        shifted = inputs[:, -length - back : -back]
        y.addcmul_(shifted if age is None else _reachable(shifted, age, back), taps[-1 - back])
    return y


@_conv.register_fake
def _(x: Tensor, weight: Tensor, state: Tensor, reset: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "amago_kernels::causal_conv1d_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor state, Tensor? reset) -> (Tensor, Tensor, Tensor)",
)
def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `x`, `weight` and the initial state."""
    grads = x.new_empty(x.shape), weight.new_empty(weight.shape), state.new_empty(state.shape)
    length, taps = x.shape[1], weight.t().contiguous().unbind(0)
    reset = drop_idle(reset)
    age = None if reset is None else _age(reset, len(taps))
    if reset is not None:
        # Not left to the zeros that multiply it below: what was dropped may be NaN.
        state = torch.where(reset[:, :1, None], 0.0, state)
    inputs = torch.cat([state.transpose(1, 2), x], dim=1)
    grad_inputs = torch.zeros_like(inputs)
    for back in range(len(taps)):
        place = slice(len(taps) - 1 - back, len(taps) - 1 - back + length)
        reaching = grad if age is None or back == 0 else _reachable(grad, age, back)
        grad_inputs[:, place].addcmul_(reaching, taps[-1 - back])
        grads[1][:, -1 - back] = (reaching * inputs[:, place]).sum((0, 1))
    grads[0].copy_(grad_inputs[:, -length:])
    grads[2].copy_(grad_inputs[:, :-length].transpose(1, 2))
    return grads


@_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), state.new_empty(state.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_conv_backward(grad, *ctx.saved_tensors), None


_conv.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op(
    "amago_kernels::causal_conv1d_triton",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? reset, bool silu) -> (Tensor, Tensor)",
)
def _triton_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, reset: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    from .triton_conv import forward

    y, last = _outputs(x, weight)
    if y.numel() > 0:
        forward(x, weight, bias, state, reset, silu, y, last)
    return y, last


@_triton_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, reset: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return _outputs(x, weight)


def _outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[2], weight.shape[1] - 1)
    return x.new_empty(x.shape), torch.empty(shape, dtype=torch.float32, device=x.device)


@torch.library.custom_op(
    "amago_kernels::causal_conv1d_triton_backward",
    mutates_args=(),
    schema="(Tensor? grad_y, Tensor? grad_last, Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? reset,"
    " bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _triton_backward(
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `x`, `weight`, `bias` and `state`; without numbers for what is None."""
    from .triton_conv import backward

    if x.numel() == 0:
        grad_x, grad_weight, grad_bias, grad_state = (x.zero_() for x in _gradients(x, weight, bias, state))
        return grad_x, grad_weight, grad_bias, grad_state
    return backward(grad_y, grad_last, x, weight, bias, state, reset, silu)


@_triton_backward.register_fake
def _(
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, weight, bias, state)


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias, grad_state = (x.new_empty(0) if one is None else one.new_empty(one.shape) for one in (bias, state))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_bias, grad_state


def _save_triton(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    # What nobody differentiates needs no zeros.
    ctx.set_materialize_grads(False)


def _differentiate_triton(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None and grad_last is None:
        return (None,) * 6
    x, weight, bias, state, reset = ctx.saved_tensors
    grads = _triton_backward(grad_y, grad_last, x, weight, bias, state, reset, ctx.silu)
    given = (x, weight, bias, state)
    return *(grad if one is not None else None for one, grad in zip(given, grads, strict=True)), None, None


_triton_conv.register_autograd(_differentiate_triton, setup_context=_save_triton)


def _launch_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    from .triton_conv import step

    y = step(x, weight, bias, state, silu)
    mark_written(state)
    return y


@torch.library.custom_op(
    "amago_kernels::causal_conv1d_step_triton",
    mutates_args=("state",),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, bool silu) -> Tensor",
)
def _triton_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    from .triton_conv import step

    return step(x, weight, bias, state, silu)


@_triton_step.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _reachable(x: Tensor, age: Tensor, back: int) -> Tensor:
    """Zeros where `back` timesteps ago lies before the last reset."""
    return torch.where(age.unsqueeze(-1) < back, 0.0, x)


def _output(y: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    out = y if bias is None else y + bias.to(y.dtype)
    return out if activation is None else F.silu(out)


def _check_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; give [B, D] and [D, W]")
    channels, taps = weight.shape
    check_shape("x", x, (x.shape[0], channels))
    check_shape("bias", bias, (channels,))
    check_shape("state", state, (x.shape[0], channels, taps - 1))
    check_floats(x=x, weight=weight, bias=bias, state=state)


def _check_activation(activation: str | None) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f"activation={activation!r} is not allowed; give None or 'silu'")


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    activation: str | None,
) -> None:
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; give [B, L, D] with L >= 1")
    batch, length, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; give [D, W] with D={channels} and W >= 1")
    check_shape("bias", bias, (channels,))
    check_shape("initial_state", initial_state, (batch, channels, weight.shape[1] - 1))
    check_reset(reset, batch, length)
    check_floats(x=x, weight=weight, bias=bias, initial_state=initial_state)
    check_devices(x=x, reset=reset)
    _check_activation(activation)
