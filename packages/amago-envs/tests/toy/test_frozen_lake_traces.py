from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from amago_envs import MetaFrozenLake, MetaFrozenLakeVector
from amago_envs.toy.lake_rules import LakeRules


class ScriptedDraws:
    """Stands in for a generator; hands out a list of numbers, and fails when asked for more."""

    def __init__(self, draws: list[float]) -> None:
        self._draws = iter(draws)

    def random(self) -> float:
        return next(self._draws)

    def exhausted(self) -> bool:
        return next(self._draws, None) is None


def play(env: MetaFrozenLake, lake: list[str], actions: list[int]) -> list[tuple[list[float], float, bool, dict]]:
    obs, info = env.reset(seed=0, options={"map": lake})
    assert obs.tolist() == [0, 0, 1, 0] and info == {}
    rows = []
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(obs) and not truncated
        rows.append((obs.tolist(), reward, terminated, info.get("metrics", {})))
    return rows


def test_trace_a_two_attempts_goal_then_hole() -> None:
    rows = play(MetaFrozenLake(2, k_attempts=2, max_attempt_steps=4), ["SF", "HG"], [3, 1, 1])
    assert rows[0] == ([0, 0.5, 0, 0], 0, False, {})
    assert rows[1][:3] == ([0, 0, 1, 0.5], 1, False)
    assert rows[1][3] == {"attempt_0/success": 1, "attempt_0/return": 1, "attempt_0/length": 2}
    assert rows[2][:3] == ([0, 0, 1, 1], 0, True)
    assert rows[2][3] == {
        "attempt_1/success": 0,
        "attempt_1/return": 0,
        "attempt_1/length": 1,
        "total_successes": 1,
        "success_rate": 0.5,
    }


def test_trace_b_recover_mode() -> None:
    rows = play(MetaFrozenLake(2, k_attempts=1, recover_mode=True), ["SF", "HG"], [1, 2, 3, 1])
    assert [row[1] for row in rows] == [-0.1, 0, 0, 1]
    assert [row[0] for row in rows[:3]] == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0.5, 0, 0]]
    assert [row[2] for row in rows] == [False, False, False, True]
    assert rows[3][3]["attempt_0/return"] == pytest.approx(0.9)


def test_trace_c_time_out() -> None:
    rows = play(MetaFrozenLake(2, k_attempts=1, max_attempt_steps=3), ["SF", "FG"], [0, 0, 0])
    assert [row[1:3] for row in rows] == [(0, False), (0, False), (0, True)]
    assert rows[2][0] == [0, 0, 1, 1]
    assert rows[2][3]["attempt_0/success"] == 0 and rows[2][3]["attempt_0/length"] == 3


def test_trace_d_hidden_progress() -> None:
    rows = play(MetaFrozenLake(2, k_attempts=2, show_k_progress=False), ["SF", "FG"], [1, 3, 1, 3])
    assert [row[1] for row in rows] == [0, 1, 0, 1]
    assert all(row[0][3] == 0 for row in rows)
    assert [row[2] for row in rows] == [False, False, False, True]


def test_trace_e_hard_recover_own_tile_becomes_a_hole() -> None:
    env = MetaFrozenLake(3, k_attempts=1, hard_mode=True, recover_mode=True)
    keep, crumble, clear = 0.9, 0.1, 0.9
    # Swap (no), noise gate of the first observation, then per step: crumble draw where the cell changes, noise gate.
    script = [0.9, clear]
    for hole_draw in (keep, crumble, None, keep, keep, crumble):
        script += [] if hole_draw is None else [hole_draw]
        script += [clear]
    draws = ScriptedDraws(script)
    env.reset(seed=0)
    env.np_random = draws  # type: ignore[assignment]
    env.reset(options={"map": ["SFF", "FHF", "FFG"]})
    rewards, places = [], []
    for action in (3, 1, 0, 3, 1, 1):
        _, reward, terminated, _, info = env.step(action)
        rewards.append(reward)
        places.append(env.position)
        if action == 0:
            assert env.active_map[0, 1] == 2 and env.map[0, 1] == 1
    assert rewards == [0, -0.1, -0.1, 0, 0, 1] and terminated
    assert places == [(0, 1), (0, 1), (0, 1), (0, 2), (1, 2), (0, 0)]
    assert info["metrics"]["attempt_0/return"] == pytest.approx(0.8)
    assert draws.exhausted()


