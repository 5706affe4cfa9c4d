"""The index math of windows, exactly: by enumeration of every start, not by drawing."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amago_offline.sampling import (
    PADDING_MODES,
    TrajectoryTable,
    check_request,
    clip_windows,
    draw_trajectories,
    draw_windows,
    start_bounds,
)

TABLE = {
    "none": ([Fraction(n, 4) for n in (1, 2, 3, 3, 2, 1)], Fraction(3)),
    "left": ([Fraction(n, 6) for n in (3, 3, 3, 3, 2, 1)], Fraction(5, 2)),
    "right": ([Fraction(n, 6) for n in (1, 2, 3, 3, 3, 3)], Fraction(5, 2)),
    "both": ([Fraction(3, 8)] * 6, Fraction(9, 4)),
}


def every_window(transitions, length, padding):
    low, high = (int(bound[0]) for bound in start_bounds(np.array([transitions]), length, padding))
    starts = np.arange(low, high + 1)
    return clip_windows(starts, np.full(len(starts), transitions), length)


@pytest.mark.parametrize("padding", PADDING_MODES)
def test_probability_of_each_transition(padding):
    first, count = every_window(6, 3, padding)
    inside = (np.arange(6) >= first[:, None]) & (np.arange(6) < (first + count)[:, None])
    probabilities, mean = TABLE[padding]
    assert [Fraction(int(n), len(first)) for n in inside.sum(axis=0)] == probabilities
    assert Fraction(int(count.sum()), len(first)) == mean


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(PADDING_MODES))
def test_number_of_windows_and_their_limits(transitions, length, padding):
    first, count = every_window(transitions, length, padding)
    if transitions <= length:
        assert first.tolist() == [0] and count.tolist() == [transitions]
        return
    expected = {
        "none": transitions - length + 1,
        "left": transitions,
        "right": transitions,
        "both": transitions + length - 1,
    }
    assert len(first) == expected[padding]
    assert (
        (first >= 0).all() and (count >= 1).all() and (count <= length).all() and (first + count <= transitions).all()
    )
    if padding == "none":
        assert (count == length).all()
    if padding == "both":
        uses = np.zeros(transitions)
        for start, n in zip(first, count, strict=True):
            uses[start : start + n] += 1
        assert (uses == length).all()


@pytest.mark.parametrize("padding", PADDING_MODES)
def test_draws_reach_every_window_about_equally(padding):
    draws = 20_000
    first, count = draw_windows(np.full(draws, 6), 3, padding, np.random.default_rng(0))
    windows = sorted(zip(*(x.tolist() for x in every_window(6, 3, padding)), strict=True))
    drawn, times = np.unique(np.stack([first, count], axis=1), axis=0, return_counts=True)
    assert sorted(set(windows)) == [tuple(row) for row in drawn.tolist()]
    np.testing.assert_allclose(times / draws, 1 / len(windows), atol=0.012)


def table(lengths):
    zeros = np.zeros(len(lengths), np.int64)
    flags = zeros.astype(bool)
    return TrajectoryTable(zeros, zeros, zeros, np.array(lengths), zeros, flags, flags)


def test_uniform_over_trajectories_or_over_transitions():
    lengths = [10, 1000, 1, 189]
    rng = np.random.default_rng(0)
    uniform = np.bincount(draw_trajectories(table(lengths), 40_000, rng), minlength=4) / 40_000
    np.testing.assert_allclose(uniform, 0.25, atol=0.01)
    weighted = np.bincount(draw_trajectories(table(lengths), 40_000, rng, "transition"), minlength=4) / 40_000
    np.testing.assert_allclose(weighted, np.array(lengths) / 1200, atol=0.01)


class EveryNumber:
    """Stands in for a generator: returns all integers of the range in order."""

    def integers(self, low, high, size):
        return np.arange(low, high)


def test_weighting_by_transition_is_exact():
    picks = draw_trajectories(table([3, 1, 4]), 8, EveryNumber(), "transition")
    assert picks.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (4, 0), (-1, 4), (4, 1.5)])
def test_wrong_requests(batch, length):
    with pytest.raises(ValueError, match=r"(batch_size|length) must be an integer >= 1"):
        check_request(batch, length)


def test_unknown_modes():
    with pytest.raises(ValueError, match="padding must be one of .*'middle'"):
        start_bounds(np.array([3]), 2, "middle")
    with pytest.raises(ValueError, match="weighting must be one of .*'rows'"):
        draw_trajectories(table([3]), 2, np.random.default_rng(0), "rows")
