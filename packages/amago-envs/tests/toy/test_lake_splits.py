"""The splits of MetaFrozenLake: no lake in both, every lake in one."""

from __future__ import annotations

import itertools

import gymnasium
import numpy as np
import pytest

from amago_envs import MetaFrozenLake, MetaFrozenLakeVector
from amago_envs.toy import lakes
from amago_envs.toy.planner import FrozenLakePlanner


def sampled(split: str, lanes: int = 512, seed: int = 0) -> set[bytes]:
    env = MetaFrozenLakeVector(lanes, 4, split=split)
    env.reset(seed=seed)
    return {lake.tobytes() for lake in env.maps}


def test_no_lake_is_in_both_splits() -> None:
    train = sampled("train") | sampled("train", seed=10_000)
    held_out = sampled("held_out") | sampled("held_out", seed=10_000)
    assert len(train) > 100 and len(held_out) > 50
    assert not train & held_out


def test_held_out_is_about_a_fifth_of_all_3x3_maps() -> None:
    passable = np.array([(True, *middle, True) for middle in itertools.product((True, False), repeat=7)])
    share = lakes.held_out(passable).mean()
    assert 0.1 < share < 0.3


def test_splits_hold_in_automatic_resets_too() -> None:
    env = MetaFrozenLakeVector(64, 3, k_attempts=1, split="held_out")
    env.reset(seed=0)
    generator = np.random.default_rng(0)
    for _ in range(100):
        env.step(generator.integers(0, 5, 64))
        walkable = env.maps.reshape(64, 9) != lakes.HOLE
        assert lakes.held_out(walkable).all()


def test_single_equals_vector() -> None:
    single = MetaFrozenLake(4, split="held_out")
    single.reset(seed=5)
    vector = MetaFrozenLakeVector(2, 4, split="held_out")
    vector.reset(seed=4)
    np.testing.assert_array_equal(single.map, vector.maps[1])


def test_planner_does_on_held_out_lakes_what_it_does_on_all() -> None:
    env = MetaFrozenLakeVector(512, 4, k_attempts=5, split="held_out")
    policy = FrozenLakePlanner(4)
    policy.reset(512)
    obs, _ = env.reset(seed=0)
    reward = np.zeros(512)
    total, alive = np.zeros(512), np.ones(512, bool)
    while alive.any():
        obs, reward, terminated, _, _ = env.step(policy.act(obs, reward))
        total += reward * alive
        alive &= ~terminated
        policy.reset(terminated)
    assert 3.85 < total.mean() < 4.2


@pytest.mark.parametrize("kwargs", [{"size": 4, "split": "test"}, {"size": 2, "split": "held_out"}])
def test_bad_split_is_refused(kwargs: dict) -> None:
    with pytest.raises(ValueError, match="split"):
        gymnasium.make("amago_envs:MetaFrozenLake-v1", **kwargs)
