"""Fields, schemas, trajectories: round trips and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amago_offline import Field, Schema, Trajectory, discrete_action_field

fields = st.builds(
    Field,
    st.lists(st.integers(1, 5), max_size=3).map(tuple),
    st.sampled_from(["bool", "uint8", "int16", "int64", "float16", "float32", "float64"]),
)
actions = st.one_of(
    st.integers(1, 100_000).map(discrete_action_field), st.integers(1, 9).map(lambda n: Field((n,), "float32"))
)


@given(st.dictionaries(st.text(min_size=1, max_size=16), fields, min_size=1, max_size=4), actions)
def test_schema_survives_json(obs, action):
    schema = Schema(obs, action)
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert schema.row_bytes == sum(np.zeros(f.shape, f.dtype).nbytes for f in (*obs.values(), action)) + 4


@pytest.mark.parametrize(
    ("number", "dtype"), [(1, "int8"), (128, "int8"), (129, "int16"), (32769, "int32"), (2**31 + 1, "int64")]
)
def test_discrete_action_takes_the_smallest_signed_integer(number, dtype):
    assert discrete_action_field(number) == Field((), dtype)


def test_key_order_has_no_meaning():
    a, b = Field((1,), "float32"), Field((2,), "uint8")
    action = discrete_action_field(2)
    assert Schema({"a": a, "b": b}, action) == Schema({"b": b, "a": a}, action)
    assert list(Schema({"b": b, "a": a}, action).columns) == ["obs.a", "obs.b", "prev_action", "prev_reward"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Field((0,), "float32"), "shape must hold dimensions >= 1"),
        (lambda: Field((2,), "object"), "dtype must be"),
        (lambda: Field((2,), "complex64"), "dtype must be"),
        (lambda: Schema({}, discrete_action_field(2)), "obs must name at least one"),
        (lambda: Schema({"": Field((), "int8")}, discrete_action_field(2)), "obs keys must be"),
        (lambda: Schema({"ä" * 34: Field((), "int8")}, discrete_action_field(2)), "obs keys must be .* 200 bytes"),
        (lambda: Schema({"o": Field((), "int8")}, Field((), "uint8")), "signed integer"),
        (lambda: discrete_action_field(0), "num_actions must be >= 1"),
    ],
)
def test_wrong_schemas_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def arrays(length=4, **changes):
    end = np.zeros(length, bool)
    return {
        "obs": {"o": np.zeros((length, 2), np.float32)},
        "prev_action": np.zeros(length, np.int8),
        "prev_reward": np.zeros(length, np.float32),
        "terminated": end,
        "truncated": end,
        "time_idx": np.arange(length),
        **changes,
    }


def flag(row, length=4):
    result = np.zeros(length, bool)
    result[row] = True
    return result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_idx": np.arange(1)}, "L >= 2"),
        ({"time_idx": np.array([0, 1, 3, 4])}, "contiguous"),
        ({"time_idx": np.array([-1, 0, 1, 2])}, "contiguous integers >= 0"),
        ({"time_idx": np.arange(4.0)}, "contiguous integers"),
        ({"terminated": flag(2)}, "terminated may be True only in the last row"),
        ({"truncated": flag(0)}, "truncated may be True only in the last row"),
        ({"truncated": np.zeros(4)}, "truncated must be a bool array"),
        ({"prev_reward": np.zeros(5, np.float32)}, "prev_reward must have shape"),
        ({"prev_action": np.zeros(3, np.int8)}, "prev_action must have 4 rows"),
        ({"obs": {"o": np.zeros((3, 2))}}, "o must have 4 rows"),
    ],
)
def test_wrong_trajectories_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Trajectory(**arrays(**changes))


def test_terminated_wins_over_truncated():
    trajectory = Trajectory(**arrays(terminated=flag(3), truncated=flag(3)))
    assert trajectory.terminated[-1] and not trajectory.truncated[-1]


SCHEMA = Schema({"o": Field((2,), "float32")}, discrete_action_field(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs": {"x": np.zeros((4, 2))}}, r"obs must have the keys \['o'\]"),
        ({"obs": {"o": np.zeros((4, 3))}}, r"obs.o must have shape \(4, 2\)"),
        ({"obs": {"o": np.zeros((4, 2), np.complex64)}}, "obs.o must have dtype float32"),
        ({"prev_action": np.zeros(4, np.float32)}, "prev_action must have dtype int8"),
        ({"prev_action": np.full(4, 300)}, "prev_action must fit int8"),
        ({"prev_action": np.array([0, 1, -1, 0])}, "prev_action must be >= 0"),
        ({"prev_action": np.array([-2, 1, 1, 0])}, "prev_action must be >= 0"),
        ({"meta": {"x": object()}}, "meta must be JSON-able"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Trajectory(**arrays(**changes)).conform(SCHEMA).encoded_meta()


def test_conform_casts_and_keeps_values():
    obs = np.linspace(0, 1, 8).reshape(4, 2)
    result = Trajectory(**arrays(obs={"o": obs}, prev_action=np.array([-1, 0, 1, 2]))).conform(SCHEMA)
    assert result.obs["o"].dtype == np.float32 and result.prev_action.dtype == np.int8
    np.testing.assert_array_equal(result.prev_action, [-1, 0, 1, 2])
    np.testing.assert_array_equal(result.obs["o"], obs.astype(np.float32))
    assert len(result) == 4 and result.transitions == 3
    assert np.shares_memory(result.actions, result.prev_action) and np.shares_memory(result.rewards, result.prev_reward)
