"""From Gymnasium spaces to what networks and the trajectory store take, for all lanes at once.

This is the only module that translates spaces. Dimensions: `N` lanes, `A` action size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from amago_core.errors import EnvError
from amago_nets.specs import ActionSpec, ArraySpec
from amago_offline.schema import Field, Schema

__all__ = ["SpaceAdapter", "fingerprint_difference", "require_gymnasium_env"]

SINGLE_KEY = "observation"
_OBS_ALLOWED = "Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of them"
_ACTION_ALLOWED = "Discrete, Box with finite bounds, MultiBinary"
# torch cannot compute with wide unsigned integers, and float64 observations are never needed as such.
_STORED_DTYPES = {"float64": "float32", "bool": "uint8", "uint16": "int32", "uint32": "int64", "uint64": "int64"}
# Bounds such as `np.finfo(np.float32).max` mean "unbounded": scaling by them would erase the signal.
_BOUND_LIMIT = 1e30


def require_gymnasium_env(env: object) -> None:
    """Refuse anything that is not a Gymnasium environment.

    Args:
        env: what the user's `make_env` returned.

    Raises:
        EnvError: if `env` is neither a `gymnasium.Env` nor a `gymnasium.vector.VectorEnv`.
    """
    if isinstance(env, gym.Env | gym.vector.VectorEnv):
        return
    kind = f"{type(env).__module__}.{type(env).__qualname__}"
    old_gym = any(base.__module__.split(".")[0] == "gym" for base in type(env).__mro__)
    hint = "; it belongs to the old gym package: use its Gymnasium version" if old_gym else ""
    raise EnvError(f"env must be a gymnasium.Env or a gymnasium.vector.VectorEnv, got {kind}{hint}")


@dataclass(frozen=True)
class _ObsLeaf:
    """One array of the observation: where it lies in the environment's output and how it is stored."""

    key: str
    path: tuple[str, ...]
    spec: ArraySpec
    start: np.ndarray | None  # token offset to subtract, broadcastable to the spec's shape

    def convert(self, value: Any, lanes: int) -> np.ndarray:
        for part in self.path:
            value = value[part]
        array = np.asarray(value)
        shape = (lanes, *self.spec.shape)
        try:
            array = array.reshape(shape)
        except ValueError:
            raise EnvError(
                f"observation {self.key!r} has shape {array.shape} for {lanes} lanes, its space says {shape}"
            ) from None
        if self.start is not None:
            array = array - self.start
        return np.asarray(array, dtype=self.spec.dtype)


def _space_name(space: object) -> str:
    text = repr(space)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _shape(space: spaces.Space) -> tuple[int, ...]:
    return tuple(int(size) for size in space.shape or ())


def _smallest_signed(largest: int) -> str:
    for name in ("int8", "int16", "int32"):
        if largest <= np.iinfo(name).max:
            return name
    return "int64"


def _tokens(shape: tuple[int, ...], classes: int, start: np.ndarray) -> tuple[ArraySpec, np.ndarray | None]:
    spec = ArraySpec(shape=shape, dtype=_smallest_signed(classes - 1), kind="tokens", num_classes=classes)
    return spec, (start if np.any(start) else None)


def _leaf_spec(space: spaces.Space, where: str) -> tuple[ArraySpec, np.ndarray | None]:
    """Spec of one non-Dict observation space, and the token offset to subtract."""
    if isinstance(space, spaces.Discrete):
        return _tokens((1,), int(space.n), np.array([space.start]))
    if isinstance(space, spaces.MultiDiscrete):
        return _tokens(_shape(space), int(np.max(space.nvec)), np.asarray(space.start))
    if isinstance(space, spaces.MultiBinary):
        return ArraySpec(shape=_shape(space), dtype="int8", kind="vector", low=0.0, high=1.0), None
    if isinstance(space, spaces.Box):
        if 0 in space.shape:
            raise EnvError(f"{where} has no elements: {_space_name(space)}")
        low, high = float(np.min(space.low)), float(np.max(space.high))
        bounded = max(abs(low), abs(high)) < _BOUND_LIMIT
        dtype = np.dtype(space.dtype).name
        return ArraySpec(
            shape=_shape(space) or (1,),
            dtype=_STORED_DTYPES.get(dtype, dtype),
            kind="image" if dtype == "uint8" and len(space.shape) == 3 else "vector",
            low=low if bounded else None,
            high=high if bounded else None,
        ), None
    raise EnvError(f"{where} is {_space_name(space)}; supported: {_OBS_ALLOWED}")


