"""One update: order, schedule, clipping, reproducibility."""

from __future__ import annotations

import pytest
import torch
from core_helpers import make_agent, make_batch

from amago_core.errors import ConfigError
from amago_core.learner import Learner, LearnerConfig


def test_learning_rate_schedule() -> None:
    config = LearnerConfig(lr=1e-4, warmup_updates=500)
    assert [config.lr_at(u, None) for u in (1, 250, 500, 10_000)] == pytest.approx([2e-7, 5e-5, 1e-4, 1e-4])
    cosine = LearnerConfig(lr=1.0, warmup_updates=10, lr_schedule="cosine", lr_final=0.1)
    assert [cosine.lr_at(u, 110) for u in (10, 60, 110)] == pytest.approx([1.0, 0.55, 0.1])


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_update_changes_what_is_trained_and_only_that(kind: str) -> None:
    agent = make_agent(kind)
    learner = Learner(agent, LearnerConfig(warmup_updates=1))
    before = {name: p.clone() for name, p in agent.named_parameters()}
    learner.update(make_batch(kind))
    for name, parameter in agent.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert all(p.grad is None for p in agent.parameters())
    assert learner.updates == 1


def test_targets_follow_the_updated_networks() -> None:
    agent = make_agent(tau=1.0)
    Learner(agent, LearnerConfig()).update(make_batch())
    for target, online in zip(agent.target_critics.parameters(), agent.critics.parameters(), strict=True):
        assert torch.equal(target, online)


def test_gradients_are_clipped_to_the_global_norm() -> None:
    agent = make_agent()
    learner = Learner(agent, LearnerConfig(grad_clip=0.5, lr=1e-3))
    seen = {}
    original = learner.optimizer.step

    def step() -> None:
        seen["norm"] = torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None]).norm()
        original()

    learner.optimizer.step = step  # type: ignore[method-assign]
    metrics = learner.update(make_batch(), detailed=True)
    assert metrics["grad_norm/all"] > 0.5
    torch.testing.assert_close(seen["norm"], torch.tensor(0.5), rtol=1e-3, atol=1e-3)
    total = sum(float(metrics[f"grad_norm/{name}"]) ** 2 for name in agent.trained_modules()) ** 0.5
    assert total == pytest.approx(float(metrics["grad_norm/all"]), rel=1e-4)


def test_decay_rates_are_not_decayed() -> None:
    agent = make_agent(encoder="mamba")
    learner = Learner(agent, LearnerConfig(lr=0.1, weight_decay=1.0, warmup_updates=0))
    before = {name: p.clone() for name, p in agent.named_parameters()}
    for group in learner.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    kept = {name for name, p in agent.named_parameters() if torch.equal(p, before[name]) and p.requires_grad}
    rates = {
        name
        for name in before
        if name.startswith("traj_encoder") and getattr(agent.get_parameter(name), "_no_weight_decay", False)
    }
    zeros = {name for name, value in before.items() if not value.any()}
    assert rates and kept - zeros == rates


@pytest.mark.parametrize("encoder", ["transformer", "gru", "ff", "mamba"])
def test_resume_is_exact(encoder: str) -> None:
    def batches(learner: Learner, first: int, last: int) -> None:
        for index in range(first, last):
            torch.manual_seed(index)
            learner.update(make_batch(seed=index))

    straight = Learner(make_agent(encoder=encoder), LearnerConfig(warmup_updates=2))
    batches(straight, 0, 6)
    first = Learner(make_agent(encoder=encoder), LearnerConfig(warmup_updates=2))
    batches(first, 0, 3)
    agent_state, learner_state = first.agent.state_dict(), first.state_dict()
    second = Learner(make_agent(encoder=encoder, seed=9), LearnerConfig(warmup_updates=2))
    second.agent.load_state_dict(agent_state)
    second.load_state_dict(learner_state)
    batches(second, 3, 6)
    for name, value in straight.agent.state_dict().items():
        assert torch.equal(value, second.agent.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
def test_compiled_loss_equals_eager() -> None:
    torch.manual_seed(0)
    eager = Learner(make_agent(encoder="ff", skip_padding=False, num_critics_td=4), LearnerConfig())
    compiled = Learner(make_agent(encoder="ff", skip_padding=False, num_critics_td=4), LearnerConfig(compile="default"))
    for index in range(2):
        one, two = eager.update(make_batch(seed=index)), compiled.update(make_batch(seed=index))
        torch.testing.assert_close(one["loss/total"], two["loss/total"], rtol=1e-4, atol=1e-4)


def test_bf16_stays_close_to_float32() -> None:
    plain = Learner(make_agent(num_critics_td=4), LearnerConfig())
    mixed = Learner(make_agent(num_critics_td=4), LearnerConfig(precision="bf16"))
    one, two = plain.update(make_batch()), mixed.update(make_batch())
    torch.testing.assert_close(one["loss/total"], two["loss/total"], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"precision": "fp16"}, {"compile": "yes"}, {"grad_clip": -1.0}])
def test_bad_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LearnerConfig(**settings)


def test_compile_needs_static_shapes() -> None:
    with pytest.raises(ConfigError, match="skip_padding"):
        Learner(make_agent(), LearnerConfig(compile="default"))
