from __future__ import annotations

import itertools

import gymnasium
import numpy as np
import pytest

from amago_envs import MetaFrozenLake, MetaFrozenLakeVector
from amago_envs.toy import FrozenLakePlanner, RandomPolicy, lakes


def success_by_attempt(lanes: int, size: int, k_attempts: int, seed: int) -> np.ndarray:
    env = MetaFrozenLakeVector(lanes, size=size, k_attempts=k_attempts)
    policy = FrozenLakePlanner(size)
    obs, _ = env.reset(seed=seed)
    policy.reset(lanes)
    rewards, finished = np.zeros(lanes), np.zeros(lanes, dtype=bool)
    results = np.full((lanes, k_attempts), np.nan)
    while not finished.all():
        obs, rewards, terminated, _, info = env.step(policy.act(obs, rewards))
        for table in (info.get("metrics", {}), info.get("final_info", {}).get("metrics", {})):
            for index in range(k_attempts):
                name = f"attempt_{index}/success"
                if name in table:
                    rows = table[f"_{name}"] & ~finished
                    results[rows, index] = table[name][rows]
        finished |= terminated
        policy.reset(terminated)
    assert not np.isnan(results).any()
    return results.mean(axis=0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(4, [0.39, 0.72, 0.92, 0.99, 1.0]), (5, [0.24, 0.54, 0.78, 0.91, 0.98, 1.0])],
)
def test_success_by_attempt(size: int, expected: list[float]) -> None:
    lanes = 600
    success = success_by_attempt(lanes, size, len(expected), seed=7)
    target = np.array(expected)
    error = np.sqrt(target * (1 - target) / lanes) + 0.003
    assert (np.abs(success - target) < 4 * error).all(), success
    assert (np.diff(success) >= 0).all()


def test_first_attempt_is_as_good_as_any_policy_without_knowledge() -> None:
    # A path of S -> G with the fewest tiles has 2 S - 3 unseen ones; that it is free implies that the lake is solvable.
    size = 3
    inner = np.array(list(itertools.product([True, False], repeat=size * size - 2)))
    passable = np.ones((len(inner), size * size), dtype=bool)
    passable[:, 1:-1] = inner
    weight = np.where(inner, 0.8, 0.2).prod(axis=1)
    solvable = float(weight[lakes.have_path(passable, size)].sum())
    expected = 0.8 ** (2 * size - 3) / solvable
    first = success_by_attempt(1000, size, 1, seed=0)[0]
    assert abs(first - expected) < 4 * np.sqrt(expected * (1 - expected) / 1000)


def play_single(env: MetaFrozenLake, policy: FrozenLakePlanner, lake: list[str]) -> list[float]:
    obs, _ = env.reset(seed=0, options={"map": lake})
    policy.reset(1)
    reward, ended, results = 0.0, False, []
    while not ended:
        obs, reward, ended, _, info = env.step(policy.act(obs, reward))
        results += [value for name, value in info.get("metrics", {}).items() if name.endswith("/success")]
    return results


def test_it_learns_where_it_fell_from_observations_alone() -> None:
    env, policy = MetaFrozenLake(3, k_attempts=4), FrozenLakePlanner(3)
    assert play_single(env, policy, ["SFF", "HHF", "FFG"]) == [0, 0, 1, 1]
    assert policy.known_maps[0].tolist() == [[1, 1, 1], [2, 2, 1], [0, 0, 1]]


def test_it_plays_recover_mode() -> None:
    env, policy = MetaFrozenLake(3, k_attempts=2, recover_mode=True), FrozenLakePlanner(3)
    assert play_single(env, policy, ["SFF", "HHF", "FFG"]) == [1, 1]
    assert policy.known_maps[0][1].tolist() == [2, 2, 1]


def test_slipping_does_not_confuse_it() -> None:
    settings = {"size": 4, "k_attempts": 6, "slip_chance": 0.3}
    env, policy = MetaFrozenLake(**settings), FrozenLakePlanner(4, slip_chance=0.3)
    for seed in range(10):
        obs, _ = env.reset(seed=seed)
        policy.reset(1)
        reward, ended = 0.0, False
        while not ended:
            obs, reward, ended, _, info = env.step(policy.act(obs, reward))
            known = policy.known_maps[0]
            assert (env.map[known == 2] == lakes.HOLE).all() and (env.map[known == 1] != lakes.HOLE).all()
        assert info["metrics"]["attempt_5/success"] == 1


def test_forms_of_reset_and_act() -> None:
    policy = FrozenLakePlanner(4)
    start = np.tile(np.array([0, 0, 1, 0], dtype=np.float32), (3, 1))
    assert policy.act(start).tolist() == [1, 1, 1]
    fell = start.copy()
    assert policy.act(fell, np.zeros(3)).tolist() == [3, 3, 3]
    policy.reset(np.array([True, False, False]))
    policy.reset([1])
    assert policy.known_maps[:, 1, 0].tolist() == [0, 0, 2]
    policy.reset()
    assert (policy.known_maps == 0).all()
    assert isinstance(policy.act(start[0]), int)


def test_random_policy() -> None:
    env = gymnasium.make_vec("amago_envs:MetaFrozenLake-v1", num_envs=16, size=4)
    obs, _ = env.reset(seed=0)
    policies = [RandomPolicy(5, seed=3) for _ in range(2)]
    for policy in policies:
        policy.reset(16)
    draws = [policy.act(obs, np.zeros(16)) for policy in policies]
    np.testing.assert_array_equal(*draws)
    counts = np.bincount(np.concatenate([policies[0].act(obs) for _ in range(300)]), minlength=5)
    assert counts.size == 5 and (np.abs(counts / counts.sum() - 0.2) < 0.03).all()
    with pytest.raises(ValueError, match="num_actions"):
        RandomPolicy(0)
