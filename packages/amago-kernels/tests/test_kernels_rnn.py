"""`gru_layer` and `lstm_layer`: every backend against PyTorch's modules and the reference, with gradients."""

from __future__ import annotations

import pytest
import torch
from reset_patterns import PATTERNS, make_reset
from torch.utils.checkpoint import checkpoint
from triton_devices import without_triton

from amago_kernels import gru_layer, lstm_layer
from amago_kernels.rnn import gru, lstm
from amago_kernels.testing import assert_close_ratio

LAYERS = ("gru", "lstm")
BACKENDS = ("auto", *without_triton("gru_layer"))
GATES = {"gru": 3, "lstm": 4}
STATES = {"gru": 1, "lstm": 2}
OPS = {
    "gru": (torch.ops.amago_kernels.gru_forward.default, torch.ops.amago_kernels.gru_backward.default),
    "lstm": (torch.ops.amago_kernels.lstm_forward.default, torch.ops.amago_kernels.lstm_backward.default),
}
FUNCTIONS = {"gru": (gru._forward, gru._backward), "lstm": (lstm._forward, lstm._backward)}


def run(kind, inputs, **options):
    """Hidden states, and for the LSTM the final cell."""
    return (gru_layer(*inputs, **options),) if kind == "gru" else lstm_layer(*inputs, **options)


