"""Plots: files appear for every shape of input; layout helpers; clear errors."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from amago_core.errors import AmagoError
from amago_core.plots import _spread, _success_keys, plot_learning_curve, plot_success_per_attempt

CURVES = {
    "agent": ([0.2, 0.5, 0.8], [0.15, 0.45, 0.75], [0.25, 0.55, 0.85]),
    "random": ([0.05, 0.05, 0.05], [0.04, 0.04, 0.04], [0.06, 0.06, 0.06]),
    "planner": (np.ones(3), None, None),
}


def records(attempts=3, frames=True):
    for epoch in range(12):
        record = {
            "step": epoch,
            "frames": 1000 * epoch if frames else 0,
            "updates": 10 * max(0, epoch - 2),
            "text": "x",
        }
        record["collect/return"] = 0.1 * epoch
        if epoch % 4 == 0:
            record["val/return"] = None if epoch == 4 else 0.2 * epoch
            record.update({f"val/attempt_{i}/success": min(1.0, 0.05 * epoch * (i + 1)) for i in range(attempts)})
        yield record


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


@pytest.mark.parametrize(
    "curves", [CURVES, {"agent": ([0.5], None, None)}, {"a": CURVES["agent"], "b": ([0.1] * 15, None, None)}]
)
def test_success_per_attempt(tmp_path, curves):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path = plot_success_per_attempt(tmp_path / "plots" / "success.png", curves, "title", subtitle="1,000 lakes")
    assert is_png(path)


@pytest.mark.parametrize("attempts", [0, 1, 3, 12])
@pytest.mark.parametrize("frames", [True, False])
def test_learning_curve(tmp_path, attempts, frames):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert is_png(plot_learning_curve(tmp_path / "curve.png", records(attempts, frames), subtitle="one seed"))


def test_one_record_is_enough(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert is_png(plot_learning_curve(tmp_path / "curve.png", [next(records())]))


def test_keys_are_ordered_by_attempt_and_prefer_validation():
    rows = [{f"{prefix}/attempt_{i}/success": 0.0 for i in (10, 2, 0) for prefix in ("collect", "val")}]
    assert _success_keys(rows) == ["val/attempt_0/success", "val/attempt_2/success", "val/attempt_10/success"]
    assert _success_keys([{"collect/attempt_0/success": 1.0}]) == ["collect/attempt_0/success"]
    assert _success_keys([{"loss": 1.0}]) == []


@pytest.mark.parametrize("positions", [[1.0, 1.0, 1.0], [5.0, 0.0, 0.1], [], [2.0], [0, 10, 20]])
def test_labels_do_not_overlap(positions):
    spread = _spread(positions, 1.0)
    ordered = np.sort(spread)
    assert (np.diff(ordered) >= 1.0 - 1e-9).all()
    assert list(np.argsort(spread, kind="stable")) == list(np.argsort(positions, kind="stable"))
    if positions == [0, 10, 20]:
        assert spread == positions


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "curves is empty"),
        ({"a": ([], None, None)}, "curves\\['a'\\]"),
        ({"a": ([0.1, 0.2], [0.1], [0.2, 0.3])}, "2, 1 and 2"),
    ],
)
def test_mistakes_are_named(tmp_path, curves, message):
    with pytest.raises(ValueError, match=message):
        plot_success_per_attempt(tmp_path / "a.png", curves)
    with pytest.raises(ValueError, match="no record holds"):
        plot_learning_curve(tmp_path / "a.png", [{"loss": 1.0}])
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_names_the_command(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AmagoError, match=r'pip install "amago-core\[plot\]"'):
        plot_success_per_attempt(tmp_path / "a.png", CURVES)
