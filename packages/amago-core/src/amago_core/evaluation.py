"""How well a policy does, on environments of its own and with a fixed number of episodes per lane.

Dimensions: N lanes, n episodes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from amago_core.vector_envs import autoreset_mode, metrics_of


class ActingPolicy(Protocol):
    """What can be evaluated: `Policy`, a scripted policy, or a user's own."""

    def reset(self, lanes: Any) -> None:
        """Begin new episodes: a number of lanes, or a bool array `[N]` of those that begin anew."""

    def act(self, obs: Any, reward: Any) -> Any:
        """Actions `[N, ...]` for the observations `[N, ...]` and the last rewards `[N]`."""


@dataclass(frozen=True)
class Evaluation:
    """Episodes of one evaluation.

    Attributes:
        returns: `[n]` sum of rewards.
        lengths: `[n]` steps.
        metrics: name to the values that the environment reported, in the order of its episodes.
        unfinished: episodes that were still running when `max_steps` was reached; not in the arrays above.
    """

    returns: np.ndarray
    lengths: np.ndarray
    metrics: dict[str, np.ndarray]
    unfinished: int = 0

    def summary(self) -> dict[str, float]:
        """Means, and `episodes`; a name is absent when there is nothing to average."""
        result = {"episodes": float(len(self.returns))}
        if len(self.returns):
            result["return"] = float(self.returns.mean())
            result["length"] = float(self.lengths.mean())
        if self.unfinished:
            result["unfinished"] = float(self.unfinished)
        result.update({name: float(values.mean()) for name, values in self.metrics.items()})
        return result


def evaluate(
    policy: ActingPolicy,
    env: VectorEnv,
    *,
    seed: int,
    episodes_per_lane: int = 1,
    max_steps: int | None = None,
) -> Evaluation:
    """Run a policy for the same number of episodes in every lane, so that long episodes count as much as short ones.

    Args:
        policy: what to evaluate; it is reset first.
        env: its autoreset mode is read from its metadata.
        seed: of the environment's reset; the same seed gives the same episodes.
        episodes_per_lane: how many.
        max_steps: stop after so many steps in any case; None waits for the last episode.

    Returns:
        The finished episodes.
    """
    if episodes_per_lane < 1:
        raise ValueError(f"episodes_per_lane must be >= 1; got {episodes_per_lane}")
    lanes, mode = env.num_envs, autoreset_mode(env)
    obs, _ = env.reset(seed=seed)
    policy.reset(lanes)
    reward, total = np.zeros(lanes, np.float32), np.zeros(lanes)
    length, finished = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
    resetting = np.zeros(lanes, bool)
    returns: list[float] = []
    lengths: list[int] = []
    metrics: dict[str, list[float]] = defaultdict(list)
    steps = 0
    while (finished < episodes_per_lane).any() and (max_steps is None or steps < max_steps):
        steps += 1
        obs, raw_reward, terminated, truncated, info = env.step(policy.act(obs, reward))
        reward = np.array(raw_reward, np.float32)
        counted = (finished < episodes_per_lane) & ~resetting
        for name, reporting, values in metrics_of(info):
            metrics[name].extend(values[counted[reporting]].tolist())
        total += np.where(counted, reward, 0.0)
        length += counted
        done = np.asarray(terminated, bool) | np.asarray(truncated, bool)
        ended = done & counted
        returns.extend(total[ended].tolist())
        lengths.extend(length[ended].tolist())
        finished += ended
        total[ended], length[ended] = 0.0, 0
        started = done
        if mode is AutoresetMode.NEXT_STEP:
            started, resetting = resetting, done & ~resetting
        elif mode is AutoresetMode.DISABLED and done.any():
            obs, _ = env.reset(options={"reset_mask": done})
        if started.any():
            policy.reset(started)
            reward[started] = 0.0
    unfinished = int((episodes_per_lane - finished).sum())
    arrays = {name: np.array(values) for name, values in metrics.items() if values}
    return Evaluation(np.array(returns), np.array(lengths), arrays, unfinished)
