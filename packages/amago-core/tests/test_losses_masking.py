import math

import pytest
import torch

from amago_core.losses import fill_masked, masked_mean, masked_sum

MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
    assert masked_mean(x, MASK).item() == pytest.approx(9.0 / (3 + 1e-5))


def test_mask_is_broadcast_over_trailing_dimensions():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    total = sum(x[b, t].sum().item() for b in range(2) for t in range(3) if MASK[b, t])
    assert masked_mean(x, MASK).item() == pytest.approx(total / (3 * 20 + 1e-5), rel=1e-5)


def test_partly_broadcast_soft_weights_match_a_loop():
    gen = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, 3, 4, 5, generator=gen), torch.rand(2, 3, 1, 5, generator=gen)
    total, weight = 0.0, 0.0
    for index in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        b, t, c, g = index
        total += (x[b, t, c, g] * weights[b, t, 0, g]).item()
        weight += weights[b, t, 0, g].item()
    assert masked_mean(x, weights).item() == pytest.approx(total / (weight + 1e-5), rel=1e-5)
    got_total, got_weight = masked_sum(x, weights)
    assert got_total.item() == pytest.approx(total, rel=1e-5)
    assert got_weight.item() == pytest.approx(weight, rel=1e-5)


def test_sums_of_two_halves_give_the_mean_of_the_whole():
    x = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    first, second = masked_sum(x[:1], MASK[:1]), masked_sum(x[1:], MASK[1:])
    mean = (first[0] + second[0]) / (first[1] + second[1] + 1e-5)
    torch.testing.assert_close(mean, masked_mean(x, MASK))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
def test_what_is_under_the_mask_leaks_into_neither_value_nor_gradient(poison, soft):
    clean = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    mask = MASK * 0.5 if soft else MASK
    dirty = torch.where(MASK[..., None], clean, poison).requires_grad_()
    clean = clean.requires_grad_()
    mean, reference = masked_mean(dirty, mask), masked_mean(clean, mask)
    assert torch.equal(mean, reference)
    mean.backward()
    reference.backward()
    assert torch.equal(dirty.grad, clean.grad)
    assert (dirty.grad[~MASK] == 0).all()


def test_an_empty_mask_gives_zero():
    x = torch.full((2, 3), math.nan, requires_grad=True)
    mean = masked_mean(x, torch.zeros(2, 3, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0.0
    assert (x.grad == 0).all()


def test_low_precision_is_averaged_in_float32():
    x = torch.ones(64, 1000, dtype=torch.bfloat16)
    mean = masked_mean(x, torch.ones(64, 1000, dtype=torch.bool))
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(1.0, rel=1e-6)


def test_fill_masked():
    x = torch.tensor([[1.0, math.nan], [math.inf, 2.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, True]])
    filled = fill_masked(x, mask, -1.0)
    assert filled.tolist() == [[1.0, -1.0], [-1.0, 2.0]]
    filled.square().sum().backward()
    assert x.grad.tolist() == [[2.0, 0.0], [0.0, 4.0]]


@pytest.mark.parametrize("shape", [(3, 2), (2,), (2, 3, 4, 1), (2, 3, 5)])
def test_a_mask_of_another_shape_is_refused(shape):
    x = torch.zeros(2, 3, 4)
    if shape == (2,):  # leading dimension alone is fine
        assert masked_mean(x, torch.ones(shape)).item() == 0.0
        return
    with pytest.raises(ValueError, match="mask"):
        masked_mean(x, torch.ones(shape))
