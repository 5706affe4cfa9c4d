"""What a network must know about observations and actions: shapes, dtypes, bounds. No environment library here."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .validation import check_choice, check_int

ArrayKind = Literal["vector", "image", "tokens"]
ActionKind = Literal["discrete", "continuous", "multi_binary", "multi_discrete"]

DTYPES = (
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
)


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One observation array of one timestep.

    Attributes:
        shape: shape without batch or time axes; `()` is a scalar.
        dtype: one of `DTYPES`.
        kind: "vector" for features, "image" for pixels, "tokens" for indices.
        low: smallest value, possibly infinite; None if unknown.
        high: largest value, possibly infinite; None if unknown.
        num_classes: number of distinct tokens, None if unknown; only for kind "tokens".

    Raises:
        ValueError: if a field is not allowed.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: ArrayKind = "vector"
    low: float | None = None
    high: float | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for name in ("shape", "low", "high", "num_classes"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        if not isinstance(self.shape, tuple) or any(type(n) is not int or n < 1 for n in self.shape):
            raise ValueError(f"shape={self.shape!r} is not allowed; give a tuple of integers >= 1")
        check_choice("dtype", self.dtype, DTYPES)
        # NumPy's dtypes equal their names.
        object.__setattr__(self, "dtype", str(self.dtype))
        check_choice("kind", self.kind, get_args(ArrayKind))
        if self.kind == "image" and len(self.shape) != 3:
            raise ValueError(f"shape={self.shape!r} is not allowed with kind='image'; give three axes")
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float)) or bound != bound):
                raise ValueError(f"{name}={bound!r} is not allowed; give a number or None")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low={self.low!r} is not allowed; give at most high={self.high!r}")
        if self.num_classes is not None:
            check_int("num_classes", self.num_classes)
            if self.kind != "tokens":
                raise ValueError(f"num_classes={self.num_classes!r} is not allowed with kind={self.kind!r}; give None")

    @property
    def numel(self) -> int:
        """Number of entries of one array."""
        product = 1
        for n in self.shape:
            product *= n
        return product


def check_nvec(nvec: Any) -> tuple[int, ...]:
    """Refuses anything but the sizes of one choice or more; returns them as Python's own integers.

    Args:
        nvec: value to check.

    Raises:
        ValueError: if `nvec` is not a non-empty tuple of integers >= 1.
    """
    sizes = _plain(nvec)
    if not isinstance(sizes, tuple) or not sizes or any(type(n) is not int or n < 1 for n in sizes):
        raise ValueError(f"nvec={nvec!r} is not allowed; give a non-empty tuple of integers >= 1")
    return sizes


def _plain(value: Any) -> Any:
    """Numbers as NumPy makes them (`Discrete.n` of Gymnasium is one) as Python's own, in tuples too."""
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, (bool, int, float)) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


@dataclass(frozen=True)
class ActionSpec:
    """The action of one timestep.

    Attributes:
        kind: "discrete" (an index), "continuous" (`A` numbers in [-1, 1]), "multi_binary" (`A` bits) or
            "multi_discrete" (`M` indices).
        size: number of discrete actions, or number of dimensions; for "multi_discrete" `sum(nvec)`.
        nvec: number of options of each of the `M` choices; only for "multi_discrete".

    Raises:
        ValueError: if a field is not allowed.
    """

    kind: ActionKind
    size: int
    nvec: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(ActionKind))
        object.__setattr__(self, "size", _plain(self.size))
        check_int("size", self.size)
        if self.kind == "multi_discrete":
            object.__setattr__(self, "nvec", check_nvec(self.nvec))
            if self.size != sum(self.nvec or ()):
                raise ValueError(f"size={self.size!r} is not allowed with nvec={self.nvec}; give their sum")
        elif self.nvec is not None:
            raise ValueError(f"nvec={self.nvec!r} is not allowed with kind={self.kind!r}; give None")

    @property
    def is_discrete(self) -> bool:
        """True if an action is one index."""
        return self.kind == "discrete"

    def encode(self, action: Tensor) -> Tensor:
        """Turns stored actions into what networks take.

        Args:
            action: discrete: `[...]` integers; multi-discrete: `[..., M]` integers; -1 means "no previous action".
                Otherwise `[..., A]` of any dtype.

        Returns:
            `[..., A]` float32: one-hot rows for discrete actions (all zeros for -1), those of all choices side by side
            for multi-discrete ones, else the values.

        Raises:
            ValueError: if the dtype or the last axis does not fit the kind.
        """
        if self.kind in ("discrete", "multi_discrete") and (
            action.dtype.is_floating_point or action.dtype == torch.bool
        ):
            raise ValueError(f"action.dtype={action.dtype} is not allowed for {self.kind} actions; give integers")
        if self.kind == "discrete":
            return _one_hot(action, self.size).float()
        last = self.size if self.nvec is None else len(self.nvec)
        if action.ndim == 0 or action.shape[-1] != last:
            raise ValueError(f"action.shape={tuple(action.shape)} is not allowed; give [..., {last}]")
        if self.nvec is None:
            return action.float()
        choices = zip(action.unbind(-1), self.nvec, strict=True)
        return torch.cat([_one_hot(choice, count) for choice, count in choices], dim=-1).float()


def check_action_spec(action_spec: Any) -> None:
    """Refuses anything but an `ActionSpec`, such as a number of actions or the space of an environment library.

    Args:
        action_spec: value to check.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(action_spec, ActionSpec):
        raise ValueError(f"action_spec={action_spec!r} is not allowed; give an ActionSpec")


def _one_hot(index: Tensor, count: int) -> Tensor:
    # A comparison beats one_hot: no host sync to check the range, any integer dtype, and -1 is no special case.
    return index.long().unsqueeze(-1) == torch.arange(count, device=index.device)
