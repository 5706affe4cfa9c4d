"""Elementwise linear recurrences: `h_t = a_t h_{t-1} + b_t`, real or complex.

Dimensions: `B` batch, `L` timesteps, `D` channels; complex numbers are pairs on a last axis of 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose, numba_refusal, triton_refusal
from ..inputs import accumulation_dtype, check_devices, check_floats, check_reset, check_shape, drop_idle
from .blocked import scan_into
from .reference import linear_reference, multiply_pairs

_Inputs = tuple[Tensor, ...]


def _numba_refusal(inputs: _Inputs) -> str | None:
    return numba_refusal(next((x.device.type for x in inputs if x.device.type != "cpu"), "cpu"))


def _triton_refusal(inputs: _Inputs) -> str | None:
    elsewhere = next((x.device.type for x in inputs if x.device.type != "cuda"), "cuda")
    return triton_refusal(elsewhere, *(x.dtype for x in inputs))


_CANDIDATES: dict[str, Callable[[_Inputs], str | None]] = {
    "triton": _triton_refusal,
    "numba": _numba_refusal,
    "blocked": lambda inputs: None,
    "reference": lambda inputs: None,
}


def linear_scan(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    pairs: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """All states of `h_t = a_t h_{t-1} + b_t`, with resets at any timestep.

    Args:
        a: factors `[B, L, D]`, or anything that broadcasts to it, such as `[D]`.
        b: terms `[B, L, D]`.
        initial_state: `[B, D]`, the state before the first timestep; zeros by default.
        reset: `[B, L]` bool; True takes the state before that timestep as zero, the initial state included.
        pairs: numbers are complex, (real, imaginary) on a last axis of 2 that every tensor but `reset` has, as
            `torch.view_as_real` makes it.
        backend: "auto", "reference", "blocked", which differentiates by one more scan and joins timesteps to blocks
            where there is little to do per timestep, "numba", which touches memory once per direction, on the CPU, or
            "triton", which does so on CUDA devices and takes no float64.

    Returns:
        States like `b`, and the last one, `[B, D]`, in the dtype that was computed in: float32, or float64 if an
        input is.

    Raises:
        ValueError: if shapes or devices disagree, one is no float, or the backend cannot serve the call.
    """
    _check(a, b, initial_state, reset, pairs)
    inputs = (a, b) if initial_state is None else (a, b, initial_state)
    chosen = choose("linear_scan", backend, inputs, _CANDIDATES)
    if chosen == "triton":
        return _scan_triton(a[(None,) * (b.dim() - a.dim())], b, initial_state, reset, pairs)
    dtype = accumulation_dtype(*inputs)
    state = torch.zeros_like(b[:, 0], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    factors = a.to(dtype).expand(b.shape)
    if chosen == "reference":
        h = linear_reference(factors, b.to(dtype), state, reset, pairs)
        last = h[:, -1].clone()
    else:
        h, last = _scan(factors, b.to(dtype), state, reset, pairs, chosen == "numba")
    return h.to(b.dtype), last


@torch.no_grad()
def linear_scan_step(a: Tensor, b: Tensor, state: Tensor, *, pairs: bool = False) -> Tensor:
    """One timestep of `linear_scan`, for acting: no gradients.

    Args:
        a: factors `[B, D]`, or anything that broadcasts to it.
        b: terms `[B, D]`.
        state: `[B, D]`, updated in place.
        pairs: as in `linear_scan`.

    Returns:
        The new state in the dtype of `b`; no view of `state`.

    Raises:
        ValueError: if shapes or devices disagree, or one is no float.
    """
    check_shape("b", b, tuple(state.shape))
    if not _fits(a, b, pairs):
        raise ValueError(f"a has shape {tuple(a.shape)}; give one that broadcasts to b, {tuple(b.shape)}")
    check_floats(state=state, a=a, b=b)
    factors, terms = a.to(state.dtype), b.to(state.dtype)
    h = (multiply_pairs(factors, state) if pairs else factors * state) + terms
    state.copy_(h)
    return h.to(b.dtype)


@torch.library.custom_op(
    "amago_kernels::linear_scan",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor state, Tensor? reset, bool pairs, bool by_numba) -> (Tensor, Tensor)",
)
def _scan(
    a: Tensor, b: Tensor, state: Tensor, reset: Tensor | None, pairs: bool, by_numba: bool
) -> tuple[Tensor, Tensor]:
    """All states, and the last one; `a` has the shape of `b`, and every tensor but `reset` the same dtype."""
    out = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    if by_numba:
        from .numba_linear import scan

        scan(a, b, state, reset, pairs, out)
    else:
        numbers, factors, terms, before = (_numbers(x, pairs) for x in (out, a, b, state))
        scan_into(numbers, factors, terms, before, drop_idle(reset))
    return out, out[:, -1].clone()


@_scan.register_fake
def _(a: Tensor, b: Tensor, state: Tensor, reset: Tensor | None, pairs: bool, by_numba: bool) -> tuple[Tensor, Tensor]:
    h, last = [torch.empty(x.shape, dtype=b.dtype, device=b.device) for x in (b, state)]
    return h, last


@torch.library.custom_op(
    "amago_kernels::linear_scan_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor grad_last, Tensor a, Tensor h, Tensor state, Tensor? reset, bool pairs, bool by_numba)"
    " -> (Tensor, Tensor, Tensor)",
)
def _scan_backward(
    grad: Tensor,
    grad_last: Tensor,
    a: Tensor,
    h: Tensor,
    state: Tensor,
    reset: Tensor | None,
    pairs: bool,
    by_numba: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `a`, `b` and the initial state; that of `b` is the scan of `grad` back in time."""
    grads = [torch.empty(x.shape, dtype=h.dtype, device=h.device) for x in (h, h, state)]
    if by_numba:
        from .numba_linear import scan_backward

        grads[2].copy_(grad_last)
        scan_backward(grad, a, h, state, reset, pairs, (grads[0], grads[1], grads[2]))
        return grads[0], grads[1], grads[2]
    grad_a, grad_b, grad_state = (_numbers(x, pairs) for x in grads)
    grad, grad_last, a, h, state = (_numbers(x, pairs) for x in (grad, grad_last, a, h, state))
    reset = drop_idle(reset)
    # Conjugates on the way in and out, in place, so that neither `a` nor `h` needs a conjugated copy.
    if pairs:
        grad = torch.conj_physical(grad, out=grad_b)
        grad_last = grad_last.conj_physical()
    torch.add(grad[:, -1], grad_last, out=grad_b[:, -1])
    later = None if reset is None else reset[:, 1:]
    scan_into(grad_b[:, :-1], a[:, 1:], grad[:, :-1], grad_b[:, -1], later, reverse=True)
    torch.mul(a[:, 0], grad_b[:, 0], out=grad_state)
    torch.mul(grad_b[:, 0], state, out=grad_a[:, 0])
    torch.mul(grad_b[:, 1:], h[:, :-1], out=grad_a[:, 1:])
    for number in (grad_a, grad_b, grad_state):
        number.conj_physical_()
    if reset is not None:
        grad_a.masked_fill_(reset.unsqueeze(-1), 0.0)
        grad_state.masked_fill_(reset[:, :1], 0.0)
    return grads[0], grads[1], grads[2]


