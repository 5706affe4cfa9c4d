"""Which windows a batch holds, and how their arrays are gathered.

Everything is vectorised over the batch; the only loops run over the sources (segments) touched and over columns.
`B` batch, `L` timesteps, `T` transitions, `W` window length in transitions (`L = W + 1` in a batch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from amago_offline.schema import OBS_PREFIX, PREV_ACTION, PREV_REWARD, Field, Schema

PADDING_MODES = ("none", "left", "right", "both")
WEIGHTINGS = ("trajectory", "transition")
# Copies between sources go through a scratch of about this size, so that it stays in the processor's cache.
CHUNK_BYTES = 1 << 18


class Source(Protocol):
    """Rows of timesteps, column by column: a segment on disk or arrays in memory."""

    def packed(self, column: str) -> np.ndarray:
        """`[N]` view of a column in which one item is the bytes of one timestep."""
        ...


@dataclass(frozen=True)
class TrajectoryTable:
    """Where every visible trajectory lies, in order of arrival; all fields `[N]`.

    Attributes:
        sequence: int64 arrival number, increasing.
        source: int64 index of the source that holds it.
        row: int64 row of its first timestep in the source.
        transitions: int64 number of transitions, >= 1.
        time_idx: int64 time index of its first timestep.
        terminated: bool, the last transition terminated.
        truncated: bool, the last transition was truncated.
    """

    sequence: np.ndarray
    source: np.ndarray
    row: np.ndarray
    transitions: np.ndarray
    time_idx: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray

    def __len__(self) -> int:
        """Number of trajectories."""
        return int(self.sequence.shape[0])

    @cached_property
    def ends(self) -> np.ndarray:
        """`[N]` running total of transitions."""
        return np.cumsum(self.transitions)

    @property
    def total_transitions(self) -> int:
        """Transitions over all trajectories."""
        return int(self.ends[-1]) if len(self) else 0


@dataclass(frozen=True)
class Windows:
    """Windows to gather; all fields `[B]`.

    Attributes:
        source: index of the source.
        row: row of the first timestep in the source.
        transitions: real transitions, `1 .. W`.
        time_idx: time index of the first timestep.
        terminated: the window ends with a terminated transition.
        truncated: the window ends with a truncated transition.
    """

    source: np.ndarray
    row: np.ndarray
    transitions: np.ndarray
    time_idx: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


def check_padding(padding: str) -> str:
    """Return `padding`, or raise ValueError if it is no padding mode."""
    if padding not in PADDING_MODES:
        raise ValueError(f"padding must be one of {PADDING_MODES}, got {padding!r}")
    return padding


def check_weighting(weighting: str) -> str:
    """Return `weighting`, or raise ValueError if it is no weighting."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}")
    return weighting


