"""Building vector environments, and reading what they report.

Dimensions: N lanes.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from amago_core.errors import EnvError
from amago_core.spaces import require_gymnasium_env

LEGACY_METRIC_PREFIX = "AMAGO_LOG_METRIC"


@dataclass(frozen=True)
class EnvFactory:
    """Makes vector environments of any number of lanes.

    Attributes:
        make_env: returns one `gymnasium.Env`.
        make_vec_env: takes a number of lanes, returns a `gymnasium.vector.VectorEnv`; wins over `make_env`.
        mode: how single environments are vectorised: in this process, or one process each.
    """

    make_env: Callable[[], gym.Env] | None = None
    make_vec_env: Callable[[int], VectorEnv] | None = None
    mode: Literal["sync", "async"] = "sync"

    def __post_init__(self) -> None:
        """Refuse a factory that can make nothing."""
        if self.make_env is None and self.make_vec_env is None:
            raise EnvError("an environment is needed: pass make_env (one environment) or make_vec_env (N lanes)")

    def build(self, lanes: int) -> VectorEnv:
        """A vector environment of `lanes` lanes.

        Raises:
            EnvError: if the callables return something else than Gymnasium environments, or another number of lanes.
        """
        if self.make_vec_env is not None:
            env: Any = self.make_vec_env(lanes)
            require_gymnasium_env(env)
            if not isinstance(env, VectorEnv):
                raise EnvError(f"make_vec_env must return a gymnasium.vector.VectorEnv; got {type(env).__name__}")
        else:
            assert self.make_env is not None
            vectorise = AsyncVectorEnv if self.mode == "async" else SyncVectorEnv
            probe = self.make_env()
            require_gymnasium_env(probe)
            if isinstance(probe, VectorEnv):
                raise EnvError("make_env must return a single environment; pass vectorised ones as make_vec_env")
            probe.close()
            env = vectorise([self.make_env] * lanes, autoreset_mode=AutoresetMode.SAME_STEP)
        if env.num_envs != lanes:
            raise EnvError(f"asked for {lanes} lanes, the vector environment has {env.num_envs}")
        return env

    @classmethod
    def restore(
        cls,
        stored: dict[str, Any] | None,
        make_env: Callable[[], gym.Env] | None,
        make_vec_env: Callable[[int], VectorEnv] | None,
        mode: Literal["sync", "async"] = "sync",
    ) -> EnvFactory:
        """A factory from callables if there are any, otherwise from what `to_json` stored.

        Raises:
            EnvError: if there is neither.
        """
        if make_env is not None or make_vec_env is not None:
            return cls(make_env, make_vec_env, mode)
        if stored is None:
            raise EnvError("the environment of this run cannot be made from Gymnasium's registry: pass make_env")
        spec = gym.envs.registration.EnvSpec.from_json(json.dumps(stored["spec"]))
        if stored["module"]:
            importlib.import_module(stored["module"])
        if stored["vectorized"]:
            return cls(None, lambda lanes: gym.make_vec(spec, num_envs=lanes), mode)
        return cls(lambda: gym.make(spec), None, mode)

    def to_json(self) -> dict[str, Any] | None:
        """How to make this environment again, if Gymnasium's registry knows it; None otherwise."""
        env: Any = self.make_vec_env(1) if self.make_vec_env is not None else self.make_env()  # type: ignore[misc]
        try:
            if env.spec is None:
                return None
            spec = json.loads(env.spec.to_json())
        except (ValueError, TypeError, AttributeError):
            # Arguments or wrappers that JSON cannot hold: the user passes make_env again when resuming.
            return None
        finally:
            env.close()
        return {"vectorized": self.make_vec_env is not None, "module": _registering_module(env), "spec": spec}


def _registering_module(env: Any) -> str | None:
    """Package to import so that the registry knows the environment; Gymnasium's own need none."""
    package = type(env.unwrapped).__module__.split(".")[0]
    return None if package in ("gymnasium", "__main__") else package


def autoreset_mode(env: VectorEnv) -> AutoresetMode:
    """When a vector environment starts a new episode, from its metadata.

    Raises:
        EnvError: if it does not say.
    """
    mode = (env.metadata or {}).get("autoreset_mode")
    if mode is None:
        raise EnvError(
            f"{type(env).__name__} does not name its autoreset mode: set metadata['autoreset_mode'] to one of "
            f"{', '.join(m.name for m in AutoresetMode)}"
        )
    return AutoresetMode(mode)


def supports_state(env: VectorEnv) -> bool:
    """True if an environment can save and restore itself exactly (`state_dict` and `load_state_dict`)."""
    inner = env.unwrapped
    return hasattr(inner, "state_dict") and hasattr(inner, "load_state_dict")


def metrics_of(info: dict[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Every metric reported in one step, in running and in ended episodes.

    Args:
        info: of `VectorEnv.step`.

    Yields:
        `(name, lanes [n], values [n])`: the lanes that reported it, and what.
    """
    for part in (info, info.get("final_info")):
        if not isinstance(part, dict):
            continue
        if isinstance(part.get("metrics"), dict):
            yield from _columns(part["metrics"])
        legacy = {k: v for k, v in part.items() if k.lstrip("_").startswith(LEGACY_METRIC_PREFIX)}
        for name, lanes, values in _columns(legacy):
            yield name.removeprefix(LEGACY_METRIC_PREFIX).strip(), lanes, values


def _columns(reported: dict[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for name, column in reported.items():
        if name.startswith("_") and name[1:] in reported:
            continue
        values = np.asarray(column, np.float64)
        present = reported.get(f"_{name}")
        lanes = np.arange(len(values)) if present is None else np.flatnonzero(present)
        if len(lanes):
            yield name, lanes, values[lanes]
