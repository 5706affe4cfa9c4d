"""One behaviour for all three autoreset modes."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from core_helpers import TraceEnv, trace_envs
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from amago_core.errors import CheckpointError, EnvError
from amago_core.lane_env import LaneEnv
from amago_core.spaces import SpaceAdapter

LIMITS = [(3, 2), (1, 4), (5,)]
MODES = list(AutoresetMode)


def history(env: LaneEnv, steps: int) -> list[list[tuple]]:
    """What each lane goes through: `("first", obs)`, then one entry per step."""
    adapter = SpaceAdapter(env.env.single_observation_space, env.env.single_action_space)
    obs = adapter.to_obs(env.reset(3), env.lanes)["observation"]
    lanes: list[list[tuple]] = [[("first", *obs[lane].tolist())] for lane in range(env.lanes)]
    for _ in range(steps):
        step = env.step(np.full(env.lanes, 8))
        obs = adapter.to_obs(step.obs, env.lanes)["observation"]
        last = obs.copy()
        if step.final_obs is not None:
            last[step.done] = adapter.final_obs(step.final_obs, np.flatnonzero(step.done))["observation"]
        reported: list[dict[str, float]] = [{} for _ in lanes]
        for name, mask, values in step.metrics:
            for lane in np.flatnonzero(mask):
                reported[lane][name] = float(values[lane])
        for lane, entries in enumerate(lanes):
            if step.stepped[lane]:
                flags = (bool(step.terminated[lane]), bool(step.truncated[lane]))
                entries.append((*last[lane].tolist(), float(step.reward[lane]), *flags, reported[lane]))
            else:
                assert step.reward[lane] == 0 and not step.done[lane] and not reported[lane]
            if step.started[lane]:
                entries.append(("first", *obs[lane].tolist()))
    return lanes


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_all_modes_tell_the_same(mode: AutoresetMode, copy: bool) -> None:
    makers = [lambda limits=limits, lane=lane: TraceEnv(limits, lane) for lane, limits in enumerate(LIMITS)]
    env = SyncVectorEnv(makers, autoreset_mode=mode, copy=copy)
    lanes = history(LaneEnv(env), 40)
    reference = history(LaneEnv(trace_envs(LIMITS, AutoresetMode.SAME_STEP)), 40)
    for ours, theirs in zip(lanes, reference, strict=True):
        assert len(ours) > 24 and ours == theirs[: len(ours)]
    assert reference[1][:4] == [
        ("first", 100, 1, 0),
        (101, 1, 8, np.float32(1.1), True, False, {"length": 1, "episode": 1, "Time": 1}),
        ("first", 200, 1, 0),
        (201, 1, 8, np.float32(1.1), False, False, {"Time": 1}),
    ]


def test_lanes_wait_for_their_reset_only_in_next_step_mode() -> None:
    for mode in MODES:
        env = LaneEnv(trace_envs([(2,), (3,)], mode))
        env.reset(0)
        waiting = []
        for _ in range(4):
            env.step(np.full(2, 7))
            waiting.append((~env.stepping).tolist())
        late = mode is AutoresetMode.NEXT_STEP
        assert waiting == (
            [[False, False], [True, False], [False, True], [False, False]] if late else [[False] * 2] * 4
        )


def test_a_reset_in_the_middle_ends_the_waiting() -> None:
    env = LaneEnv(trace_envs([(1,)], AutoresetMode.NEXT_STEP))
    env.reset(0)
    env.step(np.array([7]))
    assert not env.stepping[0]
    env.reset(0)
    assert env.step(np.array([7])).stepped[0]


class Broken(VectorEnv):
    """One step of two lanes, as the test wants it."""

    def __init__(self, reward: Any, info: dict[str, Any], done: bool = False) -> None:
        self.num_envs = 2
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gym.spaces.Box(-1, 1, (1,))
        self.single_action_space = gym.spaces.Discrete(2)
        self.result = (np.zeros((2, 1)), reward, np.array([done, False]), np.zeros(2, bool), info)

    def reset(self, **_: Any) -> tuple[np.ndarray, dict]:
        return np.zeros((2, 1)), {}

    def step(self, _: Any) -> tuple:
        return self.result


@pytest.mark.parametrize("reward", [[0.0, np.nan], [np.inf, 0.0], [1.0], [[1.0], [2.0]], [1.0, 2.0, 3.0]])
def test_bad_rewards_are_refused(reward: list) -> None:
    env = LaneEnv(Broken(np.array(reward), {}))
    env.reset(0)
    with pytest.raises(EnvError, match="one finite reward for each of 2 lanes"):
        env.step(np.zeros(2))


def test_the_last_observation_must_be_there() -> None:
    env = LaneEnv(Broken(np.zeros(2), {}, done=True))
    env.reset(0)
    with pytest.raises(EnvError, match="final_obs"):
        env.step(np.zeros(2))


def test_metrics_beside_an_end_count_where_no_final_info_is_given() -> None:
    info = {"final_obs": np.zeros((2, 1)), "metrics": {"x": np.array([1.0, 2.0])}}
    env = LaneEnv(Broken(np.zeros(2), info, done=True))
    env.reset(0)
    ((name, lanes, values),) = env.step(np.zeros(2)).metrics
    assert (name, lanes.tolist(), values.tolist()) == ("x", [True, True], [1.0, 2.0])


def test_exact_continuation_of_a_native_environment() -> None:
    pytest.importorskip("amago_envs")

    def make() -> LaneEnv:
        settings = {"size": 3, "k_attempts": 2, "max_attempt_steps": 4, "hard_mode": True}
        return LaneEnv(gym.make_vec("amago_envs:MetaFrozenLake-v1", num_envs=3, **settings))

    env = make()
    env.reset(7)
    actions = np.random.default_rng(0).integers(0, 5, (60, 3))
    for action in actions[:17]:
        env.step(action)
    saved = env.state_dict()
    ours = [env.step(action) for action in actions[17:]]
    restored = make()
    restored.load_state_dict(saved)
    for expected, action in zip(ours, actions[17:], strict=True):
        step = restored.step(action)
        for name in ("obs", "reward", "terminated", "truncated", "stepped", "started"):
            assert np.array_equal(getattr(step, name), getattr(expected, name)), name
    with pytest.raises(CheckpointError, match="load_state_dict"):
        LaneEnv(trace_envs([(2,)], AutoresetMode.NEXT_STEP)).load_state_dict(saved)
