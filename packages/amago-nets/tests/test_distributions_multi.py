"""Multi-discrete, multi-binary, and discrete actions as one-hot vectors."""

from __future__ import annotations

import math

import pytest
import torch

from amago_nets.distributions import (
    Discrete,
    DiscreteConfig,
    MultiBinary,
    MultiBinaryConfig,
    MultiDiscrete,
    MultiDiscreteConfig,
    StraightThrough,
)
from amago_nets.specs import ActionSpec

NVEC = (3, 2, 2, 4, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def choices(dist: MultiDiscrete, logits: torch.Tensor) -> list[Discrete]:
    return [Discrete(part) for part in logits.split(list(dist.nvec), dim=-1)]


def test_multi_discrete_is_independent_discretes() -> None:
    logits = 4 * torch.randn(2, 5, 12, generator=generator())
    dist = MultiDiscreteConfig(nvec=NVEC).build(logits)
    parts = choices(dist, logits)
    action = torch.stack([torch.randint(0, n, (6, 2, 5), generator=generator(1)) for n in NVEC], -1)
    expected = sum(part.log_prob(action[..., i]) for i, part in enumerate(parts))
    torch.testing.assert_close(dist.log_prob(action), expected)
    assert dist.log_prob(action[0]).shape == (2, 5)
    assert torch.equal(dist.mode, torch.stack([part.mode for part in parts], -1))
    torch.testing.assert_close(dist.mean, torch.cat([part.probs for part in parts], -1))
    assert torch.equal(dist.probs, dist.mean)
    torch.testing.assert_close(dist.entropy(), sum(part.entropy() for part in parts))


def test_multi_discrete_probabilities_sum_to_one() -> None:
    dist = MultiDiscreteConfig(nvec=(3, 2, 2)).build(torch.randn(7, generator=generator(), dtype=torch.float64))
    every = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2))
    log_prob = dist.log_prob(every)
    assert log_prob.exp().sum().item() == pytest.approx(1.0)
    assert -(log_prob.exp() * log_prob).sum().item() == pytest.approx(dist.entropy().item())


def test_multi_discrete_clips_by_hand() -> None:
    dist = MultiDiscreteConfig(nvec=(4, 2)).build(torch.tensor([10.0, 0, 0, 0, 50, 0]))
    expected = torch.tensor([0.99697885, 0.00100705, 0.00100705, 0.00100705, 0.99899095, 0.00100908])
    torch.testing.assert_close(dist.probs, expected, rtol=1e-5, atol=0)
    assert dist.log_prob(torch.tensor([0, 0])).item() == pytest.approx(-0.00302572 + math.log(0.99899095), rel=1e-4)


def test_multi_discrete_sampling() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.0, 0.0, 0.0, 3.0, 2.0, 1.0, 0.0, 5.0])
    dist = MultiDiscreteConfig(nvec=NVEC).build(logits.expand(50_000, 12))
    action = dist.sample(generator())
    assert action.dtype == torch.int64 and action.shape == (50_000, 5)
    assert (action >= 0).all() and (action < torch.tensor(NVEC)).all()
    torch.testing.assert_close(dist.encode(action).mean(0), dist.probs[0], rtol=0, atol=0.01)
    # Independent: what one choice is says nothing of the next, of the same size or not.
    for i, j in ((0, 1), (1, 2), (2, 3)):
        joint = ((action[:, i] == 0) & (action[:, j] == 0)).float().mean()
        product = (action[:, i] == 0).float().mean() * (action[:, j] == 0).float().mean()
        assert joint.item() == pytest.approx(product.item(), abs=0.01)


