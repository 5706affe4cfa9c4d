"""Other processes: killed in the middle, two writers at once, forks, live writers."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import numpy as np
import pytest

from amago_offline import ReplayDataset

WRITE_FOREVER = """
import sys
from amago_offline import ReplayDataset
from numbered_trajectories import numbered
path, every, fsync = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
dataset = ReplayDataset(path, segment_timesteps=500, commit_every=every, fsync=fsync)
print("begin", flush=True)
number = 0
while True:
    dataset.append(numbered(number, 2 + number % 60))
    number += 1
    if number % every == 0:
        print(number, flush=True)
"""


def last_number(process):
    """What the killed process had reported as committed."""
    lines = [line for line in process.stdout.read().splitlines() if line.isdigit()]
    return int(lines[-1]) if lines else 0


@pytest.mark.parametrize(("every", "fsync"), [(1, False), (7, False), (3, True)])
def test_killed_while_writing(tmp_path, schema, make, same, python, every, fsync):
    ReplayDataset(tmp_path, schema).close()
    expected = []
    for round_ in range(3):
        process = python(WRITE_FOREVER, tmp_path, every, fsync)
        assert process.stdout.readline() == "begin\n"
        time.sleep(random.uniform(0.02, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        reported = last_number(process)
        dataset = ReplayDataset(tmp_path)
        count = len(dataset) - len(expected)
        assert count >= reported
        expected += range(count)
        assert [dataset.trajectory(i).meta["number"] for i in range(len(dataset))] == expected
        for index in range(max(0, len(expected) - 40), len(expected)):
            number = expected[index]
            assert same(dataset.trajectory(index), make(number, 2 + number % 60)), (round_, index)


WRITE_SOME = """
import sys
from amago_offline import ReplayDataset
from numbered_trajectories import numbered
path, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dataset = ReplayDataset(path, segment_timesteps=400, commit_every=1 + first % 5)
print("begin", flush=True)
sys.stdin.readline()
for number in range(first, first + count):
    dataset.append(numbered(number, 2 + number % 30))
dataset.close()
"""


def test_two_writers_at_once_lose_nothing(tmp_path, schema, make, same, python):
    watcher = ReplayDataset(tmp_path, schema)
    writers = [python(WRITE_SOME, tmp_path, first, 250) for first in (0, 1002)]
    for process in writers:
        assert process.stdout.readline() == "begin\n"
    for process in writers:
        process.stdin.write("\n")
        process.stdin.flush()
    while any(process.poll() is None for process in writers):
        watcher.refresh()
        if len(watcher):
            batch = watcher.sample(16, 8, np.random.default_rng(0))
            assert (batch.obs["state"][..., 1] == batch.time_idx)[batch.timestep_mask].all()
    assert [process.wait() for process in writers] == [0, 0]
    watcher.refresh()
    numbers = [watcher.trajectory(i).meta["number"] for i in range(len(watcher))]
    assert sorted(numbers) == [*range(250), *range(1002, 1252)]
    for first in (0, 1002):
        assert [n for n in numbers if first <= n < first + 250] == list(range(first, first + 250))
    assert all(same(watcher.trajectory(i), make(n, 2 + n % 30)) for i, n in enumerate(numbers))
    assert len(np.unique(watcher.table.sequence)) == 500
    # Who looked often and who looks only now draw the same batch.
    late = ReplayDataset(tmp_path)
    left, right = (d.sample(64, 8, np.random.default_rng(3)) for d in (watcher, late))
    assert (left == right).all()


RUN = """
import hashlib, json, os, signal, sys
import numpy as np
from amago_offline import ReplayDataset
from numbered_trajectories import numbered
path, epochs, state_file, kill = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "kill"
dataset = ReplayDataset(path, max_trajectories=40, padding="both")
epoch, rng = 0, np.random.default_rng(0)
if os.path.exists(state_file):
    state = json.load(open(state_file))
    dataset.load_state_dict(state["dataset"])
    epoch, rng.bit_generator.state = state["epoch"], state["rng"]

def save():
    state = {"dataset": dataset.state_dict(), "epoch": epoch, "rng": rng.bit_generator.state}
    json.dump(state, open(state_file + ".tmp", "w"))
    os.replace(state_file + ".tmp", state_file)

save()
while epoch < epochs:
    for number in range(epoch * 9, epoch * 9 + 9):
        dataset.append(numbered(number, 3 + number % 11))
    metrics = dataset.end_of_collection(epoch)
    batch = dataset.sample_arrays(32, 6, rng)
    digest = hashlib.sha256(batch["obs"]["state"].tobytes()).hexdigest()
    print(epoch, len(dataset), metrics["evicted_trajectories"], digest)
    epoch += 1
    if epoch % 3 == 0 and not (kill and epoch == epochs):
        save()
        if not kill:
            dataset.purge()
