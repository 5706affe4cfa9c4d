from __future__ import annotations

import math

import pytest
import torch

from amago_nets.distributions import Beta, BetaConfig


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def raw_for(concentration: float) -> float:
    """Inverse of `softplus + 1.0001`."""
    return math.log(math.expm1(concentration - 1.0001))


def density(a: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    log_norm = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    y = (a + 1) / 2
    return ((alpha - 1) * y.log() + (beta - 1) * (1 - y).log() - log_norm).exp() / 2


@pytest.mark.parametrize(
    ("raw", "alpha", "beta", "mean", "log_probs"),
    [
        ((0.0, 0.0), 1.6932472, 1.6932472, 0.0, {0.0: -0.3818820, 0.5: -0.5813168, 1.0: -3.0973566}),
        (
            (2.0, 0.0),
            3.1270280,
            1.6932472,
            0.2974479,
            {0.0: -0.4533266, 0.5: -0.0714134, 0.99: -2.1821671, 1.0: -2.1821671},
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_by_hand(
    raw: tuple[float, float], alpha: float, beta: float, mean: float, log_probs: dict[float, float], dtype: torch.dtype
) -> None:
    dist = BetaConfig().build(torch.tensor(raw, dtype=dtype))
    assert dist.alpha.item() == pytest.approx(alpha, rel=1e-6)
    assert dist.beta.item() == pytest.approx(beta, rel=1e-6)
    assert dist.mean.item() == pytest.approx(mean, rel=1e-6, abs=1e-7)
    assert torch.equal(dist.mode, dist.mean)
    for action, expected in log_probs.items():
        assert dist.log_prob(torch.tensor([action], dtype=dtype)).item() == pytest.approx(expected, rel=1e-5)


def test_parameters_are_alphas_then_betas() -> None:
    params = torch.randn(3, 4, generator=generator())
    dist = BetaConfig().build(params)
    torch.testing.assert_close(dist.alpha, torch.nn.functional.softplus(params[:, :2]) + 1.0001)
    torch.testing.assert_close(dist.beta, torch.nn.functional.softplus(params[:, 2:]) + 1.0001)


def test_matches_torch() -> None:
    params = torch.randn(50, 6, generator=generator(), dtype=torch.float64) * 3
    dist = BetaConfig().build(params)
    action = torch.rand(4, 50, 3, generator=generator(1), dtype=torch.float64) * 1.98 - 0.99
    theirs = torch.distributions.Beta(dist.alpha, dist.beta)
    torch.testing.assert_close(dist.log_prob(action), (theirs.log_prob((action + 1) / 2) - math.log(2.0)).sum(-1))
    torch.testing.assert_close(dist.entropy(), (theirs.entropy() + math.log(2.0)).sum(-1))
    torch.testing.assert_close(dist.mean, 2 * theirs.mean - 1)


@pytest.mark.parametrize(("alpha", "beta"), [(5.0, 5.0), (8.0, 4.0), (40.0, 60.0)])
def test_density_integrates_to_one(alpha: float, beta: float) -> None:
    dist = Beta(f64(raw_for(alpha)), f64(raw_for(beta)))
    a = torch.linspace(-0.99, 0.99, 20_001, dtype=torch.float64)
    log_prob = dist.log_prob(a.unsqueeze(-1))
    assert torch.trapezoid(log_prob.exp(), a).item() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(log_prob.exp(), density(a, alpha, beta), rtol=1e-9, atol=0)
    entropy = -torch.trapezoid(log_prob.exp() * log_prob, a).item()
    assert dist.entropy().item() == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0002, 1.0002), (1.7, 3.1), (50.0, 1.1), (30.0, 40.0)])
def test_sample_moments(alpha: float, beta: float) -> None:
    count = 200_000
    dist = Beta(torch.full((count,), raw_for(alpha)), torch.full((count,), raw_for(beta)))
    sample = dist.sample(generator())
    assert sample.abs().max() <= 1
    mean = 2 * alpha / (alpha + beta) - 1
    variance = 4 * alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1))
    assert sample.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / count))
    assert sample.var().item() == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize(("raw_alpha", "raw_beta"), [(0.0, 0.0), (2.0, -1.0), (-4.0, 3.0)])
def test_rsample_gradients_are_those_of_expectations(raw_alpha: float, raw_beta: float) -> None:
    def expectation(raw: torch.Tensor) -> torch.Tensor:
        alpha, beta = (torch.nn.functional.softplus(raw) + 1.0001).unbind()
        a = torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1]
        log_norm = alpha.lgamma() + beta.lgamma() - (alpha + beta).lgamma()
        y = (a + 1) / 2
        p = ((alpha - 1) * y.log() + (beta - 1) * (1 - y).log() - log_norm).exp() / 2
        return torch.trapezoid(p * (2 * a).exp(), a)

    raw = f64(raw_alpha, raw_beta).requires_grad_()
    (expected,) = torch.autograd.grad(expectation(raw), raw)
    count = 400_000
    dist = Beta(raw[0].expand(count), raw[1].expand(count))
    values = (2 * dist.rsample(generator())).exp()
    (grad,) = torch.autograd.grad(values.mean(), raw)
    torch.testing.assert_close(grad, expected, rtol=0.02, atol=2e-3)


def test_rsample_uses_the_generator_and_sample_has_no_gradient() -> None:
    params = torch.zeros(64, 4, requires_grad=True)
    dist = BetaConfig().build(params)
    state = torch.random.get_rng_state()
    first, again = dist.rsample(generator(3)), dist.rsample(generator(3))
    assert torch.equal(first, again)
    assert torch.equal(first, dist.sample(generator(3)))
    assert not torch.equal(first, dist.rsample(generator(4)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.requires_grad and not dist.sample().requires_grad


def test_refuses() -> None:
    with pytest.raises(ValueError, match="last axis must be even"):
        BetaConfig().build(torch.zeros(3))
