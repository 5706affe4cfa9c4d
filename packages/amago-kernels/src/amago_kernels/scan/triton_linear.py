"""The linear recurrence in one pass over memory per direction, as Triton kernels.

A program is one warp that owns a few neighbouring numbers of one lane and walks through time. Tiles of timesteps are
fetched ahead of it; inside of a tile every thread holds all timesteps of its own numbers, so that the recurrence runs
in registers, in its own order. No product of factors is ever formed: what the reference keeps finite stays finite.
Time is not spread over programs: few lanes of few channels leave most of a device idle.

Dimensions: `B` batch, `L` timesteps, `W` numbers per timestep: `D` channels, or `2 D` with complex pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import bucket, config, on_device, tuned

if TYPE_CHECKING:
    from ..builds import Build

# Offsets inside of a tile are 32 bits wide.
_LARGEST_STRIDE = 1 << 25
_WARP = tl.constexpr(32)


@triton.jit
def _row(tile, rows, place: tl.constexpr):
    """One row of a tile. The sum is over integers, because adding zeros to those folds away when it is compiled."""
    bits = tl.where(rows[:, None] == place, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _multiply(x, y, PAIRS: tl.constexpr, CONJUGATE: tl.constexpr):
    """`x y`, or with `CONJUGATE` `x* y`."""
    if PAIRS:
        x_real, x_imaginary = tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))
        y_real, y_imaginary = tl.split(tl.reshape(y, [y.shape[0] // 2, 2]))
        if CONJUGATE:
            x_imaginary = -x_imaginary
        real = x_real * y_real - x_imaginary * y_imaginary
        imaginary = x_real * y_imaginary + x_imaginary * y_real
        return tl.reshape(tl.join(real, imaginary), [x.shape[0]])
    else:
        return x * y


@triton.jit
def _place(width, BLOCK_W: tl.constexpr):
    """The lane of this program, and its numbers."""
    blocks = tl.cdiv(width, BLOCK_W)
    lane = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    # With wider vectors the warp would cover several timesteps, and rows would have to travel between threads.
    return lane, tl.max_contiguous(columns, BLOCK_W // _WARP)


@triton.jit
def _load_resets(pointer, steps, length, stride):
    there = (steps >= 0) & (steps < length)
    return tl.load(pointer + steps.to(tl.int64) * stride, mask=there, other=0).to(tl.int32)


@tuned(
    [
        config(1, BLOCK_T=16, BLOCK_W=64, STAGES=4),
        config(1, BLOCK_T=8, BLOCK_W=64, STAGES=6),
        config(1, BLOCK_T=8, BLOCK_W=128, STAGES=4),
    ],
    key=("numbers",),
)
@triton.jit
def scan_kernel(
    h_ptr,
    last_ptr,
    a_ptr,
    b_ptr,
    state_ptr,
    reset_ptr,
    length,
    width,
    a_lane,
    a_step,
    b_lane,
    b_step,
    reset_lane,
    reset_step,
    numbers,
    PAIRS: tl.constexpr,
    CONSTANT: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`h_t = a_t h_{t-1} + b_t`; `CONSTANT`: `a` is the same at all timesteps; `NARROW`: in all channels."""
    lane, columns = _place(width, BLOCK_W)
    inside = columns < width
    rows = tl.arange(0, BLOCK_T)
    a_ptr += lane * a_lane
    b_ptr += lane * b_lane
    h_ptr += lane * length * width
    a_columns = columns % (1 + PAIRS) if NARROW else columns
    if CONSTANT:
        factor = tl.load(a_ptr + a_columns, mask=inside, other=0.0).to(tl.float32)
    if state_ptr is None:
        h = tl.zeros([BLOCK_W], tl.float32)
    else:
        h = tl.load(state_ptr + lane * width + columns, mask=inside, other=0.0).to(tl.float32)
    if reset_ptr is not None:
        reset_ptr += lane * reset_lane
        coming = _load_resets(reset_ptr, rows, length, reset_step)
    for start in tl.range(0, length, BLOCK_T, num_stages=STAGES):
        there = (rows < length - start)[:, None] & inside[None, :]
        first = tl.cast(start, tl.int64)
        if not CONSTANT:
            a_at = first * a_step + (rows[:, None] * a_step + a_columns[None, :])
            factors = tl.load(a_ptr + a_at, mask=there, other=0.0).to(tl.float32)
        b_at = first * b_step + (rows[:, None] * b_step + columns[None, :])
        terms = tl.load(b_ptr + b_at, mask=there, other=0.0).to(tl.float32)
        if reset_ptr is not None:
            resets = tl.sum(coming << rows, 0)
            coming = _load_resets(reset_ptr, start + BLOCK_T + rows, length, reset_step)
        out = tl.zeros([BLOCK_T, BLOCK_W], tl.float32)
        for place in tl.static_range(BLOCK_T):
            before = h
            if reset_ptr is not None:
                before = tl.where((resets >> place) & 1 == 1, 0.0, h)
            if not CONSTANT:
                factor = _row(factors, rows, place)
            now = _multiply(factor, before, PAIRS, False) + _row(terms, rows, place)
            out = tl.where(rows[:, None] == place, now[None, :], out)
            h = tl.where(start + place < length, now, h)
        h_at = first * width + (rows[:, None] * width + columns[None, :])
        tl.store(h_ptr + h_at, out.to(h_ptr.dtype.element_ty), mask=there)
    tl.store(last_ptr + lane * width + columns, h, mask=inside)


