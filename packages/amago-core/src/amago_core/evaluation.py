"""How well a policy does, on environments of its own and with a fixed number of episodes per lane.

Dimensions: N lanes, n episodes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import VectorEnv

from amago_core import interrupts
from amago_core.lane_env import LaneEnv


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
        metrics: name to the values that the environment reported in these episodes, in the same order.
        unfinished: episodes that `max_steps` cut off or kept from beginning; nothing of them is in the arrays above.
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
        The finished episodes, in the order in which they ended.

    Raises:
        EnvError: if the environment breaks its own autoreset mode.
        ValueError: if a number is below 1.
    """
    for name, number in (("episodes_per_lane", episodes_per_lane), ("max_steps", max_steps)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be >= 1; got {number}")
    lane_env = LaneEnv(env)
    lanes = lane_env.lanes
    obs = lane_env.reset(seed)
    policy.reset(lanes)
    reward, total = np.zeros(lanes, np.float32), np.zeros(lanes)
    length, finished = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
    reported: list[list[tuple[str, float]]] = [[] for _ in range(lanes)]
    returns: list[float] = []
    lengths: list[int] = []
    metrics: dict[str, list[float]] = defaultdict(list)
    steps = 0
    while (finished < episodes_per_lane).any() and (max_steps is None or steps < max_steps):
        interrupts.check()
        steps += 1
        step = lane_env.step(policy.act(obs, reward))
        counted = (finished < episodes_per_lane) & step.stepped
        for name, reporting, values in step.metrics:
            for lane in np.flatnonzero(reporting & counted):
                reported[lane].append((name, float(values[lane])))
        total += step.reward
        length += step.stepped
        for lane in np.flatnonzero(step.done & counted):
            returns.append(float(total[lane]))
            lengths.append(int(length[lane]))
            for name, value in reported[lane]:
                metrics[name].append(value)
            reported[lane].clear()
        finished += step.done & counted
        total[step.done], length[step.done] = 0.0, 0
        obs, reward = step.obs, step.reward
        if step.started.any():
            reward[step.started] = 0.0
            policy.reset(step.started)
    unfinished = int((episodes_per_lane - finished).sum())
    arrays = {name: np.array(values) for name, values in metrics.items()}
    return Evaluation(np.array(returns), np.array(lengths, np.int64), arrays, unfinished)
