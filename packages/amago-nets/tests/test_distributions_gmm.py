from __future__ import annotations

import math

import pytest
import torch

from amago_nets.distributions import GMM, GMMConfig
from amago_nets.distributions.gmm import mean_log_tanh_slope


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(dtype: torch.dtype = torch.float64) -> GMM:
    """A=2, M=3: mode 0 at (.5, -.5), the others at 0."""
    params = torch.tensor([0.5, -0.5, 0, 0, 0, 0, *[0.0] * 6, math.log(2.0), 0, 0], dtype=dtype)
    return GMMConfig(num_modes=3).build(params)


def one_dimensional(loc: list[float], std: list[float], weights: list[float]) -> GMM:
    raw = [math.log(math.expm1(s - 1e-4)) for s in std]
    return GMM(f64(*loc).unsqueeze(-1), f64(*raw).unsqueeze(-1), f64(*weights).log())


def integral_of(dist: GMM) -> tuple[float, float]:
    """Total probability and entropy, over x with a = tanh(x), where the density is smooth."""
    x = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    a = x.tanh()
    log_prob = dist.log_prob(a.unsqueeze(-1))
    mass = log_prob.exp() * (1 - a.square())
    return torch.trapezoid(mass, x).item(), -torch.trapezoid(mass * log_prob, x).item()


def test_values_by_hand() -> None:
    for dtype in (torch.float32, torch.float64):
        dist = by_hand(dtype)
        torch.testing.assert_close(dist.std, torch.full((3, 2), math.log(2.0) + 1e-4, dtype=dtype))
        torch.testing.assert_close(dist.log_weights.exp(), torch.tensor([0.5, 0.25, 0.25], dtype=dtype))
        torch.testing.assert_close(dist.mean, torch.tensor([0.2449187, -0.2449187], dtype=dtype), rtol=1e-6, atol=0)
        log_prob = dist.log_prob(torch.tensor([0.3, -0.2], dtype=dtype))
        assert log_prob.item() == pytest.approx(-1.1060470, rel=1e-6)
        torch.testing.assert_close(dist.mode, torch.tensor([0.5, -0.5], dtype=dtype).tanh())


def test_layout_of_the_parameters() -> None:
    config = GMMConfig()
    assert config.num_modes == 5
    assert config.param_size(3) == 2 * 5 * 3 + 5
    params = torch.arange(35.0)
    dist = config.build(params)
    assert torch.equal(dist.loc, params[:15].view(5, 3))
    torch.testing.assert_close(dist.std, torch.nn.functional.softplus(params[15:30].view(5, 3)) + 1e-4)
    torch.testing.assert_close(dist.log_weights, params[30:].log_softmax(-1))


def test_one_mode_is_a_squashed_gaussian() -> None:
    loc, raw = torch.randn(2, 7, 1, 3, generator=generator(), dtype=torch.float64)
    dist = GMM(loc, raw, torch.zeros(7, 1, dtype=torch.float64))
    x = torch.randn(7, 3, generator=generator(1), dtype=torch.float64)
    gaussian = torch.distributions.Normal(loc.squeeze(-2), dist.std.squeeze(-2))
    expected = (gaussian.log_prob(x) - (1 - x.tanh().square() + 1e-6).log()).sum(-1)
    torch.testing.assert_close(dist.log_prob(x.tanh()), expected)


def test_log_prob_matches_a_loop_and_broadcasts() -> None:
    config = GMMConfig(num_modes=3)
    params = torch.randn(2, 4, config.param_size(2), generator=generator(), dtype=torch.float64)
    action = torch.rand(5, 2, 4, 2, generator=generator(1), dtype=torch.float64) * 2 - 1
    log_prob = config.build(params).log_prob(action)
    assert log_prob.shape == (5, 2, 4)
    for k, i, j in [(0, 0, 0), (4, 1, 3), (2, 0, 2)]:
        row, a = params[i, j], action[k, i, j]
        weights = row[12:].softmax(-1)
        total = 0.0
        for m in range(3):
            p = weights[m].item()
            for d in range(2):
                sigma = math.log1p(math.exp(row[6 + 2 * m + d])) + 1e-4
                z = (math.atanh(a[d]) - row[2 * m + d].item()) / sigma
                p *= math.exp(-z * z / 2) / (sigma * math.sqrt(2 * math.pi))
            total += p
        expected = math.log(total) - sum(math.log(1 - v * v + 1e-6) for v in a.tolist())
        assert log_prob[k, i, j].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("loc", "std", "weights"),
    [
        ([0.0], [0.3], [1.0]),
        ([-1.0, 0.2, 1.5], [0.2, 0.5, 0.1], [0.5, 0.2, 0.3]),
        ([0.0, 0.0], [0.01, 1.0], [0.4, 0.6]),
    ],
)
def test_density_integrates_to_one(loc: list[float], std: list[float], weights: list[float]) -> None:
    total, _ = integral_of(one_dimensional(loc, std, weights))
    assert total == pytest.approx(1.0, abs=1e-4)


