"""Choosing parts of a configuration by name on the command line: `--traj-encoder gru --traj-encoder.d-hidden 64`.

A field that takes one of several configurations becomes an option whose value is a name; the options of the chosen one
follow under its own. This is done before tyro parses, by giving it a class whose field has the chosen type only.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro

from amago_core.errors import ConfigError
from amago_nets.registry import name_of

__all__ = ["Choices", "choices_of", "narrow", "take_choices", "widen"]

Choices = dict[str, dict[str, type | None]]
"""Option, such as `agent.filter`, to what it chooses from, by name; the default comes first."""
_ORIGINAL = "_narrowed_from"


def _option(field: str, prefix: str) -> str:
    return prefix + field.replace("_", "-")


def _name(cls: type | None, field: str) -> str:
    if cls is None:
        return "none"
    try:
        return name_of(cls)[1].replace("_", "-")
    except ValueError:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__.removesuffix("Config")).lower()
        return words.removesuffix(f"-{field.replace('_', '-')}")


def _members(hint: Any) -> list[type | None]:
    """The configurations a field chooses from; empty if it does not."""
    if get_origin(hint) not in (Union, types.UnionType):
        return []
    members = [None if member is type(None) else member for member in get_args(hint)]
    return members if all(member is None or dataclasses.is_dataclass(member) for member in members) else []


def _default_type(field: dataclasses.Field[Any]) -> type | None:
    return None if field.default is None else type(field.default)


def choices_of(cls: type, chosen: Mapping[str, type | None] | None = None, prefix: str = "") -> Choices:
    """All choices in a configuration class, the configurations inside it, and those chosen for it.

    Args:
        cls: a dataclass; fields that are a choice must have a default.
        chosen: what was chosen so far, by option; the defaults for others.
        prefix: of the options.

    Returns:
        Option to its choices.
    """
    hints, result = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if members := _members(hint):
            ordered = sorted(members, key=lambda member: member is not _default_type(field))
            option = _option(field.name, prefix)
            result[option] = {_name(member, field.name): member for member in ordered}
            part = (chosen or {}).get(option, _default_type(field))
            if part is not None:
                result.update(choices_of(part, chosen, f"{option}."))
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            result.update(choices_of(hint, chosen, f"{_option(field.name, prefix)}."))
    return result


def take_choices(arguments: Sequence[str], cls: type) -> tuple[dict[str, type | None], list[str]]:
    """Take `--option name` and `--option=name` out of a command line.

    Args:
        arguments: the command line.
        cls: the configuration class that has the choices.

    Returns:
        What was chosen, by option, and the other arguments.

    Raises:
        ConfigError: for an unknown or missing name.
    """
    chosen: dict[str, type | None] = {}
    rest = list(arguments)
    # A part that was chosen may have choices of its own.
    while (taken := _take(rest, choices_of(cls, chosen)))[0]:
        chosen.update(taken[0])
        rest = taken[1]
    return chosen, rest


def _take(arguments: Sequence[str], choices: Choices) -> tuple[dict[str, type | None], list[str]]:
    chosen: dict[str, type | None] = {}
    rest = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        option = flag.removeprefix("--").replace("_", "-")
        if not flag.startswith("--") or option not in choices:
            rest.append(argument)
            continue
        name = value if equals else next(remaining, "nothing")
        if name not in choices[option]:
            raise ConfigError(f"--{option} must be one of {', '.join(choices[option])}; got {name}")
        chosen[option] = choices[option][name]
    return chosen, rest


def narrow(cls: type, chosen: Mapping[str, type | None], prefix: str = "") -> type:
    """A subclass of a configuration class whose choices are made.

    Args:
        cls: the class.
        chosen: what to choose, by option; the defaults for others.
        prefix: of the options.

    Returns:
        A class for tyro to parse; `widen` turns its instances into ones of `cls`.
    """
    hints = get_type_hints(cls)
    fields: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(cls):
        hint, option = hints[field.name], _option(field.name, prefix)
        if members := _members(hint):
            part = chosen.get(option, _default_type(field))
            names = [_name(member, field.name) for member in members]
            note = f"{_name(part, field.name)}; --{option} {{{','.join(names)}}} chooses"
            default = field.default if part is _default_type(field) else _instance(part)
            if part is not None and choices_of(part, chosen, f"{option}."):
                part = narrow(part, chosen, f"{option}.")
                default = _instance(part)
            kind: Any = Annotated[part, tyro.conf.arg(help=note) if part is not None else tyro.conf.Suppress]
            fields[field.name] = kind, default
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type) and choices_of(hint, chosen, f"{option}."):
            inner = narrow(hint, chosen, f"{option}.")
            fields[field.name] = inner, _instance(inner)
    namespace: dict[str, Any] = {
        "__annotations__": {name: kind for name, (kind, _) in fields.items()},
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        **{name: default for name, (_, default) in fields.items()},
    }
    narrowed: type = dataclasses.dataclass(frozen=True, kw_only=True)(type(cls.__name__, (cls,), namespace))
    setattr(narrowed, _ORIGINAL, cls)
    return narrowed


def _instance(cls: type | None) -> Any:
    """An instance with all defaults, or a field without a default where one is missing."""
    if cls is None:
        return None
    required = [
        field
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return dataclasses.field() if required else cls()


def widen(config: Any) -> Any:
    """An instance of a class from `narrow` as one of the class it was made from."""
    original = getattr(type(config), _ORIGINAL, None)
    if original is None:
        return config
    return original(**{field.name: widen(getattr(config, field.name)) for field in dataclasses.fields(original)})
