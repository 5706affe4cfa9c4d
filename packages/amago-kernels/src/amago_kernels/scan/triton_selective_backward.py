"""The Triton kernel of the gradients of the selective scan, and how it is launched.

Dimensions: `B` batch, `L` timesteps, `D` channels, `N` states per channel, `K` chunks of timesteps, `P` blocks of
channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import bucket, config, on_device, tuned
from .selective_ops import CHUNK
from .triton_selective import KEY, NARROW, as_bytes, contiguous, padded_states, window_inputs, window_strides
from .triton_selective_tiles import (
    beside_channels,
    beside_states,
    load_tile,
    load_wide,
    over_channels,
    over_states,
    put_row,
    sigmoid,
    softplus,
    state_places,
    take_row,
    window_columns,
)

# States that one thread of a warp has.
NUMBERS = 8
SMALLEST_TILE = 2


@triton.jit
def backward_kernel(
    u,
    delta,
    A,
    B,
    C,
    skip,
    z,
    bias,
    reset,
    grad_y,
    grad_last,
    starts,
    scratch,
    grad_u,
    grad_delta,
    grad_A,
    grad_B,
    grad_C,
    grad_skip,
    grad_z,
    grad_bias,
    grad_state,
    lanes,
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
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """All gradients, from the last chunk to the first; what lanes or channels share as parts that are added later.

    Within a chunk time is gone through twice: forward, to leave the state before every tile in `scratch`, and back.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    first = block * CHANNELS
    d, n, alive = state_places(first, channels, states, STATES, CHANNELS)
    columns, maps = window_columns(first, channels, states, STATES, CHANNELS)
    rows = tl.arange(0, STEPS)[:, None, None]
    rows5 = tl.arange(0, STEPS)[:, None, None, None, None]
    rates = tl.load(A + d * states + n, mask=alive, other=0.0).to(tl.float32)[None, :, :, :, :] * 1.4426950408889634
    own = batch * channels * states
    if grad_last is not None:
        carry = tl.load(grad_last + own + (d * states + n), mask=alive, other=0.0).to(tl.float32)
    else:
        carry = tl.zeros([STATES // 4, CHANNELS // 8, 4, 8], tl.float32)
    sum_A = tl.zeros([STATES // 4, CHANNELS // 8, 4, 8], tl.float32)
    sum_skip = tl.zeros([CHANNELS // 8, 8], tl.float32)
    sum_bias = tl.zeros([CHANNELS // 8, 8], tl.float32)
    u += batch * u_batch
    delta += batch * delta_batch
    B += batch * B_batch
    C += batch * C_batch
    if z is not None:
        z += batch * z_batch
        grad_z += batch * length * channels
    if reset is not None:
        reset += batch * length
    grad_y += batch * length * channels
    grad_u += batch * length * channels
    grad_delta += batch * length * channels
    grad_B += (block * lanes + batch) * length * states
    grad_C += (block * lanes + batch) * length * states
    chunks = tl.cdiv(length, CHUNK)
    starts += own * chunks
    scratch += own * (CHUNK // STEPS)
    place = n * channels + d
    exists = columns < channels
    if bias is not None:
        shift = load_wide(bias, columns, exists)
    if skip is not None:
        through = load_wide(skip, columns, exists)
    for reverse_chunk in range(0, chunks):
        chunk = chunks - 1 - reverse_chunk
        begin = chunk * CHUNK
        tiles = tl.cdiv(tl.minimum(length - begin, CHUNK), STEPS)
        h = tl.load(starts + tl.cast(chunk, tl.int64) * states * channels + place, mask=alive, other=0.0)
        # The states of the chunk that comes after have been read by all threads.
        tl.debug_barrier()
        tl.store(scratch + place, h, mask=alive)
        at = tl.cast(begin, tl.int64)
        # Only the last tile of a window can be short, and its states are not needed.
        wide = (rows < (tiles - 1) * STEPS) & exists
        narrow = (rows < (tiles - 1) * STEPS) & (maps < states)
        next_u = load_tile(u, at, u_row, rows, columns, wide)
        next_delta = load_tile(delta, at, delta_row, rows, columns, wide)
        next_B = load_tile(B, at, B_row, rows, maps, narrow)
        if reset is not None:
            next_reset = tl.load(reset + at + rows5, mask=rows5 < (tiles - 1) * STEPS, other=0)
        for tile in range(0, tiles - 1):
            inputs = next_u.to(tl.float32)
            steps = next_delta.to(tl.float32)
            maps_in = next_B.to(tl.float32)
            at = tl.cast(begin + (tile + 1) * STEPS, tl.int64)
            wide = (rows < (tiles - 2 - tile) * STEPS) & exists
            narrow = (rows < (tiles - 2 - tile) * STEPS) & (maps < states)
            next_u = load_tile(u, at, u_row, rows, columns, wide)
            next_delta = load_tile(delta, at, delta_row, rows, columns, wide)
            next_B = load_tile(B, at, B_row, rows, maps, narrow)
            if bias is not None:
                steps += shift
            if SOFTPLUS:
                steps = softplus(steps)
            decay = tl.exp2(beside_states(steps) * rates)
            terms = beside_states(steps * inputs) * beside_channels(maps_in)
            if reset is not None:
                fresh = tl.broadcast_to(next_reset.to(tl.float32), decay.shape)
                next_reset = tl.load(reset + at + rows5, mask=rows5 < (tiles - 2 - tile) * STEPS, other=0)
            for i in tl.static_range(STEPS):
                if reset is not None:
                    h = tl.where(take_row(fresh, rows5, i) != 0.0, 0.0, h)
                h = take_row(decay, rows5, i) * h + take_row(terms, rows5, i)
            tl.store(scratch + (tile + 1) * states * channels + place, h, mask=alive)
        tl.debug_barrier()
        at = tl.cast(begin + (tiles - 1) * STEPS, tl.int64)
        wide = (rows < length - at) & exists
        narrow = (rows < length - at) & (maps < states)
        next_u = load_tile(u, at, u_row, rows, columns, wide)
        next_delta = load_tile(delta, at, delta_row, rows, columns, wide)
        next_B = load_tile(B, at, B_row, rows, maps, narrow)
        next_C = load_tile(C, at, C_row, rows, maps, narrow)
        next_dy = load_tile(grad_y, at, channels, rows, columns, wide)
        if z is not None:
            next_z = load_tile(z, at, z_row, rows, columns, wide)
        if reset is not None:
            next_reset = tl.load(reset + at + rows5, mask=rows5 < length - at, other=0)
        for reverse_tile in range(0, tiles):
            tile = tiles - 1 - reverse_tile
            h = tl.load(scratch + tile * states * channels + place, mask=alive, other=0.0)
            at = tl.cast(begin + tile * STEPS, tl.int64)
            now = wide
            maps_now = narrow
            inputs = next_u.to(tl.float32)
            steps = next_delta.to(tl.float32)
            maps_in = next_B.to(tl.float32)
            maps_out = next_C.to(tl.float32)
            dy = next_dy.to(tl.float32)
            before = at - STEPS
            wide = (tile > 0) & exists & (rows >= 0)
            narrow = (tile > 0) & (maps < states) & (rows >= 0)
            next_u = load_tile(u, before, u_row, rows, columns, wide)
            next_delta = load_tile(delta, before, delta_row, rows, columns, wide)
            next_B = load_tile(B, before, B_row, rows, maps, narrow)
            next_C = load_tile(C, before, C_row, rows, maps, narrow)
            next_dy = load_tile(grad_y, before, channels, rows, columns, wide)
            offsets = rows * channels + columns
            if z is not None:
                gate = next_z.to(tl.float32)
                next_z = load_tile(z, before, z_row, rows, columns, wide)
                share = sigmoid(gate)
                slope_z = dy * share * (1.0 + gate * (1.0 - share))
                dy *= gate * share
            if bias is not None:
                steps += shift
            if SOFTPLUS:
                slope = sigmoid(steps)
                steps = softplus(steps)
            # Past the last timestep nothing moves.
            steps = tl.where(now, steps, 0.0)
            decay = tl.exp2(beside_states(steps) * rates)
            terms = beside_states(steps * inputs) * beside_channels(maps_in)
            if reset is not None:
                fresh = tl.broadcast_to(next_reset.to(tl.float32), decay.shape)
                next_reset = tl.load(reset + before + rows5, mask=(tile > 0) & (rows5 >= 0), other=0)
            # What states keep of the ones before them.
            kept = terms
            for i in tl.static_range(STEPS):
                if reset is not None:
                    h = tl.where(take_row(fresh, rows5, i) != 0.0, 0.0, h)
                h = take_row(decay, rows5, i) * h
                kept = put_row(kept, rows5, i, h)
                h += take_row(terms, rows5, i)
            every = kept + terms
            part = over_channels(every * beside_states(dy), maps_now)
            tl.store(grad_C + at * states + (rows * states + maps), part, mask=maps_now)
            if z is not None:
                out = over_states(every * beside_channels(maps_out))
                if skip is not None:
                    out += through * inputs
                gated = (slope_z * out).to(grad_z.dtype.element_ty)
                tl.store(grad_z + at * channels + offsets, gated, mask=now)
            direct = beside_channels(maps_out) * beside_states(dy)
            grads = direct
            for i in tl.static_range(STEPS - 1, -1, -1):
                carry += take_row(direct, rows5, i)
                grads = put_row(grads, rows5, i, carry)
                carry *= take_row(decay, rows5, i)
                if reset is not None:
                    carry = tl.where(take_row(fresh, rows5, i) != 0.0, 0.0, carry)
            part = over_channels(grads * beside_states(steps * inputs), maps_now)
            tl.store(grad_B + at * states + (rows * states + maps), part, mask=maps_now)
            product = over_states(grads * beside_channels(maps_in))
            exponents = grads * kept
            sum_A += tl.sum(exponents * beside_states(steps), axis=0)
            dsteps = over_states(exponents * rates) * 0.6931471805599453 + product * inputs
            if SOFTPLUS:
                dsteps *= slope
            dinputs = product * steps
            if skip is not None:
                dinputs += through * dy
                sum_skip += tl.sum(dy * inputs, axis=0)
            if bias is not None:
                sum_bias += tl.sum(tl.where(now, dsteps, 0.0), axis=0)
            tl.store(grad_delta + at * channels + offsets, dsteps.to(grad_delta.dtype.element_ty), mask=now)
            tl.store(grad_u + at * channels + offsets, dinputs.to(grad_u.dtype.element_ty), mask=now)
    tl.store(grad_A + own + place, sum_A, mask=alive)
    if grad_state is not None:
        tl.store(grad_state + own + place, carry, mask=alive)
    ends = batch * channels + columns
    if skip is not None:
        tl.store(grad_skip + ends, sum_skip[None, :, :], mask=exists)
    if bias is not None:
        tl.store(grad_bias + ends, sum_bias[None, :, :], mask=exists)


# For few and for many states per channel.
BACKWARD = tuple(
    tuned(configs, key=KEY)(backward_kernel)
    for configs in ([config(1, STEPS=2), config(1, STEPS=4)], [config(8, STEPS=2), config(4, STEPS=2)])
)


def backward(
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    reset: Tensor | None,
    softplus: bool,
    from_state: bool,
) -> tuple[Tensor | None, ...]:
    """Launches the backward kernel, and adds up what lanes or blocks of channels share.

    Args:
        grad_y: `[B, L, D]` or None.
        grad_last: `[B, D, N]` or None.
        starts: the states that `forward` left behind.
        u: this and what follows as in `forward`.
        delta: see `u`.
        A: see `u`.
        B: see `u`.
        C: see `u`.
        D: see `u`.
        z: see `u`.
        delta_bias: see `u`.
        reset: see `u`.
        softplus: see `u`.
        from_state: the initial state needs a gradient.

    Returns:
        The gradients of everything from `u` to `delta_bias`, and of the initial state; None for what is not there.
    """
    batch, length, channels = u.shape
    padded, states = padded_states(A), A.shape[1]
    width = min(max(8, 32 * NUMBERS // padded), 16)
    blocks = triton.cdiv(channels, width)

    def parts(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    grad_u, grad_delta = u.new_empty(u.shape), delta.new_empty(u.shape)
    grad_z = None if z is None else z.new_empty(u.shape)
    parts_A, parts_B, parts_C = parts(batch, states, channels), *parts(2, blocks, batch, length, states).unbind(0)
    parts_D, parts_bias = parts(batch, channels), parts(batch, channels)
    grad_state = parts(batch, states, channels) if from_state else None
    inputs = window_inputs(u, delta, A, B, C, D, z, delta_bias)
    with on_device(u):
        BACKWARD[padded > NARROW][(batch * blocks,)](
            *inputs,
            as_bytes(reset),
            torch.zeros_like(u) if grad_y is None else grad_y.contiguous(),
            contiguous(grad_last),
            starts,
            parts(batch, CHUNK // SMALLEST_TILE, states, channels),
            grad_u,
            grad_delta,
            parts_A,
            parts_B,
            parts_C,
            parts_D,
            grad_z,
            parts_bias,
            grad_state,
            batch,
            length,
            channels,
            bucket(batch * channels),
            *window_strides(inputs),
            SOFTPLUS=softplus,
            states=states,
            STATES=padded,
            CHUNK=CHUNK,
            CHANNELS=width,
        )
    return (
        grad_u,
        grad_delta,
        parts_A.sum(0).t().contiguous().to(A.dtype),
        parts_B.sum(0).to(B.dtype),
        parts_C.sum(0).to(C.dtype),
        None if D is None else parts_D.sum(0).to(D.dtype),
        grad_z,
        None if delta_bias is None else parts_bias.sum(0).to(delta_bias.dtype),
        None if grad_state is None else grad_state.transpose(1, 2).contiguous(),
    )
