"""JSONL record: strict JSON, resume without losing a line; plug-ins name what to install."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from amago_core.errors import AmagoError, RunDirError
from amago_core.trackers import JSONLTracker, MultiTracker, TensorBoardTracker, Tracker, WandbTracker, read_jsonl


def strict(line):
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_lines_are_flushed_and_strict(tmp_path):
    tracker = JSONLTracker(tmp_path / "new" / "metrics.jsonl")
    assert isinstance(tracker, Tracker)
    tracker.log(3, {"a": 1.5, "nan": float("nan"), "inf": np.float32("inf"), "text": "x\ny", "none": None, "yes": True})
    first = strict(tracker.path.read_text())  # readable before close
    assert first == {"step": 3, "a": 1.5, "nan": None, "inf": None, "text": "x\ny", "none": None, "yes": True}
    assert tracker.nonfinite == 2
    tracker.log(
        4, {"tensor": torch.tensor(2.0), "histogram": np.array([1, 2]), "mixed": torch.tensor([1.0, torch.nan])}
    )
    tracker.log(5, {"np": np.int64(7), "bool": np.bool_(True), "nested": {"k": (1, 2)}})
    tracker.close()
    tracker.close()
    records = list(read_jsonl(tracker.path))
    assert records[1] == {"step": 4, "tensor": 2.0, "histogram": [1, 2], "mixed": [1.0, None]}
    assert records[2] == {"step": 5, "np": 7, "bool": True, "nested": {"k": [1, 2]}}
    assert tracker.nonfinite == 3


def test_resume_moves_the_tail_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JSONLTracker(path)
    tracker.log(1, {"a": 1})
    offset = tracker.offset
    tracker.log(2, {"a": 2})
    tracker.close()

    resumed = JSONLTracker(path)
    tail = resumed.truncate_to(offset)
    assert tail == tmp_path / "metrics.tail-0.jsonl" and next(read_jsonl(tail))["step"] == 2
    assert resumed.truncate_to(offset) is None
    resumed.log(2, {"a": 20})
    assert resumed.truncate_to(offset).name == "metrics.tail-1.jsonl"
    resumed.log(2, {"a": 30})
    resumed.sync()
    resumed.close()
    assert [record["a"] for record in read_jsonl(path)] == [1, 30]
    with JSONLTrackerClosing(path) as tracker, pytest.raises(RunDirError, match="fewer than the 9999"):
        tracker.truncate_to(9999)


@pytest.mark.parametrize("rest", [b'{"step": 2, "a"', b"x" * 10_000])
def test_unfinished_line_of_a_killed_run_is_set_aside(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    with JSONLTrackerClosing(path) as tracker:
        tracker.log(1, {})
    with path.open("ab") as file:
        file.write(rest)
    assert len(list(read_jsonl(path))) == 1
    with JSONLTrackerClosing(path) as tracker:
        tracker.log(2, {})
    assert [record["step"] for record in read_jsonl(path)] == [1, 2]
    assert (tmp_path / "metrics.tail-0.jsonl").read_bytes() == rest


class JSONLTrackerClosing(JSONLTracker):
    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def test_unwritable_file_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="cannot write .*metrics.jsonl"):
        JSONLTracker(tmp_path / "file" / "metrics.jsonl")


class Recorder:
    def __init__(self, fail=False):
        self.calls, self.closed, self.fail = [], 0, fail

    def log(self, step, metrics):
        self.calls.append((step, dict(metrics)))

    def close(self):
        self.closed += 1
        if self.fail:
            raise OSError("disk full")


def test_multi_tracker_closes_all():
    first, second = Recorder(fail=True), Recorder()
    tracker = MultiTracker([first, second])
    tracker.log(1, {"a": 2})
    assert first.calls == second.calls == [(1, {"a": 2})]
    with pytest.raises(OSError, match="disk full"):
        tracker.close()
    assert second.closed == 1


def test_missing_plug_ins_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(AmagoError, match=r'pip install "amago-core\[wandb\]"'):
        WandbTracker("project")
    with pytest.raises(AmagoError, match=r'pip install "amago-core\[tensorboard\]"'):
        TensorBoardTracker(tmp_path)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    tracker = TensorBoardTracker(tmp_path)
    tracker.log(1, {"a": 1.0, "hist": [1.0, 2.0], "text": "x", "none": None})
    tracker.close()
    assert any(path.name.startswith("events") for path in tmp_path.iterdir())


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb", reason="needs wandb")
    tracker = WandbTracker("project", log_dir=tmp_path, mode="offline")
    tracker.log(1, {"a": 1.0, "hist": [1.0, 2.0], "none": None})
    assert tracker.run_id
    tracker.close()
