from __future__ import annotations

from typing import Any

import pytest
import torch

from amago_nets.distributions import Discrete, DiscreteConfig, TanhGaussian, TanhGaussianConfig, straight_through
from amago_nets.registry import lookup
from amago_nets.specs import ActionSpec


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_discrete_values_by_hand() -> None:
    dist = DiscreteConfig().build(f64(10, 0, 0, 0))
    torch.testing.assert_close(dist.probs, f64(0.99697885, 0.00100705, 0.00100705, 0.00100705), rtol=1e-5, atol=0)
    assert dist.log_prob(torch.tensor(0)).item() == pytest.approx(-0.00302572, rel=1e-5)
    assert dist.entropy().item() == pytest.approx(0.02386471, rel=1e-5)
    two = DiscreteConfig().build(f64(50, 0))
    torch.testing.assert_close(two.probs, f64(0.99899095, 0.00100908), rtol=1e-5, atol=0)


def test_discrete_without_clipping_is_a_softmax() -> None:
    logits = torch.randn(3, 4, generator=generator(), dtype=torch.float64)
    dist = DiscreteConfig(clip_prob_low=0.0, clip_prob_high=1.0).build(logits)
    torch.testing.assert_close(dist.probs, logits.softmax(-1))
    action = torch.tensor([0, 3, 1])
    torch.testing.assert_close(dist.log_prob(action), logits.log_softmax(-1)[torch.arange(3), action])
    assert torch.equal(dist.mean, dist.probs)


@pytest.mark.parametrize("action", [0, 1])
def test_clipped_entries_pass_no_gradient(action: int) -> None:
    logits = torch.tensor([10.0, 0.0, 0.0, 0.0], requires_grad=True)
    DiscreteConfig().build(logits).log_prob(torch.tensor(action)).backward()
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


def test_entries_inside_the_clips_pass_gradient() -> None:
    logits = torch.tensor([1.0, 0.0, -20.0], requires_grad=True)
    dist = DiscreteConfig().build(logits)
    dist.log_prob(torch.tensor(0)).backward()
    assert logits.grad is not None
    assert logits.grad[0] > 0 > logits.grad[1]


def test_discrete_sampling_frequencies() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -9.0], [0.0, 0.0, 0.0, 0.0]])
    dist = DiscreteConfig().build(logits.expand(50_000, 2, 4))
    action = dist.sample(generator())
    assert action.dtype == torch.int64
    assert action.shape == (50_000, 2)
    frequency = torch.nn.functional.one_hot(action, 4).float().mean(0)
    torch.testing.assert_close(frequency, dist.probs[0], rtol=0, atol=0.01)


def test_sampling_never_picks_the_impossible() -> None:
    config = DiscreteConfig(clip_prob_low=0.0, clip_prob_high=1.0)
    inf = float("inf")
    dist = config.build(torch.tensor([-inf, 1.0, -inf, 0.0, -inf]).expand(20_000, 5))
    assert set(dist.sample(generator()).tolist()) == {1, 3}
    assert dist.entropy().isfinite().all()
    assert dist.log_prob(torch.tensor(0)).isfinite().all()


@pytest.mark.parametrize("num_actions", [1, 3, 100])
def test_largest_random_number_stays_in_range(num_actions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dist = DiscreteConfig().build(torch.randn(1000, num_actions, generator=generator()))
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 1 - 2**-24))
    assert dist.sample().eq(num_actions - 1).all()
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    assert dist.sample().eq(0).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
def test_no_action_does_not_crash(dtype: torch.dtype) -> None:
    dist = DiscreteConfig().build(torch.randn(4, 3, generator=generator()))
    log_prob = dist.log_prob(torch.tensor([-1, 0, 2, -1], dtype=dtype))
    assert log_prob.shape == (4,)
    assert log_prob.isfinite().all()
    assert log_prob[1] == dist.probs[1, 0].log()


