"""What the benchmark of one operation is made of: cases, contenders and targets.

Dimensions: the first axis of every input that is not shared is `B`, the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from costs import Cost
from torch import Tensor

Inputs = dict[str, Tensor]
Row = dict[str, Any]

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
REFERENCE = "eager reference"


@dataclass(frozen=True)
class Run:
    """A contender with its inputs in place.

    Attributes:
        call: computes the output; lanes on its first axis.
        restore: undoes what a call changed, outside of the time that is taken.
        leaves: what gradients are asked of, one per differentiable input of the case; None takes those inputs.
        gradients: turns gradients of `leaves` into gradients of the inputs.
    """

    call: Callable[[], Tensor]
    restore: Callable[[], object] = lambda: None
    leaves: Sequence[Tensor] | None = None
    gradients: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda gradients: gradients


@dataclass(frozen=True)
class Contender:
    """One way to compute what the operation computes.

    Attributes:
        name: for the table.
        make: puts it beside its inputs; whatever it prepares is not timed.
        backend: the backend of ours that it is, if it is one.
        compiled: torch.compile is part of it, which takes seconds at first.
        forward: whether the forward pass alone is timed, for which what is compiled is compiled once more.
        backward: whether it can be differentiated.
    """

    name: str
    make: Callable[[Inputs], Run]
    backend: str | None = None
    compiled: bool = False
    forward: bool = True
    backward: bool = True

    @property
    def ours(self) -> bool:
        """Whether it is one of our fast paths."""
        return self.backend is not None and self.name.startswith("ours")


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    Attributes:
        kind: what sets it apart from others of the same shape, for example "resets".
        sizes: letter to size, in the order of the table.
        dtype: of the main input.
        make: the inputs.
        reference: the specification, on float64 inputs of a few lanes; returns what contenders return.
        contenders: who takes part.
        cost: direction to bytes and FLOPs, counted on the inputs.
        auto: calls the operation with `backend="auto"`, to see what that takes.
        differentiable: inputs that want gradients; none if only the forward pass is timed.
        shared: inputs without a batch axis.
        directions: what is timed.
        graph: also time the replay of a CUDA graph.
    """

    kind: str
    sizes: Mapping[str, int]
    dtype: torch.dtype
    make: Callable[[], Inputs]
    reference: Callable[[Inputs], Tensor]
    contenders: Sequence[Contender]
    cost: Callable[[Inputs], dict[str, Cost]]
    auto: Callable[[Inputs], Any]
    differentiable: tuple[str, ...] = ()
    shared: frozenset[str] = frozenset()
    directions: tuple[str, ...] = (FORWARD, BOTH)
    graph: bool = False

    @property
    def shape(self) -> str:
        """The sizes, as text."""
        return " ".join(f"{letter}{size}" for letter, size in self.sizes.items())

    @property
    def dtype_name(self) -> str:
        """The dtype without its module."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """One line that no other case has."""
        return f"{self.kind}, {self.shape}, {self.dtype_name}"


@dataclass(frozen=True)
class Target:
    """A promise, checked against the rows of the table.

    Attributes:
        text: what is promised.
        at_least: the smallest value that keeps it.
        value: the value, or None if the rows that it needs are missing.
        device: type of the device that the promise is about.
    """

    text: str
    at_least: float
    value: Callable[[Rows], float | None]
    device: str = "cuda"


@dataclass(frozen=True)
class Operation:
    """All that is measured of one operation.

    Attributes:
        name: of the operation and its files.
        cases: those with targets first: the last ones are left out when time is short.
        targets: what is promised.
        bound: "copy" or "matmul", what limits it.
        axis: the size that plots are drawn against.
        notes: what one must know to read the table.
        builds: beginnings of the dotted names of its Triton modules.
        finish: undoes what cases set for the whole process.
    """

    name: str
    cases: Sequence[Case]
    targets: Sequence[Target]
    bound: str
    axis: str
    notes: Sequence[str]
    builds: tuple[str, ...] = ()
    finish: Callable[[], None] = lambda: None


class Rows(list[Row]):
    """The rows of a table, with questions that targets ask."""

    def where(self, **wanted: Any) -> Rows:
        """Rows that have all of these values and a time.

        Args:
            wanted: column to value.

        Returns:
            The rows.
        """
        return Rows(r for r in self if r["ms"] is not None and all(r[name] == value for name, value in wanted.items()))

    def best(self, *contenders: str, column: str = "ms") -> float | None:
        """The smallest value among contenders whose names begin so.

        Args:
            contenders: beginnings of names.
            column: which value.

        Returns:
            The value, or None if nobody has one.
        """
        values = [row[column] for row in self if row["contender"].startswith(contenders) and row[column] is not None]
        return min(values, default=None)

    def speedup(self, ours: str, *others: str, column: str = "ms") -> float | None:
        """How often ours fits into the best of others.

        Args:
            ours: beginning of the name.
            others: beginnings of names.
            column: which value.

        Returns:
            The ratio, or None where either side is missing.
        """
        mine, theirs = self.best(ours, column=column), self.best(*others, column=column)
        return None if mine is None or theirs is None else theirs / mine


def least(values: Sequence[float | None]) -> float | None:
    """The smallest value, if every one is there.

    Args:
        values: what to look at.

    Returns:
        The smallest, or None.
    """
    known = [value for value in values if value is not None]
    return min(known) if known and len(known) == len(values) else None
