"""What a selective scan on the CPU does with a timestep of a state, and with a timestep before and after all states.

All that a timestep has is one row of scratch memory, all that a state has is another, and what channels have a third.
Columns of a row are constant distances apart: the compiler sees that they do not overlap, and fills vectors.

Dimensions: `W` channels of a part, `V` the same filled up with zeros to whole vectors.
"""

from __future__ import annotations

from ..numba_jit import jit
from ..numba_math import LOG2_E, exp2, sigmoid, softplus

# The most that `V` can be, and what divides it: a vector or two.
WIDTH = 128
_VECTOR = 16

# Columns of a timestep. The backward pass turns `U`, `DELTA` and `Z` into their gradients at last.
U, DELTA, Z, SIZE, SCALED, Y, GRAD_Y, GRAD, GRAD_SIZE, GRAD_SCALED, DECAY, BEFORE = (WIDTH * i for i in range(12))
TIMESTEP_COLUMNS = 12 * WIDTH
# Columns of a state.
RATE, EXPONENT, STATE, GRAD_STATE, GRAD_RATE = (WIDTH * i for i in range(5))
STATE_COLUMNS = 5 * WIDTH
# Columns of what channels have.
BIAS, SKIP, GRAD_BIAS, GRAD_SKIP = (WIDTH * i for i in range(4))
CHANNEL_COLUMNS = 4 * WIDTH


@jit(allocates=False, inlined=True)
def cut(channels):
    """How many parts there are, and the channels of each but the last."""
    parts = (channels + WIDTH - 1) // WIDTH
    return parts, filled_up((channels + parts - 1) // parts)


@jit(allocates=False, inlined=True)
def filled_up(channels):
    """`V`."""
    return (channels + _VECTOR - 1) // _VECTOR * _VECTOR


@jit(allocates=False, inlined=True)
def put(source, row, column, vectors):
    """Into a row, filled up."""
    for w in range(source.size):
        row[column + w] = source[w]
    for w in range(source.size, vectors):
        row[column + w] = row.dtype.type(0.0)


@jit(allocates=False, inlined=True)
def take(row, column, target):
    """Out of a row."""
    for w in range(target.size):
        target[w] = row[column + w]


@jit(allocates=False, inlined=True)
def clear(row, column, vectors):
    """Zeros."""
    for w in range(vectors):
        row[column + w] = row.dtype.type(0.0)


@jit(allocates=False, inlined=True)
def begin(states, channel, rates, skip, bias, before, column):
    """What a part of the channels has, and its states at one end of the window; no gradients yet."""
    states[:] = rates.dtype.type(0.0)
    channel[:] = rates.dtype.type(0.0)
    put(skip, channel, SKIP, skip.size)
    put(bias, channel, BIAS, bias.size)
    per_exp2 = rates.dtype.type(LOG2_E)
    for w in range(rates.shape[0]):
        for n in range(rates.shape[1]):
            states[n, RATE + w] = rates[w, n]
            states[n, EXPONENT + w] = rates[w, n] * per_exp2
            states[n, column + w] = before[w, n]


@jit(allocates=False, inlined=True)
def prepare(row, channel, vectors, soft):
    """From inputs to what every state needs."""
    for w in range(vectors):
        row[DELTA + w] += channel[BIAS + w]
        row[SIZE + w] = row[DELTA + w]
        row[Y + w] = row.dtype.type(0.0)
    if soft:
        for w in range(vectors):
            row[SIZE + w] = softplus(row[DELTA + w])
    for w in range(vectors):
        row[SCALED + w] = row[SIZE + w] * row[U + w]


@jit(allocates=False, inlined=True)
def advance(row, state, vectors, b, c):
    """A timestep of a state."""
    for w in range(vectors):
        h = exp2(row[SIZE + w] * state[EXPONENT + w]) * state[STATE + w] + row[SCALED + w] * b
        state[STATE + w] = h
        row[Y + w] += c * h


@jit(allocates=False, inlined=True)
def finish(row, channel, vectors, skips, gated):
    """From the sum over states to the output."""
    if skips:
        for w in range(vectors):
            row[Y + w] += channel[SKIP + w] * row[U + w]
    if gated:
        for w in range(vectors):
            row[Y + w] *= row[Z + w] * sigmoid(row[Z + w])


@jit(allocates=False, inlined=True)
def prepare_gradients(row, vectors, gated):
    """From the gradient of the output to that of the sum over states."""
    for w in range(vectors):
        row[GRAD + w] = row[GRAD_Y + w]
        row[GRAD_SIZE + w] = row.dtype.type(0.0)
        row[GRAD_SCALED + w] = row.dtype.type(0.0)
    if gated:
        for w in range(vectors):
            row[GRAD + w] *= row[Z + w] * sigmoid(row[Z + w])


@jit(sums=True, allocates=False, inlined=True)
def repeat(row, state, vectors, b, c):
    """`advance` that keeps the decay and the state before; returns the gradient of `C`."""
    total = row.dtype.type(0.0)
    for w in range(vectors):
        decay = exp2(row[SIZE + w] * state[EXPONENT + w])
        before = state[STATE + w]
        h = decay * before + row[SCALED + w] * b
        row[DECAY + w] = decay
        row[BEFORE + w] = before
        state[STATE + w] = h
        row[Y + w] += c * h
        total += h * row[GRAD + w]
    return total


@jit(sums=True, allocates=False, inlined=True)
def differentiate(row, state, vectors, b, c):
    """A timestep of a state backwards; returns the gradient of `B`."""
    total = row.dtype.type(0.0)
    for w in range(vectors):
        grad = state[GRAD_STATE + w] + c * row[GRAD + w]
        total += grad * row[SCALED + w]
        row[GRAD_SCALED + w] += grad * b
        grad *= row[DECAY + w]
        state[GRAD_STATE + w] = grad
        grad *= row[BEFORE + w]
        row[GRAD_SIZE + w] += grad * state[RATE + w]
        state[GRAD_RATE + w] += grad * row[SIZE + w]
    return total


@jit(allocates=False, inlined=True)
def finish_gradients(row, channel, vectors, soft, gated):
    """From what all states have added up to the gradients of inputs."""
    one = row.dtype.type(1.0)
    if gated:
        for w in range(vectors):
            open_ = sigmoid(row[Z + w])
            slope = open_ * (one + row[Z + w] * (one - open_))
            row[Z + w] = row[GRAD_Y + w] * (row[Y + w] + channel[SKIP + w] * row[U + w]) * slope
    if soft:
        for w in range(vectors):
            row[DELTA + w] = sigmoid(row[DELTA + w])
    else:
        for w in range(vectors):
            row[DELTA + w] = one
    for w in range(vectors):
        u = row[U + w]
        row[DELTA + w] *= row[GRAD_SIZE + w] + row[GRAD_SCALED + w] * u
        row[U + w] = row[GRAD_SCALED + w] * row[SIZE + w] + channel[SKIP + w] * row[GRAD + w]
        channel[GRAD_BIAS + w] += row[DELTA + w]
        channel[GRAD_SKIP + w] += row[GRAD + w] * u
