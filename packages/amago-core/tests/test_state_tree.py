"""Nested states survive the way through JSON and tensors exactly."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from amago_core.errors import CheckpointError
from amago_core.state_tree import flatten_tensors, rng_state, set_rng_state, unflatten


def round_trip(tree):
    tensors, skeleton = flatten_tensors(tree)
    return unflatten(tensors, json.loads(json.dumps(skeleton, allow_nan=False)))


def same(left, right):
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    return left == right


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
)
keys = st.text(max_size=5).map(lambda key: key.replace("/", "|")) | st.sampled_from(["__tuple__", "__tensor__"])
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_any_nested_state_round_trips(tree):
    assert same(round_trip(tree), tree)


def test_names_are_joined_keys():
    tensors, _ = flatten_tensors({"state": {0: {"step": torch.tensor(3.0)}}, "list": [torch.ones(2)]}, "optimizer")
    assert sorted(tensors) == ["optimizer/list/0", "optimizer/state/0/step"]


def test_optimizer_state_round_trips():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    other = torch.optim.AdamW(model.parameters(), lr=1.0)
    other.load_state_dict(round_trip(optimizer.state_dict()))
    first, second = optimizer.state_dict(), other.state_dict()
    assert first["param_groups"] == second["param_groups"]
    for index, entry in first["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, second["state"][index][key]) and value.dtype == second["state"][index][key].dtype


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_numpy_generators_continue(bits):
    generator = np.random.Generator(bits(7))
    generator.standard_normal(3)
    other = np.random.Generator(bits(0))
    other.bit_generator.state = round_trip(generator.bit_generator.state)
    np.testing.assert_array_equal(generator.integers(1 << 60, size=20), other.integers(1 << 60, size=20))


def test_global_generators_continue():
    before = rng_state()
    try:
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        random.gauss(0, 1), np.random.standard_normal(), torch.randn(1)
        saved = round_trip(rng_state())
        expected = random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()
        set_rng_state(saved)
        assert (random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()) == expected
    finally:
        set_rng_state(before)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": object()}}, "'a/b' has type object"),
        ({"a": np.array([None])}, "dtype object"),
        ({(1, 2): 3}, "key of type tuple"),
        ({"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)}, "joined name 'a/b'"),
    ],
)
def test_what_cannot_be_stored_is_named(tree, message):
    with pytest.raises(CheckpointError, match=message):
        flatten_tensors(tree)


def test_missing_tensor_is_named():
    with pytest.raises(CheckpointError, match="'a'"):
        unflatten({}, flatten_tensors({"a": torch.ones(1)})[1])
