"""Building vector environments, making them again, and reading their reports."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from core_helpers import TraceEnv, trace_envs
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper

from amago_core.errors import EnvError
from amago_core.vector_envs import EnvFactory, autoreset_mode, metrics_of, supports_state

LAKES = "amago_envs:MetaFrozenLake-v1"
pytest.importorskip("amago_envs")


class Unrecorded(gym.Wrapper):
    """A wrapper that Gymnasium cannot make again."""


class Counting(VectorWrapper):
    """A wrapper of a vector environment, with a state of its own."""

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        self.steps = 0


def test_single_environments_are_vectorised() -> None:
    env = EnvFactory(make_env=TraceEnv).build(3)
    assert isinstance(env, SyncVectorEnv) and env.num_envs == 3
    assert autoreset_mode(env) is AutoresetMode.SAME_STEP


def test_one_process_each() -> None:
    env = EnvFactory(make_env=TraceEnv, mode="async").build(2)
    assert isinstance(env, AsyncVectorEnv) and autoreset_mode(env) is AutoresetMode.SAME_STEP
    env.close()


def test_vectorised_environments_win() -> None:
    made = []

    def make(lanes: int) -> VectorEnv:
        made.append(lanes)
        return gym.make_vec(LAKES, num_envs=lanes)

    env = EnvFactory(make_env=TraceEnv, make_vec_env=make).build(4)
    assert made == [4] and type(env).__name__ == "MetaFrozenLakeVector"


@pytest.mark.parametrize(
    ("makers", "message"),
    [
        ({}, "pass make_env"),
        ({"make_env": lambda: "env"}, "str"),
        ({"make_env": lambda: gym.make_vec(LAKES, num_envs=2)}, "as make_vec_env"),
        ({"make_vec_env": lambda lanes: TraceEnv()}, "VectorEnv; got TraceEnv"),
        ({"make_vec_env": lambda lanes: gym.make_vec(LAKES, num_envs=3)}, "asked for 2 lanes, .* has 3"),
    ],
)
def test_what_is_no_environment_is_refused(makers: dict, message: str) -> None:
    with pytest.raises(EnvError, match=message):
        EnvFactory(**makers).build(2)


def rebuilt(factory: EnvFactory, lanes: int) -> VectorEnv | None:
    stored = factory.to_json()
    return None if stored is None else EnvFactory.restore(json.loads(json.dumps(stored)), None, None).build(lanes)


def same_episodes(ours: VectorEnv, theirs: VectorEnv, steps: int = 30) -> None:
    assert np.array_equal(ours.reset(seed=5)[0], theirs.reset(seed=5)[0])
    actions = np.random.default_rng(0).integers(0, 2, (steps, ours.num_envs))
    for action in actions:
        left, right = ours.step(action), theirs.step(action)
        assert all(np.array_equal(a, b) for a, b in zip(left[:4], right[:4], strict=True))


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize(
    "factory",
    [
        EnvFactory(make_env=lambda: gym.make(LAKES, size=3, k_attempts=2, max_attempt_steps=4)),
        EnvFactory(make_env=lambda: gym.wrappers.TimeLimit(gym.make("CartPole-v1"), max_episode_steps=7)),
        EnvFactory(make_vec_env=lambda n: gym.make_vec(LAKES, num_envs=n, size=3, k_attempts=2)),
        EnvFactory(make_vec_env=lambda n: gym.make_vec(LAKES, num_envs=n, size=3, vectorization_mode="sync")),
    ],
    ids=["single", "wrapped", "native", "gymnasium's vectorisation"],
)
def test_environments_are_made_again(factory: EnvFactory, lanes: int) -> None:
    again = rebuilt(factory, lanes)
    assert again is not None
    original = factory.build(lanes)
    assert autoreset_mode(again) is autoreset_mode(original)
    same_episodes(original, again)


@pytest.mark.parametrize(
    "factory",
    [
        EnvFactory(make_env=TraceEnv),
        EnvFactory(make_env=lambda: Unrecorded(gym.make("CartPole-v1"))),
        EnvFactory(make_env=lambda: gym.wrappers.TransformReward(gym.make("CartPole-v1"), lambda r: 2 * r)),
        EnvFactory(make_vec_env=lambda n: Counting(gym.make_vec(LAKES, num_envs=n))),
        EnvFactory(make_vec_env=lambda n: trace_envs([(3,)] * n, AutoresetMode.NEXT_STEP)),
    ],
    ids=["no spec", "unknown wrapper", "callable", "vector wrapper", "vector without spec"],
)
def test_what_cannot_be_made_again_is_not_stored(factory: EnvFactory) -> None:
    assert factory.to_json() is None


def test_callables_win_over_what_is_stored() -> None:
    stored = EnvFactory(make_env=lambda: gym.make("CartPole-v1")).to_json()
    assert isinstance(EnvFactory.restore(stored, TraceEnv, None).build(1).envs[0], TraceEnv)
    with pytest.raises(EnvError, match="pass make_env"):
        EnvFactory.restore(None, None, None)


def test_the_package_that_registers_the_environment_is_known() -> None:
    vector = EnvFactory(make_vec_env=lambda n: gym.make_vec(LAKES, num_envs=n, vectorization_mode="sync")).to_json()
    assert vector is not None and vector["module"] == "amago_envs"
    inner = EnvFactory(make_env=lambda: gym.make("CartPole-v1")).to_json()
    assert inner is not None and inner["module"] is None
    with pytest.raises(ImportError):
        EnvFactory.restore({**inner, "module": "no_such_package"}, None, None)


def test_autoreset_modes() -> None:
    envs = {mode: trace_envs([(3,)], mode) for mode in AutoresetMode}
    # All of them share one metadata dictionary, which names the last mode only.
    assert len({id(env.metadata) for env in envs.values()}) == 1
    assert all(autoreset_mode(env) is mode for mode, env in envs.items())
    assert autoreset_mode(Counting(envs[AutoresetMode.NEXT_STEP])) is AutoresetMode.NEXT_STEP
    native = gym.make_vec(LAKES, num_envs=1)
    assert autoreset_mode(native) is AutoresetMode.SAME_STEP
    native.metadata = {"autoreset_mode": "NextStep"}
    assert autoreset_mode(native) is AutoresetMode.NEXT_STEP
    for metadata in ({}, {"autoreset_mode": "sometimes"}):
        native.metadata = metadata
        with pytest.raises(EnvError, match="SAME_STEP"):
            autoreset_mode(native)


def test_wrappers_hide_that_an_environment_can_be_saved() -> None:
    native = gym.make_vec(LAKES, num_envs=1)
    assert supports_state(native)
    assert not supports_state(Counting(native))
    assert not supports_state(trace_envs([(3,)], AutoresetMode.SAME_STEP))


def read(info: dict[str, Any], lanes: list[bool]) -> dict[str, list[tuple[int, float]]]:
    found = metrics_of(info, np.array(lanes))
    return {name: [(int(lane), float(v[lane])) for lane in np.flatnonzero(mask)] for name, mask, v in found}


def test_metrics_of_some_lanes() -> None:
    info = {
        "metrics": {
            "won": np.array([1, 0, 1]),
            "_won": np.array([True, False, True]),
            "length": np.array([4.0, 5.0, 6.0]),
            "_own": np.array([True, False, True]),
        },
        "_metrics": np.array([True, False, True]),
        "AMAGO_LOG_METRIC Ep 0 Return": np.array([0.5, np.nan, 1.5]),
        "_AMAGO_LOG_METRIC Ep 0 Return": np.array([True, True, False]),
        "AMAGO_LOG_METRIC_X": np.array([None, 2, None], object),
        "_AMAGO_LOG_METRIC_X": np.array([False, True, False]),
        "other": np.array(["a", "b", "c"]),
    }
    assert read(info, [True, True, True]) == {
        "won": [(0, 1.0), (2, 1.0)],
        "length": [(0, 4.0), (2, 6.0)],
        "_own": [(0, 1.0), (2, 1.0)],
        "Ep 0 Return": [(0, 0.5)],
        "_X": [(1, 2.0)],
    }
    assert read(info, [False, True, True]) == {
        "won": [(2, 1.0)],
        "length": [(2, 6.0)],
        "_own": [(2, 1.0)],
        "_X": [(1, 2.0)],
    }
    assert read(info, [False, False, False]) == {}
    assert read({}, [True]) == {} and read({"metrics": 3}, [True]) == {}


def test_values_that_are_not_finite_are_left_out() -> None:
    assert read({"metrics": {"x": np.array([np.nan, np.inf, 2.0]), "y": np.array([np.nan] * 3)}}, [True] * 3) == {
        "x": [(2, 2.0)]
    }


@pytest.mark.parametrize("column", [np.array(["a", "b"]), np.zeros((2, 2)), 3.0, {"nested": np.zeros(2)}])
def test_metrics_must_be_numbers(column: Any) -> None:
    with pytest.raises(EnvError, match="'x' must be one number for each of the 2 lanes"):
        read({"metrics": {"x": column}}, [True, True])


def test_metrics_as_gymnasium_collects_them() -> None:
    env = trace_envs([(2,), (3,)], AutoresetMode.SAME_STEP)
    env.reset(seed=0)
    for _ in range(2):
        info = env.step(np.full(2, 7))[-1]
    everyone = [True, True]
    assert read(info["final_info"], everyone) == {"length": [(0, 2.0)], "episode": [(0, 1.0)], "Time": [(0, 2.0)]}
    # Of the reset of lane 0, and of the step of lane 1.
    assert read(info, everyone) == {"of_reset": [(0, 1.0)], "Time": [(1, 2.0)]}


def test_settings_reach_the_environment() -> None:
    env = EnvFactory(make_env=partial(TraceEnv, (2,), 4)).build(1)
    assert env.reset(seed=0)[0].tolist() == [[100, 4, 0]]