def test_joint_density_integrates_to_one() -> None:
    dist = by_hand()
    x = torch.linspace(-5, 5, 501, dtype=torch.float64)
    grid = torch.cartesian_prod(x, x).view(501, 501, 2)
    mass = dist.log_prob(grid.tanh()).exp() * (1 - grid.tanh().square()).prod(-1)
    assert torch.trapezoid(torch.trapezoid(mass, x), x).item() == pytest.approx(1.0, abs=1e-3)


def test_sampling() -> None:
    count = 200_000
    dist = one_dimensional([-1.0, 0.2, 1.5], [0.05, 0.1, 0.02], [0.5, 0.2, 0.3])
    raw = torch.log(torch.expm1(dist.std - 1e-4))
    wide = GMM(dist.loc.expand(count, 3, 1), raw.expand(count, 3, 1), dist.log_weights.expand(count, 3))
    x = torch.atanh(wide.sample(generator()))
    for loc, std, weight in ((-1.0, 0.05, 0.5), (0.2, 0.1, 0.2), (1.5, 0.02, 0.3)):
        near = x[(x - loc).abs() < 0.5]
        share = near.numel() / count
        assert share == pytest.approx(weight, abs=5 * math.sqrt(0.25 / count))
        assert near.mean().item() == pytest.approx(loc, abs=5 * std / math.sqrt(near.numel()))
        assert near.std().item() == pytest.approx(std, rel=0.02)


def test_mode_is_the_likeliest_component_and_mean_may_lie_between() -> None:
    dist = one_dimensional([-1.0, 1.0], [0.1, 0.1], [0.49, 0.51])
    assert dist.mode.item() == pytest.approx(math.tanh(1.0))
    assert dist.mean.item() == pytest.approx(math.tanh(0.02))


@pytest.mark.parametrize("loc", [0.0, 0.7, -3.0, 50.0])
@pytest.mark.parametrize("std", [1e-4, 0.3, 1.0, 5.0, 50.0])
def test_mean_log_slope(loc: float, std: float) -> None:
    eps = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    weights = (-0.5 * eps.square()).softmax(0)
    expected = (weights * 2 * (math.log(2.0) - torch.logaddexp(loc + std * eps, -loc - std * eps))).sum().item()
    value = mean_log_tanh_slope(f64(loc), f64(std)).item()
    assert value == pytest.approx(expected, abs=0.02, rel=1e-4)


@pytest.mark.parametrize(
    ("loc", "std", "weights"),
    [
        ([0.4], [0.3], [1.0]),
        ([0.4, 0.4, 0.4], [0.3, 0.3, 0.3], [0.5, 0.2, 0.3]),
        ([-2.0, 0.0, 2.0], [0.1, 0.05, 0.2], [0.5, 0.2, 0.3]),
    ],
)
def test_entropy_is_exact_where_it_says_so(loc: list[float], std: list[float], weights: list[float]) -> None:
    dist = one_dimensional(loc, std, weights)
    assert dist.entropy().item() == pytest.approx(integral_of(dist)[1], abs=2e-3)


@pytest.mark.parametrize("gap", [0.1, 0.3, 0.6, 1.0, 1.5])
def test_entropy_is_a_lower_bound(gap: float) -> None:
    dist = one_dimensional([-gap, 0.0, gap], [0.3, 0.5, 0.2], [0.3, 0.3, 0.4])
    exact = integral_of(dist)[1]
    assert exact - math.log(3.0) < dist.entropy().item() < exact + 1e-3
    assert exact - dist.entropy().item() < 0.25


def test_no_rsample() -> None:
    assert not GMMConfig().differentiable
    with pytest.raises(NotImplementedError, match="GMM is not differentiable"):
        by_hand().rsample()


def test_refuses() -> None:
    with pytest.raises(ValueError, match="num_modes=0"):
        GMMConfig(num_modes=0)
    for size in (5, 14, 16):
        with pytest.raises(ValueError, match=r"2 \* 5 \* A \+ 5"):
            GMMConfig().build(torch.zeros(size))