@tuned(
    [
        config(1, BLOCK_T=8, BLOCK_W=64, STAGES=5),
        config(1, BLOCK_T=8, BLOCK_W=128, STAGES=3),
        config(1, BLOCK_T=4, BLOCK_W=128, STAGES=5),
    ],
    key=("numbers",),
)
@triton.jit
def scan_backward_kernel(
    grad_a_ptr,
    grad_b_ptr,
    grad_state_ptr,
    grad_ptr,
    grad_last_ptr,
    a_ptr,
    h_ptr,
    state_ptr,
    reset_ptr,
    length,
    width,
    grad_lane,
    grad_step,
    a_lane,
    a_step,
    reset_lane,
    reset_step,
    numbers,
    PAIRS: tl.constexpr,
    CONSTANT: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Back in time, with `g_t` the gradient of `h_t`: `g_t = grad_t + a*_{t+1} g_{t+1}`, and `g_t h*_{t-1}` for `a_t`.

    Row 0 of a tile is its last timestep. With `CONSTANT`, `grad_a` is `[B, W]`, summed over time.
    """
    lane, columns = _place(width, BLOCK_W)
    inside = columns < width
    rows = tl.arange(0, BLOCK_T)
    grad_ptr += lane * grad_lane
    a_ptr += lane * a_lane
    h_ptr += lane * length * width
    grad_b_ptr += lane * length * width
    a_columns = columns % (1 + PAIRS) if NARROW else columns
    if CONSTANT:
        factor = tl.load(a_ptr + a_columns, mask=inside, other=0.0).to(tl.float32)
        grad_factor = tl.zeros([BLOCK_W], tl.float32)
        grad_a_ptr += lane * width
    else:
        grad_a_ptr += lane * length * width
    if state_ptr is None:
        state = tl.zeros([BLOCK_W], tl.float32)
    else:
        state = tl.load(state_ptr + lane * width + columns, mask=inside, other=0.0).to(tl.float32)
    if reset_ptr is not None:
        reset_ptr += lane * reset_lane
        coming = _load_resets(reset_ptr, length - 1 - rows, length, reset_step)
    carry = tl.load(grad_last_ptr + lane * width + columns, mask=inside, other=0.0)
    for start in tl.range(0, length, BLOCK_T, num_stages=STAGES):
        left = length - start
        there = (rows < left)[:, None] & inside[None, :]
        last = tl.cast(left - 1, tl.int64)
        grad_at = last * grad_step + (columns[None, :] - rows[:, None] * grad_step)
        grads = tl.load(grad_ptr + grad_at, mask=there, other=0.0).to(tl.float32)
        if not CONSTANT:
            a_at = last * a_step + (a_columns[None, :] - rows[:, None] * a_step)
            factors = tl.load(a_ptr + a_at, mask=there, other=0.0).to(tl.float32)
        at = last * width + (columns[None, :] - rows[:, None] * width)
        earlier = (rows < left - 1)[:, None] & inside[None, :]
        states = tl.load(h_ptr - width + at, mask=earlier, other=0.0).to(tl.float32)
        if reset_ptr is not None:
            resets = tl.sum(coming << rows, 0)
            coming = _load_resets(reset_ptr, left - 1 - BLOCK_T - rows, length, reset_step)
        out_a = tl.zeros([BLOCK_T, BLOCK_W], tl.float32)
        out_b = tl.zeros([BLOCK_T, BLOCK_W], tl.float32)
        for place in tl.static_range(BLOCK_T):
            if not CONSTANT:
                factor = _row(factors, rows, place)
            now = _row(grads, rows, place) + carry
            before = tl.where(left - 1 == place, state, _row(states, rows, place))
            to_factor = _multiply(before, now, PAIRS, True)
            to_before = _multiply(factor, now, PAIRS, True)
            if reset_ptr is not None:
                cut = (resets >> place) & 1 == 1
                to_factor = tl.where(cut, 0.0, to_factor)
                to_before = tl.where(cut, 0.0, to_before)
            if CONSTANT:
                grad_factor += tl.where(place < left, to_factor, 0.0)
            else:
                out_a = tl.where(rows[:, None] == place, to_factor[None, :], out_a)
            out_b = tl.where(rows[:, None] == place, now[None, :], out_b)
            carry = tl.where(place < left, to_before, carry)
        tl.store(grad_b_ptr + at, out_b.to(grad_b_ptr.dtype.element_ty), mask=there)
        if not CONSTANT:
            tl.store(grad_a_ptr + at, out_a.to(grad_a_ptr.dtype.element_ty), mask=there)
    if CONSTANT:
        tl.store(grad_a_ptr + columns, grad_factor, mask=inside)
    tl.store(grad_state_ptr + lane * width + columns, carry.to(grad_state_ptr.dtype.element_ty), mask=inside)


def scan(a: Tensor, b: Tensor, state: Tensor | None, reset: Tensor | None, pairs: bool) -> tuple[Tensor, Tensor]:
    """All states of the recurrence.

    Args:
        a: `[B, L, D]`, or `[B, L, D, 2]` with `pairs`; `B`, `L` and `D` may be 1.
        b: `[B, L, D]`, or `[B, L, D, 2]` with `pairs`.
        state: `[B, D]`, or `[B, D, 2]`; None for zeros.
        reset: `[B, L]` bool or None.
        pairs: numbers are complex.

    Returns:
        States like `b`, and the last one in float32.
    """
    h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    last = torch.empty((b.shape[0], *b.shape[2:]), dtype=torch.float32, device=b.device)
    if b.numel() == 0:
        return h, last
    factors, terms = _dense(a), _dense(b)
    with on_device(b):
        scan_kernel[_grid(b)](
            h,
            last,
            factors,
            terms,
            None if state is None else state.contiguous(),
            None if reset is None else reset.view(torch.uint8),
            b.shape[1],
            h[0, 0].numel(),
            *_strides(factors),
            *_strides(terms),
            *_strides(reset),
            bucket(last.numel()),
            **_kind(a, b, pairs),
        )
    return h, last


def scan_backward(
    grad: Tensor,
    grad_last: Tensor,
    a: Tensor,
    h: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    pairs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `a`, of `b` and of the initial state.

    Args:
        grad: gradient of the states, like `b`.
        grad_last: gradient of the last state.
        a: as `scan` took it.
        h: the states that `scan` returned.
        state: as `scan` took it.
        reset: as `scan` took it.
        pairs: numbers are complex.

    Returns:
        Gradients like `a`, `b` and `state`; the last one in float32 if there is no `state`.
    """
    kind = _kind(a, h, pairs)
    grad_b = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    state_dtype = torch.float32 if state is None else state.dtype
    grad_state = torch.empty((h.shape[0], *h.shape[2:]), dtype=state_dtype, device=h.device)
    if h.numel() == 0:
        return torch.zeros(a.shape, dtype=a.dtype, device=a.device), grad_b, grad_state
    length = 1 if kind["CONSTANT"] else h.shape[1]
    # What is summed up below stays in float32 until then.
    a_dtype = a.dtype if a.shape == h.shape else torch.float32
    grad_a = torch.empty((h.shape[0], length, *h.shape[2:]), dtype=a_dtype, device=h.device)
    grads, factors = _dense(grad), _dense(a)
    with on_device(h):
        scan_backward_kernel[_grid(h)](
            grad_a,
            grad_b,
            grad_state,
            grads,
            grad_last.float().contiguous(),
            factors,
            h.contiguous(),
            None if state is None else state.contiguous(),
            None if reset is None else reset.view(torch.uint8),
            h.shape[1],
            h[0, 0].numel(),
            *_strides(grads),
            *_strides(factors),
            *_strides(reset),
            bucket(grad_state.numel()),
            **kind,
        )
    return grad_a.sum_to_size(a.shape).to(a.dtype), grad_b, grad_state


def _kind(a: Tensor, like: Tensor, pairs: bool) -> dict[str, bool]:
    constant = a.shape[1] == 1 and like.shape[1] > 1
    return {"PAIRS": pairs, "CONSTANT": constant, "NARROW": a.shape[2] != like.shape[2]}


def _grid(x: Tensor) -> Callable[[dict[str, int]], tuple[int]]:
    lanes, width = x.shape[0], x[0, 0].numel()
    return lambda meta: (lanes * triton.cdiv(width, meta["BLOCK_W"]),)


def _dense(x: Tensor) -> Tensor:
    """The tensor itself if the numbers of a timestep are neighbours in memory, else a copy."""
    return x if x[0, 0].is_contiguous() and x.stride(1) <= _LARGEST_STRIDE else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int]:
    """From lane to lane and from timestep to timestep; 0 along an axis that is broadcast."""
    if x is None:
        return 0, 0
    return 0 if x.shape[0] == 1 else x.stride(0), 0 if x.shape[1] == 1 else x.stride(1)


