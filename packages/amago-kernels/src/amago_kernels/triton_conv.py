"""Triton kernels of the causal convolution: a window, its gradients, and a timestep.

A program has one lane, some timesteps and some channels; neighbouring threads have neighbouring channels. Taps are
read again for every timestep they reach, from the first-level cache.

Dimensions: `B` batch, `L` timesteps, `D` channels, `W` taps, `P` blocks of timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import bucket, config, on_device, tuned

if TYPE_CHECKING:
    from .builds import Build

# Timesteps of a program of the backward pass.
_BACKWARD_STEPS = 64


@triton.jit
def _inputs(x, state, rows, columns, x_row, TAPS: tl.constexpr, mask):
    """Timesteps `rows` `[T, 1]` of a lane, which are `state` `[D, W - 1]` before the first one."""
    inputs = tl.load(x + rows * x_row + columns, mask=mask & (rows >= 0), other=0.0).to(tl.float32)
    if state is not None:
        before = mask & (rows < 0) & (rows >= 1 - TAPS)
        inputs += tl.load(state + columns * (TAPS - 1) + (rows + (TAPS - 1)), mask=before, other=0.0).to(tl.float32)
    return inputs


@triton.jit
def _tap(weight, columns, back: tl.constexpr, TAPS: tl.constexpr, exists):
    """The weights of inputs that are `back` timesteps old."""
    return tl.load(weight + columns * TAPS + (TAPS - 1 - back), mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _convolve(x, state, weight, bias, reset, rows, columns, x_row, length, TAPS: tl.constexpr, mask, exists):
    """What comes before the activation `[T, D]` at those timesteps `rows` that are in `mask`."""
    out = _tap(weight, columns, 0, TAPS, exists) * _inputs(x, state, rows, columns, x_row, TAPS, mask)
    if bias is not None:
        out += tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)
    reached = mask
    for back in tl.static_range(1, TAPS):
        if reset is not None:
            reached = reached & _goes_on(reset, rows - (back - 1), length)
        out += _tap(weight, columns, back, TAPS, exists) * _inputs(x, state, rows - back, columns, x_row, TAPS, reached)
    return out


@triton.jit
def _goes_on(reset, rows, length):
    """Where there is no reset at `rows`, which may lie outside of the window."""
    return tl.load(reset + rows, mask=(rows >= 0) & (rows < length), other=0) == 0


@tuned(
    [config(4, STEPS=16, CHANNELS=128), config(4, STEPS=32, CHANNELS=64), config(8, STEPS=32, CHANNELS=128)],
    key=("channels", "crowd"),
)
@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    state,
    reset,
    y,
    last,
    length,
    channels,
    crowd,
    x_batch,
    x_row,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """`y` `[B, L, D]` and the last inputs `[B, D, W - 1]`."""
    blocks, parts = tl.cdiv(channels, CHANNELS), tl.cdiv(length, STEPS)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    begin, batch = rest % parts * STEPS, (rest // parts).to(tl.int64)
    rows = begin + tl.arange(0, STEPS)[:, None]
    columns = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    exists = columns < channels
    x += batch * x_batch
    if state is not None:
        state += batch * channels * (TAPS - 1)
    if reset is not None:
        reset += batch * length
    mask = (rows < length) & exists
    out = _convolve(x, state, weight, bias, reset, rows, columns, x_row, length, TAPS, mask, exists)
    if SILU:
        out = out / (1.0 + tl.exp(-out))
    tl.store(y + batch * length * channels + rows * channels + columns, out.to(y.dtype.element_ty), mask=mask)
    if TAPS > 1:
        if begin + STEPS >= length:
            place = tl.arange(0, 4)[:, None]
            ends = length - (TAPS - 1) + place
            kept = (place < TAPS - 1) & exists
            reached = kept
            if reset is not None:
                for later in tl.static_range(1, TAPS - 1):
                    reached = reached & _goes_on(reset, ends + later, length)
            values = _inputs(x, state, ends, columns, x_row, TAPS, reached)
            tl.store(last + batch * channels * (TAPS - 1) + columns * (TAPS - 1) + place, values, mask=kept)


@tuned([config(4, CHANNELS=32), config(8, CHANNELS=32), config(8, CHANNELS=64)], key=("channels", "crowd"))
@triton.jit
def backward_kernel(
    x,
    weight,
    bias,
    state,
    reset,
    grad_y,
    grad_last,
    grad_x,
    grad_weight,
    grad_state,
    length,
    channels,
    crowd,
    x_batch,
    x_row,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradients of the inputs, those of `state` included, and of taps and bias as parts `[B, P, W + 1, D]`."""
    # Rows begin before the window where there is a state.
    first = 0 if state is None else 1 - TAPS
    blocks, parts = tl.cdiv(channels, CHANNELS), tl.cdiv(length - first, STEPS)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    part, batch = rest % parts, (rest // parts).to(tl.int64)
    rows = first + part * STEPS + tl.arange(0, STEPS)[:, None]
    columns = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    exists = columns < channels
    mask = (rows < length) & exists
    x += batch * x_batch
    if state is not None:
        state += batch * channels * (TAPS - 1)
    if reset is not None:
        reset += batch * length
    lane = batch * length * channels
    grad_weight += (batch * parts + part) * (TAPS + 1) * channels
    inputs = _inputs(x, state, rows, columns, x_row, TAPS, mask)
    reached = mask
    total = tl.zeros([STEPS, CHANNELS], tl.float32)
    for ahead in tl.static_range(0, TAPS):
        at = rows + ahead
        if reset is not None and ahead > 0:
            reached = reached & _goes_on(reset, at, length)
        live = reached & (at >= 0) & (at < length)
        slope = tl.load(grad_y + lane + at * channels + columns, mask=live, other=0.0).to(tl.float32)
        if SILU:
            before = _convolve(x, state, weight, bias, reset, at, columns, x_row, length, TAPS, live, exists)
            share = 1.0 / (1.0 + tl.exp(-before))
            slope *= share * (1.0 + before * (1.0 - share))
        slope = tl.where(live, slope, 0.0)
        total += _tap(weight, columns, ahead, TAPS, exists) * slope
        # Not left to the zeros in `slope`: what a reset drops may be NaN.
        shares = tl.sum(tl.where(live, inputs * slope, 0.0), axis=0)[None, :]
        tl.store(grad_weight + (TAPS - 1 - ahead) * channels + columns, shares, mask=exists)
        if ahead == 0:
            tl.store(grad_weight + TAPS * channels + columns, tl.sum(slope, axis=0)[None, :], mask=exists)
    if grad_last is not None:
        place = rows - (length - (TAPS - 1))
        kept = reached & (place >= 0)
        total += tl.load(grad_last + batch * channels * (TAPS - 1) + columns * (TAPS - 1) + place, mask=kept, other=0.0)
    inside = mask & (rows >= 0)
    tl.store(grad_x + lane + rows * channels + columns, total.to(grad_x.dtype.element_ty), mask=inside)
    if state is not None:
        place = rows + (TAPS - 1)
        tl.store(
            grad_state + batch * channels * (TAPS - 1) + columns * (TAPS - 1) + place, total, mask=mask & (rows < 0)
        )


@tuned([config(1, CHANNELS=64), config(4, CHANNELS=256)], key=("channels",), restore=("state",))
@triton.jit
def step_kernel(
    x,
    weight,
    bias,
    state,
    y,
    channels,
    x_batch,
    state_batch,
    state_channel,
    state_tap,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Writes `y` `[B, D]` and moves the inputs `[B, D, W - 1]` that came before on by one, in place."""
    blocks = tl.cdiv(channels, CHANNELS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    exists = columns < channels
    state += batch * state_batch + columns * state_channel
    now = tl.load(x + batch * x_batch + columns, mask=exists, other=0.0).to(tl.float32)
    out = _tap(weight, columns, 0, TAPS, exists) * now
    if bias is not None:
        out += tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)
    for place in tl.static_range(0, TAPS - 1):
        earlier = tl.load(state + place * state_tap, mask=exists, other=0.0).to(tl.float32)
        out += _tap(weight, columns, TAPS - 1 - place, TAPS, exists) * earlier
    for place in tl.static_range(0, TAPS - 1):
        if place + 2 < TAPS:
            moved = tl.load(state + (place + 1) * state_tap, mask=exists, other=0.0)
        else:
            moved = now.to(state.dtype.element_ty)
        # A thread may store what another one has yet to read.
        tl.debug_barrier()
        tl.store(state + place * state_tap, moved, mask=exists)
    if SILU:
        out = out / (1.0 + tl.exp(-out))
    tl.store(y + batch * channels + columns, out.to(y.dtype.element_ty), mask=exists)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
    y: Tensor,
    last: Tensor,
) -> None:
    """Launches the forward kernel.

    Args:
        x: `[B, L, D]`.
        weight: `[D, W]`.
        bias: `[D]` or None.
        state: `[B, D, W - 1]` or None.
        reset: `[B, L]` bool or None.
        silu: apply silu to the output.
        y: `[B, L, D]`, filled.
        last: `[B, D, W - 1]`, filled.
    """
    batch, length, channels = x.shape
    inputs = _arguments(x, weight, bias, state, reset)

    def grid(meta: Mapping[str, Any]) -> tuple[int]:
        return (batch * triton.cdiv(length, meta["STEPS"]) * triton.cdiv(channels, meta["CHANNELS"]),)

    with on_device(x):
        forward_kernel[grid](
            *inputs,
            y,
            last,
            length,
            channels,
            bucket(batch * length),
            *inputs[0].stride()[:2],
            SILU=silu,
            TAPS=weight.shape[1],
        )


def backward(
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the backward kernel, and adds up what lanes and timesteps share.

    Args:
        grad_y: `[B, L, D]` or None.
        grad_last: `[B, D, W - 1]` or None.
        x: this and what follows as in `forward`.
        weight: see `x`.
        bias: see `x`.
        state: see `x`.
        reset: see `x`.
        silu: see `x`.

    Returns:
        The gradients of `x`, `weight`, `bias` and `state`; without numbers for what is not there.
    """
    (batch, length, channels), taps = x.shape, weight.shape[1]
    inputs = _arguments(x, weight, bias, state, reset)
    rows = length if inputs[3] is None else length + taps - 1
    grad_x = x.new_empty(x.shape)
    grad_state = None if inputs[3] is None else torch.empty(inputs[3].shape, dtype=torch.float32, device=x.device)
    blocks = batch * triton.cdiv(rows, _BACKWARD_STEPS)
    parts = torch.empty(blocks, taps + 1, channels, dtype=torch.float32, device=x.device)
    with on_device(x):
        backward_kernel[lambda meta: (blocks * triton.cdiv(channels, meta["CHANNELS"]),)](
            *inputs,
            torch.zeros_like(x) if grad_y is None else grad_y.contiguous(),
            None if grad_last is None or taps == 1 else grad_last.contiguous(),
            grad_x,
            parts,
            grad_state,
            length,
            channels,
            bucket(batch * length),
            *inputs[0].stride()[:2],
            SILU=silu,
            TAPS=taps,
            STEPS=_BACKWARD_STEPS,
        )
    total, nothing = parts.sum(0), x.new_empty(0)
    grad_bias = nothing if bias is None else total[taps].to(bias.dtype, copy=True)
    grad_weight = total[:taps].t().contiguous().to(weight.dtype)
    if state is None:
        return grad_x, grad_weight, grad_bias, nothing.clone()
    return grad_x, grad_weight, grad_bias, torch.empty_like(state) if grad_state is None else grad_state.to(state.dtype)


def step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    """Launches the kernel of one timestep.

    Args:
        x: `[B, D]`.
        weight: `[D, W]`.
        bias: `[D]` or None.
        state: `[B, D, W - 1]`, updated in place.
        silu: apply silu to the output.

    Returns:
        `y` `[B, D]` in the dtype of `x`.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    batch, channels = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    with on_device(x):
        step_kernel[lambda meta: (batch * triton.cdiv(channels, meta["CHANNELS"]),)](
            x,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            state,
            y,
            channels,
            x.stride(0),
            *state.stride(),
            SILU=silu,
            TAPS=weight.shape[1],
        )
    return y


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What both kernels begin with."""
    return (
        x if x.stride(-1) == 1 else x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if state is None or state.shape[-1] == 0 else state.contiguous(),
        None if reset is None else reset.contiguous().view(torch.uint8),
    )


def builds() -> list[Build]:
    """B=32, L=1024, D=512, W=4 with bias and silu; one timestep at D=512."""
    from .builds import Build

    channels, taps = 512, 4
    sizes: dict[str, Any] = {"length": 1024, "channels": channels, "crowd": 1 << 15, "SILU": True, "TAPS": taps}
    sizes |= {"x_batch": 1024 * channels, "x_row": channels, "STEPS": _BACKWARD_STEPS, "last": "*fp32"}
    sizes |= {"weight": "*fp32", "bias": "*fp32", "grad_weight": "*fp32"}
    single = {"state": "*fp32", "x_batch": channels, "state_batch": channels * (taps - 1)}
    single |= {"state_channel": taps - 1, "state_tap": 1}
    built = []
    for dtype, reset in (("bf16", None), ("bf16", "*u8"), ("fp32", "*u8")):
        given = sizes | {"reset": reset} | {name: f"*{dtype}" for name in ("x", "y", "grad_x", "grad_y")}
        variant = dtype + (", resets" if reset else "")
        built.append(Build(f"causal convolution, {variant}", forward_kernel, given))
        built.append(Build(f"causal convolution backward, {variant}", backward_kernel, given))
    built.append(
        Build("causal convolution, one timestep, bf16", step_kernel, sizes | single | {"x": "*bf16", "y": "*bf16"})
    )
    return built
