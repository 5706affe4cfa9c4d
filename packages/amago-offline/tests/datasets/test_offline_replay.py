"""The replay buffer in one process: visibility, eviction, protection, state, errors."""

from __future__ import annotations

import json
import os
import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numbered_trajectories import numbered

from amago_offline import (
    Dataset,
    EmptyDatasetError,
    Field,
    InMemoryDataset,
    ReplayConfig,
    ReplayDataset,
    Schema,
    discrete_action_field,
)
from amago_offline.sampling import PADDING_MODES, WEIGHTINGS


def numbers(dataset):
    return [dataset.trajectory(i).meta["number"] for i in range(len(dataset))]


def test_is_a_dataset(tmp_path, schema):
    assert isinstance(ReplayDataset(tmp_path, schema), Dataset)


@pytest.mark.parametrize("padding", PADDING_MODES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("rows", [40, 10_000])
def test_same_batches_as_in_memory(tmp_path, schema, make, padding, weighting, rows):
    """Whatever the segments: one large one, or so many that some trajectories need one of their own."""
    settings_ = {"padding": padding, "weighting": weighting}
    replay = ReplayDataset(tmp_path, schema, segment_timesteps=rows, **settings_)
    memory = InMemoryDataset(schema, **settings_)
    for i, length in enumerate([5, 30, 2, 77, 41, 3, 9, 18]):
        replay.append(make(i, length))
        memory.append(make(i, length))
    for length in (1, 6, 40, 100):
        left, right = (d.sample(33, length, np.random.default_rng(5)) for d in (replay, memory))
        assert (left == right).all()


def test_batch_does_not_depend_on_segment_names(tmp_path, schema, make, monkeypatch):
    batches = []
    for name, order in (("a", range(100, 200)), ("b", range(200, 100, -1))):
        names = (f"{n:016d}-{n:016x}" for n in order)
        monkeypatch.setattr("amago_offline.store.writer.new_segment_name", lambda names=names: next(names))
        dataset = ReplayDataset(tmp_path / name, schema, segment_timesteps=20)
        for i in range(12):
            dataset.append(make(i, 9))
        batches.append(ReplayDataset(tmp_path / name).sample(20, 5, np.random.default_rng(0)))
    assert (batches[0] == batches[1]).all()


def test_visible_at_commit(tmp_path, schema, make):
    writer = ReplayDataset(tmp_path, schema, commit_every=3)
    reader = ReplayDataset(tmp_path)
    writer.append(make(0, 5))
    writer.append(make(1, 5))
    reader.refresh()
    assert len(writer) == len(reader) == 0
    writer.append(make(2, 5))
    assert len(writer) == 3 and len(reader) == 0
    reader.refresh()
    assert len(reader) == 3
    writer.append(make(3, 5))
    writer.commit()
    assert len(writer) == 4 and len(reader) == 3
    reader.end_of_collection(0)
    assert numbers(reader) == [0, 1, 2, 3]


def test_sampling_lists_nothing(tmp_path, schema, make, monkeypatch):
    dataset = ReplayDataset(tmp_path, schema, segment_timesteps=10)
    for i in range(5):
        dataset.append(make(i, 6))

    def refuse(*_: object) -> None:
        raise AssertionError("listed a folder")

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    dataset.sample(4, 3, np.random.default_rng(0))


def test_unknown_and_temporary_names_are_ignored(tmp_path, schema, make):
    dataset = ReplayDataset(tmp_path, schema)
    dataset.append(make(0, 5))
    for name in (".tmp-1234567890123456-0123456789abcdef", "notes", "lost+found"):
        (tmp_path / "fifo" / name).mkdir()
    (tmp_path / "fifo" / "README").write_text("hello")
    (tmp_path / "fifo" / "1234567890123456-0123456789abcdef").mkdir()
    again = ReplayDataset(tmp_path, max_trajectories=1)
    assert len(again) == 1
    again.end_of_collection(0)
    assert (tmp_path / "fifo" / "README").exists()


def test_a_damaged_segment_is_left_out_with_a_warning(tmp_path, schema, make):
    dataset = ReplayDataset(tmp_path, schema, segment_timesteps=5)
    for i in range(3):
        dataset.append(make(i, 5))
    name = dataset.sources[1].directory / "segment.json"
    dataset.close()
    name.write_text("{")
    with pytest.warns(RuntimeWarning, match="is damaged and is left out"):
        again = ReplayDataset(tmp_path)
    again.refresh()
    assert numbers(again) == [0, 2]


def test_another_schema_is_refused_and_nothing_changes(tmp_path, schema, make):
    dataset = ReplayDataset(tmp_path, schema)
    dataset.append(make(0, 5))
    dataset.close()
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    other = Schema({"state": Field((3,), "float32")}, discrete_action_field(3))
    with pytest.raises(ValueError, match=r"schema must equal .*\[3\].*the store holds .*image"):
        ReplayDataset(tmp_path, other)
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    assert ReplayDataset(tmp_path).schema == schema


def test_no_store_and_no_schema(tmp_path):
    with pytest.raises(ValueError, match="path must hold a trajectory store"):
        ReplayDataset(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_unwritable_path_reaches_the_caller(tmp_path, schema):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        ReplayDataset(tmp_path / "file" / "buffer", schema)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_reaches_the_caller(tmp_path, schema, make):
    dataset = ReplayDataset(tmp_path, schema)
    (tmp_path / "fifo").chmod(0o500)
    with pytest.raises(PermissionError):
        dataset.append(make(0, 5))
    (tmp_path / "fifo").chmod(0o700)
    dataset.append(make(0, 5))


def test_lost_area_reaches_the_caller(tmp_path, schema, make):
    dataset = ReplayDataset(tmp_path, schema)
    (tmp_path / "fifo").rmdir()
    (tmp_path / "fifo").write_text("in the way")
    with pytest.raises(OSError, match="fifo"):
        dataset.append(make(0, 5))
    assert len(dataset) == 0


def test_empty_and_ready(tmp_path, schema, make):
    dataset = ReplayDataset(tmp_path, schema, min_trajectories=2)
    with pytest.raises(EmptyDatasetError, match="at least 2 are needed"):
        dataset.sample(1, 1, np.random.default_rng(0))
    dataset.append(make(0, 5))
    assert not dataset.ready
    dataset.append(make(1, 5), protected=True)
    assert dataset.ready


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"max_trajectories": 0}, "max_trajectories must be >= 1, got 0"),
        ({"max_timesteps": -1}, "max_timesteps must be >= 1"),
        ({"commit_every": 0}, "commit_every must be >= 1"),
        ({"padding": "x"}, "padding must be one of"),
        ({"weighting": "x"}, "weighting must be one of"),
        ({"max_timesteps": 100, "segment_timesteps": 101}, "segment_timesteps must be at most max_timesteps"),
        ({"max_trajectories": 3, "min_trajectories": 4}, "min_trajectories must be at most max_trajectories"),
    ],
)
def test_wrong_settings(tmp_path, schema, settings_, message):
    with pytest.raises(ValueError, match=message):
        ReplayDataset(tmp_path / "new", schema, **settings_)
    assert not (tmp_path / "new").exists()


