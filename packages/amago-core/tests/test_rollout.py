"""Collecting: what is stored in which autoreset mode, statistics, exact continuation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from core_helpers import TraceEnv, make_policy, trace_envs
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from amago_core.errors import CheckpointError, EnvError
from amago_core.exploration import EpsilonGreedyConfig
from amago_core.policy import Policy
from amago_core.recorder import Recorder
from amago_core.rollout import Rollout, RolloutStats
from amago_core.state_tree import flatten_tensors, unflatten
from amago_core.vector_envs import EnvFactory
from amago_offline.schema import Trajectory

LIMITS = [(3, 2), (1, 4), (5,)]
MODES = list(AutoresetMode)


def rollout_in(
    env: VectorEnv, encoder: str = "gru", *, explore: bool = False, sample: bool = False, seed: int = 0, **recorder: Any
) -> tuple[Rollout, list[Trajectory]]:
    policy = make_policy(env, encoder, sample=sample, seed=seed)
    stored: list[Trajectory] = []
    exploration = None
    if explore:
        exploration = EpsilonGreedyConfig().build(env.num_envs, policy.adapter.action_spec, seed)
    keeper = Recorder(policy.adapter.schema, env.num_envs, stored.append, seed=seed, **recorder)
    return Rollout(env, policy, exploration=exploration, recorder=keeper), stored


def arrays(trajectory: Trajectory) -> dict[str, np.ndarray]:
    names = ("prev_action", "prev_reward", "terminated", "truncated", "time_idx")
    return {**{f"obs/{k}": v for k, v in trajectory.obs.items()}, **{name: getattr(trajectory, name) for name in names}}


def assert_same(ours: Sequence[Trajectory], theirs: Sequence[Trajectory]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        left, right = arrays(a), arrays(b)
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name]), name


def of_lane(stored: list[Trajectory], lane: int) -> list[Trajectory]:
    """What one lane of `TraceEnv`s stored, in order."""
    key = "observation" if "observation" in stored[0].obs else "where"
    return [t for t in stored if t.obs[key][0, 1] == lane]


def test_worked_example_of_two_lanes() -> None:
    for mode in MODES:
        rollout, stored = rollout_in(trace_envs([(3,), (3,)], mode))
        rollout.restart(0)
        rollout.collect(4)
        assert len(stored) == 2
        for lane, trajectory in enumerate(stored):
            assert trajectory.obs["observation"][:, 0].tolist() == [100, 101, 102, 103]
            assert trajectory.obs["observation"][:, 1].tolist() == [lane] * 4
            assert trajectory.terminated.tolist() == [False] * 3 + [True]
            assert trajectory.prev_reward.tolist() == np.array([0, 1, 2, 3], np.float32).tolist() or lane == 1
        rollout.restart(0)  # Stores what has begun: the next trajectory opens with observation 200.
        late = mode is AutoresetMode.NEXT_STEP  # Its fourth step only reset.
        if late:
            assert len(stored) == 2
        else:
            for trajectory in stored[2:]:
                assert trajectory.obs["observation"][:, 0].tolist() == [200, 201]
                assert trajectory.prev_action[0] == -1 and trajectory.prev_reward[0] == 0
                assert trajectory.time_idx.tolist() == [0, 1]
                assert not trajectory.terminated.any() and not trajectory.truncated.any()


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("dict_obs", [False, True])
def test_all_modes_store_the_same(dict_obs: bool, continuous: bool, reuse: bool) -> None:
    settings = {"dict_obs": dict_obs, "continuous": continuous}
    stored = {}
    for mode in MODES:
        env = trace_envs(LIMITS, mode, **settings)
        if reuse and mode is not AutoresetMode.SAME_STEP:
            makers = [lambda a=a, i=i: TraceEnv(a, i, reuse=True, **settings) for i, a in enumerate(LIMITS)]
            env = SyncVectorEnv(makers, autoreset_mode=mode, copy=False)
        rollout, stored[mode] = rollout_in(env, max_transitions=3)
        rollout.restart(0)
        rollout.collect(45)
    for lane in range(3):
        per_mode = [of_lane(stored[mode], lane) for mode in MODES]
        least = min(len(trajectories) for trajectories in per_mode)
        assert least >= 12
        for trajectories in per_mode[1:]:
            assert_same(trajectories[:least], per_mode[0][:least])


def test_what_is_stored_is_what_happened() -> None:
    """Every row against the environment's own rules."""
    rollout, stored = rollout_in(trace_envs(LIMITS, AutoresetMode.SAME_STEP), sample=True)
    rollout.restart(0)
    rollout.collect(30)
    for lane, limits in enumerate(LIMITS):
        for index, trajectory in enumerate(of_lane(stored, lane)):
            limit = limits[index % len(limits)]
            obs = trajectory.obs["observation"]
            assert obs[:, 0].tolist() == [100 * (index + 1) + t for t in range(limit + 1)]
            # The environment's actions count from 7; its observations start with 0.
            assert obs[1:, 2].tolist() == (trajectory.actions + 7).tolist()
            assert trajectory.prev_action[0] == -1 and (trajectory.actions >= 0).all()
            assert trajectory.prev_action.dtype == np.int8
            np.testing.assert_allclose(trajectory.rewards, np.arange(1, limit + 1) + lane / 10, rtol=1e-6)
            assert trajectory.time_idx.tolist() == list(range(limit + 1)) and trajectory.prev_reward[0] == 0
            assert trajectory.terminated[-1] == (limit % 2 == 1) and trajectory.truncated[-1] == (limit % 2 == 0)


