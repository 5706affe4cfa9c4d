"""SIGKILL before every single call that changes the disk, and in the middle of every write."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile

# One process builds the store; for each kill point it forks a child that is killed there, and then checks what is left.
SWEEP = """
import json, os, shutil, signal, sys
from pathlib import Path
import numpy as np
from amago_offline import Field, ReplayDataset, Schema, discrete_action_field
from numbered_trajectories import numbered

root = Path(sys.argv[1])
schema = Schema({"image": Field((2, 3), "uint8"), "state": Field((2,), "float32")}, discrete_action_field(3))
settings = dict(max_timesteps=60, segment_timesteps=20, commit_every=2, padding="both")

def numbers(dataset):
    result = []
    for i in range(len(dataset)):
        read = dataset.trajectory(i)
        n = read.meta["number"]
        good = numbered(n, 4 + n % 3)
        assert all(np.array_equal(read.obs[k], good.obs[k]) for k in good.obs), n
        assert np.array_equal(read.prev_reward, good.prev_reward) and np.array_equal(read.prev_action, good.prev_action)
        result.append(n)
    return result

def add(dataset, numbers, **options):
    for n in numbers:
        dataset.append(numbered(n, 4 + n % 3), **options)

with ReplayDataset(root / "start", schema, **settings) as dataset:
    add(dataset, range(100, 103), protected=True)
    add(dataset, range(10))  # Ends in the middle of a segment.
    dataset.end_of_collection(0)
    first = dataset.state_dict()
    expected = numbers(dataset)
    before = dataset.sample_arrays(11, 4, np.random.default_rng(0))
    add(dataset, range(300, 305))
    dataset.end_of_collection(0)

def same(left, right):
    return all(np.array_equal(left[k], right[k]) for k in left if k != "obs") and np.array_equal(
        left["obs"]["state"], right["obs"]["state"])

def work(folder):
    dataset = ReplayDataset(folder, **settings)
    dataset.load_state_dict(first)
    add(dataset, range(10, 17))
    dataset.end_of_collection(1)
    second = {"state": dataset.state_dict(), "numbers": numbers(dataset)}
    (folder / "second.tmp").write_text(json.dumps(second))
    os.replace(folder / "second.tmp", folder / "second.json")
    dataset.purge()
    dataset.close()

def arm(point):
    count = 0
    def wrap(function, half):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == point:
                if half:
                    descriptor, data, offset = arguments
                    function(descriptor, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    for name in ("rename", "replace", "ftruncate", "mkdir", "rmdir", "unlink"):
        setattr(os, name, wrap(getattr(os, name), False))
    os.pwrite = wrap(os.pwrite, True)

point, saved = 0, 0
while True:
    point += 1
    folder = root / "work"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "start", folder)
    child = os.fork()
    if child == 0:
        arm(point)
        work(folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, point
        break
    numbers(ReplayDataset(folder, **settings))
    dataset = ReplayDataset(folder, **settings)
    if (folder / "second.json").exists():
        saved += 1
        second = json.loads((folder / "second.json").read_text())
        dataset.load_state_dict(second["state"])
        assert numbers(dataset) == second["numbers"], point
    else:
        dataset.load_state_dict(first)
        assert numbers(dataset) == expected, point
        assert same(dataset.sample_arrays(11, 4, np.random.default_rng(0)), before), point
    dataset.append(numbered(50, 4 + 50 % 3))
    dataset.commit()
    dataset.refresh()
    assert numbers(dataset)[-1] == 50
    dataset.close()
print(json.dumps({"points": point, "saved": saved}))
"""


def test_every_kill_point(tmp_path, python):
    # Thousands of small files: several times faster in memory.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        process: subprocess.Popen[str] = python(SWEEP, folder)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    result = json.loads(output)
    assert result["points"] > 60 and result["saved"] > 3