def test_hard_mode_swaps_down_and_right_and_adds_noise() -> None:
    env = MetaFrozenLake(3, k_attempts=1, hard_mode=True)
    env.reset(seed=0)
    # Swapped; noise gate fires, row -1 (clipped), column +1. Then a step: ice holds, noise gate closed.
    env.np_random = ScriptedDraws([0.1, 0.1, 0.0, 0.99, 0.5, 0.9])  # type: ignore[assignment]
    obs, _ = env.reset(options={"map": ["SFF", "FFF", "FFG"]})
    np.testing.assert_array_equal(obs, np.array([0, 1 / 3, 1, 0], dtype=np.float32))
    obs, *_ = env.step(1)
    np.testing.assert_array_equal(obs, np.array([0, 1 / 3, 0, 0], dtype=np.float32))
    assert env.position == (0, 1)


def test_active_map_is_restored_between_attempts() -> None:
    env = MetaFrozenLake(3, k_attempts=3, hard_mode=True, max_attempt_steps=6)
    env.reset(seed=3)
    for _ in range(17):
        _, _, _, _, info = env.step(int(env.action_space.sample()))
        if "metrics" in info:
            np.testing.assert_array_equal(env.map, env.active_map)
            if "total_successes" in info["metrics"]:
                env.reset()


def test_no_op_is_free_and_slip_never_hits_it() -> None:
    env = MetaFrozenLake(2, k_attempts=1, slip_chance=0.5)
    env.reset(seed=0)
    env.np_random = ScriptedDraws([0.1, 0.9])  # type: ignore[assignment]
    env.reset(options={"map": "SF/FG"})
    assert env.step(0)[0].tolist() == [0, 0, 0, 0]
    assert env.step(1)[0].tolist() == [0, 0, 0, 0]
    assert env.step(1)[0].tolist() == [0.5, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 25),
        ({"hard_mode": True}, 50),
        ({"slip_chance": 0.3}, 35),
        ({"hard_mode": True, "slip_chance": 0.5}, 100),
        ({"max_attempt_steps": 7, "hard_mode": True}, 7),
    ],
)
def test_step_limits(settings: dict, limit: int) -> None:
    assert LakeRules(size=5, **settings).step_limit == limit
    env = MetaFrozenLake(5, k_attempts=1, **settings)
    env.reset(seed=0, options={"map": ["SFFFF", "FFFFF", "FFFFF", "FFFFF", "FFFFG"]})
    for step in range(1, limit + 1):
        _, _, terminated, _, info = env.step(0)
        assert terminated == (step == limit)
    assert info["metrics"]["attempt_0/length"] == limit


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 1},
        {"size": 2.5},
        {"size": 4, "k_attempts": 0},
        {"size": 4, "slip_chance": 1.0},
        {"size": 4, "slip_chance": -0.1},
        {"size": 4, "max_attempt_steps": 0},
        {"size": 4, "render_mode": "human"},
    ],
)
def test_wrong_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="allowed"):
        MetaFrozenLake(**settings)
    with pytest.raises(ValueError, match="allowed"):
        MetaFrozenLakeVector(2, **settings)


@pytest.mark.parametrize("lake", [["SF"], ["SF", "H"], ["FS", "FG"], ["SF", "FX"], ["SF", "GG"], np.full((2, 2), 7)])
def test_wrong_maps_are_refused(lake: object) -> None:
    env = MetaFrozenLake(2)
    with pytest.raises(ValueError, match="map"):
        env.reset(options={"map": lake})


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown keys"):
        MetaFrozenLake(2).reset(options={"lake": ["SF", "FG"]})


