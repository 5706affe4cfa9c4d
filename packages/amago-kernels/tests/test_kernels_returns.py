"""Returns: numbers by hand, loops over transitions, and every backend against them."""

from __future__ import annotations

import pytest
import torch
from triton_devices import without_triton

from amago_kernels import discounted_returns, lambda_returns, n_step_targets
from amago_kernels.testing import assert_close_ratio

NAN = float("nan")
N_STEP = without_triton("n_step_targets")
BLOCKED = without_triton("lambda_returns")
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


@pytest.mark.parametrize("backend", N_STEP)
@pytest.mark.parametrize("poison", [7.0, NAN, float("inf")])
@pytest.mark.parametrize(("n", "terminated_at", "valid", "expected"), TABLE)
def test_table(n, terminated_at, valid, expected, poison, backend):
    out = n_step_targets(*inputs_of_the_table(terminated_at, valid, poison), n=n, backend=backend)[0, :valid, 0]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("backend", BLOCKED)
def test_lambda_by_hand(backend):
    inputs = inputs_of_the_table(2, 4, NAN)
    # From the end: 4 + 0.9 * 40; 3; 2 + 0.9 * (10 + 0.5 * 3); 1 + 0.9 * (5 + 0.5 * 12.35).
    out = lambda_returns(*inputs, lambda_=0.5, backend=backend)[0, :4, 0]
    torch.testing.assert_close(out, torch.tensor([11.0575, 12.35, 3.0, 40.0], dtype=torch.float64))
    truncated = torch.tensor([[False, True, True, False, False]])
    out = lambda_returns(*inputs, lambda_=0.5, truncated=truncated, backend=backend)[0, :4, 0]
    torch.testing.assert_close(out, torch.tensor([14.5, 20.0, 3.0, 40.0], dtype=torch.float64))


@pytest.mark.parametrize("backend", BLOCKED)
def test_discounted_by_hand(backend):
    rewards, terminated, values, gammas, mask = inputs_of_the_table(2, 4, NAN)
    inputs = rewards, terminated, gammas, mask
    out = discounted_returns(*inputs, backend=backend)[0, :4, 0]
    torch.testing.assert_close(out, torch.tensor([5.23, 4.7, 3.0, 4.0], dtype=torch.float64))
    truncated = torch.tensor([[True, False, True, False, False]])
    out = discounted_returns(*inputs, truncated=truncated, backend=backend)[0, :4, 0]
    torch.testing.assert_close(out, torch.tensor([1.0, 4.7, 3.0, 4.0], dtype=torch.float64))
    # Values inside an episode are never looked at.
    values[0, 1] = NAN
    out = discounted_returns(*inputs, next_values=values, truncated=truncated, backend=backend)[0, :4, 0]
    torch.testing.assert_close(out, torch.tensor([10.0, 4.7, 3.0, 40.0], dtype=torch.float64))


def n_step_by_loops(rewards, terminated, truncated, values, gammas, mask, n):
    out = torch.full_like(values, NAN)
    for b in range(rewards.shape[0]):
        for t in range(rewards.shape[1]):
            for g, gamma in enumerate(gammas.tolist()):
                total, k, alive, more = 0.0, 0, True, True
                while k < n and more and t + k < rewards.shape[1] and bool(mask[b, t + k]):
                    total += gamma**k * float(rewards[b, t + k])
                    alive = not bool(terminated[b, t + k])
                    more = alive and not bool(truncated[b, t + k])
                    k += 1
                if k:
                    out[b, t, g] = total + (gamma**k * float(values[b, t + k - 1, g]) if alive else 0.0)
    return out


def lambda_by_loops(rewards, terminated, truncated, values, gammas, mask, lambda_):
    out = torch.full((*rewards.shape, len(gammas)), NAN, dtype=torch.float64)
    length = rewards.shape[1]
    for b in range(rewards.shape[0]):
        for g, gamma in enumerate(gammas.tolist()):
            for t in reversed(range(length)):
                value = 0.0 if values is None else float(values[b, t, g])
                last = t + 1 == length or bool(truncated[b, t]) or not bool(mask[b, t + 1])
                later = value if last else float(out[b, t + 1, g])
                ahead = (1 - lambda_) * value + lambda_ * later if lambda_ < 1 else later
                out[b, t, g] = float(rewards[b, t]) + (0.0 if terminated[b, t] else gamma * ahead)
    return out


