"""Triton's `linear_scan` against a loop in float64: in the interpreter on the CPU, or for real."""

from __future__ import annotations

import pytest
import torch
from linear_scan_cases import compare, make_inputs, scalar
from reset_patterns import PATTERNS, make_reset
from triton_devices import DEVICES

from amago_kernels import dispatch, linear_scan
from amago_kernels.testing import assert_close_ratio, error_ratio, poisoned

BACKEND = "triton"


def inputs_on(device, batch, length, channels, pairs):
    """Like `make_inputs`, in float32 and differentiable."""
    return [x.to(device, torch.float32).requires_grad_() for x in make_inputs(batch, length, channels, pairs)]


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_output_state_and_gradients(device, pairs, kind):
    for batch, length in ((2, 1), (2, 19)) if device == "cpu" else ((3, 1), (3, 63), (2, 130)):
        inputs = make_inputs(batch, length, 5, pairs)
        compare(inputs, make_reset(kind, batch, length), pairs, BACKEND, torch.float32, 1e-5, device=device)


@pytest.mark.parametrize(
    ("length", "channels", "pairs"), [(63, 40, False), (130, 60, False), (33, 60, True), (48, 16, True)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_several_tiles_and_blocks(device, length, channels, pairs):
    inputs = make_inputs(1, length, channels, pairs)
    compare(inputs, make_reset("some", 1, length), pairs, BACKEND, torch.float32, 1e-5, device=device)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_accumulates_in_float32(device, dtype, pairs):
    inputs = [x.to(dtype).double() for x in make_inputs(2, 20, 8, pairs)]
    compare(inputs, make_reset("some", 2, 20), pairs, BACKEND, dtype, 1e-2, device=device)
    length = 30 if device == "cpu" else 1000
    a, b = torch.full((1,), 1.0, device=device), torch.full((1, length, 1), 1.0, dtype=dtype, device=device)
    b[:, 1:] = 2.0**-12
    h, last = linear_scan(a, b, backend=BACKEND)
    assert last.item() == 1.0 + (length - 1) * 2.0**-12 and h[0, 1].item() == 1.0


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("shape", [(5,), (1,), (11, 5), (11, 1), (3, 1, 5), (3, 11, 1), (1, 1, 1)])
@pytest.mark.parametrize("device", DEVICES)
def test_factors_that_broadcast(device, shape, pairs):
    _, b, state = make_inputs(3, 11, 5, pairs)
    a = torch.randn(*shape, *((2,) if pairs else ()), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    compare([0.6 * a, b, state], make_reset("some", 3, 11), pairs, BACKEND, torch.float32, 1e-5, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_dtypes_and_no_initial_state(device):
    a, b, _ = (x.detach() for x in inputs_on(device, 2, 9, 5, False))
    a, b = a.requires_grad_(), b.bfloat16().requires_grad_()
    exact = [x.detach().cpu().double().requires_grad_() for x in (a, b)]
    expected = scalar(*linear_scan(*exact, backend="reference"))
    out = linear_scan(a, b, backend=BACKEND)
    assert (out[0].dtype, out[1].dtype) == (torch.bfloat16, torch.float32)
    got, wanted = torch.autograd.grad(scalar(*out), [a, b]), torch.autograd.grad(expected, exact)
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16]
    for one, other in zip(got, wanted, strict=True):
        assert_close_ratio(one, other, 1e-2)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_every_configuration(device, pairs, number, monkeypatch):
    from amago_kernels.scan import triton_linear

    for kernel in (triton_linear.scan_kernel, triton_linear.scan_backward_kernel):
        assert len(kernel.configs) == 3
        monkeypatch.setattr(kernel, "configs", [kernel.configs[number]])
    compare(
        make_inputs(1, 18, 33, pairs), make_reset("some", 1, 18), pairs, BACKEND, torch.float32, 1e-5, device=device
    )


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_nan_before_a_reset_is_forgotten(device, pairs):
    for length, at in ((1, 0), (20, 9)):
        a, b, _ = (x.detach() for x in inputs_on(device, 2, length, 3, pairs))
        reset = torch.zeros(2, length, dtype=torch.bool, device=device)
        reset[0, at] = True
        a[0, :at], b[0, :at] = float("nan"), float("nan")
        state = poisoned(b[:, 0].shape, device=device)
        state[1] = 0.0
        a.requires_grad_()
        h, last = linear_scan(a, b, initial_state=state, reset=reset, pairs=pairs, backend=BACKEND)
        assert h[0, :at].isnan().any(dim=-1).all()
        assert h[0, at:].isfinite().all() and h[1].isfinite().all() and last.isfinite().all()
        (grad,) = torch.autograd.grad(h[:, at:].sum() + last.sum(), [a])
        assert grad[:, at:].isfinite().all() and not grad[0, at].any()


@pytest.mark.parametrize("device", DEVICES)
def test_products_that_overflow_do_no_harm(device):
    """300 factors of 256: any product of 17 of them is infinite, and the states are zero until late."""
    length = 60 if device == "cpu" else 300
    a, b = torch.full((1, length, 3), 256.0, device=device), torch.zeros(1, length, 3, device=device)
    b[:, -10:] = 1.0
    b.requires_grad_()
    h, last = linear_scan(a, b, backend=BACKEND)
    assert not h[:, :-10].any() and h.isfinite().all()
    assert_close_ratio(last, torch.full((1, 3), float(sum(256**n for n in range(10)))), 1e-6)
    (grad,) = torch.autograd.grad(h[:, :3].sum(), [b])
    assert not grad[:, 3:].any() and grad[0, :3, 0].tolist() == [1.0 + 256.0 + 65536.0, 257.0, 1.0]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_any_strides(device, pairs):
    plain = inputs_on(device, 3, 10, 4, pairs)
    twisted = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in plain]
    by_time = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in plain[:2]]
    reset = make_reset("some", 3, 10, device=device)
    results = []
    for a, b, state in (plain, twisted, [*by_time, plain[2]]):
        h, last = linear_scan(a, b, initial_state=state, reset=reset.t().contiguous().t(), pairs=pairs, backend=BACKEND)
        results.append([h, last, *torch.autograd.grad(scalar(h, last), [a, b, state])])
    for one, *others in zip(*results, strict=True):
        assert all(error_ratio(other, one) <= 1e-6 for other in others)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_no_lanes(device, pairs):
    a, b, state = (x[:0].detach().requires_grad_() for x in inputs_on(device, 1, 4, 3, pairs))
    h, last = linear_scan(a, b, initial_state=state, pairs=pairs, backend=BACKEND)
    grads = torch.autograd.grad(h.sum() + last.sum(), [a, b, state])
    assert [x.shape for x in grads] == [a.shape, b.shape, state.shape]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_registration(device, pairs):
    a, b, state = inputs_on(device, 2, 3, 3, pairs)
    reset = make_reset("some", 2, 3, device=device)
    ops = torch.ops.amago_kernels
    torch.library.opcheck(ops.linear_scan_triton.default, (a, b, state, reset, pairs))
    torch.library.opcheck(ops.linear_scan_triton.default, (a[:1, :1], b, None, None, pairs))
    h, last = (x.detach() for x in ops.linear_scan_triton(a, b, state, reset, pairs))
    grads = torch.randn_like(h), torch.randn_like(last)
    for one in (state.detach(), None):
        torch.library.opcheck(ops.linear_scan_triton_backward.default, (*grads, a.detach(), h, one, reset, pairs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_in_one_piece(device):
    torch._dynamo.reset()
    inputs, reset = inputs_on(device, 2, 5, 3, False), make_reset("some", 2, 5, device=device)

    def layer(a, b, state):
        h, last = linear_scan(a.exp(), b, initial_state=state, reset=reset, backend=BACKEND)
        return h.square().sum() + last.sum()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs)])
    for one, other in zip(*results, strict=True):
        assert_close_ratio(one, other, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_refusals_say_why(device, monkeypatch):
    a, b, state = (x.detach() for x in inputs_on(device, 2, 5, 3, False))
    for inputs in ((a.double(), b, state), (a, b.double(), state), (a, b, state.double())):
        with pytest.raises(ValueError, match="not torch.float64; these can: .*'blocked'"):
            linear_scan(*inputs[:2], initial_state=inputs[2], backend=BACKEND)
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    for inputs in ((a.cpu(), b), (a, b.cpu())):
        with pytest.raises(ValueError, match="Triton kernels run on CUDA devices, and the input is on cpu"):
            linear_scan(*inputs, backend=BACKEND)


@pytest.mark.gpu
@pytest.mark.parametrize("pairs", [False, True])
def test_in_a_cuda_graph(pairs):
    inputs, reset = inputs_on("cuda", 4, 200, 48, pairs), make_reset("some", 4, 200, device="cuda")

    def step():
        h, last = linear_scan(inputs[0], inputs[1], initial_state=inputs[2], reset=reset, pairs=pairs, backend=BACKEND)
        grads = torch.autograd.grad(h.square().sum() + last.sum(), inputs)
        # Without their graph, whose nodes belong to a stream.
        return h.detach(), last.detach(), *grads

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs[1].normal_()
        reset.logical_not_()
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_sizes(dtype, pairs):
    tail = (300, 2) if pairs else (600,)
    shapes = (8, 1000, *tail), (8, 1000, *tail), (8, *tail)
    inputs = [torch.rand(shape, device="cuda").sub(0.2).to(dtype).requires_grad_() for shape in shapes]
    reset = make_reset("some", 8, 1000, share=0.01, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for (a, b, state), backend in ((inputs, "auto"), (exact, "reference")):
        a = a * 0.7
        h, last = linear_scan(a, b, initial_state=state, reset=reset, pairs=pairs, backend=backend)
        results.append((h, last))
    grads = [
        torch.autograd.grad(scalar(*result), leaves) for result, leaves in zip(results, (inputs, exact), strict=True)
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for one, other in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        assert_close_ratio(one, other, tolerance)