@pytest.mark.parametrize("action", [5, -1, 1.0, "1", None, [1, 2], True])
def test_wrong_actions_are_refused(action: object) -> None:
    env = MetaFrozenLake(2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action"):
        env.step(action)


@pytest.mark.parametrize("action", [1, np.int32(1), np.array(1), np.uint8(1)])
def test_integer_like_actions_are_taken(action: object) -> None:
    env = MetaFrozenLake(2)
    env.reset(seed=0, options={"map": "SF/FG"})
    assert env.step(action)[0].tolist() == [0.5, 0, 0, 0]


def test_vector_plays_given_maps() -> None:
    maps = np.array([[[0, 1], [2, 3]], [[0, 2], [1, 3]]])
    env = MetaFrozenLakeVector(2, size=2, k_attempts=1)
    env.reset(seed=0, options={"map": maps})
    np.testing.assert_array_equal(env.maps, maps)
    obs, rewards, terminated, _, info = env.step([1, 1])
    assert terminated.tolist() == [True, False] and rewards.tolist() == [0, 0]
    assert info["final_obs"][0].tolist() == [0, 0, 1, 1] and info["final_obs"][1] is None
    obs, rewards, terminated, _, info = env.step([0, 3])
    assert rewards[1] == 1 and terminated[1]
    env.reset(options={"map": ["SF", "FG"]})
    np.testing.assert_array_equal(env.maps, [[[0, 1], [1, 3]]] * 2)
    with pytest.raises(ValueError, match="one per lane"):
        env.reset(options={"map": maps[:1]})


def random_returns(
    env: MetaFrozenLakeVector, episodes_per_lane: int, seed: int, options: dict | None = None
) -> np.ndarray:
    lanes = env.num_envs
    rng = np.random.default_rng(seed)
    env.reset(seed=seed, options=options)
    running, returns, counts = np.zeros(lanes), [], np.zeros(lanes, dtype=int)
    # The first episodes of every lane, not the first to finish: short episodes must not be over-represented.
    while (counts < episodes_per_lane).any():
        _, rewards, terminated, _, _ = env.step(rng.integers(5, size=lanes))
        running += rewards
        for lane in np.flatnonzero(terminated & (counts < episodes_per_lane)):
            returns.append(running[lane])
        counts += terminated
        running[terminated] = 0
    return np.array(returns)


def assert_close_to(returns: np.ndarray, expected: float, expected_error: float = 0.0) -> None:
    error = np.hypot(returns.std() / np.sqrt(len(returns)), expected_error)
    assert abs(returns.mean() - expected) < 4 * error, (returns.mean(), expected, error)


@pytest.mark.parametrize(("lake", "expected"), [("SF/FG", 0.2688), ("SF/HG", 0.1328), ("SFF/FHF/FFG", 0.0480)])
@pytest.mark.parametrize("k_attempts", [1, 3])
def test_random_policy_on_fixed_maps(lake: str, expected: float, k_attempts: int) -> None:
    env = MetaFrozenLakeVector(4000, size=lake.index("/"), k_attempts=k_attempts)
    assert_close_to(random_returns(env, 1, seed=1, options={"map": lake}), k_attempts * expected)


@pytest.mark.parametrize(
    ("settings", "expected", "error"),
    [
        ({"size": 3}, 0.680, 0.016),
        ({"size": 4}, 0.268, 0.010),
        ({"size": 5}, 0.116, 0.006),
        ({"size": 5, "hard_mode": True}, 0.056, 0.004),
        ({"size": 5, "recover_mode": True}, -2.30, 0.03),
        ({"size": 5, "hard_mode": True, "recover_mode": True}, -19.9, 0.1),
        ({"size": 5, "slip_chance": 0.3}, 0.116, 0.007),
    ],
)
def test_random_policy_on_random_maps(settings: dict, expected: float, error: float) -> None:
    env = MetaFrozenLakeVector(1000, k_attempts=10, **settings)
    assert_close_to(random_returns(env, 1, seed=2), expected, error)


def test_vector_refuses_wrong_actions_and_seeds() -> None:
    env = MetaFrozenLakeVector(2, size=3)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step([0, 0])
    with pytest.raises(ValueError, match="seed"):
        env.reset(seed=[1])
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(options={"reset_mask": np.array([True, False])})
    env.reset(seed=0)
    for actions in ([0], [0, 5], [0, -1], [0.0, 1.0], [[0, 0]]):
        with pytest.raises(ValueError, match="actions"):
            env.step(actions)
    for mask in ([True], [0, 1], [False, False]):
        with pytest.raises(ValueError, match="reset_mask"):
            env.reset(options={"reset_mask": mask})
    with pytest.raises(ValueError, match="num_envs"):
        MetaFrozenLakeVector(0, size=3)
