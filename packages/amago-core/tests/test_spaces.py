"""Spaces: every supported kind, batched against single, and clear refusals."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import batch_space

from amago_core.errors import AmagoError, EnvError
from amago_core.spaces import SpaceAdapter, fingerprint_difference, require_gymnasium_env

BOX = spaces.Box(-1.0, 2.0, (3,), np.float32)
ACTION = spaces.Discrete(4)


class EveryKind(gym.Env):
    """Ends after 3 steps; its observation holds every supported kind."""

    observation_space = spaces.Dict(
        {
            "vec": spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "image": spaces.Box(0, 255, (8, 8, 3), np.uint8),
            "token": spaces.Discrete(300, start=5),
            "many": spaces.MultiDiscrete([3, 7]),
            "bits": spaces.MultiBinary(4),
            "inner": spaces.Dict({"scalar": spaces.Box(0.0, 1.0, (), np.float32)}),
        }
    )
    action_space = spaces.Discrete(3, start=-1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(1000)))
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 3, False, {}


def test_box_becomes_one_key():
    adapter = SpaceAdapter(BOX, ACTION)
    assert list(adapter.obs_specs) == ["observation"]
    spec = adapter.obs_specs["observation"]
    assert (spec.shape, spec.dtype, spec.kind, spec.low, spec.high) == ((3,), "float32", "vector", -1.0, 2.0)
    obs = adapter.to_obs(np.ones((5, 3), np.float32), 5)
    assert obs["observation"].shape == (5, 3)
    assert adapter.to_obs(np.ones(3, np.float32))["observation"].shape == (1, 3)


def test_every_kind_and_sorted_keys():
    adapter = SpaceAdapter(EveryKind.observation_space, EveryKind.action_space)
    specs = adapter.obs_specs
    assert list(specs) == ["bits", "image", "inner__scalar", "many", "token", "vec"]
    assert (specs["vec"].dtype, specs["vec"].low) == ("float32", None)
    assert (specs["image"].kind, specs["image"].dtype, specs["image"].shape) == ("image", "uint8", (8, 8, 3))
    assert (specs["token"].kind, specs["token"].num_classes, specs["token"].dtype) == ("tokens", 300, "int16")
    assert (specs["many"].num_classes, specs["many"].shape, specs["many"].dtype) == (7, (2,), "int8")
    assert (specs["bits"].kind, specs["bits"].shape) == ("vector", (4,))
    assert specs["inner__scalar"].shape == (1,)
    for key, spec in specs.items():
        field = adapter.schema.obs[key]
        assert (tuple(field.shape), np.dtype(field.dtype).name) == (spec.shape, spec.dtype)


@pytest.mark.parametrize("lanes", [1, 4])
def test_batched_equals_single(lanes):
    adapter = SpaceAdapter(EveryKind.observation_space, EveryKind.action_space)
    batched = batch_space(EveryKind.observation_space, lanes)
    batched.seed(3)
    sample = batched.sample()
    arrays = adapter.to_obs(sample, lanes)
    for lane, single in enumerate(gym.vector.utils.iterate(batched, sample)):
        for key, value in adapter.to_obs(single).items():
            np.testing.assert_array_equal(value[0], arrays[key][lane], err_msg=key)
    assert arrays["token"].min() >= 0 and arrays["token"].max() < 300
    assert all(arrays[key].dtype == spec.dtype for key, spec in adapter.obs_specs.items())


def test_vector_env_and_final_obs():
    env = SyncVectorEnv([EveryKind] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    adapter = SpaceAdapter(env.single_observation_space, env.single_action_space)
    obs, _ = env.reset(seed=0)
    adapter.to_obs(obs, 3)
    for _ in range(3):
        obs, _, terminated, _, info = env.step(adapter.to_env_actions(np.array([0, 1, 2])))
    assert terminated.all()
    final = adapter.final_obs(info["final_obs"], [0, 2])
    np.testing.assert_array_equal(final["image"][1], info["final_obs"][2]["image"])
    assert final["token"].shape == (2, 1)
    empty = adapter.final_obs(info["final_obs"], [])
    assert empty["image"].shape == (0, 8, 8, 3) and empty["image"].dtype == np.uint8
    holes = np.full(3, None, dtype=object)
    with pytest.raises(EnvError, match=r"lanes \[1\] ended"):
        adapter.final_obs(holes, [1])
    batched = adapter.final_obs(obs, [2])
    np.testing.assert_array_equal(batched["vec"], adapter.to_obs(obs, 3)["vec"][2:])


def test_final_obs_of_plain_arrays():
    adapter = SpaceAdapter(BOX, ACTION)
    batch = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(adapter.final_obs(batch, np.array([3, 1]))["observation"], batch[[3, 1]])


def test_discrete_actions():
    adapter = SpaceAdapter(BOX, spaces.Discrete(4, start=10))
    assert (adapter.action_spec.kind, adapter.action_spec.size) == ("discrete", 4)
    env_actions = adapter.to_env_actions(np.array([0, 3], np.int8))
    np.testing.assert_array_equal(env_actions, [10, 13])
    assert env_actions.dtype == np.int64
    np.testing.assert_array_equal(adapter.from_env_actions(env_actions), [0, 3])
    np.testing.assert_array_equal(adapter.zero_action(2), [-1, -1])
    for bad in (np.array([4]), np.array([-1])):
        with pytest.raises(EnvError, match=r"0\.\.3"):
            adapter.to_env_actions(bad)
    with pytest.raises(EnvError, match="integers"):
        adapter.to_env_actions(np.array([0.5]))


@pytest.mark.parametrize(
    ("count", "dtype"), [(2, "int8"), (128, "int8"), (129, "int16"), (300, "int16"), (40_000, "int32")]
)
def test_smallest_signed_action_dtype_holds_every_action(count, dtype):
    adapter = SpaceAdapter(BOX, spaces.Discrete(count))
    assert np.dtype(adapter.schema.action.dtype).name == dtype
    assert adapter.from_env_actions(np.array([count - 1]))[0] == count - 1


def test_continuous_actions_are_rescaled():
    space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))
    adapter = SpaceAdapter(BOX, space)
    actions = np.array([[-1.0, -1.0], [0.0, 0.5], [1.0, 1.0], [3.0, -3.0]], np.float32)
    expected = np.array([[-2, 0], [0, 7.5], [2, 10], [2, 0]], np.float32)
    got = adapter.to_env_actions(actions)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == np.float32 and all(space.contains(row) for row in got)
    np.testing.assert_allclose(adapter.from_env_actions(expected), np.clip(actions, -1, 1))
    np.testing.assert_array_equal(adapter.zero_action(3), np.zeros((3, 2), np.float32))
    with pytest.raises(EnvError, match=r"\[N, 2\]"):
        adapter.to_env_actions(np.zeros((3, 1)))


def test_shaped_and_integer_boxes():
    adapter = SpaceAdapter(BOX, spaces.Box(0, 10, (2, 2), np.int32))
    assert adapter.action_spec.size == 4
    got = adapter.to_env_actions(np.full((3, 4), 0.21))
    assert got.shape == (3, 2, 2) and got.dtype == np.int32 and (got == 6).all()


def test_multi_binary_actions():
    adapter = SpaceAdapter(BOX, spaces.MultiBinary(3))
    assert (adapter.action_spec.kind, adapter.action_spec.size) == ("multi_binary", 3)
    got = adapter.to_env_actions(np.array([[0.0, 1.0, 1.0]]))
    np.testing.assert_array_equal(got, [[0, 1, 1]])
    assert got.dtype == np.int8
    np.testing.assert_array_equal(adapter.from_env_actions(got), [[0, 1, 1]])
    assert adapter.zero_action(2).shape == (2, 3)


@pytest.mark.parametrize(
    ("obs", "action", "message"),
    [
        (spaces.Text(5), ACTION, "Text.*supported: Box"),
        (spaces.Tuple([BOX]), ACTION, "Tuple.*supported: Box"),
        (spaces.Dict({"a": spaces.Text(3)}), ACTION, "key 'a'"),
        (spaces.Dict({}), ACTION, "empty Dict"),
        (spaces.Box(0, 1, (0,)), ACTION, "no elements"),
        (BOX, spaces.MultiDiscrete([2, 2]), "MultiDiscrete.*supported: Discrete"),
        (BOX, spaces.Box(-np.inf, np.inf, (2,)), "finite bounds"),
        (BOX, spaces.Dict({"a": ACTION}), "supported: Discrete"),
        (None, ACTION, "gymnasium.Space, got builtins.NoneType"),
        (spaces.Dict({"a__b": BOX, "a": spaces.Dict({"b": BOX})}), ACTION, "collide"),
    ],
)
def test_unsupported_spaces_are_named(obs, action, message):
    with pytest.raises(EnvError, match=message) as caught:
        SpaceAdapter(obs, action)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, AmagoError) and isinstance(caught.value, ValueError)


def test_wrong_observations_are_named():
    adapter = SpaceAdapter(BOX, ACTION)
    with pytest.raises(EnvError, match=r"\(5, 2\) for 5 lanes"):
        adapter.to_obs(np.ones((5, 2)), 5)
    adapter = SpaceAdapter(spaces.Dict({"a": BOX}), ACTION)
    with pytest.raises(EnvError, match="KeyError 'a'"):
        adapter.to_obs({"b": np.ones((1, 3))}, 1)
    with pytest.raises(EnvError, match="ndarray"):
        adapter.to_obs(np.ones((1, 3)), 1)


def test_fingerprint_is_json_and_tells_differences():
    first = SpaceAdapter(EveryKind.observation_space, ACTION).fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert fingerprint_difference(first, SpaceAdapter(EveryKind.observation_space, ACTION).fingerprint()) == []
    other = SpaceAdapter(BOX, spaces.Discrete(6)).fingerprint()
    lines = fingerprint_difference(first, other)
    assert "action.size: 4 in the checkpoint, 6 here" in lines
    assert "observation.observation: missing in the checkpoint" in lines
    narrow = SpaceAdapter(BOX, spaces.Box(-1, 1, (2,))).fingerprint()
    wide = SpaceAdapter(BOX, spaces.Box(-2, 2, (2,))).fingerprint()
    assert any(line.startswith("action.low") for line in fingerprint_difference(narrow, wide))


def test_only_gymnasium_environments():
    require_gymnasium_env(EveryKind())
    require_gymnasium_env(SyncVectorEnv([EveryKind]))
    with pytest.raises(EnvError, match="got builtins.int"):
        require_gymnasium_env(3)
    old = type("OldEnv", (type("Base", (), {"__module__": "gym.core"}),), {})
    with pytest.raises(EnvError, match="old gym package"):
        require_gymnasium_env(old())
