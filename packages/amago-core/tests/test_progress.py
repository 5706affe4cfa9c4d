"""Progress: plain lines without a terminal, a throttled live display with one."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest

from amago_core.progress import ConsoleProgress, format_duration, format_value


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("frames", 1234567, "1,234,567"),
        ("loss", 1.2e-5, "1.20e-05"),
        ("return", 1.2345, "1.23"),
        ("return", 12345.6, "12,346"),
        ("success_first", 0.8341, "83.4 %"),
        ("zero", 0.0, "0"),
        ("success", None, "-"),
        ("x", float("nan"), "-"),
        ("x", np.float32(0.5), "0.5"),
        ("text", "abc", "abc"),
        ("x", float("inf"), "inf"),
    ],
)
def test_values(name, value, text):
    assert format_value(name, value) == text


def test_durations():
    assert format_duration(3725.4) == "1:02:05"
    assert format_duration(None) == format_duration(float("inf")) == "--:--"


def test_plain_prints_only_at_epoch_ends():
    clock, file = Clock(), io.StringIO()
    progress = ConsoleProgress("demo", file=file, clock=clock)
    assert not progress.live
    progress.update(epoch=1, epochs=4, frames=0, total_frames=4000, updates=0, return_=None)
    for _ in range(10):
        clock.now += 1.0
        progress.update(frames=progress._fields["frames"] + 100, updates=progress._fields["updates"] + 5)
    assert file.getvalue() == ""
    progress.epoch_end(return_=0.5, success_first=0.1, success_last=0.9)
    progress.close()
    line = file.getvalue()
    assert line == (
        "demo  epoch 1 / 4  frames 1,000 / 4,000 (100/s)  updates 50 (5/s)  return 0.5  success first 10.0 %  "
        "success last 90.0 %  ETA 0:00:30\n"
    )


def test_eta_counts_from_the_resumed_frame():
    clock = Clock()
    progress = ConsoleProgress(file=io.StringIO(), clock=clock)
    progress.update(frames=9000, total_frames=10_000)
    assert progress.eta() is None and progress.rate("frames") is None
    clock.now += 10
    progress.update(frames=9100)
    assert progress.eta() == pytest.approx(90.0) and progress.rate("frames") == pytest.approx(10.0)


def test_rate_covers_the_last_minute():
    clock = Clock()
    progress = ConsoleProgress(file=io.StringIO(), clock=clock)
    for second in range(300):
        progress.update(frames=second if second < 150 else 150 + 10 * (second - 150))
        clock.now += 1
    assert progress.rate("frames") == pytest.approx(10.0)
    assert len(progress._samples) < 70


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_live_display(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    clock, file = Clock(), io.StringIO()
    with ConsoleProgress("a [title]", file=file, live=True, clock=clock) as progress:
        for number in range(100):
            clock.now += 0.05
            progress.update(
                frames=number,
                total_frames=100,
                updates=0,
                epoch=1,
                epochs=2,
                phase="train",
                phase_done=1,
                phase_total=2,
            )
        progress.update({"success last": 0.5}, return_=2.0)
        progress.print("a [message]")
    text = file.getvalue()
    draws = text.count("elapsed")
    assert 18 <= draws <= 30  # 5 seconds, at most 4 a second
    assert "a [title]" in text and "a [message]" in text and "success last" in text and "50.0 %" in text
    progress.close()


def test_update_is_cheap():
    progress = ConsoleProgress(file=io.StringIO(), live=True)
    progress.update(frames=0, total_frames=10)
    progress._next_draw = float("inf")
    start = time.perf_counter()
    for number in range(10_000):
        progress.update(frames=number, updates=number, success_last=0.5)
    assert time.perf_counter() - start < 1.0
    progress.close()
