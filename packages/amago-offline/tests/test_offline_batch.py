"""Batches: the worked example, alignment, padding, trimming."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from amago_offline import Batch, Field, InMemoryDataset, Schema, Trajectory, discrete_action_field

SCHEMA = Schema({"obs": Field((), "int64")}, discrete_action_field(3))


def worked_example(*, time_limit=False):
    """4 steps, obs 100..104, actions 2, 0, 1, 1, rewards 1..4."""
    end = np.arange(5) == 4
    return Trajectory(
        obs={"obs": np.arange(100, 105)},
        prev_action=np.array([-1, 2, 0, 1, 1]),
        prev_reward=np.array([0, 1, 2, 3, 4]),
        terminated=end & (not time_limit),
        truncated=end & time_limit,
        time_idx=np.arange(5),
    )


@pytest.mark.parametrize("time_limit", [False, True])
def test_worked_example(time_limit):
    dataset = InMemoryDataset(SCHEMA, [worked_example(time_limit=time_limit)])
    batch = dataset.sample(1, 4, np.random.default_rng(0))
    assert batch.obs["obs"].tolist() == [[100, 101, 102, 103, 104]]
    assert batch.time_idx.tolist() == [[0, 1, 2, 3, 4]]
    assert batch.prev_action.tolist() == [[-1, 2, 0, 1, 1]]
    assert batch.prev_reward.tolist() == [[0, 1, 2, 3, 4]]
    assert batch.actions.tolist() == [[2, 0, 1, 1]]
    assert batch.rewards.tolist() == [[1, 2, 3, 4]]
    assert batch.terminations.tolist() == [[False, False, False, not time_limit]]
    assert batch.truncations.tolist() == [[False, False, False, time_limit]]
    assert batch.reset.tolist() == [[True, False, False, False, False]]
    assert batch.mask.all() and batch.batch_size == torch.Size([1])


def test_dtypes():
    batch = InMemoryDataset(SCHEMA, [worked_example()]).sample(2, 3, np.random.default_rng(0))
    assert batch.prev_action.dtype == torch.int64 and batch.time_idx.dtype == torch.int64
    assert batch.prev_reward.dtype == torch.float32
    for name in ("terminated", "truncated", "reset", "mask"):
        assert getattr(batch, name).dtype == torch.bool


def short_and_long():
    """The example of the padding rule: T=4 and T=2 in windows of 4."""
    short = worked_example()
    short = Trajectory(
        obs={"obs": short.obs["obs"][:3]},
        prev_action=short.prev_action[:3],
        prev_reward=short.prev_reward[:3],
        terminated=np.arange(3) == 2,
        truncated=np.zeros(3, bool),
        time_idx=np.arange(7, 10),
    )
    dataset = InMemoryDataset(SCHEMA, [worked_example(), short])
    # A generator that draws the long one first and the short one second.
    seed = next(s for s in range(99) if np.random.default_rng(s).integers(0, 2, 2).tolist() == [0, 1])
    return dataset.sample(2, 4, np.random.default_rng(seed))


def test_masks_and_padding():
    batch = short_and_long()
    assert batch.mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.timestep_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.lengths.tolist() == [4, 2]
    assert batch.time_idx.tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 9, 9]]
    assert batch.obs["obs"][1].tolist() == [100, 101, 102, 0, 0]
    assert batch.prev_action[1].tolist() == [-1, 2, 0, 0, 0]
    assert batch.prev_reward[1].tolist() == [0, 1, 2, 0, 0]
    assert batch.terminated[1].tolist() == [False, False, True, False, False]


def test_timestep_mask_with_a_gap():
    batch = short_and_long()
    batch.mask[0] = torch.tensor([True, False, False, True])
    assert batch.timestep_mask[0].tolist() == [True, True, False, True, True]


@pytest.mark.parametrize(("multiple", "timesteps"), [(1, 3), (2, 4), (4, 4), (5, 5), (8, 5)])
def test_trim(multiple, timesteps):
    batch = short_and_long()[1:].trim(multiple)
    assert isinstance(batch, Batch) and batch.batch_size == torch.Size([1])
    assert batch.mask.shape == (1, timesteps - 1)
    for name in ("prev_action", "prev_reward", "terminated", "truncated", "time_idx", "reset"):
        assert getattr(batch, name).shape == (1, timesteps)
    assert batch.obs["obs"].shape == (1, timesteps)
    assert batch.lengths.tolist() == [2] and batch.obs["obs"][0, :3].tolist() == [100, 101, 102]


def test_trim_keeps_a_full_batch_and_refuses_nonsense():
    batch = short_and_long()
    assert batch.trim() is batch
    with pytest.raises(ValueError, match="multiple_of must be >= 1, got 0"):
        batch.trim(0)


def test_no_copy_on_the_way_to_tensors():
    dataset = InMemoryDataset(SCHEMA, [worked_example()])
    arrays = dataset.sample_arrays(2, 4, np.random.default_rng(0))
    batch = Batch.from_arrays(arrays)
    arrays["prev_reward"][:] = 9
    arrays["obs"]["obs"][:] = 9
    assert (batch.prev_reward == 9).all() and (batch.obs["obs"] == 9).all()


def test_moves_as_one():
    batch = short_and_long().to(torch.device("meta"))
    assert batch.mask.device.type == "meta" and batch.obs["obs"].device.type == "meta"


def test_import_does_not_load_torch():
    code = "import sys, amago_offline as a; a.ReplayDataset, a.Schema; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})
