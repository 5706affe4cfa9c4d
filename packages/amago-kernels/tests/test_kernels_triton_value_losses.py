"""Triton kernels of the value losses against the reference in float64: in the interpreter, or for real."""

from __future__ import annotations

import pytest
import torch
from triton_devices import DEVICES

from amago_kernels import dispatch, hl_gauss_cross_entropy, two_hot_cross_entropy
from amago_kernels.testing import assert_close_ratio

pytest.importorskip("triton")
NAN, INF = float("nan"), float("inf")
# Logits and the targets that broadcast to them: critics first or in the middle, none shared, one for all.
SHAPES = [
    ((4, 3, 5, 2), (3, 5, 2)),
    ((3, 5, 4, 2), (3, 5, 1, 2)),
    ((3, 7), (3, 7)),
    ((2, 3, 4), (2, 1, 1)),
    ((2, 3, 2, 3), (2, 1, 2, 1)),
    ((2, 3, 2, 3), (3, 1, 3)),
    ((13,), ()),
    ((), ()),
]
BINS = (2, 16, 40, 64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_inputs(lead, target_shape, bins):
    """Logits, targets of which some lie beyond the bins, and bins that are not evenly spaced."""
    logits = 3 * torch.randn(*lead, bins, generator=generator())
    target = 30 * torch.randn(target_shape, generator=generator(1))
    gaps = 0.5 + torch.rand(bins, generator=generator(2))
    support = gaps.cumsum(0) * 8 / bins - 4.5
    return logits, target, support


def loss_of(logits, target, support, sigma, **options):
    if sigma is None:
        return two_hot_cross_entropy(logits, target, support, **options)
    return hl_gauss_cross_entropy(logits, target, support, sigma, **options)


def loss_and_gradient(logits, target, support, sigma, upstream, **options):
    leaf = logits.detach().requires_grad_()
    loss = loss_of(leaf, target, support, sigma, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream.to(loss))[0]


def check(inputs, sigma, device, dtype=torch.float32, tolerance=1e-5, **options):
    """Compares with the reference in float64, which sees the same rounded logits."""
    logits, target, support = inputs
    upstream = torch.randn(logits.shape[:-1], generator=generator(3))
    rounded = logits.to(dtype)
    wide = rounded.double(), target.double(), support.double()
    expected = loss_and_gradient(*wide, sigma, upstream, **options, backend="reference")
    moved = rounded.to(device), target.to(device), support.to(device)
    loss, grad = loss_and_gradient(*moved, sigma, upstream, **options, backend="triton")
    assert loss.dtype == torch.float32 and grad.dtype == dtype and loss.is_contiguous()
    assert_close_ratio(loss, expected[0], 1e-5, "loss")
    assert_close_ratio(grad, expected[1], tolerance, "gradient")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sigma", [None, 0.15])
@pytest.mark.parametrize(("lead", "target_shape"), SHAPES)
def test_losses_and_gradients(device, lead, target_shape, sigma):
    for bins in BINS:
        check(make_inputs(lead, target_shape, bins), sigma, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transform", ["symlog", None])
@pytest.mark.parametrize("sigma", [None, 0.01, 0.1, 30.0])
def test_transforms_and_widths(device, sigma, transform):
    logits, target, support = make_inputs((2, 63), (63,), 128)
    target[:8] = torch.tensor([1e6, -1e6, INF, -INF, 0.0, 1e-6, -1e-30, float(support[7])])
    check((logits, target, support), sigma, device, transform=transform)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [None, 0.15])
def test_half_precision(device, sigma, dtype):
    for bins in (40, 64):
        check(make_inputs((2, 5, 7), (5, 1), bins), sigma, device, dtype, 1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sigma", [None, 0.1])
def test_small_targets_on_fine_bins(device, sigma):
    """Where a careless logarithm of 1 + x loses all digits."""
    logits, _, _ = make_inputs((50,), (50,), 16)
    support = torch.linspace(-1e-4, 1e-4, 16)
    target = torch.linspace(-9e-5, 9e-5, 50)
    check((logits, target, support), None if sigma is None else 1e-5, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sigma", [None, 0.15])
def test_any_strides_and_dtypes_of_targets(device, sigma):
    logits, target, support = make_inputs((6, 7), (6, 7), 5)
    logits = torch.randn(5, 7, 6, generator=generator()).permute(2, 1, 0)
    check((logits, target.t().contiguous().t(), support.repeat_interleave(2)[::2]), sigma, device)
    check((logits, target.repeat_interleave(2, 1)[:, ::2], support), sigma, device)
    check((logits, target[:, :1].expand(6, 7), support), sigma, device)
    # More axes than kernels know, until the target is moved.
    logits, target, support = make_inputs((2, 3, 2, 3, 2), (2, 3, 2, 3, 2), 3)
    check((logits, target.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0), support), sigma, device)
    logits, target, support = make_inputs((3, 4), (4,), 16)
    moved = [x.to(device) for x in (logits, target, support)]
    expected = loss_of(logits, target.round(), support, sigma, backend="reference")
    for dtype in (torch.float64, torch.int64):
        out = loss_of(moved[0], moved[1].round().to(dtype), moved[2].double(), sigma, backend="triton")
        assert_close_ratio(out, expected, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sigma", [None, 0.15])
def test_labels_are_used_again(device, sigma, monkeypatch):
    """With so many targets that a program goes through the copies of the logits: in one group, and in three."""
    from amago_kernels.value_losses import triton_value_losses

    monkeypatch.setattr(triton_value_losses, "_LEAST_ROWS", 8)
    for lead, shape in (((3, 33), (33,)), ((5, 3, 2), (5, 1, 2)), ((17, 9), (1, 9)), ((2, 5, 3, 5), (2, 1, 3, 1))):
        check(make_inputs(lead, shape, 40), sigma, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sigma", [None, 0.15])
def test_every_configuration(device, sigma, monkeypatch):
    from amago_kernels.value_losses import triton_value_losses

    kernels = triton_value_losses.forward_kernel, triton_value_losses.backward_kernel
    for configs in zip(*(kernel.configs for kernel in kernels), strict=True):
        for kernel, chosen in zip(kernels, configs, strict=True):
            monkeypatch.setattr(kernel, "configs", [chosen])
        check(make_inputs((2, 70), (70,), 64), sigma, device)
        check(make_inputs((9,), (9,), 300), sigma, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sigma", [None, 0.75])
def test_a_nan_target_spoils_its_own_row_only(device, sigma):
    target = torch.tensor([0.5, NAN, 1.0], device=device)
    logits = torch.randn(2, 3, 5, generator=generator()).to(device).requires_grad_()
    support = torch.arange(-2.0, 3.0, device=device)
    loss = loss_of(logits, target, support, sigma, backend="triton")
    assert loss.isfinite().tolist() == [[True, False, True]] * 2
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.isfinite().all(-1).tolist() == [[True, False, True]] * 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sigma", [None, 0.1])
def test_extreme_logits(device, sigma):
    logits = torch.zeros(4, 128)
    logits[0, 5], logits[1] = 1e4, -1e4
    logits[2] = torch.linspace(-50, 50, 128)
    # Far from zero, where a log-sum-exp has few digits behind the point.
    logits[3] = 8192 + torch.linspace(-4, 4, 128).round()
    target, support = torch.tensor([1e5, -1e5, 0.0, 3.0]), torch.linspace(-11, 11, 128)
    check((logits, target, support), sigma, device)


@pytest.mark.parametrize("device", DEVICES)
def test_shapes_without_entries_and_gradients_that_repeat(device):
    support = torch.arange(-2.0, 3.0, device=device)
    for lead in ((0,), (0, 3), (3, 0, 2)):
        logits = torch.zeros(*lead, 5, device=device, requires_grad=True)
        loss = two_hot_cross_entropy(logits, torch.zeros(1, device=device), support, backend="triton")
        assert loss.shape == lead
        assert torch.autograd.grad(loss.sum(), logits)[0].shape == logits.shape
    logits = torch.randn(4, 3, 5, device=device, requires_grad=True)
    target = torch.randn(4, 1, device=device)
    grads = [
        torch.autograd.grad(two_hot_cross_entropy(logits, target, support, backend=backend).mean(), logits)[0]
        for backend in ("triton", "reference")
    ]
    assert_close_ratio(*grads, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sigma", [None, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, sigma, dtype):
    op = torch.ops.amago_kernels.value_cross_entropy_triton.default
    logits = torch.randn(3, 2, 9, generator=generator()).to(device, dtype).requires_grad_()
    target, support = torch.randn(3, 1, device=device), torch.linspace(-2, 2, 9, device=device)
    torch.library.opcheck(op, (logits, target, support, True, sigma))
    strided = torch.randn(9, 2, 3).to(device, dtype).permute(2, 1, 0).requires_grad_()
    torch.library.opcheck(op, (strided, target, support, False, sigma))
    backward = torch.ops.amago_kernels.value_cross_entropy_triton_backward.default
    grad = torch.randn(2, 3, device=device).t()
    torch.library.opcheck(backward, (grad, strided.detach(), target, support, False, sigma))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore")
def test_compiled(device):
    support, target = torch.linspace(-2, 2, 9, device=device), torch.randn(3, 1, device=device)

    def total(logits):
        loss = two_hot_cross_entropy(logits * 2, target, support, backend="triton")
        return (loss + hl_gauss_cross_entropy(logits, target, support, 0.4, backend="triton")).sum()

    results = []
    for function in (total, torch.compile(total, fullgraph=True)):
        logits = torch.randn(3, 2, 9, generator=generator()).to(device).requires_grad_()
        loss = function(logits)
        loss.backward()
        results.append((loss, logits.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_refusals(monkeypatch):
    logits, target, support = make_inputs((3, 2), (3, 1), 5)
    with pytest.raises(ValueError, match="backend='triton' cannot serve this two_hot_cross_entropy.*torch.float64"):
        two_hot_cross_entropy(logits.double(), target, support, backend="triton")
    with pytest.raises(ValueError, match="at most 1024 bins, and support has 1025"):
        hl_gauss_cross_entropy(torch.zeros(1025), torch.zeros(()), torch.arange(1025.0), 0.75, backend="triton")
    scattered = torch.zeros(2, 1, 2, 1, 2)
    with pytest.raises(ValueError, match=r"target \(2, 1, 2, 1, 2\) is repeated .* more than 4 runs"):
        two_hot_cross_entropy(torch.zeros(2, 2, 2, 2, 2, 5), scattered, support, backend="triton")
    assert two_hot_cross_entropy(torch.zeros(2, 2, 2, 2, 2, 5), scattered, support).shape == (2,) * 5
    with pytest.raises(ValueError, match="logits is torch.int64"):
        two_hot_cross_entropy(logits.long(), target, support, backend="triton")
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    with pytest.raises(ValueError, match="run on CUDA devices, and the input is on cpu"):
        two_hot_cross_entropy(logits, target, support, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("sigma", [None, 0.12])
@pytest.mark.parametrize("bins", [64, 128])
def test_large_and_in_a_graph(sigma, bins):
    lead, shape = (4, 16, 128, 7), (16, 128, 7)
    logits = torch.randn(*lead, bins, generator=generator())
    target, support = 30 * torch.randn(shape, generator=generator(1)), torch.linspace(-10, 10, bins)
    check((logits, target, support), sigma, "cuda")
    check((logits, target, support), sigma, "cuda", torch.bfloat16, 1e-2)
    static = logits.cuda().requires_grad_()
    moved, upstream = (target.cuda(), support.cuda()), torch.randn(lead, device="cuda")

    def step():
        loss = loss_of(static, *moved, sigma)
        # Detached: a graph that lives on ties the next backward pass to the stream it was made on.
        return loss.detach(), torch.autograd.grad(loss, static, upstream)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static.mul_(0.5)
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)
