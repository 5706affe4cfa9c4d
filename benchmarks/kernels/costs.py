"""Bytes and FLOPs that an operation cannot do without, by formula.

Bytes: every input is read once and every output written once, whatever a kernel reads again or keeps for itself. The
backward pass reads the inputs, what the forward pass has put out and the gradient of that, as far as the formula of the
gradient names them, and writes the gradients of the inputs. FLOPs: an addition, a multiplication and an exponential
count 1 each; what a backward pass computes again counts, as far as every known algorithm does so.

Dimensions: `B` batch or lanes, `L` timesteps, `H` heads, `E` head size, `D` channels, `N` states or bins, `W` taps,
`G` discounts, `U` hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """Bytes that must move, and FLOPs."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def both(forward: Cost, backward: Cost) -> dict[str, Cost]:
    """The costs of every direction.

    Args:
        forward: of the forward pass.
        backward: of the backward pass.

    Returns:
        Direction to cost.
    """
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}


def visible_pairs(position: Tensor, window: int | None, sink: int) -> int:
    """Pairs of a query and a key that it sees, in causal attention.

    Args:
        position: `[B, L]` int64, timesteps since the segment of the query began.
        window: keys of age up to this are visible; None is all.
        sink: the first keys of a segment are visible too.

    Returns:
        Their number, for one head.
    """
    if window is None:
        return int((position + 1).sum())
    near = torch.minimum(position, torch.full_like(position, window)) + 1
    far = (position - window).clamp(0, sink)
    return int((near + far).sum())


def attention(batch: int, length: int, heads: int, size: int, item: int, pairs: int) -> dict[str, Cost]:
    """Two products per pair forward; backward the scores again and the gradients of two products, five in all.

    Args:
        batch: `B`.
        length: `L`.
        heads: `H`.
        size: `E`.
        item: bytes per number.
        pairs: visible pairs of all lanes, for one head.

    Returns:
        Direction to cost.
    """
    full = batch * length * heads * size * item
    products = 2 * heads * size * pairs
    return both(Cost(4 * full, 2 * products), Cost(8 * full, 5 * products))


def decode(visible: int, batch: int, heads: int, size: int, item: int) -> dict[str, Cost]:
    """The visible keys and values once; query, key, value and output of the timestep; key and value once more, stored.

    Args:
        visible: timesteps that lanes see, the present one included, summed over lanes.
        batch: `B`.
        heads: `H`.
        size: `E`.
        item: bytes per number.

    Returns:
        Direction to cost.
    """
    # The present key and value come from the arguments, not from the buffer.
    moved = 2 * (visible - batch) + 6 * batch
    return {"forward": Cost(moved * heads * size * item, 4 * visible * heads * size)}


def linear_scan(numbers: int, item: int) -> dict[str, Cost]:
    """Forward reads a and b and writes h; backward reads a, h and the gradient and writes two gradients.

    Args:
        numbers: `B L D`.
        item: bytes per number.

    Returns:
        Direction to cost.
    """
    return both(Cost(3 * numbers * item, 2 * numbers), Cost(5 * numbers * item, 3 * numbers))


def selective_scan(batch: int, length: int, channels: int, states: int, item: int) -> dict[str, Cost]:
    """With gates. Forward 7 FLOPs per state and timestep; backward the states again (5), and 11 for the gradients.

    Forward reads u, delta, z, B, C and writes y. Backward reads all of these but y, and its gradient; writes five.

    Args:
        batch: `B`.
        length: `L`.
        channels: `D`.
        states: `N`.
        item: bytes per number.

    Returns:
        Direction to cost.
    """
    wide, narrow = batch * length * channels, batch * length * states
    forward = Cost((4 * wide + 2 * narrow) * item, 7 * wide * states)
    backward = Cost((7 * wide + 4 * narrow) * item, 16 * wide * states)
    return both(forward, backward)


def conv(numbers: int, taps: int, item: int) -> dict[str, Cost]:
    """Forward reads x and writes y; backward reads x and the gradient and writes one.

    Args:
        numbers: `B L D`.
        taps: `W`.
        item: bytes per number.

    Returns:
        Direction to cost.
    """
    return both(Cost(2 * numbers * item, 2 * taps * numbers), Cost(3 * numbers * item, 4 * taps * numbers))


def returns(transitions: int, discounts: int, item: int, reads_values: bool) -> dict[str, Cost]:
    """Rewards and two masks per transition; values and targets per discount.

    Args:
        transitions: `B T`.
        discounts: `G`.
        item: bytes per number.
        reads_values: whether there are values to read.

    Returns:
        Direction to cost.
    """
    moved = transitions * (item + 2) + transitions * discounts * item * (2 if reads_values else 1)
    return {"forward": Cost(moved, (4 if reads_values else 2) * transitions * discounts)}


def value_loss(rows: int, targets: int, bins: int, item: int) -> dict[str, Cost]:
    """Forward reads logits and targets and writes a float32 loss; backward reads all and writes gradients of logits.

    Args:
        rows: predictions.
        targets: scalars, in float32.
        bins: `N`.
        item: bytes per logit.

    Returns:
        Direction to cost.
    """
    logits, scalars = rows * bins * item, 4 * (rows + targets)
    return both(Cost(logits + scalars, 3 * rows * bins), Cost(2 * logits + scalars, 4 * rows * bins))


def gru(batch: int, length: int, inputs: int, units: int, item: int) -> dict[str, Cost]:
    """Six products per timestep, three with inputs and three with states; backward twice as many.

    Args:
        batch: `B`.
        length: `L`.
        inputs: `D`.
        units: `U`.
        item: bytes per number.

    Returns:
        Direction to cost.
    """
    products = 6 * batch * length * units * (inputs + units)
    weights = 3 * units * (inputs + units)
    seen = batch * length * (inputs + units) + weights
    return both(Cost(seen * item, products), Cost(2 * seen * item, 2 * products))
