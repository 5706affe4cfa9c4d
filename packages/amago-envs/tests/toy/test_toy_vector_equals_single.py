from __future__ import annotations

import json
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from amago_envs import MetaFrozenLake, MetaFrozenLakeVector, RoomKeyDoor, RoomKeyDoorVector

LAKE, ROOM = (MetaFrozenLake, MetaFrozenLakeVector), (RoomKeyDoor, RoomKeyDoorVector)
CASES: list[tuple[Any, dict[str, Any]]] = [
    (LAKE, {"size": 3, "k_attempts": 2}),
    (LAKE, {"size": 4, "k_attempts": 5}),
    (LAKE, {"size": 9, "k_attempts": 1, "max_attempt_steps": 12}),
    (LAKE, {"size": 3, "k_attempts": 3, "hard_mode": True}),
    (LAKE, {"size": 3, "k_attempts": 2, "recover_mode": True}),
    (LAKE, {"size": 3, "k_attempts": 2, "hard_mode": True, "recover_mode": True, "slip_chance": 0.4}),
    (LAKE, {"size": 3, "k_attempts": 2, "slip_chance": 0.3, "show_k_progress": False}),
    (ROOM, {"size": 3, "max_attempt_steps": 8, "meta_rollout_horizon": 30}),
    (ROOM, {"size": 3, "dark": False, "randomize_actions": True, "max_attempt_steps": 7, "meta_rollout_horizon": 25}),
    (ROOM, {"size": 4, "start_location": (0, 0), "goal_location": [3, 3], "meta_rollout_horizon": 20}),
]


def assert_same_tree(ours: Any, theirs: Any, path: str = "info") -> None:
    if isinstance(theirs, dict):
        assert isinstance(ours, dict) and set(ours) == set(theirs), (path, sorted(ours), sorted(theirs))
        for key in theirs:
            assert_same_tree(ours[key], theirs[key], f"{path}.{key}")
        return
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, path
    if theirs.dtype == object:
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine is None) == (other is None), path
            if other is not None:
                assert mine.dtype == other.dtype
                np.testing.assert_array_equal(mine, other, err_msg=path)
    else:
        np.testing.assert_array_equal(ours, theirs, err_msg=path)


def assert_same_step(ours: tuple, theirs: tuple) -> None:
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(mine, other)
    assert_same_tree(ours[-1], theirs[-1])


def both(classes: Any, settings: dict[str, Any], lanes: int) -> tuple[Any, SyncVectorEnv]:
    single, vector = classes
    reference = SyncVectorEnv([lambda: single(**settings)] * lanes, autoreset_mode=AutoresetMode.SAME_STEP)
    return vector(lanes, **settings), reference


@pytest.mark.parametrize(("classes", "settings"), CASES)
def test_vector_equals_sync_vector_of_singles(classes: Any, settings: dict[str, Any]) -> None:
    ours, theirs = both(classes, settings, 6)
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    rng = np.random.default_rng(0)
    for seed in (123, None, [7, None, 9, None, 0, 4]):
        assert_same_step(ours.reset(seed=seed), theirs.reset(seed=seed))
        assert ours.np_random_seed == theirs.np_random_seed
        ended = 0
        for _ in range(150):
            actions = rng.integers(5, size=6)
            mine, other = ours.step(actions), theirs.step(actions)
            assert_same_step(mine, other)
            ended += int(mine[2].sum())
        assert ended > 3


@pytest.mark.parametrize(("classes", "settings"), [CASES[1], CASES[5], CASES[7]])
def test_partial_resets_equal_those_of_sync_vector(classes: Any, settings: dict[str, Any]) -> None:
    ours, theirs = both(classes, settings, 5)
    rng = np.random.default_rng(1)
    ours.reset(seed=3), theirs.reset(seed=3)
    for turn in range(20):
        for _ in range(7):
            actions = rng.integers(5, size=5)
            assert_same_step(ours.step(actions), theirs.step(actions))
        mask = rng.random(5) < 0.5
        mask[turn % 5] = True
        options, seed = {"reset_mask": mask}, [None, 40 + turn][turn % 2]
        mine = ours.reset(seed=seed, options=options)
        assert "reset_mask" in options
        assert_same_step(mine, theirs.reset(seed=seed, options=options))


