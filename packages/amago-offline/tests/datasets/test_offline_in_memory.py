"""The dataset in memory, relabeling, and errors that all datasets share."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amago_offline import Dataset, EmptyDatasetError, Field, InMemoryDataset, Relabeler, Schema, Trajectory
from amago_offline.sampling import PADDING_MODES, WEIGHTINGS


class AddTen(Relabeler):
    """Adds 10 to the rewards, in place."""

    def relabel(self, trajectory, rng):
        trajectory.prev_reward[1:] += 10
        return trajectory


class Same(Relabeler):
    """Changes nothing."""

    def relabel(self, trajectory, rng):
        return trajectory


class Shorten(Relabeler):
    """Cuts after one transition and terminates there."""

    def relabel(self, trajectory, rng):
        return Trajectory(
            obs={key: value[:2] for key, value in trajectory.obs.items()},
            prev_action=trajectory.prev_action[:2],
            prev_reward=trajectory.prev_reward[:2],
            terminated=np.array([False, True]),
            truncated=np.zeros(2, bool),
            time_idx=trajectory.time_idx[:2],
        )


def test_is_a_dataset(schema):
    assert isinstance(InMemoryDataset(schema), Dataset)


@pytest.mark.parametrize("padding", PADDING_MODES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_row_of_a_batch_is_right(schema, make, padding, weighting):
    lengths = [2, 3, 9, 40, 7]
    dataset = InMemoryDataset(
        schema, [make(i, n, start=5 * i) for i, n in enumerate(lengths)], padding=padding, weighting=weighting
    )
    for seed in range(20):
        check_numbered(dataset.sample(17, 8, np.random.default_rng(seed)), lengths)


def check_numbered(batch, lengths):
    """Every real timestep belongs to one trajectory at its true time; the padding holds what it should."""
    real = batch.timestep_mask
    number = batch.obs["state"][:, :1, 0].long()
    time = batch.time_idx
    assert torch.equal(batch.obs["state"][..., 0][real], number.expand_as(time)[real].float())
    assert torch.equal(batch.obs["state"][..., 1][real], time[real].float())
    assert torch.equal(batch.obs["image"][..., 0, 0][real].long(), ((number * 7 + time) % 256)[real])
    assert torch.allclose(batch.prev_reward[real], (number + time / 1000)[real])
    start = time == 5 * number
    action = torch.where(start, -1, (number + time) % 3)
    assert torch.equal(batch.prev_action[real], action[real])
    last = time == 5 * number + torch.tensor(lengths)[number] - 1
    assert torch.equal(batch.terminated, last & (number % 3 == 0) & real)
    assert torch.equal(batch.truncated, last & (number % 3 == 1) & real)
    for value in (batch.prev_reward, batch.prev_action, batch.obs["state"], batch.obs["image"]):
        assert not value[~real].any()
    ends = time.gather(1, batch.lengths[:, None])
    assert torch.equal(time, torch.minimum(time[:, :1] + torch.arange(time.shape[1]), ends))
    assert batch.reset[:, 0].all() and not batch.reset[:, 1:].any()
    assert (batch.lengths >= 1).all() and torch.equal(batch.mask, torch.arange(8) < batch.lengths[:, None])


@given(st.integers(2, 30), st.integers(1, 12), st.sampled_from(PADDING_MODES), st.integers(0, 2**32))
def test_window_longer_than_all_trajectories_is_padded(length, batch_size, padding, seed):
    schema = Schema({"o": Field((), "float32")}, Field((2,), "float32"))
    end = np.zeros(length, bool)
    values = np.arange(1, length + 1)
    trajectory = Trajectory({"o": values}, np.ones((length, 2)), values, end, end, values)
    batch = InMemoryDataset(schema, [trajectory], padding=padding).sample(batch_size, 64, np.random.default_rng(seed))
    assert batch.obs["o"].shape == (batch_size, 65)
    assert (batch.lengths == length - 1).all() and (batch.obs["o"].sum(dim=1) == values.sum()).all()
    assert batch.trim().mask.shape == (batch_size, length - 1)


def test_relabeler_sees_whole_trajectories_and_leaves_the_store_alone(schema, make):
    trajectories = [make(i, 20) for i in range(4)]
    plain = InMemoryDataset(schema, trajectories, padding="both")
    same = InMemoryDataset(schema, trajectories, padding="both", relabeler=Same())
    more = InMemoryDataset(schema, trajectories, padding="both", relabeler=AddTen())
    for seed in range(5):
        batches = [d.sample(9, 6, np.random.default_rng(seed)) for d in (plain, same, more)]
        assert (batches[0] == batches[1]).all()
        assert torch.allclose(batches[2].rewards, batches[0].rewards + 10 * batches[0].mask)
    short = InMemoryDataset(schema, trajectories, relabeler=Shorten()).sample(5, 6, np.random.default_rng(0))
    assert (short.lengths == 1).all() and short.terminated[:, 1].all() and not short.obs["state"][:, 2:].any()


def test_empty_dataset_says_so(schema, make):
    dataset = InMemoryDataset(schema, min_trajectories=3)
    with pytest.raises(EmptyDatasetError, match="holds 0 trajectories, at least 3 are needed"):
        dataset.sample(2, 4, np.random.default_rng(0))
    assert not dataset.ready
    for i in range(3):
        assert not dataset.ready
        dataset.append(make(i, 5))
    assert dataset.ready and len(dataset) == 3


def test_wrong_settings(schema):
    with pytest.raises(ValueError, match="padding must be one of"):
        InMemoryDataset(schema, padding="centre")
    with pytest.raises(ValueError, match="weighting must be one of"):
        InMemoryDataset(schema, weighting="size")
    with pytest.raises(ValueError, match="min_trajectories must be >= 1, got 0"):
        InMemoryDataset(schema, min_trajectories=0)


def test_state(schema, make, same):
    dataset = InMemoryDataset(schema, [make(i, 5 + i) for i in range(4)])
    state = json.loads(json.dumps(dataset.state_dict()))
    before = dataset.sample(8, 4, np.random.default_rng(0))
    dataset.append(make(9, 50))
    dataset.load_state_dict(state)
    assert (dataset.sample(8, 4, np.random.default_rng(0)) == before).all()
    dataset.append(make(4, 6))
    assert same(dataset.trajectory(4), make(4, 6)) and same(dataset.trajectory(3), make(3, 8))
    with pytest.raises(ValueError, match="at most 5 trajectories"):
        dataset.load_state_dict({"kind": "in_memory", "trajectories": 6})
    assert json.dumps(dataset.describe()) and dataset.end_of_collection(0)["trajectories"] == 5


def test_it_keeps_its_own_copy(schema, make):
    trajectory = make(1, 5)
    dataset = InMemoryDataset(schema, [trajectory])
    trajectory.prev_reward[:] = -5
    dataset.trajectory(0).prev_reward[:] = -5
    assert (dataset.sample(1, 4, np.random.default_rng(0)).prev_reward > 0).all()
