"""The Triton kernel of the selective scan over windows, and how it is launched.

Dimensions: `B` batch, `L` timesteps, `D` channels, `N` states per channel, `K` chunks of timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import bucket, config, on_device, tuned
from .selective_ops import CHUNK
from .triton_selective_tiles import (
    beside_channels,
    beside_states,
    load_tile,
    load_wide,
    over_states,
    put_row,
    sigmoid,
    softplus,
    state_places,
    take_row,
    window_columns,
)

if TYPE_CHECKING:
    from ..builds import Build

KEY = ("states", "crowd")
# From more padded states per channel on, several warps share them.
NARROW = 32


@triton.jit
def forward_kernel(
    u,
    delta,
    A,
    B,
    C,
    skip,
    z,
    bias,
    state,
    reset,
    y,
    last,
    starts,
    length,
    channels,
    crowd,
    u_batch,
    u_row,
    delta_batch,
    delta_row,
    B_batch,
    B_row,
    C_batch,
    C_row,
    z_batch,
    z_row,
    SOFTPLUS: tl.constexpr,
    states: tl.constexpr,
    STATES: tl.constexpr,
    CHUNK: tl.constexpr,
    NUMBERS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """`y` `[B, L, D]`, the last state `[B, D, N]`, and the states `[B, K, N, D]` before each chunk of `CHUNK`."""
    CHANNELS: tl.constexpr = 8 if 4 * NUMBERS < STATES else 32 if NUMBERS > STATES else 32 * NUMBERS // STATES
    blocks = tl.cdiv(channels, CHANNELS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * CHANNELS
    d, n, alive = state_places(first, channels, states, STATES, CHANNELS)
    columns, maps = window_columns(first, channels, states, STATES, CHANNELS)
    rows = tl.arange(0, STEPS)[:, None, None]
    rows5 = tl.arange(0, STEPS)[:, None, None, None, None]
    # The powers of two are what the device computes.
    rates = tl.load(A + d * states + n, mask=alive, other=0.0).to(tl.float32)[None, :, :, :, :] * 1.4426950408889634
    own = batch * channels * states + d * states + n
    if state is not None:
        h = tl.load(state + own, mask=alive, other=0.0).to(tl.float32)
    else:
        h = tl.zeros([STATES // 4, CHANNELS // 8, 4, 8], tl.float32)
    u += batch * u_batch
    delta += batch * delta_batch
    B += batch * B_batch
    C += batch * C_batch
    y += batch * length * channels
    exists = columns < channels
    wide = (rows < length) & exists
    narrow = (rows < length) & (maps < states)
    at = batch * 0
    next_u = load_tile(u, at, u_row, rows, columns, wide)
    next_delta = load_tile(delta, at, delta_row, rows, columns, wide)
    next_B = load_tile(B, at, B_row, rows, maps, narrow)
    next_C = load_tile(C, at, C_row, rows, maps, narrow)
    if starts is not None:
        starts += batch * tl.cdiv(length, CHUNK) * states * channels
    if skip is not None:
        through = load_wide(skip, columns, exists)
    if bias is not None:
        shift = load_wide(bias, columns, exists)
    if z is not None:
        z += batch * z_batch
        next_z = load_tile(z, at, z_row, rows, columns, wide)
    if reset is not None:
        reset += batch * length
        next_reset = tl.load(reset + rows5, mask=rows5 < length, other=0)
    for start in range(0, length, STEPS):
        if starts is not None:
            if start % CHUNK == 0:
                kept = starts + tl.cast(start // CHUNK, tl.int64) * states * channels
                tl.store(kept + n * channels + d, h, mask=alive)
        inputs = next_u.to(tl.float32)
        steps = next_delta.to(tl.float32)
        maps_in = next_B.to(tl.float32)
        maps_out = next_C.to(tl.float32)
        now = wide
        # The next tile is on its way while this one is computed.
        at = tl.cast(start + STEPS, tl.int64)
        wide = (rows < length - start - STEPS) & exists
        narrow = (rows < length - start - STEPS) & (maps < states)
        next_u = load_tile(u, at, u_row, rows, columns, wide)
        next_delta = load_tile(delta, at, delta_row, rows, columns, wide)
        next_B = load_tile(B, at, B_row, rows, maps, narrow)
        next_C = load_tile(C, at, C_row, rows, maps, narrow)
        if z is not None:
            gate = next_z.to(tl.float32)
            next_z = load_tile(z, at, z_row, rows, columns, wide)
        if bias is not None:
            steps += shift
        if SOFTPLUS:
            steps = softplus(steps)
        # Past the last timestep nothing moves.
        steps = tl.where(now, steps, 0.0)
        decay = tl.exp2(beside_states(steps) * rates)
        terms = beside_states(steps * inputs) * beside_channels(maps_in)
        if reset is not None:
            fresh = tl.broadcast_to(next_reset.to(tl.float32), decay.shape)
            next_reset = tl.load(reset + at + rows5, mask=rows5 < length - start - STEPS, other=0)
        tile = terms
        for i in tl.static_range(STEPS):
            if reset is not None:
                h = tl.where(take_row(fresh, rows5, i) != 0.0, 0.0, h)
            h = take_row(decay, rows5, i) * h + take_row(terms, rows5, i)
            tile = put_row(tile, rows5, i, h)
        out = over_states(tile * beside_channels(maps_out))
        if skip is not None:
            out += through * inputs
        if z is not None:
            out *= gate * sigmoid(gate)
        tl.store(y + (at - STEPS) * channels + (rows * channels + columns), out.to(y.dtype.element_ty), mask=now)
    tl.store(last + own, h, mask=alive)


# For few and for many states per channel.
_FORWARD = tuple(
    tuned(configs, key=KEY)(forward_kernel)
    for configs in (
        [
            config(1, STEPS=8, NUMBERS=8),
            config(1, STEPS=4, NUMBERS=16),
            config(1, STEPS=4, NUMBERS=8),
        ],
        [config(4, STEPS=2, NUMBERS=16), config(8, STEPS=2, NUMBERS=32)],
    )
)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    softplus: bool,
    y: Tensor,
    last: Tensor,
    starts: Tensor,
) -> None:
    """Launches the forward kernel.

    Args:
        u: `[B, L, D]`.
        delta: `[B, L, D]`.
        A: `[D, N]`.
        B: `[B, L, N]`.
        C: `[B, L, N]`.
        D: `[D]` or None.
        z: `[B, L, D]` or None.
        delta_bias: `[D]` or None.
        state: `[B, D, N]` or None.
        reset: `[B, L]` bool or None.
        softplus: apply softplus to the step sizes.
        y: `[B, L, D]`, filled.
        last: `[B, D, N]`, filled.
        starts: `[B, K, N, D]`, filled; `[B, 0, N, D]` if nobody wants it.
    """
    batch, length, channels = u.shape
    padded = padded_states(A)
    inputs = window_inputs(u, delta, A, B, C, D, z, delta_bias)

    def grid(meta: Mapping[str, Any]) -> tuple[int]:
        return (batch * triton.cdiv(channels, min(max(8, 32 * meta["NUMBERS"] // padded), 32)),)

    with on_device(u):
        _FORWARD[padded > NARROW][grid](
            *inputs,
            contiguous(state),
            as_bytes(reset),
            y,
            last,
            starts if starts.shape[1] > 0 else None,
            length,
            channels,
            bucket(batch * channels),
            *window_strides(inputs),
            SOFTPLUS=softplus,
            states=A.shape[1],
            STATES=padded,
            CHUNK=CHUNK,
        )


def padded_states(A: Tensor) -> int:
    """States per channel that the kernels compute with: a power of two, from 4 on."""
    return int(max(4, triton.next_power_of_2(A.shape[1])))


def window_inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """What the kernels begin with."""
    inputs = (_with_rows(u), _with_rows(delta), A.contiguous(), _with_rows(B), _with_rows(C))
    return *inputs, contiguous(D), None if z is None else _with_rows(z), contiguous(delta_bias)


def _with_rows(x: Tensor) -> Tensor:
    """The tensor itself if its last axis lies in one piece, as in parts of a wider tensor."""
    return x if x.stride(-1) == 1 else x.contiguous()


def window_strides(inputs: Sequence[Tensor | None]) -> list[int]:
    """Distances between lanes and between timesteps of `u`, `delta`, `B`, `C` and `z`."""
    windows = (inputs[place] for place in (0, 1, 3, 4, 6))
    return [0 if x is None else x.stride(dim) for x in windows for dim in (0, 1)]


def contiguous(x: Tensor | None) -> Tensor | None:
    """The tensor, or a copy of it, in one piece."""
    return None if x is None else x.contiguous()


def as_bytes(reset: Tensor | None) -> Tensor | None:
    """Resets as Triton reads them."""
    return None if reset is None else reset.contiguous().view(torch.uint8)


def builds() -> list[Build]:
    """B=32, L=1024, D=512, N=16: what a Mamba block calls, with and without resets."""
    from ..builds import Build
    from .triton_selective_backward import BACKWARD, NUMBERS

    batch, length, channels, states = 32, 1024, 512, 16
    sizes: dict[str, Any] = {"lanes": batch, "length": length, "channels": channels, "crowd": 1 << 14}
    for name, width in (("u", channels), ("delta", channels), ("z", channels), ("B", states), ("C", states)):
        sizes |= {f"{name}_batch": length * width, f"{name}_row": width}
    sizes |= {"SOFTPLUS": True, "states": states, "STATES": states, "CHUNK": CHUNK, "CHANNELS": 2 * NUMBERS}
    built = []
    for dtype, reset in (("bf16", None), ("bf16", "*u8"), ("fp32", "*u8")):
        arguments = sizes | {name: f"*{dtype}" for name in ("u", "delta", "B", "C", "z", "y", "grad_y")}
        arguments |= {f"grad_{name}": f"*{dtype}" for name in ("u", "delta", "z")}
        arguments |= {name: "*fp32" for name in ("A", "skip", "bias", "last", "starts", "scratch")}
        arguments |= {f"grad_{name}": "*fp32" for name in ("A", "B", "C", "skip", "bias")}
        variant = dtype + (", resets" if reset else "")
        built.append(Build(f"selective scan, {variant}", _FORWARD[0], arguments | {"reset": reset}))
        built.append(Build(f"selective scan backward, {variant}", BACKWARD[0], arguments | {"reset": reset}))
    return built
