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
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper

from amago_core import interrupts
from amago_core.errors import EnvError
from amago_core.spaces import require_gymnasium_env

LEGACY_METRIC_PREFIX = "AMAGO_LOG_METRIC"

Metric = tuple[str, np.ndarray, np.ndarray]
"""Name, `[N]` bool of the lanes that reported it, `[N]` float64 values."""


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
            probe = self.make_env()
            require_gymnasium_env(probe)
            if isinstance(probe, VectorEnv):
                raise EnvError("make_env must return a single environment; pass vectorised ones as make_vec_env")
            probe.close()
            make_envs = [self.make_env] * lanes
            if self.mode == "async":
                with interrupts.ignored():
                    env = AsyncVectorEnv(make_envs, autoreset_mode=AutoresetMode.SAME_STEP)
            else:
                env = SyncVectorEnv(make_envs, autoreset_mode=AutoresetMode.SAME_STEP)
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
            ImportError: if the package of a stored environment is not installed.
        """
        if make_env is not None or make_vec_env is not None:
            return cls(make_env, make_vec_env, mode)
        if stored is None:
            raise EnvError("the environment of this run cannot be made from Gymnasium's registry: pass make_env")
        if stored["module"]:
            importlib.import_module(stored["module"])
        spec = gym.envs.registration.EnvSpec.from_json(json.dumps(stored["spec"]))
        if stored["vectorized"]:
            spec.kwargs.pop("num_envs", None)  # It would win over the argument.
            return cls(None, lambda lanes: gym.make_vec(spec, num_envs=lanes), mode)
        return cls(lambda: gym.make(spec), None, mode)

    def to_json(self) -> dict[str, Any] | None:
        """How to make this environment again, if Gymnasium's registry knows it; None otherwise.

        None is no failure: the user passes `make_env` again when resuming.
        """
        env: Any = self.make_vec_env(1) if self.make_vec_env is not None else self.make_env()  # type: ignore[misc]
        try:
            spec = None if env.spec is None else json.loads(env.spec.to_json())
        except (ValueError, TypeError, AttributeError):
            # Arguments that JSON cannot hold.
            spec = None
        finally:
            env.close()
        # The spec of a wrapped vector environment says nothing of the wrapper.
        if spec is None or isinstance(env, VectorWrapper) or not _remakable(spec):
            return None
        return {"vectorized": self.make_vec_env is not None, "module": _registering_module(spec), "spec": spec}


def _remakable(spec: dict[str, Any]) -> bool:
    """Whether all classes a spec names can be found, and wrapped, by another process."""
    wrappers = spec["additional_wrappers"]
    points = [spec["entry_point"], spec["vector_entry_point"], *(w["entry_point"] for w in wrappers)]
    found = not any(point is not None and point.startswith("__main__") for point in points)
    return found and all(wrapper["kwargs"] is not None for wrapper in wrappers)


def _registering_module(spec: dict[str, Any]) -> str | None:
    """Package to import so that the registry knows the environment; Gymnasium's own need none."""
    package = (spec["entry_point"] or spec["vector_entry_point"]).split(".")[0].split(":")[0]
    return None if package == "gymnasium" else package


def autoreset_mode(env: VectorEnv) -> AutoresetMode:
    """When a vector environment starts a new episode.

    Raises:
        EnvError: if it does not say.
    """
    # Gymnasium's own vector environments write the mode into the metadata of the environment's class, where the next
    # one built from that class overwrites it; their attribute is right.
    mode = getattr(env.unwrapped, "autoreset_mode", None) or (env.metadata or {}).get("autoreset_mode")
    try:
        return AutoresetMode(mode)
    except ValueError:
        raise EnvError(
            f"{type(env).__name__} does not name its autoreset mode: set metadata['autoreset_mode'] to one of "
            f"{', '.join(m.name for m in AutoresetMode)}; got {mode!r}"
        ) from None


def supports_state(env: VectorEnv) -> bool:
    """True if an environment can save and restore itself exactly (`state_dict` and `load_state_dict`).

    A wrapper must have both itself: what it wraps knows nothing of the wrapper's own state.
    """
    return all(callable(getattr(type(env), name, None)) for name in ("state_dict", "load_state_dict"))


def metrics_of(info: dict[str, Any], lanes: np.ndarray) -> Iterator[Metric]:
    """Metrics reported in one step.

    Args:
        info: of `VectorEnv.step`, or the `final_info` in it.
        lanes: `[N]` bool; only reports of these lanes count.

    Yields:
        Name, `[N]` bool of the lanes that reported it, `[N]` float64 values. Values that are not finite are left out.

    Raises:
        EnvError: if something else than a number is reported.
    """
    reported = info.get("metrics")
    if isinstance(reported, dict):
        yield from _columns(reported, lanes & info.get("_metrics", True))
    legacy = {k: v for k, v in info.items() if k.lstrip("_").startswith(LEGACY_METRIC_PREFIX)}
    for name, present, values in _columns(legacy, lanes):
        yield name.removeprefix(LEGACY_METRIC_PREFIX).strip(), present, values


def _columns(reported: dict[str, Any], lanes: np.ndarray) -> Iterator[Metric]:
    for name, column in reported.items():
        if name.startswith("_") and name[1:] in reported:
            continue
        present = lanes & reported.get(f"_{name}", True)
        if not present.any():
            continue
        try:
            values = np.asarray(column, np.float64)
        except (TypeError, ValueError):
            values = np.empty(0)
        if values.shape != lanes.shape:
            raise EnvError(f"metric {name!r} must be one number for each of the {len(lanes)} lanes; got {column!r}")
        present &= np.isfinite(values)
        if present.any():
            yield name, present, values
