"""Gymnasium spaces as JSON, so that a saved policy needs no environment to be loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from amago_core.errors import EnvError


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """Describe a space as JSON-able values.

    Args:
        space: Box, Discrete, MultiDiscrete, MultiBinary or a Dict of them.

    Returns:
        What `space_from_json` takes; two spaces mean the same to a policy if and only if these are equal.

    Raises:
        EnvError: for any other space.
    """
    match space:
        case spaces.Dict():
            return {"type": "Dict", "spaces": {key: space_to_json(sub) for key, sub in space.spaces.items()}}
        case spaces.Box():
            return {
                "type": "Box",
                "shape": list(space.shape),
                "dtype": np.dtype(space.dtype).name,
                "low": _bounds(space.low),
                "high": _bounds(space.high),
            }
        case spaces.Discrete():
            return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            return {
                "type": "MultiDiscrete",
                "nvec": space.nvec.tolist(),
                "start": np.asarray(space.start).tolist(),
                "dtype": np.dtype(space.dtype).name,
            }
        case spaces.MultiBinary():
            return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else [int(n) for n in space.n]}
    raise EnvError(
        f"space must be Box, Discrete, MultiDiscrete, MultiBinary or a Dict of them; got {type(space).__name__}"
    )


def space_from_json(data: dict[str, Any]) -> spaces.Space:
    """The inverse of `space_to_json`.

    Raises:
        EnvError: if `data` names an unknown type.
    """
    match data["type"]:
        case "Dict":
            return spaces.Dict({key: space_from_json(sub) for key, sub in data["spaces"].items()})
        case "Box":
            shape, dtype = tuple(data["shape"]), np.dtype(data["dtype"])
            low, high = (_array(data[name], dtype, shape) for name in ("low", "high"))
            return spaces.Box(low, high, shape, dtype.type)
        case "Discrete":
            return spaces.Discrete(data["n"], start=data["start"])
        case "MultiDiscrete":
            dtype = np.dtype(data["dtype"])
            return spaces.MultiDiscrete(np.array(data["nvec"]), dtype.type, start=np.array(data["start"]))
        case "MultiBinary":
            return spaces.MultiBinary(data["n"])
    raise EnvError(f"space type {data['type']!r} is not known")


def _bounds(values: np.ndarray) -> Any:
    flat = values.ravel()
    uniform = flat.size > 0 and bool((flat == flat[0]).all())
    return _number(flat[0]) if uniform else [_number(v) for v in flat]


def _number(value: Any) -> float | int | str:
    # JSON has no infinity.
    number = value.item()
    return repr(number) if isinstance(number, float) and not np.isfinite(number) else number


def _array(stored: Any, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(stored, list):
        return np.array([float(v) if isinstance(v, str) else v for v in stored], dtype).reshape(shape)
    return np.full(shape, float(stored) if isinstance(stored, str) else stored, dtype)
