"""Spaces survive JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gymnasium import spaces

from amago_core.errors import EnvError
from amago_core.spaces_json import space_from_json, space_to_json

LARGEST = np.finfo(np.float32).max
SPACES = [
    spaces.Box(-1, 1, (3,)),
    spaces.Box(-1, 1, ()),
    spaces.Box(0, 255, (4, 5, 3), np.uint8),
    spaces.Box(-np.inf, np.inf, (2,)),
    spaces.Box(np.array([-np.inf, -1.1], np.float32), np.array([0.1, np.inf], np.float32)),
    spaces.Box(-LARGEST, LARGEST, (2,)),
    spaces.Box(0, 2**62 + 1, (2,), np.int64),
    spaces.Box(-0.1, 0.3, (2, 2), np.float64),
    spaces.Box(-0.1, 0.3, (2,), np.float16),
    spaces.Box(0, 1, (2,), bool),
    spaces.Discrete(3),
    spaces.Discrete(np.int64(3), start=-2),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete([[2, 3], [4, 5]], dtype=np.int8, start=[[1, 1], [0, 0]]),
    spaces.MultiBinary(3),
    spaces.MultiBinary(1),
    spaces.MultiBinary((1,)),
    spaces.MultiBinary([2, 3]),
    spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Dict({"x": spaces.Box(0, 1, (1,))})}),
]


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_round_trip(space: spaces.Space) -> None:
    text = json.dumps(space_to_json(space), allow_nan=False)
    restored = space_from_json(json.loads(text))
    assert restored == space
    assert type(restored) is type(space) and restored.shape == space.shape and restored.dtype == space.dtype
    assert json.dumps(space_to_json(restored)) == text
    restored.seed(0)
    assert space.contains(restored.sample())


def test_equal_bounds_are_stored_once() -> None:
    image = json.dumps(space_to_json(spaces.Box(0, 255, (84, 84, 3), np.uint8)))
    assert len(image) < 120


@pytest.mark.parametrize("space", [spaces.Tuple([spaces.Discrete(2)]), spaces.Text(3)], ids=repr)
def test_other_spaces_are_refused(space: spaces.Space) -> None:
    with pytest.raises(EnvError, match=type(space).__name__):
        space_to_json(spaces.Dict({"x": space}))


def test_unknown_types_are_refused() -> None:
    with pytest.raises(EnvError, match="'Graph' is not known"):
        space_from_json({"type": "Graph"})
