"""The policy in a loop of one's own: memory, lanes, executed actions, errors."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from core_helpers import TraceEnv, make_agent, make_agent_for
from tensordict import TensorDict

from amago_core.agents import Agent
from amago_core.errors import EnvError
from amago_core.policy import Policy
from amago_core.spaces import SpaceAdapter
from amago_offline.batch import Batch

OBS = gym.spaces.Box(-10, 10, (3,), np.float32)
ADAPTERS = {
    "discrete": SpaceAdapter(OBS, gym.spaces.Discrete(4, start=7)),
    "continuous": SpaceAdapter(OBS, gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))),
}
ENCODERS = ["transformer", "gru", "ff"]


def policy(kind: str = "discrete", encoder: str = "gru", **settings: Any) -> Policy:
    return Policy(make_agent(kind, encoder), ADAPTERS[kind], **settings)


def inputs(lanes: int, steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(steps, lanes, 3)).astype(np.float32), rng.normal(size=(steps, lanes)).astype(np.float32)


def window_params(agent: Agent, obs: np.ndarray, prev_action: torch.Tensor, prev_reward: np.ndarray) -> torch.Tensor:
    """Parameters of the acting policy at every timestep of windows, `[B, L, P]`."""
    rows, length = prev_reward.shape
    false = torch.zeros(rows, length, dtype=torch.bool)
    batch = Batch(
        obs=TensorDict({"observation": torch.from_numpy(obs)}, batch_size=[rows]),
        prev_action=prev_action,
        prev_reward=torch.from_numpy(prev_reward),
        terminated=false,
        truncated=false,
        time_idx=torch.arange(length).expand(rows, -1),
        reset=torch.arange(length).expand(rows, -1) == 0,
        mask=torch.ones(rows, length - 1, dtype=torch.bool),
        batch_size=[rows],
    )
    with torch.no_grad():
        return agent.eval().actor(agent.encode(batch))[..., -1, :]


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_memory_equals_a_full_forward_over_the_history(encoder: str, kind: str) -> None:
    ours = policy(kind, encoder)
    seen: list[torch.Tensor] = []
    original = ours.agent.policy_step

    def spy(*arguments: Any) -> Any:
        distribution = original(*arguments)
        seen.append(distribution.mean)
        return distribution

    ours.agent.policy_step = spy  # type: ignore[method-assign]
    ours.reset(2)
    obs, reward = inputs(2, 12)
    actions = [ours.adapter.zero_action(2)]
    for t in range(12):
        # Half of the actions are replaced, as exploration does.
        chosen = ours.step({"observation": obs[t]}, reward[t] if t else np.zeros(2, np.float32))
        if t % 2:
            chosen = np.roll(chosen, 1, axis=0)
            ours.set_executed(chosen)
        actions.append(chosen)
    stacked = torch.from_numpy(np.stack([a.astype(np.float32) for a in actions[:-1]], 1))
    prev_action = stacked.long() if kind == "discrete" else stacked
    prev_reward = reward.T.copy()
    prev_reward[:, 0] = 0
    params = window_params(ours.agent, obs.swapaxes(0, 1).copy(), prev_action, prev_reward)
    expected = ours.agent.policy_config.build(params).mean
    torch.testing.assert_close(torch.stack(seen, 1), expected, rtol=1e-4, atol=1e-5)


def run(ours: Policy, obs: np.ndarray, reward: np.ndarray, resets: dict[int, list[int]] | None = None) -> np.ndarray:
    taken = []
    for t in range(len(obs)):
        lanes = (resets or {}).get(t)
        if lanes is not None:
            ours.reset(np.isin(np.arange(obs.shape[1]), lanes))
        taken.append(ours.act(obs[t], reward[t]))
    return np.stack(taken)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_reset_never_touches_another_lane(encoder: str) -> None:
    obs, reward = inputs(3, 30)
    plain, other = (policy("continuous", encoder, sample=True, seed=1) for _ in range(2))
    for ours in (plain, other):
        ours.reset(3)
    expected = run(plain, obs, reward)
    actions = run(other, obs, reward, {5: [1], 6: [1], 21: [1]})
    assert np.array_equal(actions[:, [0, 2]], expected[:, [0, 2]])
    if encoder != "ff":
        assert not np.array_equal(actions[5:, 1], expected[5:, 1])
    ours, theirs = other.state_dict(), plain.state_dict()
    assert ours["time_idx"].tolist() == [30, 9, 30] and theirs["time_idx"].tolist() == [30, 30, 30]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_reset_lane_acts_as_a_fresh_policy(encoder: str) -> None:
    obs, reward = inputs(2, 20)
    ours = policy("continuous", encoder, sample=False)
    ours.reset(2)
    actions = run(ours, obs, reward, {9: [0, 1]})
    ours.reset(2)
    fresh = run(ours, obs[9:], reward[9:])
    np.testing.assert_allclose(actions[9:], fresh, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_one_environment_equals_one_lane(kind: str) -> None:
    obs, reward = inputs(1, 8)
    single, lanes = policy(kind, seed=3), policy(kind, seed=3)
    lanes.reset(1)
    expected = run(lanes, obs, reward)[:, 0]
    for t in range(8):  # The first `act` makes room for one environment.
        action = single.act(obs[t, 0], float(reward[t, 0]))
        assert np.array_equal(action, expected[t])
        assert isinstance(action, int) if kind == "discrete" else action.shape == (2,)
        assert single.adapter._action_space.contains(action)
    single.reset()
    assert single.state_dict()["time_idx"].tolist() == [0]


def test_sampling_is_seeded_and_the_mode_is_not_random() -> None:
    obs, reward = inputs(4, 15)

    def actions(sample: bool, seed: int) -> list:
        ours = policy(sample=sample, seed=seed)
        ours.reset(4)
        return run(ours, obs, reward).tolist()

    assert actions(True, 1) == actions(True, 1) != actions(True, 2)
    assert actions(False, 1) == actions(False, 2)


@pytest.mark.parametrize("batched", [False, True])
def test_rewards_of_the_first_timestep_are_ignored(batched: bool) -> None:
    obs, reward = inputs(1, 3)
    first, second = policy("continuous", sample=False), policy("continuous", sample=False)
    for ours in (first, second):
        ours.reset(1 if batched else None)
    pick = (lambda x: x) if batched else (lambda x: x[0])
    assert np.array_equal(first.act(pick(obs[0]), pick(reward[0])), second.act(pick(obs[0])))
    assert not np.array_equal(first.act(pick(obs[1]), pick(reward[1])), second.act(pick(obs[1]), None))
    if batched:
        first.reset(np.array([True]))
        second.reset([True])
        assert np.array_equal(first.act(obs[2], reward[2]), second.act(obs[2], 0 * reward[2]))


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_executed_actions_override_the_chosen_ones(kind: str) -> None:
    obs, reward = inputs(2, 6)
    ours, theirs = policy(kind, sample=False), policy(kind, sample=False)
    executed = {
        "discrete": np.array([9, 7]),
        "continuous": np.array([[-2.0, 10.0], [1.0, 5.0]], np.float32),
    }[kind]
    in_our_terms = {"discrete": np.array([2, 0]), "continuous": np.array([[-1.0, 1.0], [0.5, 0.0]], np.float32)}[kind]
    ours.reset(2)
    theirs.reset(2)
    for t in range(6):
        # At the first timestep there is no last action, whatever the loop hands over.
        ours.act(obs[t], reward[t], executed=executed)
        if t:
            theirs.set_executed(in_our_terms)
        theirs.step({"observation": obs[t]}, reward[t] if t else np.zeros(2, np.float32))
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    ours.reset(np.array([True, False]))
    theirs.reset(np.array([True, False]))
    ours.act(obs[0], reward[0], executed=executed)
    theirs._prev_action[1] = torch.from_numpy(in_our_terms)[1]
    theirs.step({"observation": obs[0]}, np.array([0, reward[0, 1]]))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_executed_actions_of_one_environment() -> None:
    ours, theirs = policy(sample=False), policy(sample=False)
    theirs.reset(1)
    obs, _ = inputs(1, 2)
    ours.act(obs[0, 0])
    ours.act(obs[1, 0], 0.0, executed=np.int64(9))
    theirs.act(obs[0])
    theirs.act(obs[1], executed=[9])
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


GOOD = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        ("discrete", {"obs": np.zeros((3, 3))}, "observation.*2 lanes"),
        ("discrete", {"obs": np.zeros(3)}, "observation.*2 lanes"),
        ("discrete", {"obs": {"x": GOOD}}, "observation"),
        ("discrete", {"obs": GOOD, "reward": np.zeros(3)}, "reward must be one number for each of the 2 lanes"),
        ("discrete", {"obs": GOOD, "reward": 1.0}, "reward"),
        ("discrete", {"obs": GOOD, "executed": [7]}, "executed must hold 2 actions"),
        ("discrete", {"obs": GOOD, "executed": [7, 11]}, "actions must lie in 0..3|executed"),
        ("discrete", {"obs": GOOD, "executed": [7, 7 + 256]}, "executed"),
        ("discrete", {"obs": GOOD, "executed": [7, 6]}, "actions must lie in 0..3|executed"),
        ("discrete", {"obs": GOOD, "executed": [7.5, 8]}, "executed"),
        ("discrete", {"obs": GOOD, "executed": [[7], [8]]}, "executed"),
        ("discrete", {"obs": GOOD, "executed": "ab"}, "executed"),
        ("continuous", {"obs": GOOD, "executed": np.zeros(2)}, "executed"),
        ("continuous", {"obs": GOOD, "executed": np.zeros((2, 3))}, "executed"),
        ("continuous", {"obs": GOOD, "executed": np.zeros((1, 2))}, "executed"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, call: dict, message: str) -> None:
    ours = policy(kind)
    ours.reset(2)
    ours.act(GOOD)
    before = ours.state_dict()
    with pytest.raises(EnvError, match=message):
        ours.act(**call)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("lanes", [0, -1, np.zeros(3, bool), np.zeros(2, int), [True]])
def test_bad_resets(lanes: Any) -> None:
    ours = policy()
    ours.reset(2)
    with pytest.raises(ValueError, match="lanes must be"):
        ours.reset(lanes)


def test_masks_need_lanes() -> None:
    with pytest.raises(ValueError, match="a number at first"):
        policy().reset(np.array([True]))


def test_arrays_that_torch_cannot_share() -> None:
    obs, reward = inputs(2, 3)
    plain, ours = policy(sample=False), policy(sample=False)
    for p in (plain, ours):
        p.reset(2)
    expected = run(plain, obs, reward)
    frozen, flipped, wide = obs[0].copy(), obs[1][:, ::-1].copy()[:, ::-1], obs[2].astype(">f4")
    frozen.setflags(write=False)
    frozen_reward = reward[0].copy()
    frozen_reward.setflags(write=False)
    actions = [ours.act(frozen, frozen_reward), ours.act(flipped, reward[1]), ours.act(wide, reward[2])]
    assert np.array_equal(np.stack(actions), expected)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_continues_exactly_in_the_middle_of_episodes(encoder: str) -> None:
    obs, reward = inputs(3, 40)
    ours = policy("continuous", encoder, seed=1)
    ours.reset(3)
    run(ours, obs[:20], reward[:20], {7: [1]})
    saved = ours.state_dict()
    expected = run(ours, obs[20:], reward[20:], {4: [0]})
    restored = policy("continuous", encoder, seed=2)
    restored.reset(3)
    restored.load_state_dict(saved)
    assert np.array_equal(run(restored, obs[20:], reward[20:], {4: [0]}), expected)
    ours.load_state_dict(saved)  # Acting on did not change what was saved.
    assert np.array_equal(run(ours, obs[20:], reward[20:], {4: [0]}), expected)


def test_dropout_is_off_and_training_goes_on() -> None:
    ours = policy(encoder="transformer", sample=False)
    ours.agent.train()
    ours.act(np.zeros(3, np.float32))
    assert not ours.agent.training and not ours.agent.traj_encoder.training
    ours.agent.train()
    ours.act(np.zeros(3, np.float32))
    assert not ours.agent.training
    assert all(p.requires_grad for p in ours.agent.actor.parameters())


@pytest.mark.parametrize("continuous", [False, True])
def test_a_loop_over_a_dictionary_environment(continuous: bool) -> None:
    env = TraceEnv((4,), dict_obs=True, continuous=continuous)
    adapter = SpaceAdapter(env.observation_space, env.action_space)
    ours = Policy(make_agent_for(adapter, "transformer"), adapter, seed=1)
    obs, _ = env.reset(seed=0)
    ours.reset()
    reward, done = 0.0, False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(ours.act(obs, reward))
        done = terminated or truncated
    assert ours.state_dict()["time_idx"].tolist() == [4]
