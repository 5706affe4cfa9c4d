from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from amago_envs import MetaFrozenLake, RoomKeyDoor
from amago_envs.registration import ENTRY_POINTS, environment_ids, register_all

MAKERS: dict[str, Callable[..., Any]] = {
    "lake": lambda **kw: MetaFrozenLake(size=4, k_attempts=3, **kw),
    "lake-hard": lambda **kw: MetaFrozenLake(size=3, k_attempts=4, hard_mode=True, slip_chance=0.2, **kw),
    "lake-recover": lambda **kw: MetaFrozenLake(size=3, k_attempts=2, recover_mode=True, **kw),
    "room": lambda **kw: RoomKeyDoor(size=4, meta_rollout_horizon=40, max_attempt_steps=9, **kw),
    "room-light": lambda **kw: RoomKeyDoor(dark=False, meta_rollout_horizon=40, randomize_actions=True, **kw),
}


@pytest.fixture(params=sorted(MAKERS))
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return MAKERS[request.param]


def episode(env: Any, seed: int | None, rng: np.random.Generator) -> list[tuple]:
    obs, info = env.reset(seed=seed)
    rows: list[tuple] = [(obs, 0.0, False, False, info)]
    while not rows[-1][2]:
        rows.append(env.step(int(rng.integers(env.action_space.n))))
    return rows


def test_gymnasium_env_checker(make: Callable[..., Any]) -> None:
    check_env(make(), skip_render_check=True)


@pytest.mark.parametrize("name", ["MetaFrozenLake", "RoomKeyDoor"])
def test_env_checker_with_spec_and_render(name: str) -> None:
    for mode in ("ansi", "rgb_array"):
        check_env(gymnasium.make(f"amago_envs:{name}-v1", size=4, render_mode=mode).unwrapped)


def test_observations_flags_and_metrics(make: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    env, rng = make(), np.random.default_rng(0)
    for seed in range(3):
        rows = episode(env, seed, rng)
        for obs, reward, terminated, truncated, info in rows:
            assert env.observation_space.contains(obs)
            assert isinstance(reward, float) and type(terminated) is bool and truncated is False
            assert all(type(value) is float and np.isfinite(value) for value in info.get("metrics", {}).values())
        names = [name for row in rows for name in row[4].get("metrics", {})]
        if isinstance(env, MetaFrozenLake):
            for part in ("success", "return", "length"):
                wanted = [f"attempt_{index}/{part}" for index in range(env.rules.k_attempts)]
                assert [name for name in names if name.endswith(f"/{part}")] == wanted
            total = sum(row[4]["metrics"].get(f"attempt_{i}/length", 0) for row in rows if row[4] for i in range(9))
            assert total == len(rows) - 1
            assert sum(row[0][2] for row in rows) == env.rules.k_attempts + 1
        else:
            assert names == ["keys", "doors", "episodes_completed", "first_door_time"]
            assert len(rows) - 1 == 40
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(0)
    env.close()
    env.close()
    assert capsys.readouterr().out == ""


def test_step_before_reset_raises(make: Callable[..., Any]) -> None:
    with pytest.raises(gymnasium.error.ResetNeeded):
        make().step(0)


def test_equal_seeds_equal_traces_whatever_the_global_generators_do(make: Callable[..., Any]) -> None:
    traces = []
    for salt in range(2):
        random.seed(salt)
        np.random.seed(salt)
        rows = episode(make(), 5, np.random.default_rng(1))
        traces.append([(obs.tolist(), reward, info) for obs, reward, _, _, info in rows])
    assert traces[0] == traces[1]


def test_different_seeds_different_tasks() -> None:
    lakes, rooms = set(), set()
    lake, room = MetaFrozenLake(size=5), RoomKeyDoor()
    for seed in range(30):
        lake.reset(seed=seed)
        room.reset(seed=seed)
        lakes.add(lake.map.tobytes())
        rooms.add(tuple(room.layout.items()))
    assert len(lakes) > 25 and len(rooms) > 25
    unseeded = [MetaFrozenLake(size=6) for _ in range(2)]
    for env in unseeded:
        env.reset()
    assert unseeded[0].map.tobytes() != unseeded[1].map.tobytes()


def test_constructor_draws_nothing(make: Callable[..., Any]) -> None:
    env = make()
    assert env._np_random is None


def test_every_lake_can_be_solved() -> None:
    env = MetaFrozenLake(size=4)
    for seed in range(50):
        env.reset(seed=seed)
        reached, edge = {(0, 0)}, [(0, 0)]
        while edge:
            row, column = edge.pop()
            for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if cell not in reached and min(cell) >= 0 and max(cell) < 4 and env.map[cell] != 2:
                    reached.add(cell)
                    edge.append(cell)
        assert (3, 3) in reached


def test_task_names() -> None:
    assert MetaFrozenLake(size=4).task_name == "MetaFrozenLake-4x4"
    assert MAKERS["lake-hard"]().task_name == "MetaFrozenLake-3x3-hard"
    assert RoomKeyDoor().task_name == "RoomKeyDoor-dark-9x9"
    for name in ENTRY_POINTS:
        single = gymnasium.make(f"amago_envs:{name}-v1", size=4)
        vector = gymnasium.make_vec(f"amago_envs:{name}-v1", num_envs=2, size=4)
        assert single.unwrapped.task_name == vector.unwrapped.task_name  # type: ignore[attr-defined]


def test_registration_is_idempotent() -> None:
    register_all()
    for name in ENTRY_POINTS:
        for env_id in environment_ids(name):
            assert env_id in gymnasium.registry


@pytest.mark.parametrize("name", sorted(ENTRY_POINTS))
def test_make_without_arguments(name: str) -> None:
    for env_id in environment_ids(name):
        gymnasium.make(f"amago_envs:{env_id}").reset(seed=0)
        assert gymnasium.make_vec(f"amago_envs:{env_id}", num_envs=3).reset(seed=0)[0].shape == (3, 4)


def test_make_with_arguments() -> None:
    env = gymnasium.make("amago_envs:MetaFrozenLake-v1", size=4, k_attempts=5)
    assert env.unwrapped.rules.k_attempts == 5  # type: ignore[attr-defined]
    vector = gymnasium.make_vec("amago_envs:MetaFrozenLake-v1", num_envs=8, size=4, k_attempts=5)
    assert vector.num_envs == 8 and vector.spec is not None
