"""`Agent.loss`: which term trains what, and what must not matter."""

from __future__ import annotations

import copy

import pytest
import torch
from core_helpers import make_agent, make_batch
from torch import Tensor, nn

from amago_core.agents import Agent, AgentConfig
from amago_core.agents.rows import TransitionRows
from amago_core.errors import ConfigError
from amago_nets.distributions import DiscreteConfig
from amago_nets.heads import NCriticsConfig, NCriticsTwoHotConfig

KINDS = ("discrete", "continuous")


def grad_norm(module: nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


def term_gradients(agent: Agent, kind: str) -> dict[str, float]:
    agent.loss(make_batch(kind)).total.backward()
    return {name: grad_norm(module) for name, module in agent.named_children() if isinstance(module, nn.Module)}


class OnlyCritic(Agent):
    """The TD loss alone."""

    def edit_actor_mask(self, batch: object, actor_loss: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros_like(mask)


class OnlyActor(Agent):
    """The actor loss alone."""

    def edit_critic_mask(self, batch: object, critic_loss: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros_like(mask)


def with_class(agent: Agent, cls: type[Agent]) -> Agent:
    agent.__class__ = cls
    return agent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("term", "settings", "trained"),
    [
        ("critic", {}, {"critics", "traj_encoder", "tstep_encoder"}),
        ("actor", {"offline_coeff": 0.0}, {"actor", "traj_encoder", "tstep_encoder"}),
        ("actor", {"online_coeff": 0.0, "offline_coeff": 1.0}, {"actor", "traj_encoder", "tstep_encoder"}),
    ],
)
def test_gradient_table(kind: str, term: str, settings: dict, trained: set[str]) -> None:
    agent = with_class(make_agent(kind, **settings), OnlyCritic if term == "critic" else OnlyActor)
    gradients = term_gradients(agent, kind)
    assert {name for name, norm in gradients.items() if norm > 0} == trained


def test_online_term_reaches_the_state_only_through_the_action() -> None:
    """With a constant policy head the online term gives the sequence model no gradient."""
    agent = with_class(make_agent(offline_coeff=0.0), OnlyActor)
    nn.init.zeros_(list(agent.actor.parameters())[-2])
    assert term_gradients(agent, "discrete")["traj_encoder"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoder", ["transformer", "gru", "ff"])
@pytest.mark.parametrize("skip_padding", [True, False])
def test_padding_never_matters(kind: str, encoder: str, skip_padding: bool) -> None:
    results = []
    for garbage in (0.0, 1e6):
        agent = make_agent(kind, encoder, skip_padding=skip_padding)
        batch = make_batch(kind)
        padding = ~batch.timestep_mask
        batch.obs["observation"][padding] = garbage
        batch.prev_reward[padding] = garbage
        batch.prev_action[padding] = 3 if kind == "discrete" else 0.7
        batch.terminated[padding] = bool(garbage)
        batch.truncated[padding] = bool(garbage)
        batch.time_idx[padding] += int(garbage > 0)
        torch.manual_seed(1)
        output = agent.loss(batch, detailed=True)
        output.total.backward()
        gradients = [p.grad.clone() for p in agent.parameters() if p.grad is not None]
        results.append((output, gradients, {k: v.clone() for k, v in agent.state_dict().items()}))
    (first, grads, state), (second, other_grads, other_state) = results
    assert torch.equal(first.total, second.total)
    assert {k: v.item() for k, v in first.metrics.items()} == {k: v.item() for k, v in second.metrics.items()}
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))
    assert all(torch.equal(state[k], other_state[k]) for k in state)


def test_leaving_padding_out_changes_nothing() -> None:
    totals = []
    for skip_padding in (True, False):
        agent = make_agent(skip_padding=skip_padding, num_critics_td=4)
        output = agent.loss(make_batch())
        output.total.backward()
        totals.append((output.total, torch.cat([p.grad.flatten() for p in agent.critics.parameters()])))
    torch.testing.assert_close(totals[0], totals[1])


def test_trimming_the_batch_changes_nothing() -> None:
    agent = make_agent(num_critics_td=4)
    wide = make_batch(lengths=(6, 4, 1))
    narrow = wide[1:].trim()
    assert narrow.mask.shape == (2, 4)
    agent.eval()
    torch.testing.assert_close(agent.loss(wide[1:]).total, agent.loss(narrow).total)


def test_the_future_cannot_change_the_past() -> None:
    agent = make_agent(encoder="transformer").eval()
    batch = make_batch(lengths=(6,))
    changed = copy.deepcopy(batch)
    changed.obs["observation"][:, 4:] += 1.0
    changed.prev_reward[:, 4:] += 1.0
    before, after = agent.encode(batch), agent.encode(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_only_terminated_stops_the_bootstrap() -> None:
    agent = make_agent(num_critics_td=4).eval()
    targets = {}
    for flag in ("terminated", "truncated", "neither"):
        batch = make_batch(lengths=(6,))
        batch.terminated[:] = False
        if flag != "neither":
            getattr(batch, flag)[0, 6] = True
        states = agent.encode(batch)
        targets[flag] = agent.td_targets(batch, TransitionRows(batch.mask, compact=False), states)
    assert torch.equal(targets["truncated"], targets["neither"])
    assert torch.equal(targets["terminated"][:, :5], targets["neither"][:, :5])
    reward = 10 * make_batch(lengths=(6,)).rewards[0, 5]
    torch.testing.assert_close(targets["terminated"][0, 5], reward.expand(2))


def test_targets_are_multiplied_reward_plus_discounted_value() -> None:
    """One transition, one critic, by hand from the agent's own target networks."""
    agent = make_agent(
        num_critics_td=1, critics=type(AgentConfig().critics)(num_critics=1, d_hidden=16), reward_multiplier=2.0
    ).eval()
    batch = make_batch(lengths=(1,))
    batch.terminated[:] = False
    states = agent.encode(batch)
    target = agent.td_targets(batch, TransitionRows(batch.mask, compact=False), states)
    probs = agent.policy_config.build(agent.target_actor(states[:, 1:])).probs
    value = agent.popart.denormalize((agent.target_critics(states[:, 1:])[:, :, 0] * probs).sum(-1))
    expected = 2.0 * batch.rewards[..., None] + torch.tensor([0.5, 0.999]) * value
    torch.testing.assert_close(target, expected)


def test_pure_behaviour_cloning_trains_no_critic() -> None:
    agent = make_agent(online_coeff=0.0, offline_coeff=1.0, fake_filter=True).eval()
    output = agent.loss(make_batch(), detailed=True)
    output.total.backward()
    assert "critics" not in agent.trained_modules() and grad_norm(agent.critics) == 0
    assert "loss/critic" not in output.metrics
    batch = make_batch()
    log_prob = agent.policy_config.build(agent.actor(agent.encode(batch)[:, :-1])).log_prob(
        batch.actions[..., None].expand(-1, -1, 2)
    )
    expected = -log_prob[batch.mask].mean()
    torch.testing.assert_close(output.total, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_is_a_finite_scalar(kind: str) -> None:
    metrics = make_agent(kind).loss(make_batch(kind), detailed=True).metrics
    assert {"loss/total", "policy/entropy", "td_target/mean", "popart/sigma"} <= set(metrics)
    for name, value in metrics.items():
        assert value.shape == () and torch.isfinite(value), name


def test_target_networks_move_by_tau() -> None:
    agent = make_agent(tau=0.25)
    online, target = agent.critics, agent.target_critics
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in target.parameters()]
    agent.update_targets()
    for old, new, live in zip(before, target.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * live)
    assert not any(p.requires_grad for p in target.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 1.0},
        {"gammas": (1.5,)},
        {"tau": 0.0},
        {"n_step": 0},
        {"num_critics_td": 5},
        {"online_coeff": 0.0, "offline_coeff": 0.0},
        {"online_coeff": -1.0},
        {"gammas": 0.9},
        {"gamma": "0.9"},
        {"n_step": 1.0},
        {"policy": "discrete"},
        {"actor": "residual"},
        {"actor": NCriticsConfig()},
        {"critics": NCriticsTwoHotConfig()},
        {"filter": "exp"},
    ],
)
def test_bad_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        AgentConfig(**settings)


def test_policy_must_fit_the_actions() -> None:
    with pytest.raises(ConfigError, match="DiscreteConfig"):
        make_agent("continuous", policy=DiscreteConfig())