def test_given_map_equals_sync_vector() -> None:
    ours, theirs = both(LAKE, {"size": 3, "k_attempts": 2, "hard_mode": True}, 4)
    options = {"map": ["SFH", "FFF", "HFG"]}
    assert_same_step(ours.reset(seed=0, options=options), theirs.reset(seed=0, options=options))
    rng = np.random.default_rng(0)
    for _ in range(100):
        actions = rng.integers(5, size=4)
        assert_same_step(ours.step(actions), theirs.step(actions))


@pytest.mark.parametrize("name", ["MetaFrozenLake", "RoomKeyDoor"])
def test_made_by_id_equals_sync_vector_made_by_id(name: str) -> None:
    for env_id in (f"amago_envs:{name}-v1", f"amago_envs:amago_envs/{name}-v0"):
        ours = gymnasium.make_vec(env_id, num_envs=8, size=4)
        assert type(ours.unwrapped).__name__ == f"{name}Vector"
        theirs = gymnasium.make_vec(
            env_id,
            num_envs=8,
            size=4,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        )
        assert_same_step(ours.reset(seed=5), theirs.reset(seed=5))
        rng = np.random.default_rng(0)
        for _ in range(60):
            actions = rng.integers(5, size=8)
            assert_same_step(ours.step(actions), theirs.step(actions))
        ours.close(), theirs.close()


def jsonable(value: Any) -> Any:
    """What a state dict looks like after a trip through JSON."""
    return json.loads(json.dumps(value, default=lambda array: array.tolist()))


@pytest.mark.parametrize("through_json", [False, True])
@pytest.mark.parametrize(("classes", "settings"), CASES)
def test_vector_state_continues_exactly(classes: Any, settings: dict[str, Any], through_json: bool) -> None:
    original, copy = (classes[1](6, **settings) for _ in range(2))
    rng = np.random.default_rng(0)
    original.reset(seed=11)
    for _ in range(37):
        original.step(rng.integers(5, size=6))
    state = original.state_dict()
    frozen = jsonable(state)
    following = rng.integers(5, size=(120, 6))
    expected = [original.step(actions) for actions in following]
    assert jsonable(state) == frozen, "going on must not change a state that was taken"
    copy.reset(seed=99)
    copy.load_state_dict(frozen if through_json else state)
    assert copy.np_random_seed == tuple(range(11, 17))
    for actions, wanted in zip(following, expected, strict=True):
        assert_same_step(copy.step(actions), wanted)
    assert_same_step(copy.reset(), original.reset())
    assert jsonable(copy.state_dict()) == jsonable(original.state_dict())


@pytest.mark.parametrize("through_json", [False, True])
@pytest.mark.parametrize(("classes", "settings"), CASES)
def test_single_state_continues_exactly(classes: Any, settings: dict[str, Any], through_json: bool) -> None:
    original, copy = (classes[0](**settings) for _ in range(2))
    rng = np.random.default_rng(0)

    def advance(env: Any, action: int) -> tuple[Any, ...]:
        obs, reward, terminated, _, info = env.step(int(action))
        following = env.reset()[0].tolist() if terminated else None
        return obs.tolist(), reward, terminated, info, following

    original.reset(seed=11)
    for action in rng.integers(5, size=37):
        advance(original, action)
    state = original.state_dict()
    if through_json:
        state = jsonable(state)
    following = rng.integers(5, size=120)
    expected = [advance(original, action) for action in following]
    copy.load_state_dict(state)
    assert [advance(copy, action) for action in following] == expected


@pytest.mark.parametrize("classes", [LAKE, ROOM])
def test_state_before_reset_and_of_other_settings(classes: Any) -> None:
    single, vector = classes
    env = vector(3, size=4)
    other = vector(3, size=4)
    other.load_state_dict(env.state_dict())
    with pytest.raises(gymnasium.error.ResetNeeded):
        other.step([0, 0, 0])
    np.testing.assert_array_equal(env.reset()[0], other.reset()[0])
    for wrong in (vector(2, size=4), vector(3, size=5)):
        with pytest.raises(ValueError, match="settings"):
            wrong.load_state_dict(env.state_dict())
    with pytest.raises(ValueError, match="settings"):
        single(size=4).load_state_dict(single(size=5).state_dict())


def test_results_of_a_step_are_not_touched_by_the_next() -> None:
    env = MetaFrozenLakeVector(4, size=3, k_attempts=2)
    obs, _ = env.reset(seed=0)
    kept = [(obs, obs.copy())]
    rng = np.random.default_rng(0)
    for _ in range(40):
        step = env.step(rng.integers(5, size=4))
        kept += [(array, array.copy()) for array in step[:4]]
    for array, copy in kept:
        np.testing.assert_array_equal(array, copy)
