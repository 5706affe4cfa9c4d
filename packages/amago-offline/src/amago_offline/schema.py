"""What is stored: fields, the schema of a store, and one trajectory.

Experience is time-aligned at the timestep: row `t` holds an observation and what led to it (the previous action and
reward, and whether that transition ended the episode). `L` timesteps hold `T = L - 1` transitions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

FORBIDDEN_KINDS = "OSUVMmc"
PREV_ACTION = "prev_action"
PREV_REWARD = "prev_reward"
OBS_PREFIX = "obs."
# A key is part of a file name, percent-encoded.
MAX_KEY_BYTES = 200


@dataclass(frozen=True)
class Field:
    """Shape and dtype of one array per timestep.

    Args:
        shape: shape of one timestep, `()` for a scalar.
        dtype: NumPy dtype name: booleans, integers or floats.

    Raises:
        ValueError: if the dtype is none of these, or a dimension is below 1.
    """

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        """Normalise shape and dtype, so that equal fields compare equal."""
        shape = tuple(int(n) for n in self.shape)
        if any(n < 1 for n in shape):
            raise ValueError(f"shape must hold dimensions >= 1, got {shape}")
        dtype = np.dtype(self.dtype)
        if dtype.kind in FORBIDDEN_KINDS:
            raise ValueError(f"dtype must be a boolean, integer or float dtype, got {dtype.name!r}")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", dtype.name)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype on disk: little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        """Bytes of one timestep."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict that `from_json` reads back."""
        return {"shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Field:
        """The field that `to_json` described."""
        return cls(tuple(data["shape"]), data["dtype"])


def discrete_action_field(num_actions: int) -> Field:
    """The field of a discrete action: the smallest signed integer that holds `-1 .. num_actions - 1`.

    Args:
        num_actions: number of actions, >= 1; -1 stands for "no previous action".

    Returns:
        A scalar field.

    Raises:
        ValueError: if `num_actions < 1`.
    """
    if num_actions < 1:
        raise ValueError(f"num_actions must be >= 1, got {num_actions}")
    for dtype in ("int8", "int16", "int32"):
        if num_actions - 1 <= np.iinfo(dtype).max:
            return Field((), dtype)
    return Field((), "int64")


@dataclass(frozen=True)
class Schema:
    """The fields of every trajectory in a store.

    Args:
        obs: observation fields by key, at least one; the order of keys has no meaning.
        action: `Field((), <signed integer>)` for a discrete action index, otherwise `Field((A,), ...)`.

    Raises:
        ValueError: if there is no observation, a key is empty or too long, or the action field is not one of these.
    """

    obs: dict[str, Field]
    action: Field

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.obs:
            raise ValueError("obs must name at least one field, got none")
        for key in self.obs:
            if not isinstance(key, str) or not 1 <= len(quote(key, safe="")) <= MAX_KEY_BYTES:
                raise ValueError(f"obs keys must be strings of 1 to {MAX_KEY_BYTES} bytes when quoted, got {key!r}")
        object.__setattr__(self, "obs", {key: self.obs[key] for key in sorted(self.obs)})
        if self.action.shape == () and np.dtype(self.action.dtype).kind != "i":
            raise ValueError(f"action of shape () is an index and must have a signed integer dtype, got {self.action}")

    @property
    def discrete(self) -> bool:
        """Whether actions are indices."""
        return self.action.shape == ()

    @property
    def columns(self) -> dict[str, Field]:
        """Every stored column by name: `obs.<key>`, `prev_action`, `prev_reward`."""
        named = {OBS_PREFIX + key: value for key, value in self.obs.items()}
        return {**named, PREV_ACTION: self.action, PREV_REWARD: Field((), "float32")}

    @property
    def row_bytes(self) -> int:
        """Bytes of one timestep over all columns."""
        return sum(column.row_bytes for column in self.columns.values())

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict that `from_json` reads back."""
        return {"obs": {key: value.to_json() for key, value in self.obs.items()}, "action": self.action.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schema:
        """The schema that `to_json` described."""
        return cls({key: Field.from_json(value) for key, value in data["obs"].items()}, Field.from_json(data["action"]))


def _cast(name: str, array: npt.ArrayLike, target: Field, length: int) -> np.ndarray:
    """`array` as a contiguous array of the field's dtype; refuses what would change a value beyond float rounding."""
    source = np.asarray(array)
    shape = (length, *target.shape)
    if source.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {source.shape}")
    dtype = np.dtype(target.dtype)
    if source.dtype == dtype:
        return np.ascontiguousarray(source).reshape(shape)
    if not np.can_cast(source.dtype, dtype, "same_kind"):
        raise ValueError(f"{name} must have dtype {dtype.name} or one that casts to it, got {source.dtype.name}")
    result = source.astype(dtype).reshape(shape)
    if dtype.kind in "iu" and not np.array_equal(result, source):
        raise ValueError(f"{name} must fit {dtype.name}, got values from {source.min()} to {source.max()}")
    return result


def _flags(name: str, array: npt.ArrayLike, length: int) -> np.ndarray:
    """A boolean `[L]` array that may be True only in its last row."""
    result = np.asarray(array)
    if result.shape != (length,) or result.dtype != np.bool_:
        raise ValueError(f"{name} must be a bool array of shape {(length,)}, got {result.dtype.name} {result.shape}")
    if result[:-1].any():
        first = int(np.flatnonzero(result)[0])
        raise ValueError(f"{name} may be True only in the last row ({length - 1}), got True in row {first}")
    return result


@dataclass(frozen=True)
class Trajectory:
    """Contiguous timesteps of one episode, possibly cut.

    Args:
        obs: observations by key, each `[L, ...]`.
        prev_action: `[L]` index (-1 only in row 0: no previous action) or `[L, A]`.
        prev_reward: `[L]` float32.
        terminated: `[L]` bool; `terminated[t]` belongs to the transition from `t - 1` to `t` and stops the bootstrap.
        truncated: `[L]` bool; a time limit, or a cut by the environment. Dropped where `terminated` is True too.
        time_idx: `[L]` int64, contiguous, >= 0.
        meta: anything JSON-able.

    Raises:
        ValueError: if lengths differ, `L < 2`, `time_idx` is not contiguous, or a flag is set before the last row.
    """

    obs: dict[str, np.ndarray]
    prev_action: np.ndarray
    prev_reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    time_idx: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what holds for every schema and normalise dtypes."""
        times = np.asarray(self.time_idx)
        length = times.shape[0] if times.ndim == 1 else -1
        if length < 2:
            raise ValueError(f"time_idx must have shape (L,) with L >= 2 timesteps, got {times.shape}")
        if times.dtype.kind not in "iu" or times[0] < 0 or (np.diff(times) != 1).any():
            raise ValueError(f"time_idx must be contiguous integers >= 0, got {times.dtype.name} {times[:8]}...")
        obs = {key: np.asarray(value) for key, value in self.obs.items()}
        for name, value in {**obs, PREV_ACTION: np.asarray(self.prev_action)}.items():
            if value.ndim < 1 or value.shape[0] != length:
                raise ValueError(f"{name} must have {length} rows, as time_idx, got shape {value.shape}")
        terminated = _flags("terminated", self.terminated, length)
        truncated = _flags("truncated", self.truncated, length)
        fields: dict[str, Any] = {
            "obs": obs,
            PREV_ACTION: np.asarray(self.prev_action),
            PREV_REWARD: _cast(PREV_REWARD, self.prev_reward, Field((), "float32"), length),
            "terminated": terminated,
            "truncated": truncated & ~terminated,
            "time_idx": times.astype(np.int64, copy=False),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """Timesteps `L`."""
        return int(self.time_idx.shape[0])

    @property
    def transitions(self) -> int:
        """Transitions `T = L - 1`."""
        return len(self) - 1

    @property
    def actions(self) -> np.ndarray:
        """`[T, ...]` view: the action taken at each timestep but the last."""
        return self.prev_action[1:]

    @property
    def rewards(self) -> np.ndarray:
        """`[T]` view: the reward of each transition."""
        return self.prev_reward[1:]

    def conform(self, schema: Schema) -> Trajectory:
        """This trajectory in the dtypes of a schema.

        Args:
            schema: what the store holds.

        Returns:
            A trajectory of contiguous arrays, sharing memory where nothing had to change.

        Raises:
            ValueError: if keys, shapes, dtypes or values do not fit the schema.
        """
        if set(self.obs) != set(schema.obs):
            raise ValueError(f"obs must have the keys {sorted(schema.obs)}, got {sorted(self.obs)}")
        length = len(self)
        obs = {key: _cast(OBS_PREFIX + key, self.obs[key], target, length) for key, target in schema.obs.items()}
        action = _cast(PREV_ACTION, self.prev_action, schema.action, length)
        if schema.discrete and (action[0] < -1 or (action[1:] < 0).any()):
            raise ValueError("prev_action must be >= 0 (row 0: >= -1, 'no previous action'), got " + str(action.min()))
        return replace(self, obs=obs, prev_action=action)

    def encoded_meta(self) -> bytes:
        """The metadata as JSON bytes.

        Raises:
            ValueError: if it is not JSON-able.
        """
        try:
            return json.dumps(self.meta, separators=(",", ":")).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"meta must be JSON-able, got {self.meta!r}: {error}") from error
