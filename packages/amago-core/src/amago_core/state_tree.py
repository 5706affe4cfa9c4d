"""Nested training state as named tensors plus a JSON skeleton, exactly and without pickle.

`flatten_tensors` takes what `state_dict()` methods return (dictionaries with string or integer keys, lists, tuples,
numbers, strings, None, tensors, numpy arrays) apart into a flat dictionary of tensors and a JSON-able skeleton that
refers to them; `unflatten` puts both together again, bit for bit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amago_core.errors import CheckpointError

__all__ = ["flatten_tensors", "rng_state", "set_rng_state", "unflatten"]

_TENSOR, _ARRAY, _TUPLE, _PAIRS, _FLOAT = "__tensor__", "__array__", "__tuple__", "__pairs__", "__float__"
_TAGS = frozenset({_TENSOR, _ARRAY, _TUPLE, _PAIRS, _FLOAT})
# Dtypes that every supported version of torch and safetensors knows; others are stored as raw bytes.
_NATIVE = frozenset({"bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"})


def _encode_array(array: np.ndarray, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if array.dtype.hasobject or array.dtype.names is not None:
        raise CheckpointError(f"state at {path!r} is an array of dtype {array.dtype}, which cannot be stored")
    contiguous = np.array(array, order="C", copy=True)
    if array.dtype.name in _NATIVE and array.dtype.isnative:
        tensors[path] = torch.from_numpy(contiguous)
        return {_ARRAY: path}
    tensors[path] = torch.from_numpy(np.frombuffer(contiguous.tobytes(), np.uint8).copy())
    return {_ARRAY: path, "dtype": array.dtype.str, "shape": list(array.shape)}


def _encode_mapping(node: Mapping[Any, Any], path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    encoded = {}
    for key, value in node.items():
        if not isinstance(key, str | int | float | bool | None):
            raise CheckpointError(f"state at {path!r} has a key of type {type(key).__name__}; allowed: str, int, float")
        encoded[key] = _encode(value, f"{path}/{key}" if path else str(key), tensors)
    if all(isinstance(key, str) for key in encoded) and not _TAGS.intersection(encoded):
        return {str(key): value for key, value in encoded.items()}
    return {_PAIRS: [[key, value] for key, value in encoded.items()]}


def _encode(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor | np.ndarray) and path in tensors:
        raise CheckpointError(f"two entries of the state have the joined name {path!r}")
    if isinstance(node, Tensor):
        tensors[path] = node.detach()
        return {_TENSOR: path}
    if isinstance(node, np.ndarray):
        return _encode_array(node, path, tensors)
    if isinstance(node, np.generic):
        node = node.item()
    if node is None or isinstance(node, bool | int | str):
        return node
    if isinstance(node, float):
        return node if math.isfinite(node) else {_FLOAT: repr(node)}
    if isinstance(node, Mapping):
        return _encode_mapping(node, path, tensors)
    if isinstance(node, list | tuple):
        items = [_encode(item, f"{path}/{index}" if path else str(index), tensors) for index, item in enumerate(node)]
        return items if isinstance(node, list) else {_TUPLE: items}
    raise CheckpointError(
        f"state at {path!r} has type {type(node).__name__}; allowed: dict, list, tuple, str, bool, int, float, None, "
        "tensors, numpy arrays"
    )


def flatten_tensors(tree: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Take a nested state apart.

    Args:
        tree: dictionaries, lists, tuples, numbers, strings, None, tensors and numpy arrays, in any nesting.
        prefix: put before every tensor name.

    Returns:
        Tensors by name, the keys on the way joined by `/` (`"optimizer/state/0/exp_avg"`), and a JSON-able skeleton
        (strict JSON: non-finite floats, tuples and non-string keys are tagged). Tensors are not copied.

    Raises:
        CheckpointError: for a value or a key that cannot be stored, or if two joined names are equal.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(tree, prefix, tensors)


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Inverse of [`flatten_tensors`][amago_core.state_tree.flatten_tensors].

    Args:
        tensors: tensors by name; names that the skeleton does not mention are ignored.
        skeleton: as returned by `flatten_tensors`, possibly after a round trip through JSON.

    Returns:
        The nested state; numpy arrays own their memory, tensors are those of `tensors`.

    Raises:
        CheckpointError: if a tensor is missing.
    """
    if isinstance(skeleton, list):
        return [unflatten(tensors, item) for item in skeleton]
    if not isinstance(skeleton, Mapping):
        return skeleton
    if _TENSOR in skeleton or _ARRAY in skeleton:
        name = skeleton.get(_TENSOR, skeleton.get(_ARRAY))
        if name not in tensors:
            raise CheckpointError(f"the checkpoint has no tensor named {name!r}")
        if _TENSOR in skeleton:
            return tensors[name]
        array = np.array(tensors[name].cpu().numpy())
        if "dtype" in skeleton:
            array = np.frombuffer(array.tobytes(), skeleton["dtype"]).reshape(skeleton["shape"]).copy()
        return array
    if _TUPLE in skeleton:
        return tuple(unflatten(tensors, item) for item in skeleton[_TUPLE])
    if _PAIRS in skeleton:
        return {key: unflatten(tensors, value) for key, value in skeleton[_PAIRS]}
    if _FLOAT in skeleton:
        return float(skeleton[_FLOAT])
    return {key: unflatten(tensors, value) for key, value in skeleton.items()}


def rng_state() -> dict[str, Any]:
    """States of the global generators of Python, NumPy and torch (CPU, and CUDA where it has been used).

    Returns:
        A nested state that `save_checkpoint` accepts and `set_rng_state` restores.
    """
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what [`rng_state`][amago_core.state_tree.rng_state] returned.

    CUDA states are restored for the devices that exist here; on a machine without CUDA they are ignored.

    Args:
        state: result of `rng_state`, possibly loaded from a checkpoint.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, device)
