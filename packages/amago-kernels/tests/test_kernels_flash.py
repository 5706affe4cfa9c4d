"""The flash-attn backend: refused with a reason where it cannot serve, and called the way the package wants it."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch

from amago_kernels import attention, available
from amago_kernels.attention.call import AttentionCall
from amago_kernels.attention.flash import flash_attention, flash_refusal
from amago_kernels.testing import assert_close_ratio

SERVED = AttentionCall(
    causal=True,
    window=None,
    sink=0,
    sink_bias=0.0,
    logit_clip=None,
    reset=None,
    scale=0.25,
    dropout=0.0,
    dtype=torch.bfloat16,
    device_type="cuda",
    head_dim=16,
    differentiable=False,
)


def make_qkv(length: int = 12, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, length, 3, 2, 16, generator=generator, dtype=torch.float64).to(dtype)


def stand_in(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **rest):
    """What `flash_attn.flash_attn_func` documents, one query at a time: both ends of the window count, -1 is no end."""
    assert not rest
    assert q.dtype in (torch.bfloat16, torch.float16) and q.dim() == 4
    assert dropout_p == 0.0
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_size
    right = 0 if causal else right
    out = torch.empty_like(q)
    length = q.shape[1]
    for i in range(length):
        first = 0 if left < 0 else max(0, i - left)
        stop = length if right < 0 else min(length, i + right + 1)
        scores = torch.einsum("bhe,bjhe->bhj", q[:, i].double(), k[:, first:stop].double()) * scale
        out[:, i] = torch.einsum("bhj,bjhe->bhe", scores.softmax(-1), v[:, first:stop].double()).to(q.dtype)
    return out


@pytest.fixture
def installed(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"window": 0}, {"window": 3}, {"window": 40}, {"scale": 0.4}, {"scale": 0.4, "window": 5}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_call_means_the_same(installed, monkeypatch, options, dtype):
    """The whole way through `attention`, with the check of the device alone left out."""
    monkeypatch.setitem(attention.__globals__["_CANDIDATES"], "flash", lambda call: None)
    q, k, v = make_qkv(dtype=dtype).unbind(2)
    expected = attention(q.double(), k.double(), v.double(), backend="reference", **options)
    out = attention(q, k, v, backend="flash", **options)
    assert out.dtype == dtype
    assert_close_ratio(out, expected, 1e-2)


def test_dropout_is_handed_on(monkeypatch):
    seen = {}
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = lambda q, k, v, **options: seen.update(options) or v
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    flash_attention(*make_qkv().unbind(2), dataclasses.replace(SERVED, dropout=0.25, window=4))
    assert seen == {"dropout_p": 0.25, "softmax_scale": 0.25, "causal": True, "window_size": (4, 0)}


REFUSALS = {
    "not on 'cpu'": {"device_type": "cpu"},
    "not torch.float32: cast, or use torch.autocast": {"dtype": torch.float32},
    "not torch.float64": {"dtype": torch.float64},
    "head sizes up to 256, not 264": {"head_dim": 264},
    "no reset inside a window": {"reset": torch.zeros(2, 12, dtype=torch.bool)},
    "no logit_clip": {"logit_clip": 1.0},
    "no sink": {"sink": 1},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_say_why(message):
    assert flash_refusal(SERVED) is None
    assert flash_refusal(dataclasses.replace(SERVED, dtype=torch.float16, window=3, causal=True)) is None
    assert message in (flash_refusal(dataclasses.replace(SERVED, **REFUSALS[message])) or "")


def test_a_missing_package_is_named():
    if "flash" in available()["attention"]:
        pytest.skip("flash_attn is installed")
    q, k, v = make_qkv().unbind(2)
    expected = r"backend='flash' cannot serve .* flash_attn is not installed \(pip install 'amago-kernels\[flash\]'\)"
    with pytest.raises(ValueError, match=expected):
        attention(q, k, v, backend="flash")


def test_the_cpu_is_refused(installed):
    assert "flash" in available()["attention"]
    q, k, v = make_qkv(dtype=torch.float32).unbind(2)
    with pytest.raises(ValueError, match=r"CUDA devices, not on 'cpu'; these can: \[.*'sdpa', 'reference'"):
        attention(q, k, v, backend="flash")


def test_auto_never_takes_it(installed, monkeypatch):
    def never(*args, **options):
        raise AssertionError("flash-attn was called")

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", never)
    monkeypatch.setitem(attention.__globals__["_CANDIDATES"], "flash", lambda call: None)
    q, k, v = make_qkv().unbind(2)
    attention(q, k, v, window=3)
    attention(q, k, v, logit_clip=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 0, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_real_package(dtype, window):
    pytest.importorskip("flash_attn")
    exact = make_qkv(63, dtype).double().requires_grad_()
    half = exact.detach().to(dtype).cuda().requires_grad_()
    expected = attention(*exact.unbind(2), window=window, backend="reference")
    out = attention(*half.unbind(2), window=window, backend="flash")
    expected.square().sum().backward()
    out.float().square().sum().backward()
    assert_close_ratio(out.cpu(), expected, 1e-2)
    assert_close_ratio(half.grad.cpu(), exact.grad, 2e-2)
    with pytest.raises(ValueError, match="not torch.float32"):
        attention(*half.float().unbind(2), backend="flash")