def builds() -> list[Build]:
    """What is compiled for named GPUs: the default shape, B=32, L=1024, D=1024."""
    from ..builds import Build

    result = []
    for name, dtype, pairs, constant, reset in (
        ("real fp32, reset", "*fp32", False, False, "*u8"),
        ("real bf16, reset", "*bf16", False, False, "*u8"),
        ("complex fp32", "*fp32", True, False, None),
        ("complex fp32, constant factors, reset", "*fp32", True, True, "*u8"),
    ):
        width = 2048 if pairs else 1024
        a_strides = (0, 0) if constant else (1024 * width, width)
        common = {"a_ptr": dtype, "state_ptr": None, "reset_ptr": reset, "length": 1024, "width": width}
        common |= dict(zip(("a_lane", "a_step"), a_strides, strict=True))
        common |= {"reset_lane": 1024, "reset_step": 1, "numbers": 32 * width}
        common |= {"PAIRS": pairs, "CONSTANT": constant, "NARROW": False, "h_ptr": dtype}
        forward = common | {"last_ptr": "*fp32", "b_ptr": dtype, "b_lane": 1024 * width, "b_step": width}
        grads = {"grad_ptr": dtype, "grad_lane": 1024 * width, "grad_step": width, "grad_last_ptr": "*fp32"}
        grads |= {"grad_a_ptr": "*fp32" if constant else dtype, "grad_b_ptr": dtype, "grad_state_ptr": "*fp32"}
        result.append(Build(f"linear_scan {name}, forward", scan_kernel, forward))
        result.append(Build(f"linear_scan {name}, backward", scan_backward_kernel, common | grads))
    return result
