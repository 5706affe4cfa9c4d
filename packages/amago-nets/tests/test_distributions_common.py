"""What every distribution must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amago_nets.distributions import (
    BetaConfig,
    DiscreteConfig,
    DistributionConfig,
    GMMConfig,
    MultiBinaryConfig,
    MultiDiscreteConfig,
    StraightThrough,
    TanhGaussianConfig,
)
from amago_nets.registry import lookup, names
from amago_nets.specs import ActionSpec

SIZE = 5
CONFIGS: dict[str, Any] = {
    "discrete": DiscreteConfig(),
    "multi_discrete": MultiDiscreteConfig(nvec=(3, 2)),
    "multi_binary": MultiBinaryConfig(),
    "tanh_gaussian": TanhGaussianConfig(),
    "beta": BetaConfig(),
    "gmm": GMMConfig(),
}
EVERY = pytest.mark.parametrize("name", sorted(CONFIGS))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def params_for(config: DistributionConfig, *lead: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(*lead, config.param_size(SIZE), generator=generator(seed))


def some_action(config: DistributionConfig, *lead: int) -> torch.Tensor:
    if config.action_kind == "discrete":
        return torch.randint(0, SIZE, lead, generator=generator(9))
    if config.action_kind == "multi_discrete":
        return torch.randint(0, 2, (*lead, 2), generator=generator(9))
    if config.action_kind == "multi_binary":
        return torch.randint(0, 2, (*lead, SIZE), generator=generator(9))
    return torch.rand(*lead, SIZE, generator=generator(9)) * 2 - 1


@EVERY
def test_actions_of_another_size_are_refused(name: str) -> None:
    config = CONFIGS[name]
    if config.action_kind == "discrete":
        return
    dist = config.build(params_for(config, 4))
    action = some_action(config, 4)
    # One entry would broadcast to all.
    for wrong in (action[..., :1], torch.cat([action, action], dim=-1), action.new_zeros(())):
        with pytest.raises(ValueError, match=rf"action\.shape=.* give \[\.\.\., {action.shape[-1]}\]"):
            dist.log_prob(wrong)


@pytest.mark.parametrize("name", ["discrete", "multi_discrete"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint64])
def test_indices_of_any_integer_dtype(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    dist = config.build(params_for(config, 4))
    action = some_action(config, 4)
    assert torch.equal(dist.log_prob(action.to(dtype)), dist.log_prob(action))
    assert torch.equal(dist.encode(action.to(dtype)), dist.encode(action))


def test_straight_through_is_for_indices() -> None:
    with pytest.raises(ValueError, match="give a distribution over indices"):
        StraightThrough(TanhGaussianConfig().build(torch.zeros(4)))  # type: ignore[arg-type]


def test_all_are_registered() -> None:
    assert set(names("distribution")) == set(CONFIGS)
    for name, config in CONFIGS.items():
        assert lookup("distribution", name) is type(config)
        nvec = (3, 2) if config.action_kind == "multi_discrete" else None
        assert ActionSpec(config.action_kind, SIZE, nvec=nvec).kind == config.action_kind


@pytest.mark.parametrize(
    ("name", "size"),
    [("discrete", 5), ("multi_discrete", 5), ("multi_binary", 5), ("tanh_gaussian", 10), ("beta", 10), ("gmm", 55)],
)
def test_param_size(name: str, size: int) -> None:
    assert CONFIGS[name].param_size(SIZE) == size


@EVERY
def test_shapes_over_leading_axes(name: str) -> None:
    config = CONFIGS[name]
    for lead in ((), (3,), (2, 3, 4)):
        dist = config.build(params_for(config, *lead))
        action = some_action(config, *lead)
        assert dist.sample(generator()).shape == action.shape
        assert dist.mode.shape == action.shape
        assert dist.mean.shape == (*lead, SIZE)
        assert dist.log_prob(action).shape == lead
        assert dist.log_prob(action.expand(7, *action.shape)).shape == (7, *lead)
        assert dist.entropy().shape == lead
        if config.differentiable:
            assert dist.rsample(generator()).shape == (*lead, SIZE)


@EVERY
def test_rows_do_not_influence_each_other(name: str) -> None:
    config = CONFIGS[name]
    params, action = params_for(config, 4, 3), some_action(config, 4, 3)
    together = config.build(params)
    alone = config.build(params[2, 1])
    torch.testing.assert_close(together.log_prob(action)[2, 1], alone.log_prob(action[2, 1]))
    torch.testing.assert_close(together.entropy()[2, 1], alone.entropy())
    torch.testing.assert_close(together.mean[2, 1], alone.mean)
    assert torch.equal(together.mode[2, 1], alone.mode)


@EVERY
def test_generators(name: str) -> None:
    config = CONFIGS[name]
    dist = config.build(params_for(config, 64, 7))
    draws = [dist.sample] + ([dist.rsample] if config.differentiable else [])
    for draw in draws:
        state = torch.random.get_rng_state()
        first, again, other = draw(generator(5)), draw(generator(5)), draw(generator(6))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(state, torch.random.get_rng_state())
        torch.manual_seed(5)
        assert torch.equal(draw(), first)


@EVERY
def test_samples_can_be_scored(name: str) -> None:
    config = CONFIGS[name]
    params = params_for(config, 100).requires_grad_()
    dist = config.build(params)
    sample = dist.sample(generator())
    assert not sample.requires_grad
    dist.log_prob(sample).sum().backward()
    assert params.grad is not None and params.grad.isfinite().all()


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    params = params_for(config, 20).to(dtype)
    dist, wide = config.build(params), config.build(params.float())
    action = some_action(config, 20)
    for half, full in (
        (dist.log_prob(action), wide.log_prob(action)),
        (dist.entropy(), wide.entropy()),
        (dist.mean, wide.mean),
    ):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full)


EXTREMES = (-50.0, 0.0, 50.0)


@EVERY
@pytest.mark.parametrize("edge", [-1.0, -0.99, 0.0, 0.99, 1.0])
def test_extreme_parameters_and_actions_stay_finite(name: str, edge: float) -> None:
    config = CONFIGS[name]
    size = config.param_size(SIZE)
    pick = torch.randint(0, 3, (200, size), generator=generator())
    rows = torch.cat([torch.tensor(EXTREMES)[pick], *(torch.full((1, size), value) for value in EXTREMES)])
    params = rows.requires_grad_()
    dist = config.build(params)
    if config.action_kind == "continuous":
        action = torch.full((len(rows), SIZE), edge)
    else:
        action = some_action(config, len(rows))
    outputs = {"log_prob": dist.log_prob(action), "entropy": dist.entropy(), "mean": dist.mean}
    if config.differentiable:
        outputs["rsample"] = dist.rsample(generator(1))
    for what, output in outputs.items():
        assert output.isfinite().all(), what
        (grad,) = torch.autograd.grad(output.sum(), params, retain_graph=True)
        assert grad.isfinite().all(), what
    sample = dist.sample(generator(2))
    assert sample.isfinite().all() and dist.mode.isfinite().all()
    assert dist.log_prob(sample).isfinite().all()
    if config.action_kind == "continuous":
        assert sample.abs().max() <= 1
        leaf = action.clone().requires_grad_()
        (grad,) = torch.autograd.grad(dist.log_prob(leaf).sum(), leaf)
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["beta", "gmm", "tanh_gaussian", "multi_binary"])
def test_log_prob_gradients(name: str) -> None:
    config = CONFIGS[name]
    params = params_for(config, 2).double().requires_grad_()
    action = (0.95 * some_action(config, 2).double()).clamp(-0.95, 0.95)
    assert torch.autograd.gradcheck(lambda p: config.build(p).log_prob(action), params)
    assert torch.autograd.gradcheck(lambda p: config.build(p).entropy(), params)
    if name != "multi_binary":
        action = action.requires_grad_()
        assert torch.autograd.gradcheck(lambda a: config.build(params.detach()).log_prob(a), action)


@pytest.mark.filterwarnings("ignore")
def test_compiled() -> None:
    configs = [CONFIGS[name] for name in ("beta", "gmm", "multi_discrete", "multi_binary")]
    sizes = [config.param_size(SIZE) for config in configs]

    def total(params: torch.Tensor, actions: list[torch.Tensor]) -> torch.Tensor:
        built = zip(configs, params.split(sizes, dim=-1), actions, strict=True)
        dists = [(config.build(part), action) for config, part, action in built]
        return sum((d.log_prob(a) + d.entropy() for d, a in dists), torch.zeros(3)).sum()

    actions = [some_action(config, 3) for config in configs]
    results = []
    # The graph and its derivative, without generating code for it, which takes a minute.
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        params = torch.randn(3, sum(sizes), generator=generator()).requires_grad_()
        loss = function(params, actions)
        loss.backward()
        results.append((loss, params.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@EVERY
def test_on_the_device(name: str) -> None:
    config = CONFIGS[name]
    params, action = params_for(config, 50, 3), some_action(config, 50, 3)
    here, there = config.build(params), config.build(params.cuda())
    torch.testing.assert_close(there.log_prob(action.cuda()).cpu(), here.log_prob(action), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(there.entropy().cpu(), here.entropy(), rtol=1e-4, atol=1e-3)
    draws = [there.sample] + ([there.rsample] if config.differentiable else [])
    for draw in draws:
        seeded = [torch.Generator("cuda").manual_seed(seed) for seed in (5, 5, 6)]
        first, again, other = (draw(g) for g in seeded)
        assert first.is_cuda and torch.equal(first, again) and not torch.equal(first, other)
