"""Names for config classes, so that a saved run or a command line can say "gru" and mean `GRUConfig`.

A family of configs (timestep encoders, backbones, heads, distributions) shares a base class with a class attribute
`registry_kind`. A new member is one decorator away::

    @register("gru")
    @dataclass(frozen=True, kw_only=True)
    class GRUConfig(TrajEncoderConfig): ...   # TrajEncoderConfig.registry_kind = "traj_encoder"

    lookup("traj_encoder", "gru") is GRUConfig
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TypeVar

_ClassT = TypeVar("_ClassT", bound=type)

# The modules that register the built-in members of a kind; imported on the first lookup, never before.
_PROVIDERS: dict[str, tuple[str, ...]] = {
    "tstep_encoder": ("amago_nets.tstep_encoders",),
    "obs_encoder": ("amago_nets.tstep_encoders",),
    "cnn": ("amago_nets.cnn",),
    "traj_encoder": ("amago_nets.traj_encoders",),
    "actor": ("amago_nets.heads",),
    "critic": ("amago_nets.heads",),
    "distribution": ("amago_nets.distributions",),
}

_REGISTRY: dict[str, dict[str, type]] = {}


def register(name: str, *, kind: str | None = None) -> Callable[[_ClassT], _ClassT]:
    """Class decorator that gives a config class a name.

    Args:
        name: name within the kind, for example "gru".
        kind: family of the class; by default its attribute `registry_kind`.

    Returns:
        A decorator that returns the class unchanged.

    Raises:
        ValueError: (from the decorator) if the name is taken by another class, or no kind is known.
    """

    def decorate(cls: _ClassT) -> _ClassT:
        family = kind if kind is not None else getattr(cls, "registry_kind", None)
        if not isinstance(family, str) or not family:
            raise ValueError(
                f"kind={family!r} is not allowed for {cls.__qualname__}; "
                "pass register(name, kind=...) or set registry_kind"
            )
        members = _REGISTRY.setdefault(family, {})
        taken = members.get(name)
        # Reloading a module defines the same class again; only a different class is a clash.
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"name={name!r} is not allowed for {cls.__qualname__}: the {family} {name!r} is already "
                f"{taken.__module__}.{taken.__qualname__}; give a name not in {sorted(members)}"
            )
        members[name] = cls
        return cls

    return decorate


def lookup(kind: str, name: str) -> type:
    """Finds a registered class.

    Args:
        kind: family, for example "traj_encoder".
        name: name given to `register`.

    Returns:
        The class.

    Raises:
        ValueError: if the kind or the name is unknown.
    """
    members = _members(kind)
    if name not in members:
        raise ValueError(f"name={name!r} is not a registered {kind}; choose one of {sorted(members)}")
    return members[name]


def names(kind: str) -> tuple[str, ...]:
    """Lists what is registered under a kind, in alphabetical order.

    Args:
        kind: family, for example "traj_encoder".

    Returns:
        The names.

    Raises:
        ValueError: if the kind is unknown.
    """
    return tuple(sorted(_members(kind)))


def name_of(cls: type) -> tuple[str, str]:
    """Inverse of `lookup`.

    Args:
        cls: a registered class.

    Returns:
        `(kind, name)` such that `lookup(kind, name) is cls`.

    Raises:
        ValueError: if the class was never registered.
    """
    for kind, members in _REGISTRY.items():
        for name, member in members.items():
            if member is cls:
                return kind, name
    raise ValueError(f"cls={cls.__qualname__} is not registered; decorate it with amago_nets.registry.register(name)")


def _members(kind: str) -> dict[str, type]:
    for module in _PROVIDERS.get(kind, ()):
        importlib.import_module(module)
    if kind not in _REGISTRY:
        raise ValueError(f"kind={kind!r} is not known; choose one of {sorted({*_PROVIDERS, *_REGISTRY})}")
    return _REGISTRY[kind]
