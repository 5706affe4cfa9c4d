from __future__ import annotations

import dataclasses

import pytest
import torch

from amago_nets.distributions import MultiDiscreteConfig
from amago_nets.specs import ActionSpec, ArraySpec


def test_array_spec_fields() -> None:
    spec = ArraySpec(shape=(4, 2), dtype="float32", low=-1.0, high=float("inf"))
    assert (spec.kind, spec.num_classes, spec.numel) == ("vector", None, 8)
    assert ArraySpec(shape=(), dtype="int64", kind="tokens", num_classes=5).numel == 1
    assert spec == ArraySpec(shape=(4, 2), dtype="float32", low=-1.0, high=float("inf"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.shape = (1,)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shape": [4]}, r"shape=\[4\]"),
        ({"shape": (0,)}, r"shape=\(0,\)"),
        ({"dtype": "float"}, "dtype='float'.*'float32'"),
        ({"kind": "audio"}, "kind='audio'.*'image'"),
        ({"kind": "image"}, "three axes"),
        ({"low": 2.0, "high": 1.0}, "low=2.0"),
        ({"low": float("nan")}, "low=nan"),
        ({"num_classes": 3}, "num_classes=3.*'vector'"),
        ({"kind": "tokens", "num_classes": 0}, "num_classes=0"),
    ],
)
def test_array_spec_refuses(changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ArraySpec(**{"shape": (4,), "dtype": "float32", **changes})


def test_numbers_of_numpy_become_plain() -> None:
    np = pytest.importorskip("numpy")
    # Gymnasium's `Discrete.n`, `MultiDiscrete.nvec` and `Box.low.min()` are such numbers.
    spec = ArraySpec(shape=(np.int64(4),), dtype=np.dtype("uint8"), low=np.float32(0), high=np.uint8(255))  # type: ignore[arg-type]
    assert repr(spec) == repr(ArraySpec(shape=(4,), dtype="uint8", low=0.0, high=255))
    assert repr(ActionSpec("discrete", np.int64(5))) == repr(ActionSpec("discrete", 5))  # type: ignore[arg-type]
    nvec = tuple(np.array([3, 2]))
    assert repr(ActionSpec("multi_discrete", np.sum(nvec), nvec=nvec)) == repr(
        ActionSpec("multi_discrete", 5, nvec=(3, 2))
    )
    assert repr(MultiDiscreteConfig(nvec=nvec)) == repr(MultiDiscreteConfig(nvec=(3, 2)))
    with pytest.raises(ValueError, match="size="):
        ActionSpec("discrete", np.float64(5))  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "size", "match"), [("box", 2, "kind='box'"), ("discrete", 0, "size=0")])
def test_action_spec_refuses(kind: str, size: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ActionSpec(kind, size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
)
def test_encode_discrete(dtype: torch.dtype) -> None:
    action = torch.tensor([[0, 2], [1, 2]], dtype=dtype)
    expected = torch.tensor([[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 1]]], dtype=torch.float32)
    encoded = ActionSpec("discrete", 3).encode(action)
    assert encoded.dtype == torch.float32
    assert torch.equal(encoded, expected)


def test_encode_no_previous_action_is_zero() -> None:
    encoded = ActionSpec("discrete", 300).encode(torch.tensor([-1, 299], dtype=torch.int16))
    assert encoded[0].eq(0).all()
    assert encoded[1].nonzero().flatten().tolist() == [299]


def test_encode_scalar_and_values() -> None:
    assert ActionSpec("discrete", 2).encode(torch.tensor(1)).tolist() == [0.0, 1.0]
    encoded = ActionSpec("multi_binary", 3).encode(torch.tensor([[1, 0, 1]], dtype=torch.int8))
    assert encoded.dtype == torch.float32
    assert encoded.tolist() == [[1.0, 0.0, 1.0]]
    values = torch.rand(2, 5, 4, dtype=torch.float64)
    assert torch.equal(ActionSpec("continuous", 4).encode(values), values.float())


def test_encode_refuses() -> None:
    with pytest.raises(ValueError, match="integers"):
        ActionSpec("discrete", 3).encode(torch.zeros(2))
    with pytest.raises(ValueError, match=r"\[\.\.\., 3\]"):
        ActionSpec("continuous", 3).encode(torch.zeros(2, 4))


def test_multi_discrete() -> None:
    spec = ActionSpec("multi_discrete", 6, nvec=(3, 2, 1))
    assert not spec.is_discrete
    assert spec == ActionSpec("multi_discrete", 6, nvec=(3, 2, 1))
    hash(spec)
    action = torch.tensor([[0, 1, 0], [2, -1, 0], [-1, -1, -1]], dtype=torch.int8)
    encoded = spec.encode(action)
    assert encoded.dtype == torch.float32
    assert encoded.tolist() == [[1, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]]
    assert spec.encode(action.view(3, 1, 3)).shape == (3, 1, 6)
    with pytest.raises(ValueError, match="multi_discrete actions; give integers"):
        spec.encode(action.float())
    for wrong in (action[:, :2], torch.zeros((), dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"\[\.\.\., 3\]"):
            spec.encode(wrong)


@pytest.mark.parametrize(
    ("kind", "size", "nvec", "match"),
    [
        ("multi_discrete", 6, None, "nvec=None"),
        ("multi_discrete", 6, (), r"nvec=\(\)"),
        ("multi_discrete", 6, [3, 3], r"nvec=\[3, 3\]"),
        ("multi_discrete", 6, (6, 0), r"nvec=\(6, 0\)"),
        ("multi_discrete", 2, (3, 2), r"size=2 .* nvec=\(3, 2\); give their sum"),
        ("discrete", 3, (3,), r"nvec=\(3,\) .* kind='discrete'; give None"),
    ],
)
def test_nvec_refuses(kind: str, size: int, nvec: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ActionSpec(kind, size, nvec=nvec)  # type: ignore[arg-type]
