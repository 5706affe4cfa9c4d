"""The wheel of amago-offline, installed alone, stores trajectories and samples windows."""

import importlib.util
import sys
import tempfile

import numpy as np

from amago_offline.datasets import ReplayDataset
from amago_offline.schema import Field, Schema, Trajectory

assert not {"gymnasium", "amago_nets", "amago_core"} & sys.modules.keys()
assert importlib.util.find_spec("gymnasium") is None

length = 9
schema = Schema(obs={"observation": Field((3,), "float32")}, action=Field((), "int8"))
trajectory = Trajectory(
    obs={"observation": np.ones((length, 3), np.float32)},
    prev_action=np.r_[-1, np.arange(length - 1) % 2].astype(np.int8),
    prev_reward=np.ones(length, np.float32),
    terminated=np.arange(length) == length - 1,
    truncated=np.zeros(length, bool),
    time_idx=np.arange(length),
    meta={},
)
with tempfile.TemporaryDirectory() as folder:
    dataset = ReplayDataset(folder, schema)
    for _ in range(3):
        dataset.append(trajectory)
    dataset.commit()
    batch = dataset.sample(4, 5, np.random.default_rng(0))
    assert batch.actions.shape[:2] == batch.rewards.shape == batch.mask.shape == (4, 5)
print("amago-offline works alone")
