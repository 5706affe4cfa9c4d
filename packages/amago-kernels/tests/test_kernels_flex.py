"""`attention(backend="flex")`: compiled flex_attention with every option, and where it refuses to serve."""

from __future__ import annotations

import pytest
import torch
from reset_patterns import make_reset

from amago_kernels import attention
from amago_kernels.testing import assert_close_ratio

# What is imported and compiled warns in its own ways.
pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = {
    "sink": {"window": 5, "sink": 2},
    "bias_full": {"causal": False, "sink": 3, "sink_bias": 1.5},
    "everything": {"window": 34, "sink": 4, "sink_bias": 0.4, "logit_clip": 0.6, "scale": 0.3},
}


def make_qkv(length, size=16, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, 3, 2, size, generator=generator, dtype=torch.float64).to(dtype).to(device)


def test_everything_at_once_on_the_cpu():
    """One program of every kind is compiled: a score and a mask, with and without segments."""
    qkv = make_qkv(37)
    for reset in (None, make_reset("some", 2, 37), make_reset("last", 2, 37)):
        out = attention(*qkv.unbind(2), reset=reset, backend="flex", **OPTIONS["everything"])
        expected = attention(*qkv.double().unbind(2), reset=reset, backend="reference", **OPTIONS["everything"])
        assert_close_ratio(out, expected, 1e-5)


def test_parameters_are_no_obstacle_without_gradients():
    qkv = make_qkv(20).requires_grad_()
    reset = make_reset("some", 2, 20)
    with torch.no_grad():
        out = attention(*qkv.unbind(2), reset=reset, causal=False, backend="flex")
    assert not out.requires_grad
    expected = attention(*qkv.double().unbind(2), reset=reset, causal=False, backend="reference")
    assert_close_ratio(out, expected, 1e-5)


REFUSALS = {
    r"head sizes \(16, 32, 64, 128, 256\), not 40": {"size": 40},
    "not torch.float64": {"dtype": torch.float64},
    "dropout=0.2 is given": {"dropout": 0.2},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_say_why(message):
    options = dict(REFUSALS[message])
    q, k, v = make_qkv(4, options.pop("size", 16), options.pop("dtype", torch.float32)).unbind(2)
    with pytest.raises(ValueError, match=f"backend='flex' cannot serve this attention call: .*{message}"):
        attention(q, k, v, backend="flex", **options)


def test_gradients_are_refused_on_the_cpu():
    q, k, v = make_qkv(4).requires_grad_().unbind(2)
    with pytest.raises(ValueError, match="no backward on CPUs"):
        attention(q, k, v, backend="flex")


def test_it_is_no_part_of_a_larger_compilation():
    q, k, v = make_qkv(4).unbind(2)
    run = torch.compile(attention, backend="eager")
    with pytest.raises(Exception, match="compiles by itself"):
        run(q, k, v, backend="flex")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "pattern"), [("sink", "none"), ("bias_full", "some"), ("everything", "all")])
def test_gradients(name, pattern):
    exact = make_qkv(130, dtype=torch.float64).requires_grad_()
    given = exact.detach().float().cuda().requires_grad_()
    reset = make_reset(pattern, 2, 130, share=0.05)
    moved = None if reset is None else reset.cuda()
    expected = attention(*exact.unbind(2), reset=reset, backend="reference", **OPTIONS[name])
    out = attention(*given.unbind(2), reset=moved, backend="flex", **OPTIONS[name])
    expected.square().sum().backward()
    out.square().sum().backward()
    assert_close_ratio(out.cpu(), expected, 1e-3)
    assert_close_ratio(given.grad.cpu(), exact.grad, 1e-3)


@pytest.mark.gpu
def test_half_precision():
    exact = make_qkv(130, size=64, dtype=torch.bfloat16).double().requires_grad_()
    given = exact.detach().bfloat16().cuda().requires_grad_()
    reset = make_reset("some", 2, 130, share=0.05)
    expected = attention(*exact.unbind(2), reset=reset, window=50, backend="reference")
    out = attention(*given.unbind(2), reset=reset.cuda(), window=50, backend="flex")
    expected.square().sum().backward()
    out.float().square().sum().backward()
    assert_close_ratio(out.cpu(), expected, 1e-2)
    assert_close_ratio(given.grad.cpu(), exact.grad, 2e-2)
