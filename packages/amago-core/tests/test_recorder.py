"""Trajectories as they are stored: alignment, snippets, staggering, exact continuation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from amago_core.errors import CheckpointError
from amago_core.recorder import Recorder
from amago_core.state_tree import flatten_tensors, unflatten
from amago_offline.schema import Field, Schema, Trajectory

SCHEMA = Schema(obs={"observation": Field((1,), "int32")}, action=Field((), "int8"))


class Lanes:
    """Feeds a recorder: lane `l` sees `1000 * l + 100 * episode + t` and gets reward `t + 1` for action `t % 4`."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.t = np.zeros(recorder.lanes, np.int64)
        self.episode = np.zeros(recorder.lanes, np.int64)

    def obs(self, lanes: np.ndarray) -> dict[str, np.ndarray]:
        values = 1000 * lanes + 100 * self.episode[lanes] + self.t[lanes]
        return {"observation": values[:, None].astype(np.int32)}

    def begin(self, *lanes: int) -> None:
        index = np.array(lanes)
        self.t[index] = 0
        self.episode[index] += 1
        self.recorder.begin(index, self.obs(index), np.full(len(index), -1, np.int8))

    def add(self, *lanes: int, terminated: tuple[int, ...] = (), truncated: tuple[int, ...] = ()) -> None:
        index = np.array(lanes)
        action = self.t[index] % 4
        self.t[index] += 1
        flags = (np.isin(index, terminated), np.isin(index, truncated))
        self.recorder.add(index, self.obs(index), action, self.t[index].astype(np.float32), *flags)


def recording(lanes: int = 1, **settings) -> tuple[Lanes, list[Trajectory]]:
    stored: list[Trajectory] = []
    return Lanes(Recorder(SCHEMA, lanes, stored.append, **settings)), stored


def values(trajectory: Trajectory) -> list[int]:
    return trajectory.obs["observation"][:, 0].tolist()


