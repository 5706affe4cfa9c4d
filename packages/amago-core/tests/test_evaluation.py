"""Evaluation: quotas per lane, nothing counted that is not finished, every autoreset mode."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from core_helpers import make_policy, trace_envs
from gymnasium.vector import AutoresetMode

from amago_core.evaluation import Evaluation, evaluate

MODES = list(AutoresetMode)
LIMITS = [(3, 2), (1, 4), (9,)]


class Scripted:
    """Always the same action; writes down what it is told."""

    def __init__(self) -> None:
        self.resets: list[Any] = []
        self.rewards: list[np.ndarray] = []
        self.first: list[list[bool]] = []

    def reset(self, lanes: Any) -> None:
        self.resets.append(lanes)

    def act(self, obs: np.ndarray, reward: np.ndarray) -> np.ndarray:
        self.rewards.append(reward.copy())
        self.first.append((obs[:, 0] % 100 == 0).tolist())
        return np.full(len(obs), 8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quota", [1, 2, 5])
def test_every_lane_finishes_its_quota(quota: int, mode: AutoresetMode) -> None:
    result = evaluate(Scripted(), trace_envs(LIMITS, mode), seed=0, episodes_per_lane=quota)
    lengths = sorted(limits[e % len(limits)] for limits in LIMITS for e in range(quota))
    assert sorted(result.lengths.tolist()) == lengths
    assert result.unfinished == 0 and len(result.returns) == 3 * quota
    # Metrics belong to the same episodes, in the same order; the last reset and idle lanes add nothing.
    assert result.metrics["length"].tolist() == result.lengths.tolist()
    assert sorted(result.metrics["episode"].tolist()) == sorted(list(range(1, quota + 1)) * 3)
    assert len(result.metrics["Time"]) == sum(lengths) and "of_reset" not in result.metrics
    expected = {(n, lane): sum(range(1, n + 1)) + n * lane / 10 for lane, a in enumerate(LIMITS) for n in a}
    for length, value in zip(result.lengths, result.returns, strict=True):
        assert any(value == pytest.approx(v) for (n, _), v in expected.items() if n == length)


def test_all_modes_agree() -> None:
    env = trace_envs(LIMITS, AutoresetMode.SAME_STEP)
    policies = {mode: make_policy(env, "transformer", sample=False) for mode in MODES}
    results = {m: evaluate(p, trace_envs(LIMITS, m), seed=0, episodes_per_lane=4) for m, p in policies.items()}
    reference = results[AutoresetMode.SAME_STEP]
    for result in results.values():
        assert sorted(result.returns.tolist()) == sorted(reference.returns.tolist())
        assert result.summary() == pytest.approx(reference.summary())


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_is_told_where_episodes_begin(mode: AutoresetMode) -> None:
    policy = Scripted()
    evaluate(policy, trace_envs([(2,), (3,)], mode), seed=0, episodes_per_lane=3)
    assert policy.resets[0] == 2
    masks = iter(policy.resets[1:])
    for first, reward in zip(policy.first, policy.rewards, strict=True):
        assert not reward[first].any()
        if policy.first[0] is not first and any(first):
            assert next(masks).tolist() == first


@pytest.mark.parametrize("mode", MODES)
def test_what_is_cut_off_is_reported_and_not_counted(mode: AutoresetMode) -> None:
    result = evaluate(Scripted(), trace_envs([(3,), (8,)], mode), seed=0, episodes_per_lane=2, max_steps=7)
    assert result.lengths.tolist() == [3, 3] and result.unfinished == 2
    assert result.metrics["length"].tolist() == [3, 3]
    assert result.metrics["Time"].tolist() == [1, 2, 3, 1, 2, 3]  # Nothing of the lane that never ended.
    summary = result.summary()
    assert summary["unfinished"] == 2 and summary["episodes"] == 2


def test_never_nan() -> None:
    result = evaluate(Scripted(), trace_envs([(9,)], AutoresetMode.SAME_STEP), seed=0, max_steps=4)
    assert result.summary() == {"episodes": 0.0, "unfinished": 1.0}
    assert result.returns.shape == result.lengths.shape == (0,) and result.metrics == {}
    assert Evaluation(np.zeros(2), np.ones(2), {"x": np.ones(3)}).summary() == {
        "episodes": 2.0,
        "return": 0.0,
        "length": 1.0,
        "x": 1.0,
    }


@pytest.mark.parametrize("settings", [{"episodes_per_lane": 0}, {"max_steps": 0}])
def test_bad_numbers_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        evaluate(Scripted(), trace_envs([(3,)], AutoresetMode.SAME_STEP), seed=0, **settings)


def test_a_native_environment_and_its_seed() -> None:
    pytest.importorskip("amago_envs")
    env = gym.make_vec("amago_envs:MetaFrozenLake-v1", num_envs=4, size=3, k_attempts=3, max_attempt_steps=6)
    first, second, other = (
        evaluate(make_policy(env, "transformer", seed=0), env, seed=seed, episodes_per_lane=2) for seed in (1, 1, 2)
    )
    assert first.returns.tolist() == second.returns.tolist() and first.summary() == second.summary()
    assert first.lengths.tolist() != other.lengths.tolist()
    assert len(first.metrics["attempt_0/success"]) == len(first.metrics["success_rate"]) == 8
    totals = sum(first.metrics[f"attempt_{i}/success"] for i in range(3))
    assert totals.tolist() == first.metrics["total_successes"].tolist() == first.returns.tolist()
