import itertools
import math
from collections import Counter

import pytest
import torch

from amago_core.losses import reduce_ensemble, td_targets
from amago_core.losses import td as td_module

REWARDS = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
VALUES = torch.tensor([[10.0, 20.0, 30.0, 40.0, 50.0]])[..., None]
GAMMA = torch.tensor([0.9])


def flags(*steps, size=5):
    return torch.tensor([[step in steps for step in range(size)]])


def targets(terminated=(), off=(), n=1):
    y = td_targets(REWARDS, flags(*terminated), VALUES, GAMMA, ~flags(*off), reward_multiplier=1.0, n=n)
    return y[0, :, 0].tolist()


def loop_targets(rewards, terminated, values, gammas, mask, multiplier, n):
    """Plain loops over everything, straight from the formula."""
    B, T = rewards.shape
    y = torch.zeros(B, T, len(gammas))
    for b, t, g in itertools.product(range(B), range(T), range(len(gammas))):
        if not mask[b, t]:
            continue
        gamma, total, alive, k = gammas[g].item(), 0.0, 1.0, 0
        while k < n and t + k < T and mask[b, t + k] and alive:
            total += gamma**k * multiplier * rewards[b, t + k].item()
            alive = 0.0 if terminated[b, t + k] else 1.0
            k += 1
        y[b, t, g] = total + (gamma**k * values[b, t + k - 1, g].item() if alive else 0.0)
    return y


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, [10, 20, 30, 40, 50]),
        ({"terminated": (2,)}, [10, 20, 3, 40, 50]),
        ({"n": 3}, [27.1, 37.1, 47.1, 49, 50]),
        ({"n": 3, "terminated": (2,)}, [5.23, 4.7, 3, 49, 50]),
        ({"n": 3, "terminated": (4,)}, [27.1, 37.1, 10.65, 8.5, 5]),
        ({"n": 3, "off": (3, 4)}, [27.1, 29, 30, 0, 0]),
    ],
)
def test_targets_by_hand(kwargs, expected):
    assert targets(**kwargs) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 4, 20])
def test_targets_equal_the_loop_and_ignore_padding(n):
    gen = torch.Generator().manual_seed(n)
    B, T = 5, 7
    rewards = torch.randn(B, T, generator=gen)
    values = torch.randn(B, T, 3, generator=gen)
    lengths = torch.tensor([7, 1, 4, 0, 6])
    mask = torch.arange(T) < lengths[:, None]
    terminated = torch.rand(B, T, generator=gen) < 0.2
    gammas = torch.tensor([0.1, 0.9, 0.999])
    expected = loop_targets(rewards, terminated, values, gammas, mask, 10.0, n)
    torch.testing.assert_close(
        td_targets(rewards, terminated, values, gammas, mask, n=n), expected, rtol=1e-5, atol=1e-5
    )

    poisoned = td_targets(
        torch.where(mask, rewards, math.nan),
        terminated | ~mask,
        torch.where(mask[..., None], values, math.inf),
        gammas,
        mask,
        n=n,
    )
    torch.testing.assert_close(poisoned, expected, rtol=1e-5, atol=1e-5)


def test_targets_carry_no_gradient():
    values = VALUES.clone().requires_grad_()
    y = td_targets(REWARDS, flags(), values, GAMMA, ~flags())
    assert not y.requires_grad
    assert y.dtype == torch.float32


@pytest.mark.parametrize(("mode", "expected"), [("min", 7.7), ("mean", 9.05)])
def test_ensemble_example(mode, expected):
    # The subset {0, 3} of [3, 5, 2, 6], stated as an ensemble of its own.
    values = torch.tensor([3.0, 6.0]).view(1, 1, 2, 1)
    reduced = reduce_ensemble(values, num_subset=2, mode=mode)
    y = td_targets(torch.tensor([[0.5]]), flags(size=1), reduced, GAMMA, ~flags(size=1))
    assert y.item() == pytest.approx(expected)


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize(("mode", "num_subset"), [("min", 2), ("mean", 2), ("mean", 3), ("min", 1)])
def test_subsets_are_distinct_uniform_and_drawn_per_element(mode, num_subset, table, monkeypatch):
    if not table:
        monkeypatch.setattr(td_module, "_MAX_TABLE_ROWS", 0)
    B, T, G = 40, 30, 5
    critics = [3.0, 5.0, 2.0, 6.0]
    # Offsets make every (b, t, g) its own, so that a mixed-up gather would show.
    offset = 100.0 * torch.arange(B * T * G).view(B, T, 1, G)
    values = torch.tensor(critics).view(1, 1, 4, 1) + offset
    out = reduce_ensemble(values, num_subset=num_subset, mode=mode, generator=torch.Generator().manual_seed(0))
    residual = (out - offset[:, :, 0]).double()
    reduce = min if mode == "min" else lambda subset: sum(subset) / len(subset)
    subsets = [reduce(s) for s in itertools.combinations(critics, num_subset)]
    expected = Counter(round(value, 1) for value in subsets)
    seen = Counter(round(value, 1) for value in residual.flatten().tolist())
    assert set(seen) == set(expected)
    total = B * T * G
    for value, ways in expected.items():
        assert seen[value] / total == pytest.approx(ways / len(subsets), abs=0.02)
    for dim in range(3):  # drawn anew along every dimension
        assert (residual.std(dim) > 0).float().mean() > 0.9


def test_expected_minimum_over_pairs_without_replacement():
    values = torch.tensor([3.0, 5.0, 2.0, 6.0]).view(1, 1, 4, 1).expand(200, 100, 4, 2)
    out = reduce_ensemble(values, num_subset=2, generator=torch.Generator().manual_seed(0))
    assert out.mean().item() == pytest.approx(2.8333, abs=0.02)


def test_the_full_ensemble_draws_nothing():
    values = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    gen = torch.Generator().manual_seed(7)
    before = gen.get_state()
    assert torch.equal(reduce_ensemble(values, num_subset=4, generator=gen), values.amin(2))
    assert torch.equal(reduce_ensemble(values, num_subset=4, mode="mean", generator=gen), values.mean(2))
    assert torch.equal(gen.get_state(), before)


def test_same_seed_same_subsets():
    values = torch.randn(4, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    first, second = (
        reduce_ensemble(values, num_subset=2, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3)
    )
    other = reduce_ensemble(values, num_subset=2, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_rows_without_a_time_dimension_are_reduced_alike():
    values = torch.randn(4, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    windows = reduce_ensemble(values, num_subset=2, generator=torch.Generator().manual_seed(3))
    rows = reduce_ensemble(values.flatten(0, 1), num_subset=2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(rows, windows.flatten(0, 1))


def test_low_precision_values_are_reduced_in_float32():
    values = torch.randn(2, 3, 4, 5).bfloat16()
    assert reduce_ensemble(values, num_subset=2, mode="mean").dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "kwargs", "name"),
    [
        ((4,), {"num_subset": 2}, "next_values"),
        ((2, 3, 4, 5), {"num_subset": 0}, "num_subset"),
        ((2, 3, 4, 5), {"num_subset": 5}, "num_subset"),
        ((2, 3, 4, 5), {"num_subset": 2, "mode": "max"}, "mode"),
    ],
)
def test_bad_arguments_are_refused(shape, kwargs, name):
    with pytest.raises(ValueError, match=name):
        reduce_ensemble(torch.zeros(shape), **kwargs)


def test_a_horizon_of_zero_is_refused():
    with pytest.raises(ValueError, match="n"):
        targets(n=0)
