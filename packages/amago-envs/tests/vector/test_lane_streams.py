from __future__ import annotations

import json

import numpy as np
import pytest
from gymnasium.utils import seeding

from amago_envs.vector import LaneStreams


def test_lanes_hand_out_what_their_generator_would() -> None:
    lanes, rng = 5, np.random.default_rng(0)
    streams = LaneStreams(lanes, largest_request=30, seeds=list(range(10, 10 + lanes)))
    singles = [seeding.np_random(seed)[0] for seed in range(10, 10 + lanes)]
    for _ in range(400):
        chosen = np.flatnonzero(rng.random(lanes) < 0.5)
        count = int(rng.integers(1, 31))
        drawn = streams.take_one(chosen)[:, None] if count == 1 else streams.take(chosen, count)
        assert drawn.shape == (chosen.size, count)
        for lane, row in zip(chosen, drawn, strict=True):
            np.testing.assert_array_equal(row, [singles[lane].random() for _ in range(count)])


def test_reseed_starts_again() -> None:
    streams = LaneStreams(2, largest_request=4, seeds=[1, 2])
    both = np.arange(2)
    first = streams.take(both, 4)
    streams.reseed(1, 2)
    np.testing.assert_array_equal(streams.take(np.array([1]), 4)[0], first[1])
    assert streams.seeds == (1, 2)


def test_state_goes_through_json() -> None:
    streams = LaneStreams(3, largest_request=7)
    lanes = np.arange(3)
    for _ in range(25):
        streams.take(lanes, 7)
    state = json.loads(json.dumps(streams.state_dict(), default=lambda array: array.tolist()))
    copy = LaneStreams(3, largest_request=7)
    copy.load_state_dict(state)
    for _ in range(50):
        np.testing.assert_array_equal(streams.take(lanes, 5), copy.take(lanes, 5))
    assert copy.seeds == streams.seeds


def test_states_that_do_not_fit_are_refused() -> None:
    state = LaneStreams(3, largest_request=7).state_dict()
    with pytest.raises(ValueError, match="buffer"):
        LaneStreams(4, largest_request=7).load_state_dict(state)
    state["generators"][0] = {"bit_generator": "MT19937"}
    with pytest.raises(ValueError, match="PCG64"):
        LaneStreams(3, largest_request=7).load_state_dict(state)


def test_an_empty_request_draws_nothing() -> None:
    streams = LaneStreams(2, largest_request=1)
    nobody = np.array([], dtype=np.int64)
    assert streams.take(nobody, 3).shape == (0, 3) and streams.take_one(nobody).shape == (0,)
