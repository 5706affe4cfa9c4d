"""Positions: numbers of the specification, precision, and errors that name the limit."""

from __future__ import annotations

import math

import pytest
import torch

from amago_nets.positions import LearnablePositions, apply_rotary, fixed_embedding, rotary_angles


def test_fixed_by_hand():
    out = fixed_embedding(torch.tensor([0, 1, 100]), 4)
    expected = [
        [0.0, 1.0, 0.0, 1.0],
        [0.8414710, 0.5403023, 0.0099998, 0.9999500],
        [-0.5063656, 0.8623189, 0.8414710, 0.5403023],
    ]
    torch.testing.assert_close(out, torch.tensor(expected), atol=1e-6, rtol=0)
    assert fixed_embedding(torch.zeros(3, 5, dtype=torch.int64), 8).shape == (3, 5, 8)
    assert fixed_embedding(torch.tensor([3]), 4, dtype=torch.float64).dtype == torch.float64


def test_rotary_by_hand():
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 4)
    out = apply_rotary(x, *rotary_angles(torch.tensor([1]), 4)).flatten()
    expected = torch.tensor([0.5403023, -0.0099998, 0.8414710, 0.9999500])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_rotary_products_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 3, 8, dtype=torch.float64).unbind(0)

    def product(at_q, at_k):
        turned = [
            apply_rotary(x, *rotary_angles(torch.tensor([t]), 8, dtype=torch.float64))
            for x, t in ((q, at_q), (k, at_k))
        ]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(product(5, 2), product(1005, 1002))
    assert not torch.allclose(product(5, 2), product(5, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_do_not_follow_half_precision(dtype):
    """Neighbouring large times stay apart although the dtype cannot tell them apart."""
    time_idx = torch.tensor([4096, 4097])
    assert torch.equal(time_idx.to(torch.bfloat16)[0], time_idx.to(torch.bfloat16)[1])
    wide = fixed_embedding(time_idx, 8, dtype=torch.float64)
    out = fixed_embedding(time_idx, 8, dtype=dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wide, atol=5e-3, rtol=0)
    cos, sin = rotary_angles(time_idx, 8, dtype=dtype)
    assert cos.dtype == sin.dtype == dtype
    assert float(cos[0, 0, 0]) == pytest.approx(math.cos(4096), abs=5e-3)


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="dim=5"):
        fixed_embedding(torch.tensor([0]), 5)
    with pytest.raises(ValueError, match="head_dim=3"):
        rotary_angles(torch.tensor([0]), 3)


def test_learnable_names_its_limit():
    positions = LearnablePositions(4, 6)
    assert positions(torch.tensor([[0, 3]])).shape == (1, 2, 6)
    assert torch.equal(positions(torch.tensor([2]))[0], positions.table.weight[2])
    for wrong in (4, -1):
        with pytest.raises(ValueError, match="max_time_idx-1=3"):
            positions(torch.tensor([0, wrong]))
