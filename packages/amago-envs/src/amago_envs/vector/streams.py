"""One random stream per lane, read for many lanes at once.

`N` is the number of lanes, `M` the number of lanes in one request, `K` the draws per lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.utils import seeding

IntArray = np.ndarray[Any, np.dtype[np.int64]]
FloatArray = np.ndarray[Any, np.dtype[np.float64]]


class LaneStreams:
    """Uniform draws in [0, 1) from one generator per lane, buffered so that reading them needs no loop over lanes.

    A lane hands out exactly the numbers that `generator.random()` called once per draw would give, in the same order,
    whatever the other lanes do. This is what makes lane `i` of a vector environment equal to a single environment.

    Args:
        num_lanes: number of lanes `N`, >= 1.
        largest_request: the largest `count` that `take` will be asked for, >= 1.
        seeds: seed of each lane, or None for seeds from the operating system.
    """

    def __init__(self, num_lanes: int, largest_request: int, seeds: Sequence[int | None] | None = None) -> None:
        self._size = max(64, 4 * largest_request)
        self._buffer: FloatArray = np.zeros((num_lanes, self._size))
        # A cursor at the end means an empty buffer: nothing is drawn before it is asked for.
        self._cursor: IntArray = np.full(num_lanes, self._size, dtype=np.int64)
        self._generators: list[np.random.Generator] = []
        self._seeds: list[int] = []
        for seed in seeds if seeds is not None else [None] * num_lanes:
            generator, used = seeding.np_random(seed)
            self._generators.append(generator)
            self._seeds.append(used)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed each lane started from."""
        return tuple(self._seeds)

    def reseed(self, lane: int, seed: int) -> None:
        """Start one lane's stream again.

        Args:
            lane: index of the lane.
            seed: its new seed, >= 0.
        """
        self._generators[lane], self._seeds[lane] = seeding.np_random(seed)
        self._cursor[lane] = self._size

    def take(self, lanes: IntArray, count: int) -> FloatArray:
        """Draw the next numbers of some lanes.

        Args:
            lanes: `[M]` distinct lane indices.
            count: draws per lane, `K`.

        Returns:
            `[M, K]` float64 in [0, 1).
        """
        start = self._cursor[lanes]
        if start.size and start.max() > self._size - count:
            for lane in lanes[start > self._size - count].tolist():
                self._refill(lane)
            start = self._cursor[lanes]
        self._cursor[lanes] = start + count
        draws: FloatArray = self._buffer[lanes[:, None], start[:, None] + np.arange(count)]
        return draws

    def take_one(self, lanes: IntArray) -> FloatArray:
        """Draw the next number of some lanes.

        Args:
            lanes: `[M]` distinct lane indices.

        Returns:
            `[M]` float64 in [0, 1).
        """
        start = self._cursor[lanes]
        if start.size and start.max() >= self._size:
            for lane in lanes[start >= self._size].tolist():
                self._refill(lane)
            start = self._cursor[lanes]
        self._cursor[lanes] = start + 1
        return self._buffer[lanes, start]

    def _refill(self, lane: int) -> None:
        row, used = self._buffer[lane], int(self._cursor[lane])
        row[: self._size - used] = row[used:].copy()
        row[self._size - used :] = self._generators[lane].random(used)
        self._cursor[lane] = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue every stream exactly.

        Returns:
            Dict of generator states (JSON-able), seeds, the numbers drawn ahead `[N, size]` and the cursors `[N]`.
        """
        return {
            "generators": [generator.bit_generator.state for generator in self._generators],
            "seeds": list(self._seeds),
            "buffer": self._buffer.copy(),
            "cursor": self._cursor.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state taken with `state_dict`.

        Args:
            state: what `state_dict` returned, from streams of the same shape; arrays may have become lists.

        Raises:
            ValueError: if the state is of another number of lanes or another buffer size.
        """
        buffer = np.asarray(state["buffer"], dtype=np.float64)
        if buffer.shape != self._buffer.shape:
            raise ValueError(f"state: buffer of shape {buffer.shape}, this one has {self._buffer.shape}")
        self._buffer = buffer.copy()
        self._cursor = np.array(state["cursor"], dtype=np.int64)
        self._seeds = [int(seed) for seed in state["seeds"]]
        self._generators = [generator_from_state(entry) for entry in state["generators"]]


def generator_from_state(state: dict[str, Any]) -> np.random.Generator:
    """Rebuild a generator from the state of its bit generator.

    Args:
        state: `generator.bit_generator.state` of a PCG64 generator.

    Returns:
        A generator that continues where the other one stood.

    Raises:
        ValueError: if the state is of another bit generator.
    """
    if state["bit_generator"] != "PCG64":
        raise ValueError(f"state: bit generator {state['bit_generator']!r}, allowed: 'PCG64'")
    bit_generator: Any = np.random.PCG64()
    bit_generator.state = state
    return np.random.Generator(bit_generator)