def random_inputs(length, seed):
    """Inputs in float64 with ends of all kinds, and the same with NaN wherever nothing may be read."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(5, length, generator=generator, dtype=torch.float64)
    values = torch.randn(5, length, 3, generator=generator, dtype=torch.float64)
    terminated = torch.rand(5, length, generator=generator) < 0.15
    truncated = torch.rand(5, length, generator=generator) < 0.15
    mask = torch.rand(5, length, generator=generator) < 0.8
    mask[0] = True
    terminated[1], truncated[2] = False, False
    gammas = torch.tensor([0.0, 0.9, 0.999], dtype=torch.float64)
    clean = rewards, terminated, truncated, values.clone(), gammas, mask
    values[terminated] = NAN
    values[~mask] = NAN
    return clean, (rewards.masked_fill(~mask, NAN), terminated, truncated, values, gammas, mask)


@pytest.mark.parametrize("backend", N_STEP)
@pytest.mark.parametrize("length", [1, 2, 13])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 12, 13, 100])
def test_n_step_equals_loops(n, length, backend):
    clean, (rewards, terminated, truncated, values, gammas, mask) = random_inputs(length, n)
    expected = n_step_by_loops(*clean, n)
    options = {"n": n, "truncated": truncated, "backend": backend}
    out = n_step_targets(rewards, terminated, values, gammas, mask, **options)
    assert_close_ratio(out[mask], expected[mask], 1e-12)
    single = n_step_targets(rewards.float(), terminated, values.float(), gammas.float(), mask, **options)
    assert single.dtype == torch.float32 and single.is_contiguous()
    assert_close_ratio(single[mask], expected[mask], 1e-5)
    nowhere = torch.zeros_like(truncated)
    out = n_step_targets(rewards, terminated, values, gammas, mask, n=n, backend=backend)
    expected = n_step_by_loops(*clean[:2], nowhere, *clean[3:], n)
    assert_close_ratio(out[mask], expected[mask], 1e-12)


@pytest.mark.parametrize("backend", BLOCKED)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("lambda_", [0, 0.0, 0.7, 1.0])
def test_lambda_equals_loops(lambda_, length, backend):
    clean, (rewards, terminated, truncated, values, gammas, mask) = random_inputs(length, length)
    expected = lambda_by_loops(*clean, lambda_)
    options = {"lambda_": lambda_, "truncated": truncated, "backend": backend}
    out = lambda_returns(rewards, terminated, values, gammas, mask, **options)
    assert_close_ratio(out[mask], expected[mask], 1e-12)
    single = lambda_returns(rewards.float(), terminated, values.float(), gammas.float(), mask, **options)
    assert single.dtype == torch.float32 and single.is_contiguous()
    assert_close_ratio(single[mask], expected[mask], 1e-5)


@pytest.mark.parametrize("backend", BLOCKED)
@pytest.mark.parametrize("length", [1, 2, 17, 64])
@pytest.mark.parametrize("given", [False, True])
def test_discounted_equals_loops(given, length, backend):
    clean, (rewards, terminated, truncated, values, gammas, mask) = random_inputs(length, length)
    expected = lambda_by_loops(*clean[:3], clean[3] if given else None, *clean[4:], 1.0)
    options = {"next_values": values if given else None, "truncated": truncated, "backend": backend}
    out = discounted_returns(rewards, terminated, gammas, mask, **options)
    assert_close_ratio(out[mask], expected[mask], 1e-12)
    half = discounted_returns(rewards.half(), terminated, gammas.float(), mask, truncated=truncated, backend=backend)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("backend", BLOCKED)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_broken_stays_in_its_episode(bad, backend):
    rewards, values = torch.ones(1, 40), torch.ones(1, 40, 2)
    terminated, mask = torch.zeros(1, 40, dtype=torch.bool), torch.ones(1, 40, dtype=torch.bool)
    terminated[0, [9, 30]] = True
    rewards[0, 25] = bad
    gammas = torch.tensor([0.5, 0.9])
    out = lambda_returns(rewards, terminated, values, gammas, mask, lambda_=0.9, backend=backend)
    assert out[0, :10].isfinite().all() and out[0, 26:].isfinite().all() and not out[0, 10:26].isfinite().any()


def call_each(rewards, terminated, values, gammas, mask, **options):
    yield "n_step_targets", n_step_targets(rewards, terminated, values, gammas, mask, n=3, **options)
    yield "lambda_returns", lambda_returns(rewards, terminated, values, gammas, mask, lambda_=0.9, **options)
    yield "discounted_returns", discounted_returns(rewards, terminated, gammas, mask, next_values=values, **options)


def test_any_strides():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(23, 4, generator=generator).t()
    values = torch.randn(2, 23, 4, generator=generator).permute(2, 1, 0)
    terminated = (torch.rand(23, 4, generator=generator) < 0.2).t()
    gammas, mask = torch.tensor([0.5, 0.0, 0.9])[::2], torch.ones(1, 1, dtype=torch.bool).expand(4, 23)
    strided = call_each(rewards, terminated, values, gammas, mask)
    dense = call_each(*(x.contiguous() for x in (rewards, terminated, values, gammas, mask)), backend="reference")
    for (name, out), (_, expected) in zip(strided, dense, strict=True):
        assert_close_ratio(out, expected, 1e-6, name)


def test_gradients_come_from_the_reference():
    flags = torch.zeros(4, 7, dtype=torch.bool)
    rewards, values = torch.randn(4, 7), torch.randn(4, 7, 2, requires_grad=True)
    gammas = torch.tensor([0.5, 0.9])
    out = n_step_targets(rewards, flags, values, gammas, ~flags, n=3)
    (grad,) = torch.autograd.grad(out.sum(), values)
    assert grad[0, 3].tolist() == pytest.approx([0.5**3, 0.9**3])
    assert grad[0, 6].tolist() == pytest.approx([0.5 + 0.25 + 0.125, 0.9 + 0.81 + 0.729])
    for name, result in call_each(rewards, flags, values, gammas, ~flags):
        assert result.requires_grad, name
    with pytest.raises(ValueError, match="backend='fused' cannot serve this n_step_targets call: it carries no grad"):
        n_step_targets(rewards, flags, values, gammas, ~flags, backend="fused")
    with pytest.raises(ValueError, match="backend='blocked' cannot serve this lambda_returns call: it carries no grad"):
        lambda_returns(rewards, flags, values, gammas, ~flags, lambda_=0.5, backend="blocked")
    with torch.no_grad():
        lambda_returns(rewards, flags, values, gammas, ~flags, lambda_=0.5, backend="blocked")


def test_gradients_are_right():
    _, (rewards, terminated, truncated, values, gammas, mask) = random_inputs(4, 0)
    rewards, values = rewards.nan_to_num().requires_grad_(), values.nan_to_num().requires_grad_()

    def all_of_them(rewards, values, gammas):
        results = call_each(rewards, terminated, values, gammas, mask, truncated=truncated)
        return torch.stack([out for _, out in results])

    # Finite differences must not leave what is allowed.
    inner = gammas.clamp(0.01, 0.99).requires_grad_()
    assert torch.autograd.gradcheck(all_of_them, (rewards, values, inner))


def test_no_gradient_of_nan_gets_through():
    _, (rewards, terminated, truncated, values, gammas, mask) = random_inputs(9, 0)
    leaves = rewards.requires_grad_(), values.requires_grad_(), gammas.clone().requires_grad_()
    for name, out in call_each(leaves[0], terminated, leaves[1], leaves[2], mask, truncated=truncated):
        for grad in torch.autograd.grad(out[mask].sum(), leaves):
            assert grad.isfinite().all(), name


def test_nothing_to_compute():
    flags = torch.zeros(0, 5, dtype=torch.bool)
    for shape in ((0, 5, 2), (3, 0, 2), (3, 5, 0)):
        flags = torch.zeros(shape[:2], dtype=torch.bool)
        for _, out in call_each(torch.zeros(shape[:2]), flags, torch.zeros(shape), torch.zeros(shape[2]), flags):
            assert out.shape == shape


def test_opcheck():
    _, inputs = random_inputs(9, 0)
    operator = torch.ops.amago_kernels.lambda_returns.default
    torch.library.opcheck(operator, (*(x.nan_to_num() if x.is_floating_point() else x for x in inputs), 0.9))
    rewards, terminated, _, _, gammas, mask = inputs
    torch.library.opcheck(operator, (rewards.nan_to_num().half(), terminated, None, None, gammas.float(), mask, 1.0))


@pytest.mark.filterwarnings("ignore")
def test_compiled():
    rewards, values, flags = torch.randn(3, 20), torch.randn(3, 20, 2), torch.rand(3, 20) < 0.2

    def total(rewards, values):
        results = call_each(rewards, flags, values, torch.tensor([0.5, 0.9]), ~flags)
        return sum(torch.where(flags.unsqueeze(-1), 0.0, out).sum() for _, out in results)

    torch.testing.assert_close(torch.compile(total, fullgraph=True)(rewards, values), total(rewards, values))


BAD = {
    "n=0": {"n": 0},
    "n=True": {"n": True},
    "rewards is torch.int64": {"rewards": torch.zeros(2, 3, dtype=torch.long)},
    "truncated is torch.uint8": {"truncated": torch.zeros(2, 3, dtype=torch.uint8)},
    "gammas is on meta and rewards on cpu": {"gammas": torch.zeros(4, device="meta")},
    "backend='blocked' is not known": {"backend": "blocked"},
    "rewards has shape": {"rewards": torch.zeros(2, 3, 1)},
    "terminated is torch.float32": {"terminated": torch.zeros(2, 3)},
    "mask is torch.bool": {"mask": torch.zeros(2, 4, dtype=torch.bool)},
    "do not fit rewards": {"next_values": torch.zeros(2, 3, 5)},
    "gammas has shape": {"gammas": torch.zeros(4, 1)},
    r"gammas=\[.*give numbers in \[0, 1\]": {"gammas": torch.tensor([0.0, 0.5, 1.5, 0.0])},
    r"gammas=\[-0.5": {"gammas": torch.tensor([-0.5, 0.5, 0.5, 0.0])},
    r"gammas=\[nan": {"gammas": torch.tensor([NAN, 0.5, 0.5, 0.0])},
    "gammas is torch.int64": {"gammas": torch.ones(4, dtype=torch.long)},
    "next_values=None": {"next_values": None},
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


@pytest.mark.parametrize("lambda_", [-0.1, 1.5, NAN, True, "0.9"])
def test_lambda_is_a_weight(lambda_):
    flags = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="lambda_=.*give a number in"):
        lambda_returns(torch.zeros(2, 3), flags, torch.zeros(2, 3, 1), torch.zeros(1), flags, lambda_=lambda_)
