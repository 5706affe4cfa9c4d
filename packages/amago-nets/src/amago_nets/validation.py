"""Small checks shared by the config dataclasses; every error names the field, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any


def check_choice(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Refuses a value outside a closed set.

    Args:
        name: field name, for the message.
        value: value to check.
        allowed: values that are accepted.

    Raises:
        ValueError: if `value` is not in `allowed`.
    """
    if value not in allowed:
        listed = ", ".join(repr(item) for item in allowed)
        raise ValueError(f"{name}={value!r} is not allowed; choose one of {listed}")


def check_int(name: str, value: Any, *, low: int = 1, high: int | None = None) -> None:
    """Refuses anything but an integer in `[low, high]`.

    Args:
        name: field name, for the message.
        value: value to check; booleans are refused.
        low: smallest value accepted.
        high: largest value accepted; None is no limit.

    Raises:
        ValueError: if `value` is not an integer, or outside the range.
    """
    allowed = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value!r} is not allowed; give {allowed}")


def check_bool(name: str, value: Any) -> None:
    """Refuses anything but True and False.

    Args:
        name: field name, for the message.
        value: value to check.

    Raises:
        ValueError: if `value` is not a bool.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not allowed; give True or False")


def check_float(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuses anything but a finite number in `[low, high]`.

    Args:
        name: field name, for the message.
        value: value to check.
        low: smallest value accepted.
        high: largest value accepted.

    Raises:
        ValueError: if `value` is not a finite number, or outside the range.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} is not allowed; give a finite number in [{low:g}, {high:g}]")


def check_dropout(name: str, value: Any) -> None:
    """Refuses anything but a probability below one.

    Args:
        name: field name, for the message.
        value: value to check.

    Raises:
        ValueError: if `value` is not a number in `[0, 1)`.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0.0 <= value < 1.0:
        raise ValueError(f"{name}={value!r} is not allowed; give a number in [0, 1)")