def test_log_prob_broadcasts() -> None:
    dist = DiscreteConfig().build(torch.randn(2, 5, 7, 3, generator=generator()))
    action = torch.randint(0, 3, (2, 5), generator=generator())
    log_prob = dist.log_prob(action.unsqueeze(-1))
    assert log_prob.shape == (2, 5, 7)
    assert log_prob[1, 2, 3] == dist.probs[1, 2, 3, action[1, 2]].log()
    assert dist.log_prob(torch.zeros(4, 2, 5, 7, dtype=torch.int64)).shape == (4, 2, 5, 7)


def test_discrete_mode_ignores_the_clips() -> None:
    dist = DiscreteConfig(clip_prob_high=0.2).build(torch.tensor([1.0, 3.0, 2.0]))
    assert dist.probs[1] == dist.probs[2]
    assert dist.mode == 1


def test_straight_through_by_hand() -> None:
    logits = f64(1.0, 0.0).requires_grad_()
    scores = logits.log_softmax(-1) + f64(0.2, 0.5)
    y = straight_through(scores, 0.5)
    assert y.tolist() == [1.0, 0.0]
    soft = (scores / 0.5).softmax(-1)
    torch.testing.assert_close(soft.detach(), f64(0.8021839, 0.1978161), rtol=1e-6, atol=1e-7)
    weights = f64(3.0, -1.0)
    (hard_grad,) = torch.autograd.grad((y * weights).sum(), logits, retain_graph=True)
    (soft_grad,) = torch.autograd.grad((soft * weights).sum(), logits)
    torch.testing.assert_close(hard_grad, soft_grad)


def test_discrete_rsample() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0], requires_grad=True)
    dist = DiscreteConfig().build(logits.expand(50_000, 3))
    y = dist.rsample(generator())
    assert y.shape == (50_000, 3)
    assert torch.equal(y.max(-1).values, torch.ones(50_000))
    assert torch.equal(y.sum(-1), torch.ones(50_000))
    torch.testing.assert_close(y.mean(0), dist.probs[0], rtol=0, atol=0.01)
    (grad,) = torch.autograd.grad(y[:, 0].mean(), logits)
    assert grad[0] > 0


@pytest.mark.parametrize(("raw", "std"), [(-1.0, 0.01552071), (0.0, 0.22313016), (1.0, 3.20778227)])
def test_tanh_gaussian_std(raw: float, std: float) -> None:
    assert TanhGaussian(f64(0.0), f64(raw)).std.item() == pytest.approx(std, rel=1e-5)


def test_tanh_gaussian_std_limits() -> None:
    std = TanhGaussian(f64(0.0, 0.0), f64(-100.0, 100.0)).std
    torch.testing.assert_close(std, f64(0.006737947, 7.3890561))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("action", "expected"),
    [(0.0, -1.9296306), (0.5, 0.8443286), (-0.5, -10.1887798), (0.99, -41.78015), (0.999, -41.78015), (1.0, -41.78015)],
)
def test_tanh_gaussian_log_prob(action: float, expected: float, dtype: torch.dtype) -> None:
    dist = TanhGaussianConfig().build(torch.tensor([0.5, 0.0], dtype=dtype))
    assert dist.log_prob(torch.tensor([action], dtype=dtype)).item() == pytest.approx(expected, rel=1e-5)


def test_tanh_gaussian_log_prob_sums_dimensions_and_broadcasts() -> None:
    params = torch.randn(2, 5, 7, 6, generator=generator())
    dist = TanhGaussianConfig().build(params)
    action = torch.rand(4, 2, 5, 7, 3, generator=generator()) * 2 - 1
    log_prob = dist.log_prob(action)
    assert log_prob.shape == (4, 2, 5, 7)
    single = [TanhGaussian(params[..., [i]], params[..., [i + 3]]).log_prob(action[..., [i]]) for i in range(3)]
    torch.testing.assert_close(log_prob, sum(single))


def test_tanh_gaussian_density_integrates_to_one() -> None:
    dist = TanhGaussianConfig().build(f64(0.3, -0.2))
    a = torch.linspace(-0.98999, 0.98999, 20_001, dtype=torch.float64).unsqueeze(-1)
    total = torch.trapezoid(dist.log_prob(a).exp(), a.squeeze(-1))
    assert total.item() == pytest.approx(1.0, abs=1e-4)