def _obs_leaves(space: spaces.Space, path: tuple[str, ...] = ()) -> Iterator[_ObsLeaf]:
    """All arrays of an observation space, keys sorted, nested keys joined by `__`."""
    where = "observation space" + (f" at key {'/'.join(path)!r}" if path else "")
    if isinstance(space, spaces.Dict):
        if not space.spaces:
            raise EnvError(f"{where} is an empty Dict; supported: {_OBS_ALLOWED}")
        for key in sorted(space.spaces, key=str):
            if not isinstance(key, str):
                raise EnvError(f"{where} has the key {key!r}; keys must be strings")
            yield from _obs_leaves(space.spaces[key], (*path, key))
        return
    spec, start = _leaf_spec(space, where)
    yield _ObsLeaf("__".join(path) if path else SINGLE_KEY, path, spec, start)


class SpaceAdapter:
    """Translates between one environment family and arrays, vectorised over lanes.

    Observations become a dictionary of arrays with sorted keys (`{"observation": ...}` when the space is no Dict).
    Images are 3-d uint8 boxes; `Discrete` and `MultiDiscrete` become tokens that count from 0; float64 becomes
    float32. Actions are integers from 0 for `Discrete`, floats in [-1, 1] for `Box`, and 0 or 1 for `MultiBinary`.

    Args:
        single_observation_space: space of one environment, as in `VectorEnv.single_observation_space`.
        single_action_space: space of one environment, as in `VectorEnv.single_action_space`.

    Attributes:
        obs_specs: key -> [`ArraySpec`][amago_nets.specs.ArraySpec] of one timestep.
        action_spec: what the actor must produce.
        schema: what the trajectory store must hold.

    Raises:
        EnvError: if a space is not supported.
    """

    obs_specs: dict[str, ArraySpec]
    action_spec: ActionSpec
    schema: Schema

    def __init__(self, single_observation_space: spaces.Space, single_action_space: spaces.Space) -> None:
        for name, space in (("observation", single_observation_space), ("action", single_action_space)):
            if not isinstance(space, spaces.Space):
                kind = f"{type(space).__module__}.{type(space).__qualname__}"
                raise EnvError(f"{name} space must be a gymnasium.Space, got {kind}")
        self._leaves = tuple(_obs_leaves(single_observation_space))
        self.obs_specs = {leaf.key: leaf.spec for leaf in self._leaves}
        if len(self.obs_specs) != len(self._leaves):
            keys = sorted(leaf.key for leaf in self._leaves)
            raise EnvError(f"observation keys collide once nested keys are joined by '__': {keys}")
        self._action_space = single_action_space
        self.action_spec, action_field = self._translate_action(single_action_space)
        obs_fields = {key: Field(shape=spec.shape, dtype=spec.dtype) for key, spec in self.obs_specs.items()}
        self.schema = Schema(obs=obs_fields, action=action_field)

    def _translate_action(self, space: spaces.Space) -> tuple[ActionSpec, Field]:
        if isinstance(space, spaces.Discrete):
            count = int(space.n)
            return ActionSpec(kind="discrete", size=count), Field(shape=(), dtype=_smallest_signed(count - 1))
        if isinstance(space, spaces.MultiBinary):
            size = int(np.prod(space.shape))
            return ActionSpec(kind="multi_binary", size=size), Field(shape=(size,), dtype="uint8")
        if isinstance(space, spaces.Box):
            low, high = np.asarray(space.low, np.float64).ravel(), np.asarray(space.high, np.float64).ravel()
            if low.size == 0:
                raise EnvError(f"action space has no elements: {_space_name(space)}")
            if not (np.all(np.abs(low) < _BOUND_LIMIT) and np.all(np.abs(high) < _BOUND_LIMIT)):
                raise EnvError(
                    f"action space {_space_name(space)} must have finite bounds, because actions are rescaled "
                    "from [-1, 1]: clip it with gymnasium.wrappers.RescaleAction or a bounded Box"
                )
            self._low, self._high = low, high
            self._half, self._middle = (high - low) / 2, (high + low) / 2
            return ActionSpec(kind="continuous", size=low.size), Field(shape=(low.size,), dtype="float32")
        raise EnvError(f"action space is {_space_name(space)}; supported: {_ACTION_ALLOWED}")

    def to_obs(self, batched_env_obs: Any, lanes: int | None = None) -> dict[str, np.ndarray]:
        """Observations of all lanes as plain arrays.

        Args:
            batched_env_obs: what `VectorEnv.reset` or `step` returned, leading dimension `N`. The result may share
                memory with it.
            lanes: `N`; None for the observation of one single environment, which gets a leading dimension 1.

        Returns:
            key -> `[N, *shape]` of the dtype in `obs_specs`.

        Raises:
            EnvError: if a shape or a key is not what the space promised.
        """
        count = 1 if lanes is None else lanes
        try:
            return {leaf.key: leaf.convert(batched_env_obs, count) for leaf in self._leaves}
        except (KeyError, IndexError, TypeError) as error:
            expected = sorted(self.obs_specs)
            raise EnvError(
                f"observation of type {type(batched_env_obs).__name__} does not match its space with keys {expected}: "
                f"{type(error).__name__} {error}"
            ) from None

    def final_obs(self, final_obs: Any, lanes: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Last observations of the lanes that ended, from `info["final_obs"]` of a `SAME_STEP` vector environment.

        Args:
            final_obs: an object array of `N` single observations (None where the lane goes on), as Gymnasium's own
                vector environments give, or batched observations of all `N` lanes.
            lanes: indices of the `n` lanes that ended.

        Returns:
            key -> `[n, *shape]`.

        Raises:
            EnvError: if an ended lane has no final observation.
        """
        picked = [int(lane) for lane in lanes]
        if isinstance(final_obs, np.ndarray) and final_obs.dtype == object:
            missing = [lane for lane in picked if final_obs[lane] is None]
            if missing:
                raise EnvError(f"lanes {missing} ended, but info['final_obs'] holds None for them")
            singles = [self.to_obs(final_obs[lane]) for lane in picked]
            return {
                leaf.key: np.concatenate([single[leaf.key] for single in singles])
                if singles
                else np.zeros((0, *leaf.spec.shape), leaf.spec.dtype)
                for leaf in self._leaves
            }
        probe = final_obs
        for part in self._leaves[0].path:
            probe = probe[part]
        everything = self.to_obs(final_obs, len(probe))
        return {key: value[picked] for key, value in everything.items()}

    def to_env_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions of the policy as `VectorEnv.step` takes them.

        Args:
            actions: `[N]` integers in `0 .. size-1` (discrete), `[N, A]` floats in [-1, 1] (continuous; values outside
                are clipped), or `[N, A]` of 0 and 1 (multi-binary).

        Returns:
            `[N]` int64 counted from the space's `start`, or `[N, *shape]` in the space's dtype and bounds.

        Raises:
            EnvError: if the shape is wrong or a discrete action is out of range.
        """
        actions = np.asarray(actions)
        space = self._action_space
        if self.action_spec.kind == "discrete":
            if actions.ndim != 1 or actions.dtype.kind not in "iu":
                raise EnvError(f"actions must be integers of shape [N], got {actions.dtype} {list(actions.shape)}")
            if actions.size and (actions.min() < 0 or actions.max() >= self.action_spec.size):
                raise EnvError(f"actions must lie in 0..{self.action_spec.size - 1}, got {actions.tolist()}")
            return actions.astype(np.int64) + int(space.start)  # type: ignore[attr-defined]
        if actions.ndim != 2 or actions.shape[1] != self.action_spec.size:
            raise EnvError(f"actions must have shape [N, {self.action_spec.size}], got {list(actions.shape)}")
        shape = (len(actions), *(space.shape or ()))
        if self.action_spec.kind == "multi_binary":
            return (actions > 0.5).astype(space.dtype).reshape(shape)
        scaled = np.clip(self._middle + actions * self._half, self._low, self._high)
        if np.dtype(space.dtype).kind in "iu":
            scaled = np.rint(scaled)
        return scaled.astype(space.dtype).reshape(shape)

    def from_env_actions(self, env_actions: Any) -> np.ndarray:
        """Inverse of [`to_env_actions`][amago_core.spaces.SpaceAdapter.to_env_actions], for scripted policies and data.

        Args:
            env_actions: `[N]` or `[N, *shape]`, as `VectorEnv.step` takes them.

        Returns:
            `[N]` or `[N, A]` in the dtype of `schema.action`.
        """
        array = np.asarray(env_actions)
        dtype = self.schema.action.dtype
        if self.action_spec.kind == "discrete":
            return (array - int(self._action_space.start)).astype(dtype)  # type: ignore[attr-defined]
        array = array.reshape(len(array), self.action_spec.size)
        if self.action_spec.kind == "multi_binary":
            return (array > 0).astype(dtype)
        half = np.where(self._half > 0, self._half, 1.0)
        return np.clip((array - self._middle) / half, -1.0, 1.0).astype(dtype)

    def zero_action(self, lanes: int) -> np.ndarray:
        """The action before the first step: -1 for every discrete lane ("none"), zeros otherwise.

        Args:
            lanes: `N`.

        Returns:
            `[N]` or `[N, A]` in the dtype of `schema.action`.
        """
        if self.action_spec.kind == "discrete":
            return np.full(lanes, -1, dtype=self.schema.action.dtype)
        return np.zeros((lanes, self.action_spec.size), dtype=self.schema.action.dtype)

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able description of both spaces; equal for environments that one policy can serve.

        Returns:
            A dictionary with the keys `observation` and `action`, safe to store and to compare.
        """
        observation: dict[str, Any] = {}
        for leaf in self._leaves:
            spec = leaf.spec
            observation[leaf.key] = {
                "kind": spec.kind,
                "shape": list(spec.shape),
                "dtype": spec.dtype,
                "low": spec.low,
                "high": spec.high,
                "num_classes": spec.num_classes,
                "start": None if leaf.start is None else leaf.start.tolist(),
            }
        action: dict[str, Any] = {"kind": self.action_spec.kind, "size": self.action_spec.size}
        if self.action_spec.kind == "discrete":
            action["start"] = int(self._action_space.start)  # type: ignore[attr-defined]
        else:
            action["shape"] = list(self._action_space.shape or ())
            action["dtype"] = np.dtype(self._action_space.dtype).name
        if self.action_spec.kind == "continuous":
            action["low"], action["high"] = self._low.tolist(), self._high.tolist()
        return {"observation": observation, "action": action}


def fingerprint_difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, one line each.

    Args:
        saved: fingerprint from a checkpoint.
        current: fingerprint of the environment at hand.

    Returns:
        Lines such as `"action.size: 4 in the checkpoint, 6 here"`; empty if they are equal.
    """
    lines: list[str] = []

    def visit(path: str, left: Any, right: Any) -> None:
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            for key in sorted({*left, *right}):
                if key not in left:
                    lines.append(f"{path}{key}: missing in the checkpoint")
                elif key not in right:
                    lines.append(f"{path}{key}: missing here")
                else:
                    visit(f"{path}{key}.", left[key], right[key])
        elif left != right:
            lines.append(f"{path[:-1]}: {left} in the checkpoint, {right} here")

    visit("", saved, current)
    return lines
