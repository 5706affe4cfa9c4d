"""`n_step_targets`: numbers by hand, and a loop over transitions."""

from __future__ import annotations

import pytest
import torch

from amago_kernels import n_step_targets
from amago_kernels.testing import assert_close_ratio

NAN = float("nan")
TABLE = [
    (1, None, 5, [10, 20, 30, 40, 50]),
    (1, 2, 5, [10, 20, 3, 40, 50]),
    (3, None, 5, [27.1, 37.1, 47.1, 49, 50]),
    (3, 2, 5, [5.23, 4.7, 3, 49, 50]),
    (3, 4, 5, [27.1, 37.1, 10.65, 8.5, 5]),
    (3, None, 3, [27.1, 29, 30]),
]


def inputs_of_the_table(terminated_at, valid, poison):
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    values = torch.tensor([[10.0, 20.0, 30.0, 40.0, 50.0]], dtype=torch.float64).unsqueeze(-1)
    terminated = torch.zeros(1, 5, dtype=torch.bool)
    mask = torch.arange(5)[None] < valid
    if terminated_at is not None:
        terminated[0, terminated_at] = True
        values[0, terminated_at] = poison
    rewards[~mask] = poison
    values[~mask] = poison
    return rewards, terminated, values, torch.tensor([0.9], dtype=torch.float64), mask


@pytest.mark.parametrize("poison", [7.0, NAN, float("inf")])
@pytest.mark.parametrize(("n", "terminated_at", "valid", "expected"), TABLE)
def test_table(n, terminated_at, valid, expected, poison):
    out = n_step_targets(*inputs_of_the_table(terminated_at, valid, poison), n=n)[0, :valid, 0]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64))


def by_loops(rewards, terminated, values, gammas, mask, n):
    out = torch.full_like(values, NAN)
    for b in range(rewards.shape[0]):
        for t in range(rewards.shape[1]):
            for g, gamma in enumerate(gammas.tolist()):
                total, k, alive = 0.0, 0, True
                while k < n and alive and t + k < rewards.shape[1] and bool(mask[b, t + k]):
                    total += gamma**k * float(rewards[b, t + k])
                    alive = not bool(terminated[b, t + k])
                    k += 1
                if k:
                    out[b, t, g] = total + (gamma**k * float(values[b, t + k - 1, g]) if alive else 0.0)
    return out


@pytest.mark.parametrize("length", [1, 2, 13])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 12, 13, 100])
def test_equals_loops(n, length):
    generator = torch.Generator().manual_seed(n)
    rewards = torch.randn(5, length, generator=generator, dtype=torch.float64)
    values = torch.randn(5, length, 3, generator=generator, dtype=torch.float64)
    terminated = torch.rand(5, length, generator=generator) < 0.2
    mask = torch.rand(5, length, generator=generator) < 0.8
    mask[0] = True
    gammas = torch.tensor([0.0, 0.9, 0.999], dtype=torch.float64)
    expected = by_loops(rewards, terminated, values, gammas, mask, n)
    values[terminated] = NAN
    values[~mask], rewards = NAN, rewards.masked_fill(~mask, NAN)
    out = n_step_targets(rewards, terminated, values, gammas, mask, n=n)
    assert_close_ratio(out[mask], expected[mask], 1e-12)
    single = n_step_targets(rewards.float(), terminated, values.float(), gammas.float(), mask, n=n)
    assert single.dtype == torch.float32
    assert_close_ratio(single[mask], expected[mask], 1e-5)


def test_any_strides_and_gradients():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(7, 4, generator=generator).t()
    values = torch.randn(2, 7, 4, generator=generator).permute(2, 1, 0).requires_grad_()
    flags = torch.zeros(4, 7, dtype=torch.bool)
    out = n_step_targets(rewards, flags, values, torch.tensor([0.5, 0.9]), ~flags, n=3)
    (grad,) = torch.autograd.grad(out.sum(), values)
    assert grad[0, 3].tolist() == pytest.approx([0.5**3, 0.9**3])
    assert grad[0, 6].tolist() == pytest.approx([0.5 + 0.25 + 0.125, 0.9 + 0.81 + 0.729])


BAD = {
    "n=0": {"n": 0},
    "rewards has shape": {"rewards": torch.zeros(2, 3, 1)},
    "terminated is torch.float32": {"terminated": torch.zeros(2, 3)},
    "mask is torch.bool": {"mask": torch.zeros(2, 4, dtype=torch.bool)},
    "do not fit rewards": {"next_values": torch.zeros(2, 3, 5)},
    "gammas": {"gammas": torch.zeros(4, 1)},
}


@pytest.mark.parametrize("message", BAD)
def test_refusals_say_why(message):
    flags = torch.zeros(2, 3, dtype=torch.bool)
    call = {
        "rewards": torch.zeros(2, 3),
        "terminated": flags,
        "next_values": torch.zeros(2, 3, 4),
        "gammas": torch.zeros(4),
        "mask": flags,
        **BAD[message],
    }
    with pytest.raises(ValueError, match=message):
        n_step_targets(**call)