def test_multi_discrete_rsample() -> None:
    logits = torch.randn(12, generator=generator(), requires_grad=True)
    dist = MultiDiscreteConfig(nvec=NVEC).build(logits.expand(40_000, 12))
    y = dist.rsample(generator(1))
    assert y.shape == (40_000, 12)
    assert set(y.unique().tolist()) == {0.0, 1.0}
    for part in y.split(list(NVEC), dim=-1):
        assert part.sum(-1).eq(1).all()
    torch.testing.assert_close(y.mean(0), dist.probs[0], rtol=0, atol=0.01)
    (grad,) = torch.autograd.grad(y[:, 0].mean(), logits)
    # One choice has no influence on the others.
    assert grad[0] > 0 and grad[1:3].lt(0).all() and grad[3:].eq(0).all()


def test_multi_discrete_codes() -> None:
    dist = MultiDiscreteConfig(nvec=NVEC).build(torch.zeros(2, 12))
    action = torch.stack([torch.randint(0, n, (4, 2), generator=generator()) for n in NVEC], -1)
    encoded = dist.encode(action)
    assert torch.equal(encoded, ActionSpec("multi_discrete", 12, nvec=NVEC).encode(action))
    assert torch.equal(dist.decode(encoded), action)
    nothing = torch.full((2, 5), -1)
    assert dist.encode(nothing).eq(0).all()
    assert dist.log_prob(nothing).isfinite().all()


def test_multi_discrete_refuses() -> None:
    for nvec in ((), (3, 0), [3, 2], (True,), (2.0,), 3):
        with pytest.raises(ValueError, match="nvec="):
            MultiDiscreteConfig(nvec=nvec)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"action_size=6 .* give 5"):
        MultiDiscreteConfig(nvec=(3, 2)).param_size(6)
    with pytest.raises(ValueError, match=r"give \[\.\.\., 5\]"):
        MultiDiscreteConfig(nvec=(3, 2)).build(torch.zeros(4))
    with pytest.raises(ValueError, match="clip_prob_high=1.5"):
        MultiDiscreteConfig(nvec=(3, 2), clip_prob_high=1.5)
    with pytest.raises(ValueError, match="floor='soft'"):
        MultiDiscreteConfig(nvec=(3, 2), floor="soft")  # type: ignore[arg-type]
    assert MultiDiscreteConfig(nvec=(3, 2)).param_size(5) == 5


def test_mixture_floor() -> None:
    logits = torch.tensor([10.0, 0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    dist = DiscreteConfig(floor="mixture", clip_prob_low=0.01).build(logits)
    torch.testing.assert_close(dist.probs, 0.96 * logits.softmax(-1) + 0.01)
    assert dist.probs.sum().item() == pytest.approx(1.0)
    dist.log_prob(torch.tensor(1)).backward()
    assert logits.grad is not None and logits.grad.ne(0).all()
    with pytest.raises(ValueError, match=r"clip_prob_low=0.25 .* give less than 0.25"):
        DiscreteConfig(floor="mixture", clip_prob_low=0.25).build(logits)
    parts = MultiDiscreteConfig(nvec=(2, 3), floor="mixture").build(torch.zeros(5))
    torch.testing.assert_close(parts.probs, torch.tensor([0.5, 0.5, 1 / 3, 1 / 3, 1 / 3]))


def test_multi_binary_by_hand() -> None:
    logits = torch.tensor([0.0, 2.0, -2.0], dtype=torch.float64)
    per_bit = [-0.6931472, -0.1269280, -0.1269281]
    action = torch.tensor([1, 1, 0])
    mean, total = MultiBinaryConfig().build(logits), MultiBinaryConfig(reduction="sum").build(logits)
    torch.testing.assert_close(mean.probs, torch.tensor([0.5, 0.8807970, 0.1192029]).double(), rtol=1e-6, atol=0)
    assert mean.log_prob(action).item() == pytest.approx(sum(per_bit) / 3, rel=1e-6)
    assert total.log_prob(action).item() == pytest.approx(sum(per_bit), rel=1e-6)
    for i in range(3):
        bit = MultiBinary(logits[i : i + 1]).log_prob(action[i : i + 1])
        assert bit.item() == pytest.approx(per_bit[i], rel=1e-5)
    assert mean.mode.tolist() == [0.0, 1.0, 0.0]


def test_multi_binary_sums_to_one_and_entropy_is_exact() -> None:
    logits = torch.randn(4, generator=generator(), dtype=torch.float64) * 2
    dist = MultiBinaryConfig(reduction="sum").build(logits)
    every = torch.cartesian_prod(*[torch.tensor([0, 1])] * 4)
    log_prob = dist.log_prob(every)
    assert log_prob.exp().sum().item() == pytest.approx(1.0)
    entropy = -(log_prob.exp() * log_prob).sum().item()
    assert dist.entropy().item() == pytest.approx(entropy)
    assert MultiBinary(logits).entropy().item() == pytest.approx(entropy)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool, torch.float32])
