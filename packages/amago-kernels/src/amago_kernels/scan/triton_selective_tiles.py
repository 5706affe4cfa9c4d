"""What the Triton kernels of the selective scan are made of.

A program has one lane and `CHANNELS` channels and goes through time tile by tile, `STEPS` timesteps each. Tiles are
`[T, R, Q, 4, 8]`: state `4 r + n` of channel `8 q + d`, so that the last two axes are the threads of a warp, and time
and the rest lie in registers. Taking a timestep out of a tile (`take_row`) or putting it in (`put_row`) is then free.

Dimensions: `B` batch, `L` timesteps, `D` channels, `N` states per channel, `K` chunks of timesteps, `P` blocks of
channels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def take_row(tile, rows, i: tl.constexpr):
    """Timestep `i` of a tile."""
    # Adding -0.0 changes nothing, so the compiler drops the sum; 0.0 it would have to add.
    nothing = tl.full([1, 1, 1, 1, 1], -2147483648, tl.int32).to(tl.float32, bitcast=True)
    return tl.sum(tl.where(rows == i, tile, nothing), axis=0)


@triton.jit
def put_row(tile, rows, i: tl.constexpr, row):
    """A tile with another timestep `i`."""
    return tl.where(rows == i, row[None, :, :, :, :], tile)


@triton.jit
def over_states(tile):
    """Sums `[T, R, Q, 4, 8]` over states: `[T, Q, 8]`."""
    return tl.sum(tl.sum(tile, axis=1), axis=2)


@triton.jit
def over_channels(tile, narrow):
    """Sums `[T, R, Q, 4, 8]` over channels: `[T, R, 4]`, zero where not `narrow`."""
    # Turned around and selected from, parts meet in the registers of one thread; sums across threads cost more.
    parts = tl.permute(tl.sum(tile, axis=2), (3, 0, 1, 2))
    return tl.sum(tl.where(narrow[None, :, :, :], parts, 0.0), axis=0)


@triton.jit
def softplus(x):
    """`max(x, 0) + log(1 + e)` with `e = exp(-|x|)`, which is `2 artanh(s)`: its series is right for small `e`, too."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    square = s * s
    series = 1.0 / 15.0 + square * (1.0 / 17.0)
    series = 1.0 / 11.0 + square * (1.0 / 13.0 + square * series)
    series = 1.0 / 7.0 + square * (1.0 / 9.0 + square * series)
    series = 1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * series))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def sigmoid(x):
    """`1 / (1 + exp(-x))`."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def load_wide(pointer, offsets, mask):
    """What is masked is zero."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_tile(pointer, at, stride, rows, columns, mask):
    """A tile as it lies in memory, beginning with timestep `at`."""
    return tl.load(pointer + at * stride + (rows * stride + columns), mask=mask, other=0.0)


@triton.jit
def beside_states(tile):
    """`[T, Q, 8]` beside all states."""
    return tile[:, None, :, None, :]


@triton.jit
def beside_channels(tile):
    """`[T, R, 4]` beside all channels."""
    return tile[:, :, None, :, None]


@triton.jit
def state_places(first, channels, states, STATES: tl.constexpr, CHANNELS: tl.constexpr):
    """Indices of channels and states `[R, Q, 4, 8]`, and which of them exist.

    The indices of channels are in bounds, and the compiler does not know that they are neighbours: it would deal
    states out to threads by the way they lie in memory.
    """
    n = 4 * tl.arange(0, STATES // 4)[:, None, None, None] + tl.arange(0, 4)[None, None, :, None]
    d = first + 8 * tl.arange(0, CHANNELS // 8)[None, :, None, None] + tl.arange(0, 8)[None, None, None, :]
    alive = (d < channels) & (n < states)
    return tl.minimum(d, channels - 1), n, alive


@triton.jit
def window_columns(first, channels, states, STATES: tl.constexpr, CHANNELS: tl.constexpr):
    """Indices of channels `[1, Q, 8]` and of states `[1, R, 4]`."""
    d = first + 8 * tl.arange(0, CHANNELS // 8)[None, :, None] + tl.arange(0, 8)[None, None, :]
    n = 4 * tl.arange(0, STATES // 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    return d, n