def make_inputs(kind, batch, length, inputs, size, dtype=torch.float64, device=None):
    generator = torch.Generator().manual_seed(0)
    rows = GATES[kind] * size
    states = [(batch, size)] * STATES[kind]
    shapes = [(batch, length, inputs), *states, (rows, inputs), (rows, size), (rows,), (rows,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(device=device, dtype=dtype).requires_grad_() for tensor in tensors]


def weigh(outputs):
    """A sum in which every entry of every output counts differently."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device) for out in outputs]
    return sum((out.double() * weight).sum() for out, weight in zip(outputs, weights, strict=True))


def compare(outputs, inputs, expected, exact, tolerance):
    """Outputs, and the gradient of every input."""
    for out, want in zip(outputs, expected, strict=True):
        assert_close_ratio(out, want, tolerance)
    grads = torch.autograd.grad(weigh(outputs), inputs)
    for got, want in zip(grads, torch.autograd.grad(weigh(expected), exact), strict=True):
        assert_close_ratio(got, want, tolerance, f"gradient {tuple(want.shape)}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_torch(kind, backend, dtype):
    module = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind](5, 7, batch_first=True, dtype=torch.float64)
    x, *rest = make_inputs(kind, 3, 11, 5, 7)
    states, weights = rest[:-4], [module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0, module.bias_hh_l0]
    before = tuple(state.unsqueeze(0) for state in states)
    out, last = module(x, before[0] if kind == "gru" else before)
    hidden, *cell = (last,) if kind == "gru" else last
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, *states, *weights)]
    got = run(kind, inputs, backend=backend)
    assert all(tensor.dtype == dtype for tensor in got)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close_ratio(got[0][:, -1], hidden[0], tolerance)
    compare(got, inputs, (out, *(tensor[0] for tensor in cell)), [x, *states, *weights], tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 3, 4), (2, 1, 3, 4), (3, 63, 5, 8), (1, 130, 4, 3)])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_gradients(kind, dtype, pattern, shape):
    exact, inputs = make_inputs(kind, *shape), make_inputs(kind, *shape, dtype=dtype)
    reset = make_reset(pattern, *shape[:2])
    expected = run(kind, exact, reset=reset, backend="reference")
    out = run(kind, inputs, reset=reset, backend="fused")
    compare(out, inputs, expected, exact, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_half_precision_computes_in_float32(kind, backend, dtype):
    """Equal to float32 on the rounded inputs; the state stays in the dtype it is given in."""
    inputs = make_inputs(kind, 3, 33, 5, 6, dtype)
    for i in range(1, 1 + STATES[kind]):
        inputs[i] = inputs[i].detach().float().requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    reset = make_reset("some", 3, 33)
    out = run(kind, inputs, reset=reset, backend=backend)
    expected = run(kind, exact, reset=reset, backend="reference")
    for got, want in zip(out, expected, strict=True):
        assert got.dtype == torch.float32
        assert_close_ratio(got, want, 1e-6)
    grads = torch.autograd.grad(weigh(out), inputs)
    for got, want, tensor in zip(grads, torch.autograd.grad(weigh(expected), exact), inputs, strict=True):
        assert got.dtype == tensor.dtype
        assert_close_ratio(got, want, 1e-2 if tensor.dtype == dtype else 1e-5)
    rounded = run(kind, [tensor.detach().to(dtype) for tensor in inputs], reset=reset, backend=backend)
    for got, want in zip(rounded, expected, strict=True):
        assert got.dtype == dtype
        assert_close_ratio(got, want, 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_reset_equals_a_fresh_start(kind, backend):
    x, *rest = make_inputs(kind, 2, 9, 3, 4)
    states, weights = rest[:-4], rest[-4:]
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 4] = True
    out = run(kind, (x, *states, *weights), reset=reset, backend=backend)
    zeros = [torch.zeros(1, 4, dtype=torch.float64) for _ in states]
    fresh = run(kind, (x[:1, 4:], *zeros, *weights), backend=backend)
    other = run(kind, (x[1:], *(state[1:] for state in states), *weights), backend=backend)
    assert_close_ratio(out[0][:1, 4:], fresh[0], 1e-12)
    for got, *want in zip(out, fresh, other, strict=True):
        lane = got[:, -1] if got.dim() == 3 else got
        assert_close_ratio(lane, torch.cat([w[:, -1] if w.dim() == 3 else w for w in want]), 1e-12)
    grads = torch.autograd.grad(out[0][0, 4:].sum(), [x, *states], retain_graph=True)
    assert not grads[0][0, :4].any() and grads[0][0, 4].all()
    assert not any(grad.any() for grad in grads[1:])
    (grad,) = torch.autograd.grad(out[0][0, 3].sum(), x)
    assert grad[0, :4].all() and not grad[0, 4:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_nan_before_a_reset_is_forgotten(kind, backend):
    x, *rest = (tensor.detach() for tensor in make_inputs(kind, 2, 9, 3, 4))
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 4] = True
    x[0, :4] = float("nan")
    out = run(kind, (x, *rest), reset=reset, backend=backend)
    assert out[0][0, :4].isnan().all()
    assert out[0][0, 4:].isfinite().all() and all(tensor.isfinite().all() for tensor in out[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gru_by_hand(backend):
    """One unit, input weights 1, recurrent weights .5, recurrent candidate bias .1, inputs 1 and -1."""
    x, bias = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([0.0, 0.0, 0.1])
    weights = (torch.ones(3, 1), torch.full((3, 1), 0.5), torch.zeros(3), bias)
    out = gru_layer(x, torch.zeros(1, 1), *weights, backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.2126327, -0.4600436]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lstm_by_hand(backend):
    """One unit, input weights 1, recurrent weights .5, forget bias 1, inputs 1 and -1."""
    x, bias = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    weights = (torch.ones(4, 1), torch.full((4, 1), 0.5), torch.zeros(4), bias)
    out, cell = lstm_layer(x, torch.zeros(1, 1), torch.zeros(1, 1), *weights, backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.3696064, 0.0298897]))
    torch.testing.assert_close(cell.flatten(), torch.tensor([0.0977391]))


@pytest.mark.parametrize("kind", LAYERS)
def test_any_strides_and_no_gradient_for_x(kind):
    x, *rest = make_inputs(kind, 3, 6, 4, 5)
    twisted = x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    turned = [tensor.detach().t().contiguous().t() if tensor.dim() == 2 else tensor.detach() for tensor in rest]
    turned = [tensor.requires_grad_() for tensor in turned]
    out, again = run(kind, (x, *rest), backend="fused"), run(kind, (twisted, *turned), backend="fused")
    compare(again, turned, out, rest, 1e-12)


@pytest.mark.parametrize("used", [0, 1])
def test_lstm_gradients_of_one_output_alone(used):
    exact, inputs = make_inputs("lstm", 2, 5, 3, 4), make_inputs("lstm", 2, 5, 3, 4)
    wanted = torch.autograd.grad(run("lstm", exact, backend="reference")[used].square().sum(), exact)
    grads = torch.autograd.grad(run("lstm", inputs, backend="fused")[used].square().sum(), inputs)
    for got, want in zip(grads, wanted, strict=True):
        assert_close_ratio(got, want, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_no_lanes(kind, backend):
    inputs = make_inputs(kind, 0, 5, 3, 4)
    out = run(kind, inputs, reset=torch.zeros(0, 5, dtype=torch.bool), backend=backend)
    assert out[0].shape == (0, 5, 4)
    grads = torch.autograd.grad(weigh(out), inputs)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_checkpointing(kind, backend):
    inputs = make_inputs(kind, 2, 5, 3, 4)
    expected = run(kind, inputs, backend=backend)
    again = checkpoint(lambda *given: run(kind, given, backend=backend), *inputs, use_reentrant=False)
    compare(again, inputs, expected, inputs, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_changes_nothing(kind, backend):
    inputs = make_inputs(kind, 2, 5, 3, 4, torch.float32)
    expected = run(kind, inputs, backend=backend)
    wanted = torch.autograd.grad(weigh(expected), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(kind, inputs, backend=backend)
        grads = torch.autograd.grad(weigh(out), inputs) if backend != "reference" else wanted
    for got, want in zip((*out, *grads), (*expected, *wanted), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives_belong_to_the_reference(kind):
    inputs = make_inputs(kind, 1, 3, 2, 2)
    reset = make_reset("some", 1, 3)
    assert torch.autograd.gradgradcheck(lambda *args: run(kind, args, reset=reset, backend="reference"), inputs)
    (grad,) = torch.autograd.grad(weigh(run(kind, inputs)), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("pattern", ["none", "some"])
@pytest.mark.parametrize("kind", LAYERS)
def test_opcheck(kind, pattern):
    x, *rest = make_inputs(kind, 3, 5, 4, 2, torch.float32)
    by_time = x.detach().transpose(0, 1).requires_grad_()
    reset = make_reset(pattern, 3, 5)
    args = (by_time, *rest, None if reset is None else reset.t())
    forward, backward = OPS[kind]
    torch.library.opcheck(forward, args)
    args = [None if tensor is None else tensor.detach() for tensor in args]
    for for_x in (True, False):
        torch.library.opcheck(backward, backward_args(kind, args, forward(*args), for_x))


def backward_args(kind, args, outputs, for_x):
    grads = [torch.ones_like(tensor) for tensor in outputs[: STATES[kind]]]
    return (*grads, *args[:-3], *outputs, args[-1], for_x)


@pytest.mark.parametrize("kind", LAYERS)
def test_no_synchronisation_off_the_cpu(kind):
    """Meta tensors have no values to look at."""
    forward, backward = FUNCTIONS[kind]
    x, *rest = (torch.empty_like(tensor, device="meta") for tensor in make_inputs(kind, 3, 5, 4, 2, torch.float32))
    args = (x.transpose(0, 1), *rest, torch.empty(5, 3, dtype=torch.bool, device="meta"))
    outputs = forward(*args)
    grads = backward(*backward_args(kind, args, outputs, True))
    assert all(tensor.device.type == "meta" for tensor in (*outputs, *grads))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_training(kind):
    def train(*inputs, reset=None):
        return run(kind, inputs, reset=reset)

    torch.compiler.reset()
    compiled = torch.compile(train, fullgraph=True)
    for pattern in ("none", "some"):
        exact, inputs = make_inputs(kind, 3, 6, 4, 5), make_inputs(kind, 3, 6, 4, 5)
        reset = make_reset(pattern, 3, 6)
        expected = run(kind, exact, reset=reset, backend="reference")
        compare(compiled(*inputs, reset=reset), inputs, expected, exact, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", LAYERS)
def test_on_a_gpu(kind, pattern):
    exact, inputs = make_inputs(kind, 3, 63, 5, 8), make_inputs(kind, 3, 63, 5, 8, torch.float32, "cuda")
    expected = run(kind, exact, reset=make_reset(pattern, 3, 63), backend="reference")
    compare(run(kind, inputs, reset=make_reset(pattern, 3, 63, device="cuda")), inputs, expected, exact, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LAYERS)
def test_cuda_graph(kind):
    """Training with resets is captured once and replayed on new values."""
    inputs = make_inputs(kind, 3, 9, 5, 8, torch.float32, "cuda")
    reset = make_reset("some", 3, 9, device="cuda")
    weights = [torch.randn_like(out) for out in run(kind, inputs, reset=reset)]

    def train():
        out = run(kind, inputs, reset=reset)
        return torch.autograd.grad(sum((o * w).sum() for o, w in zip(out, weights, strict=True)), inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train()
    reset.logical_not_()
    graph.replay()
    for got, want in zip(captured, train(), strict=True):
        assert_close_ratio(got, want, 1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_refusals_say_why(kind):
    first = {"gru": "initial_state", "lstm": "initial_hidden"}[kind]
    x, state, *rest = make_inputs(kind, 2, 5, 3, 4)
    weights = rest[-4:]
    with pytest.raises(ValueError, match="x has shape"):
        run(kind, (x[0], state, *rest))
    with pytest.raises(ValueError, match="L >= 1"):
        run(kind, (x[:, :0], state, *rest))
    with pytest.raises(ValueError, match=f"{first} has shape"):
        run(kind, (x, state[:1], *rest))
    for i, name in enumerate(("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
        wrong = [torch.cat([tensor, tensor]) if i == j else tensor for j, tensor in enumerate(weights)]
        with pytest.raises(ValueError, match=f"{name} has shape"):
            run(kind, (x, state, *rest[:-4], *wrong))
    with pytest.raises(ValueError, match="x is torch.int64; give a floating dtype"):
        run(kind, (x.long(), state, *rest))
    with pytest.raises(ValueError, match=f"{first} is on meta and x on cpu; give one device"):
        run(kind, (x, state.to("meta"), *rest))
    with pytest.raises(ValueError, match="reset is torch.int64"):
        run(kind, (x, state, *rest), reset=torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="backend='cudnn' is not known"):
        run(kind, (x, state, *rest), backend="cudnn")