@_scan_backward.register_fake
def _(
    grad: Tensor,
    grad_last: Tensor,
    a: Tensor,
    h: Tensor,
    state: Tensor,
    reset: Tensor | None,
    pairs: bool,
    by_numba: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    full, first = [torch.empty(x.shape, dtype=h.dtype, device=h.device) for x in (h, state)]
    return full, torch.empty_like(full), first


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, state, reset, ctx.pairs, ctx.by_numba = inputs
    ctx.save_for_backward(a, output[0], state, reset)


def _differentiate(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    return *_scan_backward(grad, grad_last, *ctx.saved_tensors, ctx.pairs, ctx.by_numba), None, None, None


_scan.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op(
    "amago_kernels::linear_scan_triton",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor? state, Tensor? reset, bool pairs) -> (Tensor, Tensor)",
)
def _scan_triton(
    a: Tensor, b: Tensor, state: Tensor | None, reset: Tensor | None, pairs: bool
) -> tuple[Tensor, Tensor]:
    """All states in the dtype of `b`, and the last one in float32; axes of `a` may be 1."""
    from .triton_linear import scan

    return scan(a, b, state, reset, pairs)


@_scan_triton.register_fake
def _(a: Tensor, b: Tensor, state: Tensor | None, reset: Tensor | None, pairs: bool) -> tuple[Tensor, Tensor]:
    last = torch.empty((b.shape[0], *b.shape[2:]), dtype=torch.float32, device=b.device)
    return torch.empty(b.shape, dtype=b.dtype, device=b.device), last


@torch.library.custom_op(
    "amago_kernels::linear_scan_triton_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor grad_last, Tensor a, Tensor h, Tensor? state, Tensor? reset, bool pairs)"
    " -> (Tensor, Tensor, Tensor)",
)
def _scan_triton_backward(
    grad: Tensor,
    grad_last: Tensor,
    a: Tensor,
    h: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    pairs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `a`, `b` and the initial state; that of a state that was not given is float32."""
    from .triton_linear import scan_backward

    return scan_backward(grad, grad_last, a, h, state, reset, pairs)


@_scan_triton_backward.register_fake
def _(
    grad: Tensor,
    grad_last: Tensor,
    a: Tensor,
    h: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    pairs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float32 if state is None else state.dtype
    first = torch.empty((h.shape[0], *h.shape[2:]), dtype=dtype, device=h.device)
    grad_a = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    return grad_a, torch.empty(h.shape, dtype=h.dtype, device=h.device), first


def _save_triton(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, state, reset, ctx.pairs = inputs
    ctx.save_for_backward(a, output[0], state, reset)


def _differentiate_triton(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    a, h, state, reset = ctx.saved_tensors
    grad_a, grad_b, grad_state = _scan_triton_backward(grad, grad_last, a, h, state, reset, ctx.pairs)
    return grad_a, grad_b, None if state is None else grad_state, None, None


_scan_triton.register_autograd(_differentiate_triton, setup_context=_save_triton)


def _numbers(x: Tensor, pairs: bool) -> Tensor:
    """The tensor itself, or its pairs as complex numbers, without a copy where the strides allow it."""
    if not pairs:
        return x
    aligned = x.stride(-1) == 1 and all(stride % 2 == 0 for stride in x.stride()[:-1]) and x.storage_offset() % 2 == 0
    # Not `contiguous()`: that is the tensor itself where only the place of its first pair is odd.
    return torch.view_as_complex(x if aligned else x.clone(memory_format=torch.contiguous_format))


def _fits(a: Tensor, b: Tensor, pairs: bool) -> bool:
    """Whether `a` broadcasts to `b`."""
    if a.dim() > b.dim() or (pairs and (a.dim() == 0 or a.shape[-1] != 2)):
        return False
    return all(one in (1, other) for one, other in zip(a.shape, b.shape[b.dim() - a.dim() :], strict=True))


def _check(a: Tensor, b: Tensor, initial_state: Tensor | None, reset: Tensor | None, pairs: bool) -> None:
    wanted = "[B, L, D, 2]" if pairs else "[B, L, D]"
    if b.dim() != (4 if pairs else 3) or b.shape[1] < 1 or (pairs and b.shape[-1] != 2):
        raise ValueError(f"b has shape {tuple(b.shape)}; give {wanted} with L >= 1")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"a is {a.dtype} and b is {b.dtype}; give floating dtypes (complex numbers with pairs=True)")
    if not _fits(a, b, pairs):
        raise ValueError(f"a has shape {tuple(a.shape)}; give one that broadcasts to b, {tuple(b.shape)}")
    check_shape("initial_state", initial_state, (b.shape[0], *b.shape[2:]))
    check_reset(reset, b.shape[0], b.shape[1])
    check_floats(b=b, a=a, initial_state=initial_state)
    check_devices(b=b, reset=reset)