def test_continuous_actions_are_stored_in_the_policys_units() -> None:
    rollout, stored = rollout_in(
        trace_envs([(4,)], AutoresetMode.SAME_STEP, continuous=True), sample=True, explore=True
    )
    rollout.restart(0)
    rollout.collect(40)
    for trajectory in stored:
        actions = trajectory.actions
        assert actions.dtype == np.float32 and np.abs(actions).max() <= 1 and not trajectory.prev_action[0].any()
        executed = actions * np.array([2, 5]) + np.array([0, 5])
        np.testing.assert_allclose(trajectory.obs["observation"][1:, 2], executed.sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_snippets_have_exactly_the_limit(mode: AutoresetMode) -> None:
    rollout, stored = rollout_in(trace_envs([(20,)], mode), max_transitions=5)
    rollout.restart(0)
    rollout.collect(21)
    assert [(int(t.time_idx[0]), int(t.time_idx[-1])) for t in stored[:4]] == [(0, 5), (5, 10), (10, 15), (15, 20)]
    assert [bool(t.truncated[-1]) for t in stored[:4]] == [False, False, False, True]
    for before, after in zip(stored[:3], stored[1:4], strict=True):
        left, right = arrays(before), arrays(after)
        assert all(np.array_equal(left[name][-1], right[name][0]) for name in left)


@pytest.mark.parametrize("mode", MODES)
def test_statistics(mode: AutoresetMode) -> None:
    rollout, _ = rollout_in(trace_envs([(2,), (3,)], mode))
    rollout.restart(0)
    stats = rollout.collect(3)
    late = mode is AutoresetMode.NEXT_STEP
    assert stats.frames == (5 if late else 6)
    assert stats.returns == [3.0, pytest.approx(6.3)] and stats.lengths == [2, 3]
    expected = {"length": [2.0, 3.0], "episode": [1.0, 1.0], "Time": [1, 1, 2, 2, 3] if late else [1, 1, 2, 2, 1, 3]}
    assert {name: sorted(values) for name, values in stats.metrics.items()} == {
        name: sorted(values) for name, values in expected.items()
    }
    summary = stats.summary()
    assert summary["return"] == pytest.approx(4.65) and summary["length"] == 2.5 and summary["episodes"] == 2
    stats = rollout.collect(3)  # Episodes go on from one call to the next.
    assert stats.lengths == ([2] if late else [2, 2, 3])


def test_nothing_is_averaged_over_nothing() -> None:
    assert RolloutStats().summary() == {"episodes": 0.0}
    rollout, _ = rollout_in(trace_envs([(9,)], AutoresetMode.SAME_STEP))
    rollout.restart(0)
    assert rollout.collect(1).summary() == {"episodes": 0.0, "Time": 1.0}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("encoder", ["transformer", "gru"])
def test_the_users_loop_acts_as_the_rollout_does(encoder: str, mode: AutoresetMode) -> None:
    rollout, stored = rollout_in(trace_envs(LIMITS, mode, dict_obs=True), encoder, sample=True, seed=4)
    rollout.restart(0)
    rollout.collect(25)
    env = trace_envs(LIMITS, mode, dict_obs=True)
    policy = make_policy(env, encoder, sample=True, seed=4)
    obs, _ = env.reset(seed=0)
    policy.reset(3)
    reward, resetting = np.zeros(3), np.zeros(3, bool)
    taken: list[list[int]] = [[], [], []]
    for _ in range(25):
        action = policy.act(obs, reward)
        obs, reward, terminated, truncated, _ = env.step(action)
        done = terminated | truncated
        for lane in np.flatnonzero(~resetting):
            taken[lane].append(int(action[lane]) - 7)
        started = done
        if mode is AutoresetMode.NEXT_STEP:
            started, resetting = resetting, done
        elif mode is AutoresetMode.DISABLED and done.any():
            obs, _ = env.reset(options={"reset_mask": done})
        if started.any():
            policy.reset(started)  # The loop need not zero the reward: the policy ignores it.
    for lane in range(3):
        actions = np.concatenate([t.actions for t in of_lane(stored, lane)]).tolist()
        assert len(actions) > 10 and actions == taken[lane][: len(actions)]


def test_one_environment_in_the_users_loop_acts_as_one_lane() -> None:
    rollout, stored = rollout_in(trace_envs([(5, 2)], AutoresetMode.DISABLED), "transformer", sample=True, seed=4)
    rollout.restart(0)
    rollout.collect(24)
    env = TraceEnv((5, 2))
    policy = make_policy(trace_envs([(5, 2)], AutoresetMode.DISABLED), "transformer", sample=True, seed=4)
    taken = []
    for _ in range(6):
        obs, _ = env.reset()
        policy.reset()
        reward, done = 0.0, False
        while not done:
            action = policy.act(obs, reward)
            taken.append(action - 7)
            obs, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
    assert np.concatenate([t.actions for t in stored]).tolist() == taken


@pytest.mark.parametrize("mode", MODES)
def test_a_lane_never_touches_another(mode: AutoresetMode) -> None:
    """Lane 1 is reset at other times; what lanes 0 and 2 do and store stays the same, bit for bit."""
    results = []
    for middle in ((1, 4), (2, 2, 1)):
        env = trace_envs([(3, 2), middle, (5,)], mode, continuous=True)
        rollout, stored = rollout_in(env, "transformer", sample=True, seed=2)
        rollout.restart(0)
        rollout.collect(30)
        results.append(stored)
    for lane in (0, 2):
        assert_same(*(of_lane(stored, lane) for stored in results))
    assert [len(t) for t in of_lane(results[0], 1)] != [len(t) for t in of_lane(results[1], 1)]


def test_exploration_sees_real_steps_only_and_its_actions_are_remembered() -> None:
    rollout, stored = rollout_in(trace_envs([(1,), (3,)], AutoresetMode.NEXT_STEP), explore=True, sample=True)
    rollout.restart(0)
    rollout.collect(8)
    assert rollout.exploration is not None and rollout.exploration.steps.tolist() == [4, 6]
    assert sum(t.transitions for t in stored) == 4 + 6
    executed = rollout.policy.state_dict()["prev_action"]
    for trajectory in stored:  # The environment shows what it ran.
        assert trajectory.obs["observation"][1:, 2].tolist() == (trajectory.actions + 7).tolist()
    assert executed.shape == (2,)


def lakes(lanes: int = 3) -> VectorEnv:
    pytest.importorskip("amago_envs")
    settings = {"size": 3, "k_attempts": 3, "max_attempt_steps": 4, "recover_mode": True}
    return gym.make_vec("amago_envs:MetaFrozenLake-v1", num_envs=lanes, **settings)


@pytest.mark.parametrize("encoder", ["transformer", "gru"])
def test_continues_exactly_in_the_middle_of_episodes(encoder: str) -> None:
    settings = {"explore": True, "sample": True, "max_transitions": 6, "stagger": 4}
    rollout, stored = rollout_in(lakes(), encoder, seed=1, **settings)
    assert rollout.exact
    rollout.restart(5)
    rollout.collect(33)
    done = len(stored)
    tensors, skeleton = flatten_tensors(rollout.state_dict())
    text = json.dumps(skeleton)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = rollout.collect(50)
    for _ in range(2):  # Twice, because going on must not change what was saved.
        restored, again = rollout_in(lakes(), encoder, seed=2, **settings)
        restored.load_state_dict(unflatten(tensors, json.loads(text)))
        stats = restored.collect(50)
        assert_same(again, stored[done:])
        assert stats == expected and stats.returns


def test_a_state_in_memory_is_independent() -> None:
    rollout, stored = rollout_in(lakes(), sample=True, max_transitions=4)
    rollout.restart(0)
    rollout.collect(10)
    state = rollout.state_dict()
    runs = []
    for _ in range(3):
        stored.clear()
        runs.append((rollout.collect(20), list(stored)))
        rollout.load_state_dict(state)
    for stats, trajectories in runs[1:]:
        assert stats == runs[0][0]
        assert_same(trajectories, runs[0][1])


def test_environments_that_cannot_be_saved_begin_anew() -> None:
    rollout, _ = rollout_in(trace_envs([(5,)], AutoresetMode.SAME_STEP), explore=True)
    assert not rollout.exact
    rollout.restart(0)
    rollout.collect(3)
    state = rollout.state_dict()
    assert set(state) == {"policy", "exploration", "recorder"}
    restored, stored = rollout_in(trace_envs([(5,)], AutoresetMode.SAME_STEP), explore=True)
    restored.load_state_dict(state)
    assert restored.exploration is not None and restored.exploration.steps.tolist() == [3]
    restored.restart(1)  # Stores what was unfinished.
    restored.collect(5)
    assert [t.time_idx.tolist() for t in stored] == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_states_that_do_not_fit_are_refused() -> None:
    rollout, _ = rollout_in(lakes(), explore=True)
    rollout.restart(0)
    state = rollout.state_dict()
    with pytest.raises(CheckpointError, match="exploration: this rollout has no, the saved one had one"):
        rollout_in(lakes())[0].load_state_dict(state)
    bare = Rollout(lakes(), make_policy(lakes()), exploration=rollout.exploration)
    with pytest.raises(CheckpointError, match="recorder"):
        bare.load_state_dict(state)
    with pytest.raises(CheckpointError, match="cannot be saved"):
        rollout_in(trace_envs([(5,)] * 3, AutoresetMode.SAME_STEP), explore=True)[0].load_state_dict(state)
    with pytest.raises(ValueError, match="lanes|shape"):
        rollout_in(lakes(2), explore=True)[0].load_state_dict(state)


def test_restart_flushes_and_forgets() -> None:
    rollout, stored = rollout_in(lakes(), "transformer", sample=False)
    rollout.restart(3)
    rollout.collect(5)
    stored.clear()
    first = rollout.state_dict()
    rollout.restart(3)
    assert sum(t.transitions for t in stored) == int((first["recorder"]["rows"] - 1).sum())
    assert not any(t.terminated.any() or t.truncated.any() for t in stored)
    fresh, _ = rollout_in(lakes(), "transformer", sample=False)
    fresh.restart(3)
    stored.clear()
    assert rollout.collect(30) == fresh.collect(30)


def test_without_a_recorder_or_exploration() -> None:
    env = trace_envs([(2,)], AutoresetMode.DISABLED)
    rollout = Rollout(env, make_policy(env))
    rollout.restart(0)
    assert rollout.collect(4).lengths == [2, 2]


def test_one_process_per_environment() -> None:
    rollouts = []
    for mode in ("sync", "async"):
        env = EnvFactory(make_env=TraceEnv, mode=mode).build(2)  # type: ignore[arg-type]
        rollout, stored = rollout_in(env, sample=True)
        rollout.restart(0)
        rollouts.append((rollout.collect(7), stored))
        env.close()
    assert rollouts[0][0] == rollouts[1][0] and len(rollouts[0][1]) == 4
    assert_same(rollouts[0][1], rollouts[1][1])


class NoFinalObs(SyncVectorEnv):
    """Breaks its autoreset mode."""

    def step(self, actions: Any) -> tuple:
        *rest, info = super().step(actions)
        return *rest, {key: value for key, value in info.items() if key != "final_obs"}


def test_a_missing_last_observation_is_an_error() -> None:
    env = NoFinalObs([lambda: TraceEnv((2,))], autoreset_mode=AutoresetMode.SAME_STEP)
    rollout, _ = rollout_in(env)
    rollout.restart(0)
    rollout.collect(1)
    with pytest.raises(EnvError, match="NoFinalObs resets in the same step"):
        rollout.collect(1)


def test_policies_of_other_lanes_are_made_to_fit() -> None:
    env = trace_envs([(2,)] * 3, AutoresetMode.SAME_STEP)
    policy: Policy = make_policy(env)
    policy.reset(7)
    rollout = Rollout(env, policy)
    rollout.restart(0)
    assert rollout.collect(2).frames == 6
