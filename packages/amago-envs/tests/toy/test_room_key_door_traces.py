from __future__ import annotations

import numpy as np
import pytest

from amago_envs import RoomKeyDoor, RoomKeyDoorVector

TRACE_SETTINGS = {
    "size": 3,
    "max_attempt_steps": 6,
    "meta_rollout_horizon": 14,
    "start_location": (0, 0),
    "key_location": (0, 2),
    "goal_location": (2, 2),
}
TRACE_ACTIONS = [2, 2, 3, 3, 1, 2, 2, 4, 4, 4, 4, 0, 2, 2]
TRACE_REWARDS = [0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]


def test_hand_trace() -> None:
    env = RoomKeyDoor(**TRACE_SETTINGS)
    obs, info = env.reset(seed=0)
    assert obs.tolist() == [0, 0, 0, 0] and info == {}
    observations, rewards, ends = [], [], []
    for action in TRACE_ACTIONS:
        obs, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(obs) and not truncated
        observations.append(obs)
        rewards.append(reward)
        ends.append(terminated)
    assert rewards == TRACE_REWARDS
    assert ends == [False] * 13 + [True]
    np.testing.assert_allclose(observations[1], [0, 2 / 3, 1, 2 / 6], rtol=1e-6)
    np.testing.assert_allclose(observations[3], [2 / 3, 2 / 3, 1, 4 / 6], rtol=1e-6)
    assert observations[4].tolist() == [0, 0, 0, 0]
    assert observations[10][3] == 1.0
    assert observations[11].tolist() == [0, 0, 0, 0]
    assert info["metrics"] == {"keys": 3, "doors": 1, "episodes_completed": 1, "first_door_time": 4}


def optimal_return(start: tuple, key: tuple, goal: tuple, limit: int, horizon: int) -> int:
    to_key = max(1, abs(start[0] - key[0]) + abs(start[1] - key[1]))
    to_goal = max(1, abs(key[0] - goal[0]) + abs(key[1] - goal[1]))
    length = to_key + to_goal
    assert length <= limit
    rounds, rest = divmod(horizon, length + 1)
    return 2 * rounds + (2 if rest >= length else 1 if rest >= to_key else 0)


def walk(position: tuple, target: tuple) -> int:
    if position[0] != target[0]:
        return 3 if target[0] > position[0] else 1
    if position[1] != target[1]:
        return 2 if target[1] > position[1] else 0
    return 4


@pytest.mark.parametrize("seed", range(8))
def test_known_layout_play_reaches_the_optimum(seed: int) -> None:
    env = RoomKeyDoor(dark=False, size=4, meta_rollout_horizon=60)
    obs, _ = env.reset(seed=seed)
    layout = env.layout
    total, ended = 0.0, False
    while not ended:
        own, has_key = np.rint(obs[:2] * 4), obs[2] > 0
        goal, key = np.rint(obs[4:6] * 4), np.rint(obs[6:] * 4)
        obs, reward, ended, _, _ = env.step(walk(tuple(own), tuple(goal if has_key else key)))
        total += reward
    assert total == optimal_return(layout["start"], layout["key"], layout["goal"], 50, 60)


def test_optimum_of_the_trace_instance() -> None:
    assert optimal_return((0, 0), (0, 2), (2, 2), 6, 14) == 6


def test_key_and_door_never_pay_in_one_step() -> None:
    spot = (1, 1)
    env = RoomKeyDoor(size=3, start_location=spot, key_location=spot, goal_location=spot, meta_rollout_horizon=6)
    env.reset(seed=0)
    rewards, held = [], []
    for _ in range(6):
        obs, reward, *_ = env.step(4)
        rewards.append(reward)
        held.append(obs[2])
    assert rewards == [1, 1, 0, 1, 1, 0] and held == [1, 1, 0, 1, 1, 0]


def test_time_out_on_the_step_that_finds_the_key_ends_the_attempt() -> None:
    env = RoomKeyDoor(size=2, start_location=(0, 0), key_location=(0, 1), goal_location=(1, 1), max_attempt_steps=1)
    env.reset(seed=0)
    assert env.step(2)[1] == 1
    obs, reward, *_ = env.step(3)
    assert reward == 0 and obs.tolist() == [0, 0, 0, 0]


def test_randomised_actions_are_a_fixed_permutation_per_task() -> None:
    orders = set()
    for seed in range(30):
        env = RoomKeyDoor(size=9, start_location=(4, 4), randomize_actions=True)
        env.reset(seed=seed)
        moved = []
        for action in range(5):
            env.reset(seed=seed)
            env.step(action)
            x, y = env.layout["agent"]
            moved.append((x - 4, y - 4))
        assert sorted(moved) == [(-1, 0), (0, -1), (0, 0), (0, 1), (1, 0)]
        orders.add(tuple(moved))
    assert len(orders) > 15


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"max_attempt_steps": 0},
        {"meta_rollout_horizon": 0},
        {"start_location": "corner"},
        {"key_location": (9, 0)},
        {"goal_location": (0, 0, 0)},
        {"goal_location": (0.5, 0)},
        {"render_mode": "human"},
    ],
)
def test_wrong_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="allowed"):
        RoomKeyDoor(**settings)
    with pytest.raises(ValueError, match="allowed"):
        RoomKeyDoorVector(2, **settings)


def test_options_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown keys"):
        RoomKeyDoor().reset(options={"map": []})


def test_vector_layouts_follow_locations() -> None:
    env = RoomKeyDoorVector(5, size=4, key_location=(1, 3))
    env.reset(seed=0)
    assert env.layouts["key"].tolist() == [[1, 3]] * 5
    assert len({tuple(start) for start in env.layouts["start"].tolist()}) > 1


def test_first_door_time_without_a_door_is_the_horizon() -> None:
    env = RoomKeyDoor(size=5, start_location=(0, 0), goal_location=(4, 4), meta_rollout_horizon=3)
    env.reset(seed=0)
    for _ in range(3):
        *_, info = env.step(4)
    assert info["metrics"]["first_door_time"] == 3 and info["metrics"]["doors"] == 0


@pytest.mark.parametrize(
    ("size", "expected", "error"), [(9, 2.61, 0.10), (8, 3.11, 0.11), (5, 8.70, 0.18), (3, 26.5, 0.4)]
)
def test_random_policy(size: int, expected: float, error: float) -> None:
    lanes = 1000
    env = RoomKeyDoorVector(lanes, size=size)
    env.reset(seed=size)
    rng = np.random.default_rng(size)
    returns, terminated = np.zeros(lanes), np.zeros(lanes, dtype=bool)
    while not terminated.any():
        _, rewards, terminated, _, info = env.step(rng.integers(5, size=lanes))
        returns += rewards
    assert terminated.all()
    error = float(np.hypot(error, returns.std() / np.sqrt(lanes)))
    assert abs(returns.mean() - expected) < 4 * error, (returns.mean(), expected, error)
    metrics = info["final_info"]["metrics"]
    np.testing.assert_array_equal(metrics["keys"] + metrics["doors"], returns)