def assert_same(ours: list[Trajectory], theirs: list[Trajectory]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in ("prev_action", "prev_reward", "terminated", "truncated", "time_idx"):
            left, right = getattr(a, name), getattr(b, name)
            assert left.dtype == right.dtype and np.array_equal(left, right), name
        assert all(np.array_equal(a.obs[key], b.obs[key]) for key in a.obs)
        assert a.meta == b.meta


@pytest.mark.parametrize(
    ("flags", "expected"), [((1, 0), (True, False)), ((0, 1), (False, True)), ((1, 1), (True, False))]
)
def test_worked_example(flags: tuple[int, int], expected: tuple[bool, bool]) -> None:
    stored: list[Trajectory] = []
    recorder = Recorder(SCHEMA, 1, stored.append)
    lane = np.array([0])

    def obs(value: int) -> dict[str, np.ndarray]:
        return {"observation": np.array([[value]])}

    recorder.begin(lane, obs(100), np.array([-1]))
    for t, action in enumerate([2, 0, 1, 1]):
        end = [np.array([bool(flag) and t == 3]) for flag in flags]
        recorder.add(lane, obs(101 + t), np.array([action]), np.array([t + 1.0], np.float32), *end)
    (trajectory,) = stored
    assert values(trajectory) == [100, 101, 102, 103, 104]
    assert trajectory.prev_action.tolist() == [-1, 2, 0, 1, 1] and trajectory.prev_action.dtype == np.int8
    assert trajectory.prev_reward.tolist() == [0, 1, 2, 3, 4] and trajectory.prev_reward.dtype == np.float32
    assert trajectory.time_idx.tolist() == [0, 1, 2, 3, 4]
    assert trajectory.terminated.tolist() == [False] * 4 + [expected[0]]
    assert trajectory.truncated.tolist() == [False] * 4 + [expected[1]]
    trajectory.conform(SCHEMA)


def test_trajectories_say_where_they_come_from() -> None:
    lanes, stored = recording(2, max_transitions=2)
    lanes.begin(0, 1)
    for _ in range(3):
        lanes.add(0, 1)
    lanes.recorder.policy_version = 7
    lanes.add(0, 1, terminated=(1,))
    lanes.begin(1)
    lanes.add(1, terminated=(1,))
    meta = [tuple(t.meta[key] for key in ("lane", "episode", "snippet", "policy_version")) for t in stored]
    assert meta == [(0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 1, 7), (1, 0, 1, 7), (1, 1, 0, 7)]
    json.dumps(stored[0].meta)


def test_lanes_are_recorded_apart() -> None:
    lanes, stored = recording(3)
    lanes.begin(0, 1, 2)
    lanes.add(0, 1, 2)
    lanes.add(0, 1, 2, terminated=(1,))
    lanes.begin(1)
    lanes.add(0, 2, 1)
    lanes.add(2, 0, truncated=(0, 2))
    assert [values(t) for t in stored] == [
        [1100, 1101, 1102],
        [2100, 2101, 2102, 2103, 2104],
        [100, 101, 102, 103, 104],
    ]
    lanes.recorder.flush()
    assert values(stored[3]) == [1200, 1201]
    assert stored[3].prev_action.tolist() == [-1, 0] and stored[3].prev_reward.tolist() == [0.0, 1.0]


def test_snippets_have_exactly_the_limit_and_share_the_cut() -> None:
    lanes, stored = recording(max_transitions=5)
    lanes.begin(0)
    for t in range(20):
        lanes.add(0, terminated=(0,) if t == 19 else ())
    assert [t.transitions for t in stored] == [5, 5, 5, 5]
    assert [(int(t.time_idx[0]), int(t.time_idx[-1])) for t in stored] == [(0, 5), (5, 10), (10, 15), (15, 20)]
    assert [bool(t.terminated.any()) for t in stored] == [False, False, False, True]
    assert not any(t.truncated.any() for t in stored)
    for before, after in zip(stored, stored[1:], strict=False):
        assert values(before)[-1] == values(after)[0]
        assert before.prev_action[-1] == after.prev_action[0] and before.prev_reward[-1] == after.prev_reward[0]
    whole, unlimited = recording()
    whole.begin(0)
    for t in range(20):
        whole.add(0, terminated=(0,) if t == 19 else ())
    joined = np.concatenate([stored[0].prev_action, *(t.actions for t in stored[1:])])
    assert np.array_equal(joined, unlimited[0].prev_action)


def test_an_episode_may_end_right_after_a_cut() -> None:
    lanes, stored = recording(max_transitions=5)
    lanes.begin(0)
    for t in range(6):
        lanes.add(0, truncated=(0,) if t == 5 else ())
    assert [t.transitions for t in stored] == [5, 1]
    assert stored[1].truncated.tolist() == [False, True]


def test_staggered_lengths_are_uniform_and_cover_every_transition_once() -> None:
    lanes, stored = recording(max_transitions=5, stagger=2, seed=3)
    lanes.begin(0)
    for _ in range(6000):
        lanes.add(0)
    lengths = [t.transitions for t in stored]
    counts = np.bincount(lengths, minlength=8)
    assert counts[:3].sum() == 0 and len(counts) == 8
    assert np.abs(counts[3:] / len(lengths) - 0.2).max() < 0.04
    lanes.recorder.flush()
    times = np.concatenate([t.time_idx[1:] for t in stored])
    assert np.array_equal(times, np.arange(1, 6001))


@pytest.mark.parametrize(("limit", "stagger"), [(5, 5), (5, 9), (5, 0), (None, 2)])
def test_lengths_are_fixed_unless_the_limit_exceeds_the_window(limit: int | None, stagger: int) -> None:
    lanes, stored = recording(2, max_transitions=limit, stagger=stagger)
    lanes.begin(0, 1)
    for _ in range(24):
        lanes.add(0, 1)
    lanes.add(0, 1, terminated=(0, 1))
    assert [t.transitions for t in stored] == ([25, 25] if limit is None else [5] * 10)


def test_staggering_is_seeded() -> None:
    lengths = []
    for seed in (1, 1, 2):
        lanes, stored = recording(2, max_transitions=10, stagger=5, seed=seed)
        lanes.begin(0, 1)
        for _ in range(200):
            lanes.add(0, 1)
        lengths.append([t.transitions for t in stored])
    assert lengths[0] == lengths[1] != lengths[2]


def test_flush_stores_what_is_unfinished_and_nothing_twice() -> None:
    lanes, stored = recording(4)
    lanes.begin(0, 1, 2)
    lanes.add(0, 1)
    lanes.add(0, 1, terminated=(1,))  # lane 1 awaits its reset, lane 2 has one timestep, lane 3 none
    stored.clear()
    lanes.recorder.flush()
    assert [values(t) for t in stored] == [[100, 101, 102]]
    assert not stored[0].terminated.any() and not stored[0].truncated.any()
    lanes.recorder.flush()
    assert len(stored) == 1
    lanes.begin(0)
    lanes.add(0, terminated=(0,))
    assert values(stored[1]) == [200, 201]


@pytest.mark.parametrize("before", ["begin", "next episode", "flush"])
def test_steps_need_a_first_timestep(before: str) -> None:
    lanes, _ = recording(2)
    if before == "next episode":
        lanes.begin(0, 1)
        lanes.add(0, 1, terminated=(1,))
    elif before == "flush":
        lanes.begin(0, 1)
        lanes.add(0, 1)
        lanes.recorder.flush()
    else:
        lanes.begin(0)
    with pytest.raises(ValueError, match="must have begun"):
        lanes.add(0, 1)


def test_stored_arrays_stay_as_they_are() -> None:
    lanes, stored = recording(max_transitions=3)
    lanes.begin(0)
    for _ in range(3):
        lanes.add(0)
    first = values(stored[0])
    for _ in range(7):
        lanes.add(0)
    assert values(stored[0]) == first == [100, 101, 102, 103]


def test_long_episodes_grow_the_block() -> None:
    lanes, stored = recording(2)
    lanes.begin(0, 1)
    for t in range(300):
        lanes.add(0, *((1,) if t < 10 else ()))
    lanes.add(0, 1, terminated=(0, 1))
    assert [len(t) for t in stored] == [302, 12]
    assert values(stored[0]) == list(range(100, 402)) and values(stored[1]) == list(range(1100, 1112))


@pytest.mark.parametrize("at", [1, 37, 100])
def test_continues_exactly(at: int) -> None:
    def feed(lanes: Lanes, steps: range) -> None:
        for t in steps:
            ends = tuple(lane for lane in range(3) if (t + 1) % (20 + 30 * lane) == 0)
            lanes.add(0, 1, 2, terminated=ends)
            if ends:
                lanes.begin(*ends)

    settings = {"max_transitions": 8, "stagger": 5, "seed": 4}
    lanes, stored = recording(3, **settings)
    lanes.begin(0, 1, 2)
    feed(lanes, range(at))
    saved, t, episode = lanes.recorder.state_dict(), lanes.t.copy(), lanes.episode.copy()
    done = len(stored)
    tensors, skeleton = flatten_tensors(saved)
    feed(lanes, range(at, 150))
    restored, again = recording(3, **{**settings, "seed": 99})
    restored.recorder.load_state_dict(unflatten(tensors, json.loads(json.dumps(skeleton))))
    restored.t, restored.episode = t, episode
    feed(restored, range(at, 150))
    lanes.recorder.flush()
    restored.recorder.flush()
    assert_same(stored[done:], again)


def test_a_saved_state_is_independent() -> None:
    lanes, stored = recording()
    lanes.begin(0)
    lanes.add(0)
    saved = lanes.recorder.state_dict()
    lanes.add(0)
    lanes.recorder.load_state_dict(saved)
    lanes.t[0] = 1
    lanes.add(0, terminated=(0,))
    assert values(stored[0]) == [100, 101, 102]
    assert saved["rows"].tolist() == [2]


def test_states_of_something_else_are_refused() -> None:
    lanes, _ = recording(2)
    saved = lanes.recorder.state_dict()
    with pytest.raises(CheckpointError, match="2 lanes"):
        recording(3)[0].recorder.load_state_dict(saved)
    other = Schema(obs={"x": Field((1,), "int32")}, action=Field((), "int8"))
    with pytest.raises(CheckpointError, match="obs/x"):
        Recorder(other, 2, print).load_state_dict(saved)


def test_observations_of_several_parts_and_continuous_actions() -> None:
    schema = Schema(
        obs={"image": Field((2, 2, 1), "uint8"), "x": Field((3,), "float32")}, action=Field((2,), "float32")
    )
    stored: list[Trajectory] = []
    recorder = Recorder(schema, 2, stored.append)
    lanes = np.arange(2)

    def obs(t: int) -> dict[str, np.ndarray]:
        image = np.full((2, 2, 2, 1), t, np.uint8)
        return {"image": image, "x": np.array([[t, 0, 0], [t, 1, 1]], np.float32), "unused": image}

    recorder.begin(lanes, obs(0), np.zeros((2, 2), np.float32))
    action = np.array([[0.25, -1.0], [0.5, 1.0]])
    no, yes = np.zeros(2, bool), np.ones(2, bool)
    recorder.add(lanes, obs(1), action, np.ones(2, np.float32), yes, no)
    assert len(stored) == 2
    for lane, trajectory in enumerate(stored):
        trajectory.conform(schema)
        assert set(trajectory.obs) == {"image", "x"}
        assert trajectory.obs["image"].dtype == np.uint8 and trajectory.obs["image"][:, 0, 0, 0].tolist() == [0, 1]
        assert trajectory.obs["x"].tolist() == [[0, lane, lane], [1, lane, lane]]
        assert trajectory.prev_action.tolist() == [[0, 0], action[lane].tolist()]
    recorder.begin(lanes, obs(0), np.zeros((2, 2), np.float32))
    with pytest.raises(KeyError, match="x"):
        recorder.add(lanes, {"image": obs(1)["image"]}, action, np.ones(2, np.float32), no, no)


@pytest.mark.parametrize("settings", [{"max_transitions": 0}, {"max_transitions": 5, "stagger": -1}])
def test_bad_arguments(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(reversed(settings))):
        Recorder(SCHEMA, 1, print, **settings)
