"""`attention`: every backend against the reference in float64, and the reference against loops and numbers by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from triton_devices import without_triton

from amago_kernels import attention
from amago_kernels.testing import assert_close_ratio

OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 5},
    "window0": {"window": 0},
    "sink": {"window": 3, "sink": 2},
    "sink_bias": {"window": 3, "sink": 2, "sink_bias": -0.7},
    "bias_only": {"sink": 1, "sink_bias": 1.5},
    "clip": {"logit_clip": 0.8},
    "clip_sink": {"window": 4, "sink": 1, "sink_bias": 0.5, "logit_clip": 0.6},
    "scale": {"scale": 0.3},
}
RESETS = ("none", "first", "last", "all", "some")
# "flash" and "flex" have their own tests, as Triton has: they serve neither all of these options nor these sizes.
BACKENDS = tuple(name for name in without_triton("attention") if name not in ("flash", "flex"))


def make_reset(kind: str, batch: int, length: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    reset = torch.zeros(batch, length, dtype=torch.bool)
    if kind == "first":
        reset[:, 0] = True
    elif kind == "last":
        reset[:, -1] = True
    elif kind == "all":
        reset[:] = True
    else:
        generator = torch.Generator().manual_seed(3)
        reset[:] = torch.rand(batch, length, generator=generator) < 0.2
    return reset


def make_qkv(batch: int, length: int, heads: int, size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 3, heads, size, generator=generator, dtype=torch.float64).to(dtype)


def by_loops(q, k, v, reset, *, causal=True, window=None, sink=0, sink_bias=0.0, logit_clip=None, scale=None):
    """The specification once more, one query at a time."""
    batch, length, heads, size = q.shape
    scale = size**-0.5 if scale is None else scale
    out = torch.zeros_like(q)
    for b, h, i in itertools.product(range(batch), range(heads), range(length)):
        segment = [0] * length
        for t in range(1, length):
            segment[t] = t if reset is not None and bool(reset[b, t]) else segment[t - 1]
        scores, keys = [], []
        for j in range(length):
            if segment[j] != segment[i] or (causal and j > i):
                continue
            is_sink = j - segment[j] < sink
            if window is not None and i - j > window and not is_sink:
                continue
            score = float(q[b, i, h] @ k[b, j, h]) * scale + (sink_bias if is_sink else 0.0)
            if logit_clip is not None:
                score = max(-logit_clip, min(logit_clip, score))
            scores.append(score)
            keys.append(j)
        weights = [math.exp(s - max(scores)) for s in scores]
        out[b, i, h] = sum(w * v[b, j, h] for w, j in zip(weights, keys, strict=True)) / sum(weights)
    return out


SERVED = [
    (backend, name)
    for backend in ("auto", *BACKENDS)
    for name, options in OPTIONS.items()
    if backend != "sdpa" or "logit_clip" not in options
]


@pytest.mark.parametrize("kind", RESETS)
@pytest.mark.parametrize("name", OPTIONS)
def test_reference_equals_loops(name, kind):
    qkv = make_qkv(2, 9, 2, 4, torch.float64)
    reset = make_reset(kind, 2, 9)
    q, k, v = qkv.unbind(2)
    out = attention(q, k, v, reset=reset, backend="reference", **OPTIONS[name])
    assert_close_ratio(out, by_loops(q, k, v, reset, **OPTIONS[name]), 1e-12)


@pytest.mark.parametrize("shape", [(2, 1, 1, 8), (2, 63, 2, 40), (1, 130, 2, 60)])
@pytest.mark.parametrize("kind", RESETS)
@pytest.mark.parametrize(("backend", "name"), SERVED)
def test_output_and_gradients(backend, name, kind, shape):
    options = OPTIONS[name]
    exact = make_qkv(*shape, torch.float64).requires_grad_()
    single = exact.detach().float().requires_grad_()
    weights = make_qkv(*shape, torch.float64, seed=1)[:, :, 0]
    reset = make_reset(kind, shape[0], shape[1])
    expected = attention(*exact.unbind(2), reset=reset, backend="reference", **options)
    out = attention(*single.unbind(2), reset=reset, backend=backend, **options)
    (expected * weights).sum().backward()
    (out * weights.float()).sum().backward()
    assert out.dtype == torch.float32
    assert_close_ratio(out, expected, 1e-5)
    for i, which in enumerate("qkv"):
        # With one visible key the gradient of q and k is zero up to rounding: measure it against that of v.
        scale = max(1.0, float(exact.grad[:, :, 2].norm()))
        got, want = single.grad[:, :, i].double(), exact.grad[:, :, i]
        assert float((got - want).norm()) / max(scale, float(want.norm())) < 1e-5, f"gradient of {which}"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", RESETS)
@pytest.mark.parametrize(("backend", "name"), SERVED)
def test_output_and_gradients_on_the_gpu(backend, name, kind):
    exact = make_qkv(2, 63, 2, 40, torch.float64).requires_grad_()
    single = exact.detach().float().cuda().requires_grad_()
    reset = make_reset(kind, 2, 63)
    expected = attention(*exact.unbind(2), reset=reset, backend="reference", **OPTIONS[name])
    moved = None if reset is None else reset.cuda()
    out = attention(*single.unbind(2), reset=moved, backend=backend, **OPTIONS[name])
    expected.square().sum().backward()
    out.square().sum().backward()
    assert_close_ratio(out.cpu(), expected, 1e-5)
    assert_close_ratio(single.grad.cpu(), exact.grad, 1e-5)


def test_by_hand():
    q = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(1, 2, 1, 2)
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    v = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 2, 1, 2)
    for backend in BACKENDS:
        out = attention(q, k, v, backend=backend).view(2, 2)
        torch.testing.assert_close(out, torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
        query = torch.tensor([[1.0, 0.0], [2.0, 1.0]]).view(1, 2, 1, 2)
        out = attention(query, k, v, backend=backend).view(2, 2)
        torch.testing.assert_close(out[1], torch.tensor([1.6604769, 2.6604769]))


def test_clip_by_hand():
    """Scores (3, -5) clipped at 2 weigh like (2, -2)."""
    q = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    k = torch.tensor([3.0, -5.0], dtype=torch.float64).view(1, 2, 1, 1)
    v = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    out = attention(q, k, v, logit_clip=2.0, scale=1.0)
    assert float(out[0, 1]) == pytest.approx(1.0 / (1.0 + math.exp(-4.0)))


@pytest.mark.parametrize(("sink", "row", "seen"), [(0, 3, [1, 2, 3]), (1, 3, [0, 1, 2, 3]), (1, 5, [0, 3, 4, 5])])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_visibility(backend, sink, row, seen):
    zeros = torch.zeros(1, 6, 1, 8, dtype=torch.float64)
    v = torch.eye(6, 8, dtype=torch.float64).view(1, 6, 1, 8)
    out = attention(zeros, zeros, v, window=2, sink=sink, backend=backend)[0, row, 0]
    assert out.nonzero().flatten().tolist() == seen


@pytest.mark.parametrize("kind", ["none", "some"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_is_exactly_invisible(backend, kind):
    q, k, v = make_qkv(2, 40, 2, 16, torch.float32).unbind(2)
    later = make_qkv(2, 40, 2, 16, torch.float32, seed=5).unbind(2)
    reset = make_reset(kind, 2, 40)
    before = attention(q, k, v, reset=reset, backend=backend)
    cut = 17
    q, k, v = (torch.cat([old[:, :cut], new[:, cut:]], dim=1) for old, new in zip((q, k, v), later, strict=True))
    after = attention(q, k, v, reset=reset, backend=backend)
    assert torch.equal(before[:, :cut], after[:, :cut])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    q, k, v = make_qkv(2, 13, 3, 8, torch.float32).unbind(2)
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), window=4, backend=backend)
    twisted = [x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for x in (q, k, v)]
    assert not twisted[0].is_contiguous()
    assert_close_ratio(attention(*twisted, window=4, backend=backend), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, dtype):
    exact = make_qkv(2, 33, 2, 16, torch.float64)
    reset = make_reset("some", 2, 33)
    expected = attention(*exact.to(dtype).double().unbind(2), reset=reset, backend="reference")
    out = attention(*exact.to(dtype).unbind(2), reset=reset, backend=backend)
    assert out.dtype == dtype
    assert_close_ratio(out, expected, 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtype_and_the_reference_alone(backend):
    q, k, v = make_qkv(2, 33, 2, 16, torch.float32).unbind(2)
    expected = attention(q, k, v, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, backend=backend)
    assert out.dtype == torch.float32
    assert_close_ratio(out, expected, 0.0 if backend == "reference" else 1e-2)


def test_dropout_drops_weights():
    torch.manual_seed(0)
    q, k, v = make_qkv(2, 32, 2, 8, torch.float32).unbind(2)
    for backend in BACKENDS:
        plain = attention(q, k, v, backend=backend)
        dropped = torch.stack([attention(q, k, v, dropout=0.3, backend=backend) for _ in range(400)])
        assert not torch.equal(dropped[0], dropped[1])
        assert float((dropped.mean(0) - plain).abs().mean()) < 0.03


def test_compiles_without_looking_at_resets():
    """While compiling, nothing may depend on the values of `reset`; fullgraph would refuse it."""
    qkv = make_qkv(1, 6, 1, 8, torch.float32)
    reset = make_reset("some", 1, 6)

    def run(qkv, reset):
        return attention(*qkv.unbind(2), reset=reset)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert_close_ratio(compiled(qkv, reset), run(qkv, reset), 1e-6)


BAD_CALLS = {
    "backend='fast' is not known": {"backend": "fast"},
    "backend='triton' cannot serve": {"backend": "triton"},
    "backend='flash' cannot serve": {"backend": "flash"},
    "backend='flex' cannot serve": {"backend": "flex"},
    "logit_clip is not something SDPA can do": {"backend": "sdpa", "logit_clip": 1.0},
    "window=-1": {"window": -1},
    "window needs causal=True": {"window": 1, "causal": False},
    "window=1.5": {"window": 1.5},
    "sink=-2": {"sink": -2},
    "sink=0.5": {"sink": 0.5},
    "sink_bias=nan": {"sink_bias": float("nan")},
    "scale=inf": {"scale": float("inf")},
    "dropout=1.5": {"dropout": 1.5},
    "reset is on meta and q on cpu": {"reset": torch.zeros(1, 4, dtype=torch.bool, device="meta")},
    "logit_clip=0.0": {"logit_clip": 0.0},
    "reset is torch.int64": {"reset": torch.zeros(1, 4, dtype=torch.int64)},
    r"give torch.bool \(1, 4\)": {"reset": torch.zeros(1, 3, dtype=torch.bool)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_refusals_say_why(message):
    q, k, v = make_qkv(1, 4, 1, 8, torch.float32).unbind(2)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **BAD_CALLS[message])


def test_shapes_and_dtypes_are_checked():
    q, k, v = make_qkv(1, 4, 1, 8, torch.float32).unbind(2)
    with pytest.raises(ValueError, match="must share one shape"):
        attention(q, k[:, :3], v)
    with pytest.raises(ValueError, match="one floating dtype"):
        attention(q, k.double(), v)
    with pytest.raises(ValueError, match="L=0"):
        attention(q[:, :0], k[:, :0], v[:, :0])
    with pytest.raises(ValueError, match="E=0"):
        attention(q[..., :0], k[..., :0], v[..., :0])
    with pytest.raises(ValueError, match="v is on meta and q on cpu"):
        attention(q, k, v.to("meta"))


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("causal", [True, False])
def test_scale_need_not_be_positive(scale, causal):
    q, k, v = make_qkv(2, 7, 2, 16, torch.float32).unbind(2)
    expected = attention(q, k, v, scale=scale, causal=causal, backend="reference")
    assert_close_ratio(attention(q, k, v, scale=scale, causal=causal), expected, 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_numbers_may_change_in_compiled_code():
    q, k, v = make_qkv(1, 5, 1, 16, torch.float32).unbind(2)
    options = [{"scale": number, "sink": 1, "sink_bias": number, "window": 2} for number in (0.5, 0.7, 0.9)]
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    for chosen in options:
        assert_close_ratio(compiled(q, k, v, **chosen), attention(q, k, v, **chosen), 1e-6)
