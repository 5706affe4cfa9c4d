"""`attention(backend="triton")`: options, resets, shapes and layouts against the reference in float64."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from reset_patterns import PATTERNS, make_reset
from triton_devices import DEVICES

from amago_kernels import attention, dispatch
from amago_kernels.testing import assert_close_ratio, error_ratio

triton = pytest.importorskip("triton")
FORWARD = importlib.import_module("amago_kernels.attention.triton_forward")
BACKWARD = importlib.import_module("amago_kernels.attention.triton_backward")
LAUNCH = importlib.import_module("amago_kernels.attention.triton_launch")
OPERATORS = importlib.import_module("amago_kernels.attention.triton_op")

# Blocks hold 32 or 64: some windows end inside a block, some beyond one, and some sinks fill more than one.
OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "window0": {"window": 0},
    "window": {"window": 40},
    "sink": {"window": 5, "sink": 2},
    "many_sinks": {"window": 10, "sink": 35},
    "bias": {"sink": 3, "sink_bias": -0.7},
    "bias_full": {"causal": False, "sink": 3, "sink_bias": 1.5},
    "clip": {"logit_clip": 0.5},
    "scale": {"scale": -0.3},
    "everything": {"window": 34, "sink": 4, "sink_bias": 0.4, "logit_clip": 0.6, "scale": 0.3},
}
EVERYTHING = OPTIONS["everything"]


def make_qkv(shape, dtype=torch.float32, device="cpu", seed=0):
    batch, length, heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 3, heads, size, generator=generator, dtype=torch.float64).to(dtype).to(device)


def compare(qkv, reset, options, tolerance, *, run=None):
    """Output and gradients of one call, `qkv` packed `[B, L, 3, H, E]`."""
    exact, given = (qkv.detach().to("cpu", torch.float64).requires_grad_(), qkv.detach().clone().requires_grad_())
    expected = attention(*exact.unbind(2), reset=None if reset is None else reset.cpu(), backend="reference", **options)
    grad = make_qkv([qkv.shape[i] for i in (0, 1, 3, 4)], qkv.dtype, seed=1)[:, :, 0]
    expected.backward(grad.double())
    run = attention if run is None else run
    out = run(*given.unbind(2), reset=reset, backend="triton", **options)
    out.backward(grad.to(qkv.device))
    assert out.dtype == qkv.dtype
    assert_close_ratio(out.cpu(), expected, tolerance)
    got, want = given.grad.cpu().double(), exact.grad
    for i, name in enumerate("qkv"):
        # With one visible key the gradients of q and k are zero up to rounding: measure them against that of v.
        size, usual = float(want[:, :, i].norm()), float(want[:, :, 2].norm())
        size = usual if size < 1e-9 * usual else size
        assert float((got[:, :, i] - want[:, :, i]).norm()) <= tolerance * size, f"gradient of {name}"


@pytest.mark.parametrize("pattern", [*PATTERNS, "inside"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_options_and_resets(monkeypatch, device, name, pattern):
    # As on accelerators, where nobody looks whether there is one.
    monkeypatch.setitem(attention.__globals__, "has_interior_reset", lambda reset: True)
    lanes = 2 if pattern in ("some", "inside") else 1
    if pattern == "inside":
        # A block of queries sees the end of the first keys, not their beginning; the end of one does not see them.
        reset = torch.zeros(2, 70, dtype=torch.bool, device=device)
        reset[0, 20] = reset[1, 50] = True
    else:
        reset = make_reset(pattern, lanes, 70, share=0.06, device=device)
    compare(make_qkv((lanes, 70, 1, 24), device=device), reset, OPTIONS[name], 1e-5)


@pytest.mark.parametrize("name", ["causal", "everything"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 16), (1, 63, 3, 40), (1, 130, 2, 64), (1, 33, 1, 128)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_shapes(device, shape, name):
    reset = make_reset("some", shape[0], shape[1], share=0.03, device=device)
    compare(make_qkv(shape, device=device), reset, OPTIONS[name], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "everything"])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(device, name, dtype):
    reset = make_reset("some", 2, 130, share=0.02, device=device)
    compare(make_qkv((2, 130, 1, 40), dtype, device), reset, OPTIONS[name], 1e-2)


CONFIGURATIONS = [
    (kind, number)
    for kind, forward in FORWARD.forward_kernels.items()
    for number in range(
        max(len(x.configs) for x in (forward, BACKWARD.query_kernels[kind], BACKWARD.key_kernels[kind]))
    )
]


@pytest.mark.parametrize("name", ["causal", "everything"])
@pytest.mark.parametrize(("kind", "number"), CONFIGURATIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_configuration(monkeypatch, device, kind, number, name):
    kernels = (FORWARD.forward_kernels[kind], BACKWARD.query_kernels[kind], BACKWARD.key_kernels[kind])
    for kernel in kernels:
        monkeypatch.setattr(kernel, "configs", [kernel.configs[min(number, len(kernel.configs) - 1)]])
    dtype = torch.float16 if kind in ("half", "long") else torch.float32
    size = 24 if kind in ("half", "single") else 72
    qkv = make_qkv((1, 130, 1, size), dtype, device)
    assert LAUNCH.kind_of(qkv[:, :, 0]) == kind
    reset = make_reset("some", 1, 130, share=0.02, device=device)
    compare(qkv, reset, OPTIONS[name], 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_segments(device):
    length = 1100
    reset = torch.zeros(3, length, dtype=torch.bool)
    reset[0, [0, 5, 63, 64, 1040, 1099]] = True
    reset[1, 1:3] = True
    # Every other row: strides are taken as they are.
    bounds = LAUNCH.segment_bounds(torch.stack([reset, reset.logical_not()], dim=1).to(device)[:, 0]).cpu()
    for lane in range(3):
        edges = [0, *(t for t in reset[lane].nonzero().flatten().tolist() if t > 0), length]
        starts = [first for first, end in zip(edges, edges[1:], strict=False) for _ in range(first, end)]
        stops = [end for first, end in zip(edges, edges[1:], strict=False) for _ in range(first, end)]
        assert bounds[:, lane].tolist() == [starts, stops]


def layouts(device):
    packed = make_qkv((2, 20, 2, 16), device=device)
    yield "packed", packed.unbind(2)
    yield "heads first", [x.transpose(1, 2).contiguous().transpose(1, 2) for x in packed.unbind(2)]
    yield "time first", [x.transpose(0, 1).contiguous().transpose(0, 1) for x in packed.unbind(2)]
    yield "last stride", [x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for x in packed.unbind(2)]
    odd = torch.empty(packed.numel() + 1, device=device)[1:].view(packed.shape).copy_(packed)
    yield "odd offset", odd.unbind(2)
    yield "odd stride", torch.nn.functional.pad(packed, (0, 3))[..., :16].unbind(2)
    yield "one lane of many", [x[1:] for x in packed.unbind(2)]
    yield "shared heads", [x[:, :, :1].expand(-1, -1, 2, -1) for x in packed.unbind(2)]


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides(device):
    reset = make_reset("some", 2, 20, share=0.05, device=device)
    for name, (q, k, v) in layouts(device):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k, v)]
        lanes = reset[: q.shape[0]]
        results = [
            attention(*x, reset=lanes, window=9, backend=backend)
            for x, backend in (((q, k, v), "triton"), (plain, "reference"))
        ]
        assert_close_ratio(*results, 1e-5, name)
        # What `sum` hands back has no strides at all.
        got, want = (torch.autograd.grad(y.sum(), x) for y, x in zip(results, ((q, k, v), plain), strict=True))
        assert_close_ratio(torch.stack(got), torch.stack(want), 1e-5, name)


@pytest.mark.parametrize("device", DEVICES)
def test_every_entry_is_written(device, monkeypatch):
    """New memory holds NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(1 << 20)

    monkeypatch.setattr(torch, "empty", lambda *args, **options: fill(empty(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: fill(empty_like(*args, **options)))
    q, k, v = (x.contiguous() for x in make_qkv((1, 70, 2, 40), device=device).unbind(2))
    options = (make_reset("some", 1, 70, device=device), True, 20, 2, 0.5, 0.7, 0.2)
    out, lse, bounds = FORWARD.attention_forward(q, k, v, *options)
    grads = BACKWARD.attention_backward(out, q, k, v, out, lse, bounds, *options[1:])
    assert all(bool(x.isfinite().all()) for x in (out, lse, *grads))
    assert int(bounds.max()) == 70


@pytest.mark.parametrize("device", DEVICES)
def test_the_future_and_other_segments_are_exactly_invisible(device):
    before, after = (make_qkv((1, 70, 1, 16), device=device, seed=seed) for seed in (0, 9))
    reset = torch.zeros(1, 70, dtype=torch.bool, device=device)
    reset[:, 31] = True
    changed = torch.cat([after[:, :31], before[:, 31:50], after[:, 50:]], dim=1)
    one, other = (attention(*x.unbind(2), reset=reset, backend="triton") for x in (before, changed))
    assert torch.equal(one[:, 31:50], other[:, 31:50])
    assert error_ratio(one[:, :31], other[:, :31]) > 0.1


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_the_same_twice(device):
    grads = []
    for _ in range(2):
        qkv = make_qkv((1, 70, 2, 16), device=device).requires_grad_()
        attention(*qkv.unbind(2), backend="triton", **EVERYTHING).square().sum().backward()
        grads.append(qkv.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_decides_the_dtype(device):
    q, k, v = make_qkv((1, 33, 1, 16), device=device).unbind(2)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = attention(q, k, v, backend="triton")
        again = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="triton")
    assert out.dtype == torch.float32
    assert torch.equal(out, again.float())


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_operators(device, resets):
    q, k, v = (x.detach().requires_grad_() for x in make_qkv((1, 5, 2, 16), device=device).unbind(2))
    reset = make_reset("some", 1, 5, device=device) if resets else None
    options = (True, 2, 1, 0.5, None, 0.25)
    torch.library.opcheck(OPERATORS._attention, (q, k, v, reset, *options))
    with torch.no_grad():
        saved = OPERATORS._attention(q, k, v, reset, *options)
    arguments = [x.detach() for x in (q, q, k, v, *saved)]
    torch.library.opcheck(OPERATORS._attention_backward, (*arguments, *options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_a_whole(device):
    torch.compiler.reset()
    run = torch.compile(attention, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    compare(
        make_qkv((1, 9, 1, 16), device=device), make_reset("some", 1, 9, device=device), {"window": 3}, 1e-5, run=run
    )


def test_auto_takes_it_for_what_sdpa_has_no_fast_kernel_for(monkeypatch):
    taken = []
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    names = attention.__globals__
    monkeypatch.setitem(names["_CANDIDATES"], "triton", lambda call: "no" if call.head_dim > 128 else None)
    for name, run in list(names["_BACKENDS"].items()):
        record = lambda q, k, v, call, name=name, run=run: taken.append(name) or q  # noqa: E731
        monkeypatch.setitem(names["_BACKENDS"], name, record)
    q = torch.zeros(1, 4, 1, 16)
    wide = torch.zeros(1, 4, 1, 136)
    reset = make_reset("last", 1, 4)
    for x, options in [(q, {}), (q, {"causal": False}), (q, {"window": 9}), (q, {"reset": make_reset("first", 1, 4)})]:
        attention(x, x, x, **options)
    assert taken == ["sdpa"] * 4
    taken.clear()
    for options in ({"window": 2}, {"sink": 1, "sink_bias": 1.0}, {"logit_clip": 1.0}, {"reset": reset}):
        attention(q, q, q, **options)
    assert taken == ["triton"] * 4
    taken.clear()
    attention(wide, wide, wide, window=1)
    attention(wide, wide, wide, logit_clip=1.0)
    assert taken == ["sdpa", "reference"]


REFUSALS = {
    "multiples of 8 from 16 to 128, not 12": {"size": 12},
    "multiples of 8 from 16 to 128, not 8": {"size": 8},
    "multiples of 8 from 16 to 128, not 136": {"size": 136},
    "not torch.float64": {"dtype": torch.float64},
    r"knows no dropout, and dropout=0.1 is given": {"dropout": 0.1},
}


@pytest.mark.parametrize("message", REFUSALS)
@pytest.mark.parametrize("device", DEVICES)
def test_refusals_say_why(device, message):
    options = dict(REFUSALS[message])
    shape = (1, 4, 1, options.pop("size", 16))
    q, k, v = make_qkv(shape, options.pop("dtype", torch.float32), device).unbind(2)
    with pytest.raises(ValueError, match=f"backend='triton' cannot serve this attention call: .*{message}"):
        attention(q, k, v, backend="triton", **options)


def test_the_cpu_is_refused_outside_the_interpreter():
    code = """
import torch
from amago_kernels import attention
x = torch.zeros(1, 4, 1, 16)
try:
    attention(x, x, x, backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "backend='triton' cannot serve this attention call: Triton kernels run on CUDA devices" in out.stdout
    assert "on cpu" in out.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "full", "sink", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_windows(name, dtype):
    options = dict(OPTIONS[name])
    if "window" in options:
        options |= {"window": 300, "sink": 4 * options.get("sink", 0)}
    reset = make_reset("some", 2, 1500, share=0.004, device="cuda")
    # Of a million scores, some lie so near the edge of the clamp that rounding decides whether a slope is 0.
    exact = dtype == torch.float32 and "logit_clip" not in options
    compare(make_qkv((2, 1500, 2, 64), dtype, "cuda"), reset, options, 1e-5 if exact else 1e-2)


@pytest.mark.gpu
def test_replays_in_a_cuda_graph():
    qkv = make_qkv((2, 200, 2, 64), torch.bfloat16, "cuda").requires_grad_()
    reset = make_reset("some", 2, 200, share=0.02, device="cuda")

    def run():
        out = attention(*qkv.unbind(2), reset=reset, window=50, sink=2, backend="triton")
        (grad,) = torch.autograd.grad(out.square().sum(), qkv)
        return out.detach(), grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        qkv.copy_(make_qkv((2, 200, 2, 64), torch.bfloat16, "cuda", seed=3))
    reset.copy_(reset.roll(7, dims=1))
    graph.replay()
    for got, want in zip(captured, run(), strict=True):
        assert torch.equal(got, want)
