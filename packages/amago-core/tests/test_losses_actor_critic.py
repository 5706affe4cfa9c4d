import math

import pytest
import torch

from amago_core.losses import (
    BinaryFilterConfig,
    advantages,
    discrete_action_values,
    discrete_state_values,
    masked_mean,
    offline_loss,
    online_loss,
    reduce_ensemble,
    squared_error,
    td_targets,
)


class TestGoldenExample:
    """Two stub critics, three states, two actions, one discount; every number worked out by hand."""

    def setup_method(self):
        q = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [2.0, 2.0]], [[2.0, 0.0], [1.0, 4.0], [0.0, 4.0]]])
        self.q = q.permute(1, 0, 2)[None, :, :, None, :]  # [B=1, L=3, C=2, G=1, A=2]
        self.probs = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]])[None, :, None, :]
        self.actions = torch.tensor([[0, 1]])
        self.rewards = torch.tensor([[1.0, -1.0]])
        self.terminated = torch.tensor([[False, True]])
        self.gammas = torch.tensor([0.5])
        self.mask = torch.ones(1, 2, dtype=torch.bool)

    def targets(self, mode="min"):
        values = discrete_state_values(self.q, self.probs)
        reduced = reduce_ensemble(values[:, 1:], num_subset=2, mode=mode)
        return td_targets(self.rewards, self.terminated, reduced, self.gammas, self.mask, reward_multiplier=1.0)

    def test_state_values(self):
        values = discrete_state_values(self.q, self.probs)
        assert values[0, :, 0, 0].tolist() == [1.5, 0.75, 2.0]
        assert values[0, :, 1, 0].tolist() == [1.0, 3.25, 2.0]

    def test_targets(self):
        assert self.targets("min").flatten().tolist() == [1.375, -1.0]
        assert self.targets("mean").flatten().tolist() == [2.0, -1.0]

    def test_total(self):
        q_sa = discrete_action_values(self.q[:, :-1], self.actions)
        values = discrete_state_values(self.q, self.probs)[:, :-1]

        critic = squared_error(q_sa, self.targets())
        assert critic.flatten().tolist() == pytest.approx([0.140625, 0.390625, 1.0, 25.0])
        critic = masked_mean(critic, self.mask)
        assert critic.item() == pytest.approx(6.6328125, rel=1e-5)

        online = online_loss(values)
        assert masked_mean(online, self.mask).item() == pytest.approx(-0.875, rel=1e-5)

        advantage = advantages(q_sa, values)
        assert advantage.flatten().tolist() == [0.25, 0.0]
        weights = BinaryFilterConfig().build()(advantage)
        assert weights.flatten().tolist() == [1.0, 0.0]

        log_prob = self.probs[:, :-1].gather(-1, self.actions[..., None, None]).squeeze(-1).log()
        offline = offline_loss(log_prob, weights)
        assert masked_mean(offline, self.mask).item() == pytest.approx(0.34657359, rel=1e-5)

        total = masked_mean(1.0 * online + 0.1 * offline, self.mask) + 10.0 * critic
        assert total.item() == pytest.approx(65.4877824, rel=1e-5)


def test_expected_value_example():
    value = discrete_state_values(torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[0.5, 0.3, 0.2]]))
    assert value.item() == pytest.approx(1.9)


def test_state_values_are_differentiable_in_the_policy():
    probs = torch.tensor([[0.5, 0.3, 0.2]], requires_grad=True)
    discrete_state_values(torch.tensor([[[1.0, 2.0, 4.0]]]), probs).sum().backward()
    assert probs.grad.tolist() == [[1.0, 2.0, 4.0]]


def test_action_values_pick_the_right_entry():
    q = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    actions = torch.tensor([[0, 5, 2], [1, -1, 4]], dtype=torch.int8)
    picked = discrete_action_values(q, actions)
    for b in range(2):
        for t in range(3):
            assert torch.equal(picked[b, t], q[b, t, :, :, max(int(actions[b, t]), 0)])


def test_squared_error_against_a_loop():
    gen = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 3, 4, 5, generator=gen), torch.randn(2, 3, 5, generator=gen)
    error = squared_error(pred, target)
    for c in range(4):
        torch.testing.assert_close(error[:, :, c], (pred[:, :, c] - target) ** 2)


def test_gradients_flow_only_where_they_should():
    pred = torch.zeros(1, 2, 3, 1, requires_grad=True)
    target = torch.ones(1, 2, 1, requires_grad=True)
    squared_error(pred, target).sum().backward()
    assert (pred.grad == -2.0).all()
    assert target.grad is None

    log_prob = torch.tensor([[[-1.0]]], requires_grad=True)
    weights = torch.tensor([[[3.0]]], requires_grad=True)
    offline_loss(log_prob, weights).sum().backward()
    assert log_prob.grad.item() == -3.0
    assert weights.grad is None

    q = torch.zeros(1, 1, 2, 1, requires_grad=True)
    assert not advantages(q, q).requires_grad


def test_online_loss_uses_the_smallest_of_all_critics():
    values = torch.tensor([[[[3.0, 1.0], [5.0, -4.0], [2.0, 0.0], [6.0, 9.0]]]], requires_grad=True)
    loss = online_loss(values)
    assert loss.tolist() == [[[-2.0, 4.0]]]
    loss.sum().backward()
    assert values.grad[0, 0].tolist() == [[0, 0], [0, -1], [-1, 0], [0, 0]]


def test_everything_is_computed_in_float32():
    values = torch.ones(1, 2, 3, 4, dtype=torch.bfloat16)
    flat = values[:, :, 0]
    for out in (online_loss(values), advantages(values, values), squared_error(values, flat), offline_loss(flat, flat)):
        assert out.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: squared_error(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4)), "target"),
        (lambda: squared_error(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 1)), "target"),
        (lambda: discrete_action_values(torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 4, dtype=torch.int64)), "actions"),
        (lambda: discrete_state_values(torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 4, 6)), "probs"),
        (lambda: online_loss(torch.zeros(3)), "values"),
        (lambda: advantages(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 5)), "state_values"),
        (lambda: offline_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3)), "weights"),
    ],
)
def test_shapes_that_disagree_are_refused(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_padding_changes_neither_loss_nor_gradient():
    """The whole chain with garbage (finite, as networks give on zeroed padding) under the mask."""

    def run(garbage):
        mask = torch.tensor([[True, True, False], [True, False, False]])
        gen = torch.Generator().manual_seed(0)
        pred = torch.where(mask[..., None, None], torch.randn(2, 3, 4, 2, generator=gen), garbage).requires_grad_()
        log_prob = torch.where(mask[..., None], torch.randn(2, 3, 2, generator=gen), garbage).requires_grad_()
        rewards = torch.where(mask, torch.randn(2, 3, generator=gen), math.nan if garbage else 0.0)
        next_values = torch.where(mask[..., None], torch.randn(2, 3, 2, generator=gen), garbage)
        gammas = torch.tensor([0.5, 0.9])
        y = td_targets(rewards, torch.zeros(2, 3, dtype=torch.bool), next_values, gammas, mask, n=2)
        weights = BinaryFilterConfig().build()(pred.detach().mean(2))
        loss = masked_mean(squared_error(pred, y), mask) + masked_mean(offline_loss(log_prob, weights), mask)
        loss.backward()
        return loss.detach(), pred.grad, log_prob.grad

    for clean, dirty in zip(run(0.0), run(1e30), strict=True):
        assert torch.equal(clean, dirty)
