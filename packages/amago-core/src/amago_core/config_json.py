"""Configurations as JSON and back, exactly, without importing anything a file asks for.

A configuration is a dataclass whose fields are numbers, strings, None, paths, enums, tuples, lists, dictionaries with
string keys, and other configurations. In JSON each carries a tag: `{"type": "amago_nets.traj_encoders:GRUConfig"}`.
Tags are resolved only to dataclasses of the `amago_*` packages and to those passed to `register_config`.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

import numpy as np

from amago_core.checkpoint import write_text_atomic
from amago_core.errors import ConfigError

__all__ = ["diff", "from_json", "load", "register_config", "save", "to_json"]

TYPE = "type"
_PACKAGES = frozenset({"amago_kernels", "amago_nets", "amago_offline", "amago_envs", "amago_core"})
_registered: dict[str, type] = {}
_Class = TypeVar("_Class", bound=type)


@overload
def register_config(cls: _Class, /) -> _Class: ...
@overload
def register_config(*, name: str) -> Callable[[_Class], _Class]: ...
def register_config(cls: Any = None, /, *, name: str | None = None) -> Any:
    """Allow a configuration class of your own in files; use it as a decorator above `@dataclass(frozen=True)`.

    Args:
        cls: the dataclass.
        name: its tag in files; default is the name of the class.

    Returns:
        The class, or a decorator if only `name` was given.

    Raises:
        ConfigError: if it is no frozen dataclass, or another class has the name.
    """
    if cls is None:
        return lambda decorated: _register(decorated, name)
    return _register(cls, name)


def _register(cls: type, name: str | None) -> type:
    tag = name or cls.__name__
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise ConfigError(f"register_config needs a frozen dataclass, got {cls!r}")
    if ":" in tag:
        raise ConfigError(f"name={tag!r} must not contain ':'")
    known = _registered.get(tag)
    # The same class again, as when a notebook cell runs twice, replaces the older one.
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"the configuration name {tag!r} is already taken by {known.__module__}.{known.__qualname__}")
    _registered[tag] = cls
    return cls


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in _PACKAGES


def _tag(cls: type, path: str) -> str:
    """Tag of a class: its registered name, or the shortest module of ours that offers it."""
    for name, known in _registered.items():
        if known is cls:
            return name
    parts = cls.__module__.split(".")
    if _is_ours(cls.__module__) and cls.__qualname__ == cls.__name__:
        for length in range(1, len(parts) + 1):
            module = ".".join(parts[:length])
            if getattr(sys.modules.get(module), cls.__name__, None) is cls:
                return f"{module}:{cls.__name__}"
    raise ConfigError(
        f"{path}: {cls.__module__}.{cls.__qualname__} cannot be written to a file; "
        "decorate the class with amago_core.config_json.register_config"
    )


def _resolve(tag: Any, path: str) -> type:
    if isinstance(tag, str):
        if tag in _registered:
            return _registered[tag]
        module, _, name = tag.partition(":")
        if _is_ours(module) and all(part.isidentifier() for part in (*module.split("."), name)):
            try:
                found = getattr(importlib.import_module(module), name, None)
            except ImportError:
                found = None
            if isinstance(found, type) and dataclasses.is_dataclass(found) and _is_ours(found.__module__):
                return found
    raise ConfigError(
        f"{path}: unknown type {tag!r}; allowed: configurations of the amago packages and those given to "
        f"register_config ({', '.join(sorted(_registered)) or 'none so far'})"
    )


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON-able values.

    Args:
        config: instance of a configuration dataclass.

    Returns:
        A dictionary that `from_json` turns back into an equal configuration.

    Raises:
        ConfigError: if a value cannot be written, or a class is not registered.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"config must be an instance of a dataclass, got {type(config).__name__}")
    encoded: dict[str, Any] = _encode(config, "config")
    return encoded


def _encode(value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        if TYPE in fields:
            raise ConfigError(f"{path}: a configuration must not have a field named {TYPE!r}")
        encoded = {name: _encode(inner, f"{path}.{name}") for name, inner in fields.items()}
        return {TYPE: _tag(type(value), path), **encoded}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_encode(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _encode(item, f"{path}.{key}") for key, item in value.items()}
    raise ConfigError(f"{path}: a value of type {type(value).__name__} cannot be written to a file: {value!r:.80}")


def from_json(data: Any) -> Any:
    """Build a configuration from what `to_json` returned.

    Fields that are missing take their defaults.

    Args:
        data: JSON values with a type tag.

    Returns:
        The configuration.

    Raises:
        ConfigError: naming the field, for an unknown field, an unknown type, a wrong type or a refused value.
    """
    if not isinstance(data, Mapping) or TYPE not in data:
        raise ConfigError(f"config: expected an object with a {TYPE!r}, got {_kind(data)}")
    return _decode_dataclass(data, None, "config")


def _kind(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _decode_dataclass(data: Mapping[str, Any], default: type | None, path: str) -> Any:
    cls = _resolve(data[TYPE], path) if TYPE in data else default
    if cls is None:
        raise ConfigError(f"{path}: expected an object with a {TYPE!r}, got {_kind(data)}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    unknown = sorted(set(data) - set(fields) - {TYPE})
    if unknown:
        raise ConfigError(f"{path}: {cls.__name__} has no field {unknown[0]!r}; its fields are {', '.join(fields)}")
    try:
        hints = get_type_hints(cls)
    except NameError:  # annotations that name local classes cannot be resolved: values are then taken as they are
        hints = {}
    values = {name: _decode(data[name], hints.get(name, Any), f"{path}.{name}") for name in fields if name in data}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {cls.__name__} cannot be built: {error}") from error


def _wrong(path: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{path}: expected {expected}, got {_kind(value)}")


def _class_of(hint: Any) -> Any:
    """The class behind an annotation, None if it allows anything."""
    hint = get_origin(hint) or hint
    return hint if isinstance(hint, type) and hint is not Any and hint is not object else None


def _decode(value: Any, hint: Any, path: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _decode_union(value, get_args(hint), path)
    if origin is Literal:
        allowed = get_args(hint)
        if not any(value == item and type(value) is type(item) for item in allowed):
            raise _wrong(path, f"one of {', '.join(map(repr, allowed))}", value)
        return value
    if hint is None or hint is type(None):
        if value is not None:
            raise _wrong(path, "null", value)
        return None
    if isinstance(value, Mapping) and TYPE in value:
        return _decode_tagged(value, hint, path)
    container = _class_of(hint)
    if container is not None:
        if isinstance(container, type) and dataclasses.is_dataclass(container):
            if not isinstance(value, Mapping):
                raise _wrong(path, container.__name__, value)
            return _decode_dataclass(value, container, path)
        if container in (tuple, list, Sequence):
            return _decode_sequence(value, container, get_args(hint), path)
        if container in (dict, Mapping):
            if not isinstance(value, Mapping):
                raise _wrong(path, "an object", value)
            inner = (get_args(hint) or (str, Any))[1]
            return {key: _decode(item, inner, f"{path}.{key}") for key, item in value.items()}
        return _decode_scalar(value, container, path)
    if isinstance(value, Mapping):
        return {key: _decode(item, Any, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_decode(item, Any, f"{path}[{index}]") for index, item in enumerate(value))
    return value


def _decode_tagged(value: Mapping[str, Any], hint: Any, path: str) -> Any:
    """An object that names its class, which must fit the annotation; classes of the user fit everywhere."""
    cls = _resolve(value[TYPE], path)
    expected = _class_of(hint)
    if expected is not None and not (issubclass(cls, expected) or cls in _registered.values()):
        raise _wrong(path, expected.__name__, value)
    return _decode_dataclass(value, None, path)


def _decode_union(value: Any, members: tuple[Any, ...], path: str) -> Any:
    if isinstance(value, Mapping) and TYPE in value:
        cls = _resolve(value[TYPE], path)
        classes = [member for member in members if isinstance(member, type)]
        if any(issubclass(cls, member) for member in classes) or cls in _registered.values():
            return _decode_dataclass(value, None, path)
        raise _wrong(path, " or ".join(member.__name__ for member in classes), value)
    # None last in the order of trying would also do; strings go last, because "inf" may mean the number.
    for member in sorted(members, key=lambda member: member in (str, Path)):
        try:
            return _decode(value, member, path)
        except ConfigError:
            continue
    raise _wrong(path, " or ".join(getattr(member, "__name__", str(member)) for member in members), value)


def _decode_sequence(value: Any, container: Any, args: tuple[Any, ...], path: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(path, "a list", value)
    if container is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise _wrong(path, f"a list of {len(args)}", value)
        inner = args
    else:
        inner = (args[0] if args else Any,) * len(value)
    items = [
        _decode(item, hint, f"{path}[{index}]") for index, (item, hint) in enumerate(zip(value, inner, strict=True))
    ]
    return items if container is list else tuple(items)


def _decode_scalar(value: Any, hint: type, path: str) -> Any:
    if issubclass(hint, enum.Enum):
        if not isinstance(value, str) or value not in hint.__members__:
            raise _wrong(path, f"one of {', '.join(hint.__members__)}", value)
        return hint[value]
    if hint is float:
        if value in ("inf", "-inf", "nan") or (isinstance(value, int | float) and not isinstance(value, bool)):
            return float(value)
        raise _wrong(path, "a number", value)
    if hint is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong(path, "an integer", value)
        return value
    if hint in (bool, str):
        if not isinstance(value, hint):
            raise _wrong(path, "true or false" if hint is bool else "a string", value)
        return value
    if issubclass(hint, Path):
        if not isinstance(value, str):
            raise _wrong(path, "a path", value)
        return hint(value)
    if not isinstance(value, hint):
        raise _wrong(path, hint.__name__, value)
    return value


def save(config: Any, path: str | Path) -> None:
    """Write a configuration; the file appears whole or not at all.

    Args:
        config: instance of a configuration dataclass.
        path: file to write or replace.

    Raises:
        ConfigError: if it cannot be expressed in JSON or the file cannot be written.
    """
    text = json.dumps(to_json(config), indent=2) + "\n"
    try:
        write_text_atomic(path, text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def load(path: str | Path) -> Any:
    """Read a configuration.

    Args:
        path: file written by `save`.

    Returns:
        The configuration.

    Raises:
        ConfigError: if the file cannot be read or does not hold a valid configuration.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    try:
        return from_json(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def diff(left: Any, right: Any) -> dict[str, tuple[Any, Any]]:
    """What differs between two configurations.

    Args:
        left: a configuration.
        right: another one.

    Returns:
        Dotted field name -> (value in `left`, value in `right`), as JSON values; None where a side lacks the field.
    """
    first, second = _flat(to_json(left)), _flat(to_json(right))
    return {
        name: (first.get(name), second.get(name))
        for name in (*first, *(name for name in second if name not in first))
        if first.get(name) != second.get(name)
    }


def _flat(data: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(data, Mapping):
        return {path: data}
    result: dict[str, Any] = {}
    for key, value in data.items():
        result.update(_flat(value, f"{path}.{key}" if path else key))
    return result
