"""Exploration: noise between the policy and the environments, for all lanes at once.

An exploration object lives in the rollout loop. It owns its generator and its counters, and both are part of the
checkpoint. It is for collecting training data only: evaluation does not use it.

Symbols: `n` environment steps a lane has taken in training, `t` steps since the lane's rollout started, `N` lanes,
`A` action size.
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from amago_core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from amago_nets.specs import ActionSpec

__all__ = [
    "BilevelEpsilonGreedy",
    "BilevelEpsilonGreedyConfig",
    "EpsilonGreedy",
    "EpsilonGreedyConfig",
    "Exploration",
    "ExplorationConfig",
]

_ACTION_KINDS = ("discrete", "continuous", "multi_binary")


class Exploration(abc.ABC):
    """Epsilon-noise on the actions of `N` lanes; subclasses say how large epsilon is.

    With probability epsilon a discrete action is replaced by a uniformly drawn one (so it changes with probability
    `eps * (1 - 1/A)`); to a continuous one `eps * N(0, 1)` is added per dimension, clipped to [-1, 1]; each bit of a
    multi-binary one flips with probability `eps / 2`.

    A custom schedule subclasses this (or `EpsilonGreedy`) and overrides `eps`.

    Args:
        lanes: number of lanes N, >= 1.
        action_spec: what an action is.
        seed: seed of the generator; everything is determined by it.
        randomize: multiply epsilon by a factor that each lane draws from [0, 1) at every rollout start.

    Raises:
        ConfigError: if `lanes`, `seed` or the kind or size of the action is not allowed.
    """

    def __init__(self, lanes: int, action_spec: ActionSpec, seed: int, *, randomize: bool = True) -> None:
        if lanes < 1:
            raise ConfigError(f"lanes: got {lanes}, must be >= 1")
        if seed < 0:
            raise ConfigError(f"seed: got {seed}, must be >= 0")
        if action_spec.kind not in _ACTION_KINDS:
            raise ConfigError(f"action_spec.kind: got {action_spec.kind!r}, allowed are {', '.join(_ACTION_KINDS)}")
        if action_spec.size < 1:
            raise ConfigError(f"action_spec.size: got {action_spec.size}, must be >= 1")
        self.lanes = lanes
        self.action_spec = action_spec
        self.randomize = randomize
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._n = np.zeros(lanes, dtype=np.int64)
        self._t = np.zeros(lanes, dtype=np.int64)
        self._multiplier = np.ones(lanes, dtype=np.float64)
        self.start_episode(np.ones(lanes, dtype=np.bool_))

    @abc.abstractmethod
    def eps(self, n: NDArray[np.int64], t: NDArray[np.int64]) -> NDArray[np.float64]:
        """Epsilon before the random multiplier.

        Args:
            n: `[N]` environment steps of each lane in training.
            t: `[N]` steps of each lane since its rollout started.

        Returns:
            `[N]` (or a scalar for all lanes), in [0, 1].
        """

    def start_episode(self, lane_mask: NDArray[np.bool_]) -> None:
        """Start a new rollout in some lanes: `t` becomes 0 and the multiplier is drawn anew.

        Args:
            lane_mask: `[N]` bool; True where a rollout starts.

        Raises:
            ValueError: if `lane_mask` is not `[N]` bool.
        """
        mask = self._lane_mask(lane_mask, "lane_mask")
        self._t[mask] = 0
        if self.randomize:
            self._multiplier[mask] = self._rng.random(int(mask.sum()))

    def epsilon(self) -> NDArray[np.float64]:
        """Epsilon of the next action of every lane, multiplier included.

        Returns:
            `[N]` float64 in [0, 1].

        Raises:
            ValueError: if `eps` was overridden and returned something else.
        """
        eps = np.asarray(self.eps(self._n.copy(), self._t.copy()), dtype=np.float64)
        if eps.shape not in ((), (self.lanes,)):
            raise ValueError(f"eps(n, t): returned shape {eps.shape}, allowed are ({self.lanes},) and ()")
        if not np.all((eps >= 0.0) & (eps <= 1.0)):
            raise ValueError(f"eps(n, t): returned {eps}, all values must be in [0, 1]")
        return eps * self._multiplier

    def apply(self, actions: NDArray[Any], active: NDArray[np.bool_] | None = None) -> NDArray[Any]:
        """Disturb one action per lane and count one environment step.

        Args:
            actions: `[N]` integers in `[0, A)` (discrete), `[N, A]` float in [-1, 1] (continuous), or `[N, A]` of 0
                and 1 (multi-binary), as the policy chose them. Not modified.
            active: `[N]` bool; lanes where it is False keep their action and their counters, for steps that only
                reset an environment. None: all lanes.

        Returns:
            The actions to execute, a new array of the shape and dtype of `actions`.

        Raises:
            ValueError: if the number of lanes, the shape, the dtype or a value is not allowed.
        """
        actions = np.asarray(actions)
        self._check_actions(actions)
        eps = self.epsilon()
        if active is not None:
            mask = self._lane_mask(active, "active")
            eps = np.where(mask, eps, 0.0)
        disturbed = self._disturb(actions, eps)
        step = 1 if active is None else mask.astype(np.int64)
        self._n += step
        self._t += step
        return disturbed

    @property
    def steps(self) -> NDArray[np.int64]:
        """`[N]` environment steps of each lane in training (a copy)."""
        return self._n.copy()

    @property
    def multiplier(self) -> NDArray[np.float64]:
        """`[N]` current random factors (a copy); ones if `randomize` is False."""
        return self._multiplier.copy()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly, as JSON-able values.

        Returns:
            Counters, multipliers and the state of the generator.
        """
        return {
            "n": self._n.tolist(),
            "t": self._t.tolist(),
            "multiplier": self._multiplier.tolist(),
            "generator": copy.deepcopy(dict(self._rng.bit_generator.state)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; nothing changes if it is refused.

        Args:
            state: from `state_dict` of an object with as many lanes.

        Raises:
            CheckpointError: if an entry is missing or made for another number of lanes or another generator.
        """
        missing = sorted({"n", "t", "multiplier", "generator"} - set(state))
        if missing:
            raise CheckpointError(f"exploration state: missing {missing}, found {sorted(state)}")
        n = np.asarray(state["n"], dtype=np.int64)
        t = np.asarray(state["t"], dtype=np.int64)
        multiplier = np.asarray(state["multiplier"], dtype=np.float64)
        for name, value in (("n", n), ("t", t), ("multiplier", multiplier)):
            if value.shape != (self.lanes,):
                raise CheckpointError(f"exploration state: {name} has shape {value.shape}, expected {self.lanes} lanes")
        bit_generator = np.random.PCG64(0)
        try:
            bit_generator.state = copy.deepcopy(state["generator"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"exploration state: generator is not a state of PCG64: {error!r}") from error
        self._n, self._t, self._multiplier = n.copy(), t.copy(), multiplier.copy()
        self._rng = np.random.Generator(bit_generator)

    def _disturb(self, actions: NDArray[Any], eps: NDArray[np.float64]) -> NDArray[Any]:
        # The same amount is drawn whatever the actions are, so that the stream depends on the seed alone.
        if self.action_spec.kind == "discrete":
            explore = self._rng.random(self.lanes) < eps
            uniform = self._rng.integers(self.action_spec.size, size=self.lanes)
            return np.where(explore, uniform, actions).astype(actions.dtype)
        if self.action_spec.kind == "continuous":
            noise = self._rng.standard_normal(actions.shape)
            return np.clip(actions + eps[:, None] * noise, -1.0, 1.0).astype(actions.dtype)
        flip = self._rng.random(actions.shape) < 0.5 * eps[:, None]
        return np.where(flip, actions == 0, actions != 0).astype(actions.dtype)

    def _check_actions(self, actions: NDArray[Any]) -> None:
        kind, size = self.action_spec.kind, self.action_spec.size
        expected = (self.lanes,) if kind == "discrete" else (self.lanes, size)
        if actions.shape != expected:
            raise ValueError(f"actions: got shape {actions.shape}, expected {expected} ({kind}, {self.lanes} lanes)")
        if kind == "discrete":
            if actions.dtype.kind not in "iu":
                raise ValueError(f"actions: got dtype {actions.dtype}, discrete actions must be integers")
            if np.any(actions < 0) or np.any(actions >= size):
                raise ValueError(
                    f"actions: got values in [{actions.min()}, {actions.max()}], allowed are 0 to {size - 1}"
                )
        elif kind == "continuous":
            if actions.dtype.kind != "f":
                raise ValueError(f"actions: got dtype {actions.dtype}, continuous actions must be floats")
            # Written so that NaN is refused too.
            if not np.all(np.abs(actions) <= 1.0):
                raise ValueError(f"actions: got values in [{actions.min()}, {actions.max()}], allowed are -1.0 to 1.0")
        elif not np.all((actions == 0) | (actions == 1)):
            raise ValueError(f"actions: got values in [{actions.min()}, {actions.max()}], allowed are 0 and 1")

    def _lane_mask(self, mask: NDArray[np.bool_], name: str) -> NDArray[np.bool_]:
        mask = np.asarray(mask)
        if mask.shape != (self.lanes,) or mask.dtype != np.bool_:
            raise ValueError(f"{name}: got shape {mask.shape}, dtype {mask.dtype}; expected ({self.lanes},) bool")
        return mask


class EpsilonGreedy(Exploration):
    """Epsilon falls linearly with the environment steps of the lane: `max(s0 - (s0-s1) * n / anneal, s1)`.

    Args:
        config: the schedule.
        lanes: number of lanes N, >= 1.
        action_spec: what an action is.
        seed: seed of the generator.
    """

    def __init__(self, config: EpsilonGreedyConfig, lanes: int, action_spec: ActionSpec, seed: int) -> None:
        super().__init__(lanes, action_spec, seed, randomize=config.randomize)
        self.config = config

    def eps(self, n: NDArray[np.int64], t: NDArray[np.int64]) -> NDArray[np.float64]:
        """Epsilon before the random multiplier.

        Args:
            n: `[N]` environment steps of each lane in training.
            t: `[N]` steps since the rollout started; not used.

        Returns:
            `[N]` in [0, 1].
        """
        return _anneal(self.config.start_eps, self.config.end_eps, self.config.steps_anneal, n)


class BilevelEpsilonGreedy(Exploration):
    """Epsilon falls within a rollout, and both of its ends fall over training.

    `s(n) + (e(n) - s(n)) * min(t / horizon, 1)`, where `s` and `e` are annealed as in `EpsilonGreedy`: late attempts
    of a rollout exploit what early ones explored.

    Args:
        config: the schedule.
        lanes: number of lanes N, >= 1.
        action_spec: what an action is.
        seed: seed of the generator.

    Source: Grigsby et al., "AMAGO: Scalable In-Context Reinforcement Learning for Adaptive Agents" (ICLR 2024).
    """

    def __init__(self, config: BilevelEpsilonGreedyConfig, lanes: int, action_spec: ActionSpec, seed: int) -> None:
        super().__init__(lanes, action_spec, seed, randomize=config.randomize)
        self.config = config

    def eps(self, n: NDArray[np.int64], t: NDArray[np.int64]) -> NDArray[np.float64]:
        """Epsilon before the random multiplier.

        Args:
            n: `[N]` environment steps of each lane in training.
            t: `[N]` steps since the rollout started.

        Returns:
            `[N]` in [0, 1].
        """
        config = self.config
        start = _anneal(config.eps_start_start, config.eps_start_end, config.steps_anneal, n)
        end = _anneal(config.eps_end_start, config.eps_end_end, config.steps_anneal, n)
        return start + (end - start) * np.minimum(t / config.rollout_horizon, 1.0)


@dataclass(frozen=True, kw_only=True)
class ExplorationConfig:
    """Base of the exploration configurations; a custom one overrides `build`.

    Args:
        randomize: multiply epsilon by a factor that each lane draws from [0, 1) at every rollout start.
    """

    randomize: bool = True

    def build(self, lanes: int, action_spec: ActionSpec, seed: int) -> Exploration:
        """Build the exploration of a rollout loop.

        Args:
            lanes: number of lanes N, >= 1.
            action_spec: what an action is.
            seed: seed of the generator.

        Returns:
            The exploration, with fresh counters.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement build()")


@dataclass(frozen=True, kw_only=True)
class EpsilonGreedyConfig(ExplorationConfig):
    """Configures `EpsilonGreedy`.

    Args:
        start_eps: epsilon at the first step, in [0, 1].
        end_eps: epsilon after annealing, in [0, `start_eps`].
        steps_anneal: environment steps per lane over which epsilon falls, >= 1.
        randomize: multiply epsilon by a factor that each lane draws from [0, 1) at every rollout start.
    """

    start_eps: float = 1.0
    end_eps: float = 0.05
    steps_anneal: int = 1_000_000

    def __post_init__(self) -> None:
        """Check the values."""
        _require_falling("start_eps", self.start_eps, "end_eps", self.end_eps)
        _require_steps("steps_anneal", self.steps_anneal)

    def build(self, lanes: int, action_spec: ActionSpec, seed: int) -> Exploration:
        """Build an `EpsilonGreedy`.

        Args:
            lanes: number of lanes N, >= 1.
            action_spec: what an action is.
            seed: seed of the generator.

        Returns:
            The exploration, with fresh counters.
        """
        return EpsilonGreedy(self, lanes, action_spec, seed)


@dataclass(frozen=True, kw_only=True)
class BilevelEpsilonGreedyConfig(ExplorationConfig):
    """Configures `BilevelEpsilonGreedy`.

    Args:
        rollout_horizon: steps of a rollout over which epsilon moves from its start to its end value, >= 1.
        eps_start_start: epsilon at a rollout's start, at the start of training.
        eps_start_end: epsilon at a rollout's start, after annealing; at most `eps_start_start`.
        eps_end_start: epsilon at a rollout's end, at the start of training.
        eps_end_end: epsilon at a rollout's end, after annealing; at most `eps_end_start`.
        steps_anneal: environment steps per lane over which both fall, >= 1.
        randomize: multiply epsilon by a factor that each lane draws from [0, 1) at every rollout start.
    """

    rollout_horizon: int
    eps_start_start: float = 1.0
    eps_start_end: float = 0.05
    eps_end_start: float = 0.8
    eps_end_end: float = 0.01
    steps_anneal: int = 1_000_000

    def __post_init__(self) -> None:
        """Check the values."""
        _require_falling("eps_start_start", self.eps_start_start, "eps_start_end", self.eps_start_end)
        _require_falling("eps_end_start", self.eps_end_start, "eps_end_end", self.eps_end_end)
        _require_steps("steps_anneal", self.steps_anneal)
        _require_steps("rollout_horizon", self.rollout_horizon)

    def build(self, lanes: int, action_spec: ActionSpec, seed: int) -> Exploration:
        """Build a `BilevelEpsilonGreedy`.

        Args:
            lanes: number of lanes N, >= 1.
            action_spec: what an action is.
            seed: seed of the generator.

        Returns:
            The exploration, with fresh counters.
        """
        return BilevelEpsilonGreedy(self, lanes, action_spec, seed)


def _anneal(start: float, end: float, steps: int, n: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.maximum(start - (start - end) * n / steps, end)


def _require_falling(start_name: str, start: float, end_name: str, end: float) -> None:
    for name, value in ((start_name, start), (end_name, end)):
        if not (math.isfinite(value) and 0.0 <= value <= 1.0):
            raise ConfigError(f"{name}: got {value}, must be in [0, 1]")
    if end > start:
        raise ConfigError(f"{end_name}: got {end}, must be at most {start_name}, which is {start}")


def _require_steps(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: got {value!r}, must be an integer >= 1")