def test_config_builds(tmp_path, schema, make):
    dataset = ReplayConfig(max_trajectories=50, padding="both").build(tmp_path, schema)
    assert dataset.config.max_trajectories == 50 and dataset.padding == "both"
    assert json.loads(json.dumps(dataset.describe()))["config"]["max_trajectories"] == 50


def test_eviction_is_first_in_first_out_and_spares_the_protected(tmp_path, schema, make):
    dataset = ReplayDataset(tmp_path, schema, max_trajectories=32)
    for i in range(5):
        dataset.append(make(1000 + i, 6), protected=True)
    for i in range(100):
        dataset.append(make(i, 6))
        if i % 10 == 9:
            metrics = dataset.end_of_collection(i // 10)
            assert 30 < metrics["trajectories"] - 5 <= 32 or i < 32
            assert metrics["protected_trajectories"] == 5
    seen = numbers(dataset)
    assert seen[:5] == [1000, 1001, 1002, 1003, 1004] and seen[5:] == list(range(100 - len(seen) + 5, 100))
    assert metrics["trajectories"] == len(dataset) and metrics["timesteps"] == 6 * len(dataset)


def test_limit_in_timesteps(tmp_path, schema, make):
    dataset = ReplayDataset(tmp_path, schema, max_timesteps=160)
    for i in range(40):
        dataset.append(make(i, 10))
    assert dataset.end_of_collection(0)["timesteps"] == 160
    dataset.append(make(40, 500))
    assert dataset.end_of_collection(1)["timesteps"] == 500 and numbers(dataset) == [40]


def test_eviction_leaves_segments_of_live_writers(tmp_path, schema, make):
    slow, owner = ReplayDataset(tmp_path, schema), ReplayDataset(tmp_path, max_trajectories=2)
    slow.append(make(0, 5))
    for i in range(1, 6):
        owner.append(make(i, 5))
    assert owner.end_of_collection(0)["evicted_trajectories"] == 4
    assert numbers(owner) == [0, 5]
    slow.close()
    for i in range(6, 8):
        owner.append(make(i, 5))
    owner.end_of_collection(1)
    assert numbers(owner) == [6, 7]


def test_collectors_never_delete(tmp_path, schema, make):
    collector = ReplayDataset(tmp_path, schema, max_trajectories=2, can_delete=False)
    for i in range(6):
        collector.append(make(i, 5))
    state = collector.state_dict()
    assert collector.end_of_collection(0)["evicted_trajectories"] == 0 and len(collector) == 6
    collector.append(make(6, 5))
    collector.load_state_dict(state)
    assert len(collector) == 6 and collector.purge() == 0
    collector.refresh()
    assert len(collector) == 7


def folders(path, area):
    return len([p for p in (path / area).iterdir()])


def test_purge_keeps_what_the_last_state_needs(tmp_path, schema, make):
    dataset = ReplayDataset(tmp_path, schema, max_trajectories=4)
    for i in range(6):
        dataset.append(make(i, 5))
    oldest = dataset.state_dict()
    dataset.end_of_collection(0)
    first = dataset.state_dict()
    for i in range(6, 9):
        dataset.append(make(i, 5))
    dataset.end_of_collection(1)
    assert folders(tmp_path, "evicted") == 5
    assert dataset.purge(keep=[oldest]) == 0
    assert dataset.purge() == 2 and folders(tmp_path, "evicted") == 3
    dataset.load_state_dict(first)
    assert numbers(dataset) == [2, 3, 4, 5]
    for i in range(6, 9):
        dataset.append(make(i, 5))
    dataset.end_of_collection(1)
    dataset.state_dict()
    assert dataset.purge() == 3 and folders(tmp_path, "evicted") == 0
    before = numbers(dataset)
    with pytest.raises(ValueError, match="neither in the store .* nor among its evicted"):
        dataset.load_state_dict(first)
    assert numbers(dataset) == before


def test_purge_without_any_state_deletes_all(tmp_path, schema, make):
    dataset = ReplayDataset(tmp_path, schema, max_trajectories=1)
    for i in range(3):
        dataset.append(make(i, 5))
    dataset.end_of_collection(0)
    (tmp_path / "evicted" / ".deleting-x").mkdir()
    assert dataset.purge() == 2 and folders(tmp_path, "evicted") == 0


def test_wrong_states_change_nothing(tmp_path, schema, make):
    dataset = ReplayDataset(tmp_path, schema)
    dataset.append(make(0, 5))
    state = dataset.state_dict()
    dataset.append(make(1, 5))
    more = json.loads(json.dumps(state))
    more["segments"][0]["trajectories"] = 3
    for wrong, message in (
        ({"kind": "in_memory"}, "state must be of kind 'replay'"),
        (
            {**state, "schema": Schema({"o": Field((), "int8")}, discrete_action_field(2)).to_json()},
            "state must be of schema",
        ),
        (more, "state needs 3 trajectories .* holds 2"),
    ):
        with pytest.raises(ValueError, match=message):
            dataset.load_state_dict(wrong)
    assert numbers(dataset) == [0, 1]
    dataset.append(make(2, 5))
    assert numbers(dataset) == [0, 1, 2]


def test_uncommitted_is_lost_by_load_and_kept_by_state(tmp_path, schema, make):
    dataset = ReplayDataset(tmp_path, schema, commit_every=100)
    dataset.append(make(0, 5))
    state = dataset.state_dict()
    assert len(dataset) == 1
    dataset.append(make(1, 5))
    dataset.load_state_dict(state)
    dataset.commit()
    assert numbers(dataset) == [0]


def test_lost_sequence_file_is_repaired(tmp_path, schema, make):
    with ReplayDataset(tmp_path, schema) as dataset:
        for i in range(3):
            dataset.append(make(i, 5))
    (tmp_path / "sequence").unlink()
    dataset = ReplayDataset(tmp_path)
    dataset.append(make(3, 5))
    assert numbers(dataset) == [0, 1, 2, 3] and len(np.unique(dataset.table.sequence)) == 4


def test_evicted_while_another_process_reads(tmp_path, schema, make, same):
    owner = ReplayDataset(tmp_path, schema, max_trajectories=1)
    for i in range(3):
        owner.append(make(i, 5))
    reader = ReplayDataset(tmp_path, can_delete=False)
    owner.end_of_collection(0)
    owner.purge()
    reader.sample(8, 4, np.random.default_rng(0))
    assert same(reader.trajectory(0), make(0, 5))
    reader.refresh()
    assert numbers(reader) == [2]


class ReplayMachine(RuleBasedStateMachine):
    """Any order of appends, commits, evictions, states, reloads and reopenings, against a plain list."""

    @initialize(limit=st.integers(1, 40), every=st.integers(1, 4))
    def begin(self, limit, every):
        self.make = numbered
        self.folder = tempfile.mkdtemp()
        self.remove = lambda: shutil.rmtree(self.folder)
        self.settings = {"max_trajectories": limit, "commit_every": every}
        schema = Schema({"image": Field((2, 3), "uint8"), "state": Field((2,), "float32")}, discrete_action_field(3))
        self.dataset = ReplayDataset(self.folder, schema, **self.settings)
        self.fifo: list[int] = []
        self.protected: list[int] = []
        self.count, self.state = 0, None

    @rule(times=st.integers(1, 6), protected=st.booleans())
    def append(self, times, protected):
        for _ in range(times):
            self.dataset.append(self.make(self.count, 2 + self.count % 5), protected=protected)
            (self.protected if protected else self.fifo).append(self.count)
            self.count += 1

    @rule()
    def collect(self):
        self.dataset.end_of_collection(0)
        limit = self.settings["max_trajectories"]
        visible = self.visible()
        kept = [n for n in self.fifo if n in visible]
        assert kept == self.fifo[len(self.fifo) - len(kept) :]
        assert len(kept) <= limit and (len(self.fifo) <= limit or len(kept) > limit - max(1, -(-limit // 16)))
        self.fifo = kept

    @rule()
    def save(self):
        self.state = json.loads(json.dumps(self.dataset.state_dict())), list(self.fifo), list(self.protected)
        self.dataset.purge()

    @rule()
    def load(self):
        if self.state is not None:
            self.dataset.load_state_dict(self.state[0])
            self.fifo, self.protected = list(self.state[1]), list(self.state[2])

    @rule()
    def reopen(self):
        self.dataset.close()
        self.dataset = ReplayDataset(self.folder, **self.settings)

    def visible(self):
        return {self.dataset.trajectory(i).meta["number"] for i in range(len(self.dataset))}

    @invariant()
    def nothing_is_lost(self):
        self.dataset.commit()
        assert numbers(self.dataset) == sorted(self.fifo + self.protected)
        if len(self.dataset):
            batch = self.dataset.sample(8, 3, np.random.default_rng(0))
            real = batch.timestep_mask
            assert (batch.obs["state"][..., 1] == batch.time_idx)[real].all()

    def teardown(self):
        if hasattr(self, "remove"):
            self.dataset.close()
            self.remove()


ReplayMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
TestReplayMachine = ReplayMachine.TestCase