def test_tanh_gaussian_rsample() -> None:
    params = torch.randn(3, 4, generator=generator(), dtype=torch.float64).requires_grad_()
    dist = TanhGaussianConfig().build(params)
    eps = torch.randn(3, 2, generator=generator(7), dtype=torch.float64)
    y = dist.rsample(generator(7))
    torch.testing.assert_close(y, torch.tanh(dist.loc + dist.std * eps))
    (grad,) = torch.autograd.grad(y.sum(), params)
    slope = 1 - y.square()
    torch.testing.assert_close(grad[:, :2], slope)
    raw = params[:, 2:].detach()
    torch.testing.assert_close(grad[:, 2:], slope * dist.std * eps * 3.5 * (1 - raw.tanh().square()))
    assert not dist.sample(generator()).requires_grad
    assert torch.equal(dist.mode, params[:, :2].tanh())


@pytest.mark.parametrize("raw", [-1.0, 0.0, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("loc", [0.0, 0.7, -3.0])
def test_tanh_gaussian_mean_and_entropy_by_fine_integration(loc: float, raw: float) -> None:
    dist = TanhGaussian(f64(loc), f64(raw))
    eps = torch.linspace(-10, 10, 400_001, dtype=torch.float64)
    weights = (-0.5 * eps.square()).exp()
    weights /= weights.sum()
    x = loc + dist.std * eps
    log_density = -0.5 * eps.square() - dist.std.log() - 0.9189385332 + 2 * x.cosh().log()
    assert dist.mean.item() == pytest.approx((weights * x.tanh()).sum().item(), abs=1e-4)
    assert dist.entropy().item() == pytest.approx(-(weights * log_density).sum().item(), abs=1e-3)


CONFIGS = [(DiscreteConfig(), 3), (TanhGaussianConfig(), 6)]


@pytest.mark.parametrize(("config", "size"), CONFIGS)
@pytest.mark.parametrize("method", ["sample", "rsample"])
def test_generators_make_samples_reproducible(config: Any, size: int, method: str) -> None:
    dist = config.build(torch.randn(64, 7, size, generator=generator(1)))
    draw = getattr(dist, method)
    state = torch.random.get_rng_state()
    first, again, other = draw(generator(5)), draw(generator(5)), draw(generator(6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(draw(), first)


@pytest.mark.parametrize(("config", "size"), CONFIGS)
def test_half_precision_parameters(config: Any, size: int) -> None:
    dist = config.build(torch.randn(2, size, generator=generator()).bfloat16())
    sample = dist.sample(generator())
    assert dist.log_prob(sample).dtype == torch.float32
    assert dist.entropy().isfinite().all()


@pytest.mark.parametrize(
    ("config", "kind", "size"), [(CONFIGS[0][0], "discrete", 5), (CONFIGS[1][0], "continuous", 10)]
)
def test_config_facts(config: Any, kind: str, size: int) -> None:
    assert config.param_size(5) == size
    assert config.differentiable
    assert ActionSpec(config.action_kind, 5).kind == kind


def test_config_refuses() -> None:
    with pytest.raises(ValueError, match="clip_prob_low=-0.1"):
        DiscreteConfig(clip_prob_low=-0.1)
    with pytest.raises(ValueError, match="clip_prob_high=1.5"):
        DiscreteConfig(clip_prob_high=1.5)
    with pytest.raises(ValueError, match="clip_prob_low=0.5.*less than clip_prob_high=0.5"):
        DiscreteConfig(clip_prob_low=0.5, clip_prob_high=0.5)
    with pytest.raises(ValueError, match="log_std_low=3.0"):
        TanhGaussianConfig(log_std_low=3.0)
    with pytest.raises(ValueError, match="log_std_high=inf"):
        TanhGaussianConfig(log_std_high=float("inf"))
    with pytest.raises(ValueError, match="last axis must be even"):
        TanhGaussianConfig().build(torch.zeros(3))


def test_registered() -> None:
    assert lookup("distribution", "discrete") is DiscreteConfig
    assert lookup("distribution", "tanh_gaussian") is TanhGaussianConfig
    assert isinstance(DiscreteConfig().build(torch.zeros(2)), Discrete)
