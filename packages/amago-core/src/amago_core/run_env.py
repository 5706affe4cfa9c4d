"""The environments of a run: what `env.json` must say about them, and making them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import gymnasium as gym
from gymnasium.vector import VectorEnv

from amago_core.config import ExperimentConfig
from amago_core.errors import ConfigError, EnvError
from amago_core.spaces_json import space_to_json
from amago_core.vector_envs import EnvFactory

Makers = tuple[Callable[[], gym.Env] | None, Callable[[int], VectorEnv] | None]
"""`make_env` and `make_vec_env`."""
_SPACES = ("observation_space", "action_space")


def spaces_of(env: VectorEnv) -> dict[str, Any]:
    """The spaces of one lane, as JSON values."""
    return {name: space_to_json(getattr(env, f"single_{name}")) for name in _SPACES}


def describe_env(env: VectorEnv, factory: EnvFactory, val_factory: EnvFactory) -> dict[str, Any]:
    """Content of `env.json`: both spaces, and how to make the environments again (None where JSON cannot say)."""
    stored = factory.to_json()
    return {
        **spaces_of(env),
        "factory": stored,
        "val_factory": stored if val_factory is factory else val_factory.to_json(),
        "validates_in_training_env": val_factory is factory,
    }


def require_same_spaces(env: VectorEnv, expected: dict[str, Any], name: str = "the environment") -> None:
    """Refuse an environment whose spaces are not those of the run.

    Args:
        env: the environment.
        expected: from `spaces_of` or `describe_env`.
        name: of the environment, for the message.

    Raises:
        EnvError: naming the space that differs.
    """
    for space, now in spaces_of(env).items():
        if now != expected[space]:
            raise EnvError(f"{space} of {name} is not that of the run: {now} instead of {expected[space]}")


def require_room_for_positions(config: ExperimentConfig, env_json: dict[str, Any]) -> None:
    """Refuse learnable positions that end before the episodes do, where the registry names a time limit.

    Args:
        config: of the run.
        env_json: from `describe_env`.

    Raises:
        ConfigError: naming the number that is needed.
    """
    rows = getattr(config.traj_encoder, "max_time_idx", None)
    if rows is None or getattr(config.traj_encoder, "positions", None) != "learnable":
        return
    specs = [(env_json[name] or {}).get("spec", {}) for name in ("factory", "val_factory")]
    limit = max(spec.get("max_episode_steps") or 0 for spec in specs)
    if rows <= limit:
        raise ConfigError(
            f"max_time_idx of the learnable positions must be >= {limit + 1}, one more than the environment's time "
            f"limit; got {rows}"
        )


def restore_factories(
    env_json: dict[str, Any], train: Makers, val: Makers, mode: Literal["sync", "async"]
) -> tuple[EnvFactory, EnvFactory]:
    """Makers of the training and the validation environments of a stored run.

    Args:
        env_json: from `describe_env`.
        train: as given for training; `(None, None)` uses Gymnasium's registry.
        val: as given for validation; `(None, None)` uses what the run has validated in.
        mode: how single environments are vectorised.

    Returns:
        Both; the same object twice if the run validates where it trains.

    Raises:
        EnvError: if one cannot be made from the registry and was not given.
    """
    factory = _restore(env_json["factory"], train, mode, "make_env or make_vec_env")
    if val == (None, None) and env_json["validates_in_training_env"]:
        return factory, factory
    return factory, _restore(env_json["val_factory"], val, mode, "make_val_env or make_val_vec_env")


def _restore(
    stored: dict[str, Any] | None, makers: Makers, mode: Literal["sync", "async"], arguments: str
) -> EnvFactory:
    if stored is None and makers == (None, None):
        raise EnvError(f"an environment of this run cannot be made from Gymnasium's registry: pass {arguments}")
    try:
        return EnvFactory.restore(stored, *makers, mode)
    except (gym.error.Error, ImportError) as error:
        raise EnvError(f"an environment of this run cannot be made again ({error}): pass {arguments}") from error