sys.stdout.flush()
if kill:
    dataset.append(numbered(9999, 5))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(python, *arguments):
    process = python(RUN, *arguments)
    lines = process.stdout.read().splitlines()
    return process.wait(), lines


@pytest.mark.parametrize("killed_after", [2, 5, 8, 12])
def test_killed_and_resumed_run_equals_one_that_was_not(tmp_path, schema, python, killed_after):
    """Batches, sizes and evictions agree epoch by epoch, with trajectories and evictions after the last state."""
    for name in ("plain", "broken"):
        ReplayDataset(tmp_path / name, schema).close()
    code, plain = run(python, tmp_path / "plain", 14, tmp_path / "plain.json", "live")
    assert code == 0 and len(plain) == 14 and any(line.split()[2] != "0" for line in plain[:9])
    code, first = run(python, tmp_path / "broken", killed_after, tmp_path / "broken.json", "kill")
    assert code == -signal.SIGKILL and first == plain[:killed_after]
    code, second = run(python, tmp_path / "broken", 14, tmp_path / "broken.json", "live")
    saved = 14 - len(second)
    assert code == 0 and saved % 3 == 0 and saved >= killed_after - 3
    assert second == plain[saved:]


def test_what_came_later_is_set_aside_not_deleted(tmp_path, schema, make, same, python):
    dataset = ReplayDataset(tmp_path, schema, max_trajectories=32)
    for number in range(31):
        dataset.append(make(number, 6))
    before = dataset.sample(32, 4, np.random.default_rng(0))
    state = json.loads(json.dumps(dataset.state_dict()))
    dataset.append(make(100, 6), protected=True)
    for number in range(31, 60):
        dataset.append(make(number, 6))
    assert dataset.end_of_collection(0)["evicted_trajectories"] == 28
    dataset.close()

    again = ReplayDataset(tmp_path, max_trajectories=32)
    again.load_state_dict(state)
    assert (again.sample(32, 4, np.random.default_rng(0)) == before).all()
    again.refresh()
    assert [again.trajectory(i).meta["number"] for i in range(len(again))] == list(range(31))
    for number in range(31, 40):
        again.append(make(number, 6))
    assert [again.trajectory(i).meta["number"] for i in range(len(again))] == list(range(40))

    from amago_offline.store import StoreDirectory, StoreReader

    aside = StoreReader(StoreDirectory(tmp_path), areas=["set_aside"])
    found = [aside.read(i) for i in range(len(aside.table))]
    assert [t.meta["number"] for t in found] == [100, *range(31, 60)]
    assert all(same(t, make(t.meta["number"], 6)) for t in found)


def test_state_of_a_live_collector_is_left_to_it(tmp_path, schema, make):
    learner, collector = ReplayDataset(tmp_path, schema), ReplayDataset(tmp_path, schema)
    learner.append(make(0, 5))
    for number in (1, 2):
        collector.append(make(number, 5))
    learner.refresh()
    state = learner.state_dict()
    collector.append(make(3, 5))
    learner.append(make(4, 5))
    learner.load_state_dict(state)
    numbers = [learner.trajectory(i).meta["number"] for i in range(len(learner))]
    assert numbers == [0, 1, 2]
    learner.append(make(5, 5))
    assert [learner.trajectory(i).meta["number"] for i in range(len(learner))] == [0, 1, 2, 5]
    learner.refresh()
    assert [learner.trajectory(i).meta["number"] for i in range(len(learner))] == [0, 1, 2, 3, 5]
    collector.append(make(6, 5))
    collector.close()


FORK = """
import json, os, signal, sys, time
from amago_offline import ReplayDataset
from numbered_trajectories import numbered
dataset = ReplayDataset(sys.argv[1])
dataset.append(numbered(0, 5))
print(json.dumps(dataset.state_dict()), flush=True)
child = os.fork()
if child == 0:
    try:
        dataset.append(numbered(1, 5))
    except RuntimeError as error:
        os.write(1, f"{error}\\n".encode())  # One write: two processes share the pipe.
    time.sleep(60)
os.write(1, f"{child}\\n".encode())
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_child_does_not_keep_the_segment_locked(tmp_path, schema, python):
    ReplayDataset(tmp_path, schema).close()
    process = python(FORK, tmp_path)
    state = json.loads(process.stdout.readline())
    lines = sorted([process.stdout.readline(), process.stdout.readline()])
    process.stdin.write("\n")
    process.stdin.flush()
    process.wait()
    try:
        assert "is closed" in lines[1]
        dataset = ReplayDataset(tmp_path)
        dataset.load_state_dict(state)
        assert dataset.state_dict() == state
        dataset.close()
    finally:
        os.kill(int(lines[0]), signal.SIGKILL)