def test_multi_binary_log_prob_takes_any_dtype_and_broadcasts(dtype: torch.dtype) -> None:
    dist = MultiBinaryConfig().build(torch.randn(2, 7, 3, generator=generator()))
    action = torch.randint(0, 2, (2, 1, 3), generator=generator(1)).to(dtype)
    log_prob = dist.log_prob(action)
    assert log_prob.shape == (2, 7)
    p = dist.probs[1, 4]
    expected = torch.where(action[1, 0] > 0, p, 1 - p).log().mean()
    torch.testing.assert_close(log_prob[1, 4], expected)


def test_multi_binary_sampling() -> None:
    dist = MultiBinaryConfig().build(torch.tensor([0.0, 2.0, -2.0, 50.0, -50.0]).expand(50_000, 5))
    bits = dist.sample(generator())
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(bits.mean(0), dist.probs[0], rtol=0, atol=0.01)
    assert torch.equal(dist.mean, dist.probs)


def test_multi_binary_refuses() -> None:
    assert not MultiBinaryConfig().differentiable
    with pytest.raises(NotImplementedError, match="MultiBinary is not differentiable"):
        MultiBinary(torch.zeros(2)).rsample()
    with pytest.raises(ValueError, match="reduction='max'"):
        MultiBinaryConfig(reduction="max")  # type: ignore[arg-type]


def test_straight_through_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    dist = StraightThrough(DiscreteConfig().build(logits))
    noise = torch.tensor([0.2, 0.5], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: (-(-noise).exp()).exp())
    y = dist.rsample()
    assert y.tolist() == [1.0, 0.0]
    soft = torch.tensor([0.8021839, 0.1978161], dtype=torch.float64)
    # d soft_0 / d logit_0 of softmax(logits / 0.5).
    (grad,) = torch.autograd.grad(y[0], logits)
    slope = soft[0] * soft[1] / 0.5
    torch.testing.assert_close(grad, torch.stack([slope, -slope]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("nvec", [None, (2, 3), (2, 2, 1)])
def test_straight_through_agrees_with_its_base(nvec: tuple[int, ...] | None) -> None:
    logits = torch.randn(3, 4, 5, generator=generator())
    base = DiscreteConfig().build(logits) if nvec is None else MultiDiscreteConfig(nvec=nvec).build(logits)
    dist = StraightThrough(base)
    sample = dist.sample(generator(1))
    assert sample.shape == (3, 4, 5) and not sample.requires_grad
    assert torch.equal(sample, dist.rsample(generator(1)))
    assert torch.equal(base.encode(base.decode(sample)), sample)
    assert torch.equal(dist.log_prob(sample), base.log_prob(base.decode(sample)))
    assert torch.equal(dist.mode, base.encode(base.mode))
    assert torch.equal(dist.mean, base.mean)
    assert torch.equal(dist.entropy(), base.entropy())


def test_straight_through_scores_softened_actions_as_their_index() -> None:
    base = DiscreteConfig().build(torch.randn(4, generator=generator()))
    stored = torch.tensor([0.00100705, 0.99697885, 0.00100705, 0.00100705])
    assert StraightThrough(base).log_prob(stored) == base.log_prob(torch.tensor(1))
    assert StraightThrough(base).log_prob(torch.zeros(4)) == base.log_prob(torch.tensor(-1))
