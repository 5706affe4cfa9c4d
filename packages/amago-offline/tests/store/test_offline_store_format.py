"""One segment: records, torn commits, round trips, write errors."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amago_offline import Field, Schema, Trajectory, discrete_action_field
from amago_offline.store.segment import INDEX_FILE, RECORD, Segment, column_file, committed_records, seal_records
from amago_offline.store.writer import SegmentWriter


def group(start, count):
    records = np.zeros(count, RECORD)
    records["sequence"] = np.arange(start, start + count)
    records["timesteps"] = 5
    return seal_records(records)


def test_a_cut_index_shows_whole_commits_only():
    data = group(0, 3) + group(3, 1) + group(4, 2)
    for length in range(len(data) + 1):
        whole = length // RECORD.itemsize
        expected = max(n for n in (0, 3, 4, 6) if n <= whole)
        assert len(committed_records(data[:length])) == expected
        assert len(committed_records(data[:length] + bytes(999))) == expected


def test_any_changed_byte_hides_its_commit_and_what_follows():
    data = group(0, 2) + group(2, 1)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x41
        assert len(committed_records(bytes(changed))) == (0 if position < 2 * RECORD.itemsize else 2)


def test_column_files_are_unique_and_valid_names():
    names = ["a/b", "a%2Fb", "..", ".", "a b", "ä" * 33, "x" * 200, "a.b", "\0", "\n"]
    files = [column_file("obs." + name) for name in names]
    assert len(set(files)) == len(names)
    assert all("/" not in file and "\0" not in file and len(file.encode()) <= 255 for file in files)


@st.composite
def trajectories(draw):
    """Any schema with one to three observations, and some trajectories of it."""
    dtypes = st.sampled_from(["bool", "uint8", "int32", "float32", "float64"])
    shapes = st.sampled_from([(), (1,), (3,), (2, 2)])
    keys = draw(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3, unique=True))
    schema = Schema(
        {key: Field(draw(shapes), draw(dtypes)) for key in keys},
        draw(st.sampled_from([discrete_action_field(5), discrete_action_field(900), Field((2,), "float32")])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    result = []
    for number in range(draw(st.integers(1, 5))):
        length = draw(st.integers(2, 9))
        ends = np.zeros((2, length), bool)
        ends[:, -1] = draw(st.sampled_from([(0, 0), (0, 1), (1, 0)]))
        start = draw(st.integers(0, 2**40))
        action = rng.integers(0, 5, (length, *schema.action.shape)).astype(schema.action.dtype)
        result.append(
            Trajectory(
                obs={k: rng.integers(0, 2, (length, *f.shape)).astype(f.dtype) for k, f in schema.obs.items()},
                prev_action=action,
                prev_reward=rng.normal(size=length),
                terminated=ends[0],
                truncated=ends[1],
                time_idx=np.arange(start, start + length),
                meta={"number": number, "text": draw(st.text(max_size=5))},
            )
        )
    return schema, result


@settings(max_examples=40, deadline=None)
@given(trajectories())
def test_round_trip(case):
    schema, written = case
    with tempfile.TemporaryDirectory() as folder:
        writer = SegmentWriter.create(Path(folder), schema, sum(map(len, written)))
        for trajectory in written:
            writer.append(trajectory.conform(schema))
        segment = Segment(writer.directory, schema)
        assert not len(segment.records)
        writer.commit(np.arange(len(written)))
        assert segment.refresh() and not segment.refresh()
        for position, trajectory in enumerate(written):
            read = segment.read(position)
            assert read.meta == trajectory.meta and read.obs.keys() == trajectory.obs.keys()
            for key in read.obs:
                np.testing.assert_array_equal(read.obs[key], trajectory.obs[key], strict=True)
            for name in ("prev_action", "prev_reward", "terminated", "truncated", "time_idx"):
                np.testing.assert_array_equal(getattr(read, name), getattr(trajectory, name), strict=True)
        writer.abandon()


def test_reopened_segment_goes_on_where_it_was_told(tmp_path, schema, make, same):
    writer = SegmentWriter.create(tmp_path, schema, 100)
    for number in range(3):
        writer.append(make(number, 5))
        writer.commit([number])
    reader = Segment(writer.directory, schema)
    writer.abandon()
    with pytest.raises(ValueError, match="records must be at most 3"):
        SegmentWriter.reopen(writer.directory, schema, 4)
    again = SegmentWriter.reopen(writer.directory, schema, 1)
    for number in (7, 8):
        again.append(make(number, 6))
    again.commit([7, 8])
    assert reader.refresh()
    assert [reader.read(i).meta["number"] for i in range(3)] == [0, 7, 8] and same(reader.read(2), make(8, 6))


def test_one_writer_per_segment(tmp_path, schema):
    writer = SegmentWriter.create(tmp_path, schema, 10)
    with pytest.raises(BlockingIOError, match="another process is writing segment"):
        SegmentWriter.reopen(writer.directory, schema, 0)
    writer.abandon()
    SegmentWriter.reopen(writer.directory, schema, 0).abandon()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("column", ["obs.state", "prev_reward", None])
def test_full_disk_reaches_the_caller_and_harms_nothing(tmp_path, schema, make, same, column):
    writer = SegmentWriter.create(tmp_path, schema, 100)
    writer.append(make(0, 5))
    writer.commit([0])
    name = INDEX_FILE if column is None else column_file(column)
    good = os.dup(writer._files[name])
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, writer._files[name])
    with pytest.raises(OSError, match="No space left on device"):
        writer.append(make(1, 6))
        writer.commit([1])
    os.dup2(good, writer._files[name])
    reader = Segment(writer.directory, schema)
    assert len(reader.records) == 1
    if column is not None:
        assert writer.pending == 0
        writer.append(make(1, 6))
    writer.commit([2])
    assert reader.refresh() and same(reader.read(1), make(1, 6)) and same(reader.read(0), make(0, 5))
    writer.abandon()
    os.close(good)
    os.close(full)


def test_a_closed_writer_says_so(tmp_path, schema, make):
    writer = SegmentWriter.create(tmp_path, schema, 100)
    writer.abandon()
    with pytest.raises(RuntimeError, match="is closed"):
        writer.append(make(0, 5))