def check_request(batch_size: int, length: int) -> None:
    """Raise ValueError if a batch of this size and length cannot be asked for."""
    for name, value in (("batch_size", batch_size), ("length", length)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def start_bounds(transitions: np.ndarray, length: int, padding: str) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest window start of trajectories; starts are uniform over the integers between, both included.

    Args:
        transitions: `[B]` integers `T`.
        length: `W` transitions of a window.
        padding: "none" (`0 .. T-W`), "left" (`1-W .. T-W`), "right" (`0 .. T-1`) or "both" (`1-W .. T-1`).

    Returns:
        `(lowest, highest)`, each `[B]`; both 0 where `T <= W`: the whole trajectory, always.

    Raises:
        ValueError: if `padding` is unknown.
    """
    check_padding(padding)
    lowest = 1 - length if padding in ("left", "both") else 0
    highest = transitions - (1 if padding in ("right", "both") else length)
    whole = transitions <= length
    return np.where(whole, 0, lowest), np.where(whole, 0, highest)


def clip_windows(start: np.ndarray, transitions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut windows to their trajectories.

    Args:
        start: `[B]` window starts, possibly negative.
        transitions: `[B]` transitions `T` of the trajectories.
        length: `W` transitions of a window.

    Returns:
        `(first, count)`, each `[B]`: first transition, which is also the first timestep, and number of transitions.
    """
    first = np.maximum(start, 0)
    return first, np.minimum(start + length, transitions) - first


def draw_trajectories(
    table: TrajectoryTable, batch_size: int, rng: np.random.Generator, weighting: str = "trajectory"
) -> np.ndarray:
    """Draw trajectories with replacement.

    Args:
        table: the visible trajectories, at least one.
        batch_size: number of draws.
        rng: source of randomness.
        weighting: "trajectory" (uniform) or "transition" (proportional to the number of transitions).

    Returns:
        `[B]` int64 positions in the table.
    """
    if check_weighting(weighting) == "trajectory":
        return rng.integers(0, len(table), size=batch_size)
    return np.searchsorted(table.ends, rng.integers(0, table.total_transitions, size=batch_size), side="right")


def draw_windows(
    transitions: np.ndarray, length: int, padding: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one window of each trajectory.

    Args:
        transitions: `[B]` transitions of the drawn trajectories.
        length: `W` transitions of a window.
        padding: see `start_bounds`.
        rng: source of randomness.

    Returns:
        `(first, count)`, each `[B]`: first transition (and timestep) and number of transitions.
    """
    lowest, highest = start_bounds(transitions, length, padding)
    return clip_windows(rng.integers(lowest, highest, endpoint=True), transitions, length)


def table_windows(table: TrajectoryTable, picks: np.ndarray, first: np.ndarray, count: np.ndarray) -> Windows:
    """Windows `first .. first + count` of the trajectories at `picks`, all `[B]`."""
    at_end = first + count == table.transitions[picks]
    return Windows(
        source=table.source[picks],
        row=table.row[picks] + first,
        transitions=count,
        time_idx=table.time_idx[picks] + first,
        terminated=table.terminated[picks] & at_end,
        truncated=table.truncated[picks] & at_end,
    )


def pack_rows(array: np.ndarray) -> np.ndarray:
    """`[N]` view of a contiguous `[N, ...]` array in which one item is the bytes of one row.

    Gathering such items copies each row with one memory move, several times faster than indexing typed rows.
    """
    flat = array.reshape(array.shape[0], -1)
    return flat.view(f"V{flat.shape[1] * flat.itemsize}")[:, 0]


def _gather_column(sources: Sequence[Source], name: str, column: Field, plan: _Plan) -> np.ndarray:
    """`[B, L, ...]` of one column, zero under the padding."""
    batch, width, length, row_bytes = plan.batch, plan.width, plan.length, column.row_bytes
    packed = np.empty((batch, length), f"V{row_bytes}")
    if len(plan.groups) == 1 and width == length:
        source, _, rows = plan.groups[0]
        sources[source].packed(name).take(rows, mode="clip", out=packed)
    else:
        for source, members, rows in plan.groups:
            data = sources[source].packed(name)
            step = max(1, CHUNK_BYTES // (row_bytes * len(members)))
            for left in range(0, width, step):
                right = min(left + step, width)
                packed[members, left:right] = data.take(rows[:, left:right], mode="clip")
    # Zeroing packed rows is an order of magnitude faster than zeroing typed ones through a mask.
    zero = np.zeros((), packed.dtype)
    if width < length:
        packed[:, width:] = zero
    if plan.padded is not None:
        packed[:, :width][plan.padded] = zero
    return packed.view(np.dtype(column.dtype)).reshape(batch, length, *column.shape)


class _Plan:
    """Row indices of a batch, per source, shared by all columns."""

    def __init__(self, windows: Windows, length: int) -> None:
        steps = np.arange(length)
        count = windows.transitions
        self.batch, self.length = len(count), length
        self.width = int(count.max()) + 1
        columns = steps[: self.width]
        # Rows past a window repeat its last row: nothing outside the committed trajectory is ever read.
        rows = windows.row[:, None] + np.minimum(columns, count[:, None])
        self.padded = None if (count == self.width - 1).all() else columns > count[:, None]
        order = np.argsort(windows.source, kind="stable")
        touched, starts = np.unique(windows.source[order], return_index=True)
        if len(touched) == 1:
            self.groups = [(int(touched[0]), np.arange(self.batch), rows)]
        else:
            members = np.split(order, starts[1:])
            self.groups = [(int(source), member, rows[member]) for source, member in zip(touched, members, strict=True)]


def gather(sources: Sequence[Source], schema: Schema, windows: Windows, length: int) -> dict[str, Any]:
    """Read windows into the arrays of a batch.

    Args:
        sources: what `windows.source` indexes.
        schema: the fields of the sources.
        windows: what to read.
        length: `W`; arrays have `L = W + 1` timesteps, right-padded with zeros (`time_idx`: with its last value).

    Returns:
        The fields of `Batch` as arrays: `obs` (a dict of `[B, L, ...]`), `prev_action`, `prev_reward`, `terminated`,
        `truncated`, `time_idx`, `reset`, each `[B, L, ...]`, and `mask` `[B, T]`.
    """
    timesteps = length + 1
    plan = _Plan(windows, timesteps)
    columns = {name: _gather_column(sources, name, column, plan) for name, column in schema.columns.items()}
    return assemble(columns, schema, windows, length)


def assemble(columns: Mapping[str, np.ndarray], schema: Schema, windows: Windows, length: int) -> dict[str, Any]:
    """Add what is derived (flags, time indices, mask) to gathered columns; see `gather`."""
    batch, steps = len(windows.transitions), np.arange(length + 1)
    lanes = np.arange(batch)
    action = columns[PREV_ACTION]
    ends = {}
    for name in ("terminated", "truncated"):
        flags = np.zeros((batch, length + 1), np.bool_)
        flags[lanes, windows.transitions] = getattr(windows, name)
        ends[name] = flags
    reset = np.zeros((batch, length + 1), np.bool_)
    reset[:, 0] = True
    return {
        "obs": {key: columns[OBS_PREFIX + key] for key in schema.obs},
        PREV_ACTION: action.astype(np.int64) if schema.discrete else action,
        PREV_REWARD: columns[PREV_REWARD],
        **ends,
        "time_idx": windows.time_idx[:, None] + np.minimum(steps, windows.transitions[:, None]),
        "reset": reset,
        "mask": steps[:-1] < windows.transitions[:, None],
    }
