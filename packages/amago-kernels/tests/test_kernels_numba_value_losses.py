"""The value losses that Numba compiles: sizes, layouts, threads, half precision, and rows that overflow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from amago_kernels import hl_gauss_cross_entropy, two_hot_cross_entropy
from amago_kernels.testing import assert_close_ratio

numba_jit = pytest.importorskip("amago_kernels.numba_jit", reason="Numba is not installed", exc_type=ImportError)

UNEVEN = (-3.0, -2.9, -1.0, 0.0, 0.001, 0.002, 2.0, 7.0)


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_inputs(lead: tuple[int, ...], of_target: tuple[int, ...], bins: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = 3 * torch.randn(*lead, bins, generator=generator())
    return logits, 30 * torch.randn(of_target, generator=generator(1)), torch.linspace(-5, 5, bins)


def solve(
    inputs: tuple[Tensor, Tensor, Tensor],
    sigma: float | None,
    backend: str = "numba",
    dtype: torch.dtype | None = None,
    transform: str | None = "symlog",
) -> tuple[Tensor, Tensor]:
    """Losses, and gradients of the logits under some upstream gradient."""
    logits, target, support = (x if dtype is None else x.to(dtype) for x in inputs)
    leaf = logits.detach().clone().requires_grad_()
    if sigma is None:
        loss = two_hot_cross_entropy(leaf, target, support, transform=transform, backend=backend)
    else:
        loss = hl_gauss_cross_entropy(leaf, target, support, sigma, transform=transform, backend=backend)
    upstream = torch.randn(loss.shape, generator=generator(2)).to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]


def check(inputs: tuple[Tensor, Tensor, Tensor], sigma: float | None, transform: str | None = "symlog") -> None:
    expected = solve(inputs, sigma, "reference", torch.float64, transform)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        for got, wanted in zip(solve(inputs, sigma, "numba", dtype, transform), expected, strict=True):
            assert got.dtype == dtype and got.is_contiguous()
            assert_close_ratio(got, wanted, tolerance)


@pytest.mark.parametrize("sigma", [None, 0.75])
@pytest.mark.parametrize("bins", [2, 3, 16, 51, 64, 130])
def test_bins(bins: int, sigma: float | None) -> None:
    check(make_inputs((5, 13), (5, 1), bins), sigma if sigma is None else sigma * 10 / (bins - 1))


@pytest.mark.parametrize(
    ("lead", "of_target"),
    [
        ((), ()),
        ((1,), (1,)),
        ((130,), ()),
        ((130,), (130,)),
        ((63, 2), (63, 1)),
        ((2, 63), (63,)),
        ((5, 3, 4, 7), (5, 3, 1, 7)),
        ((3, 5, 4, 7), (3, 1, 4, 1)),
        ((2, 3, 2, 3, 2), (1, 3, 1, 3, 1)),
        ((2, 3, 2, 3, 2), (2, 1, 2, 1, 2)),
    ],
)
@pytest.mark.parametrize("sigma", [None, 0.4])
def test_layouts(lead: tuple[int, ...], of_target: tuple[int, ...], sigma: float | None) -> None:
    check(make_inputs(lead, of_target, 9), sigma)


@pytest.mark.parametrize("transform", ["symlog", None])
@pytest.mark.parametrize("sigma", [None, 0.001, 0.5, 40.0])
def test_uneven_bins(sigma: float | None, transform: str | None) -> None:
    support = torch.tensor(UNEVEN, dtype=torch.float64)
    target = torch.cat([support, torch.linspace(-4.0, 9.0, 100, dtype=torch.float64)])
    if transform == "symlog":
        target = target.sign() * target.abs().expm1()
    logits = torch.randn(2, target.shape[0], 8, generator=generator(), dtype=torch.float64)
    expected = solve((logits, target, support), sigma, "reference", None, transform)
    for got, wanted in zip(solve((logits, target, support), sigma, "numba", None, transform), expected, strict=True):
        assert_close_ratio(got, wanted, 1e-11)


@pytest.mark.parametrize("target", [0.0, -0.0, 1e-30, -1e-8, 1e-4, -0.5, 3.0, 1e20, -3e38, math.inf, -math.inf])
def test_symlog(target: float) -> None:
    support = torch.linspace(-10, 10, 33)
    logits = torch.zeros(33)
    _, got = solve((logits, torch.tensor(target), support), None)
    _, wanted = solve((logits, torch.tensor(target), support), None, "reference", torch.float64)
    assert_close_ratio(got, wanted, 1e-6)


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_any_strides(sigma: float | None) -> None:
    logits = torch.randn(16, 6, 5, generator=generator())
    target = torch.randn(12, 5, generator=generator(1))
    support = torch.linspace(-3, 3, 32)
    strided = logits.permute(1, 2, 0), target[::2], support[::2]
    copies = tuple(x.contiguous() for x in strided)
    for got, wanted in zip(solve(strided, sigma), solve(copies, sigma), strict=True):
        assert torch.equal(got, wanted)
    leaf = copies[0].clone().requires_grad_()
    loss = two_hot_cross_entropy(leaf, *copies[1:], backend="numba")
    one = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(one, torch.autograd.grad(loss, leaf, torch.ones(5, 6).t())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_compile_nothing_more(dtype: torch.dtype) -> None:
    from amago_kernels.value_losses import numba_value_losses

    logits, target, support = make_inputs((8,), (8,), 6)
    logits = logits.to(dtype)
    solve((logits, target, support), None)
    kernels = numba_value_losses._forward, numba_value_losses._backward
    before = [len(kernel.signatures) for kernel in kernels]
    for case in ((logits, target[:1].expand(8), support), (logits[:4], target[::2], support)):
        solve(case, None)
    row = logits.flatten()[::8]
    for got, wanted in zip(
        solve((row, target[3], support), None), solve((row.clone(), target[3], support), None), strict=True
    ):
        assert torch.equal(got, wanted)
    assert [len(kernel.signatures) for kernel in kernels] == before


@pytest.mark.parametrize("sigma", [None, 0.5])
@pytest.mark.parametrize("of_target", [(37, 1, 7), (37, 4, 7), (4, 1)])
def test_the_same_on_any_number_of_threads(threads, sigma: float | None, of_target: tuple[int, ...]) -> None:
    inputs = make_inputs((37, 4, 7), of_target, 600)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(solve(inputs, sigma))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_bfloat16_is_rounded_once(sigma: float | None) -> None:
    logits, target, support = make_inputs((50, 3), (50, 1), 21)
    target[7], logits[9, 1, 4] = math.nan, math.nan
    logits = logits.bfloat16()
    (loss, grad), (wanted, wanted_grad) = (solve((x, target, support), sigma) for x in (logits, logits.float()))
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grad, wanted_grad.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert grad[9, 1].isnan().all() and grad[8].isfinite().all()


def test_bfloat16_goes_to_the_even_neighbour() -> None:
    # All of the prediction is in the first bin, and all of the label in the second.
    logits = torch.tensor([[200.0, 0.0]]).bfloat16().repeat(4, 1).requires_grad_()
    upstream = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8, 1.0 + 2**-8 + 2**-20])
    loss = two_hot_cross_entropy(logits, torch.ones(4), torch.tensor([0.0, 1.0]), transform=None, backend="numba")
    grad = torch.autograd.grad(loss, logits, upstream)[0]
    assert grad[:, 0].tolist() == [1.0, 1.0 + 2**-6, -1.0, 1.0 + 2**-7]
    assert torch.equal(grad[:, 1], -grad[:, 0])
    # All bits of this NaN are set: rounded like a number, it would become one.
    upstream = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).repeat(4)
    loss = two_hot_cross_entropy(logits, torch.ones(4), torch.tensor([0.0, 1.0]), transform=None, backend="numba")
    assert torch.autograd.grad(loss, logits, upstream)[0].isnan().all()


@pytest.mark.parametrize("sigma", [None, 0.5])
@pytest.mark.parametrize("offset", [-3e4, -200.0, -75.0, -40.0, 40.0, 75.0, 200.0, 3e4])
def test_rows_far_from_zero(offset: float, sigma: float | None) -> None:
    """Whose exponentials overflow or vanish, or whose sums are known coarsely; between others."""
    logits, target, support = make_inputs((6, 3), (6, 1), 40)
    logits[2, 1] += offset
    expected = solve((logits, target, support), sigma, "reference", torch.float64)
    loss, grad = solve((logits, target, support), sigma)
    # Losses are differences of numbers as large as the offset.
    assert_close_ratio(loss, expected[0], 1e-5 if abs(offset) < 1e3 else 1e-4)
    assert_close_ratio(grad, expected[1], 1e-5)
    assert_close_ratio(grad[2, 1], expected[1][2, 1], 1e-5)


def test_nothing_hides_what_is_no_number() -> None:
    logits, target, support = make_inputs((5,), (5,), 33)
    logits[1, 3], logits[2, 32], logits[3, 0] = math.nan, math.inf, -math.inf
    loss, grad = solve((logits, target, support), None)
    assert loss[1:3].isnan().all() and grad[1:3].isnan().all()
    assert loss[[0, 4]].isfinite().all() and grad[[0, 3, 4]].isfinite().all() and grad[3, 0] == 0.0


@pytest.mark.parametrize("sigma", [None, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(sigma: float | None, dtype: torch.dtype) -> None:
    op = torch.ops.amago_kernels.value_cross_entropy_numba.default
    logits = torch.randn(3, 2, 9, generator=generator()).to(dtype).requires_grad_()
    target, support = torch.randn(3, 1, generator=generator(1)), torch.linspace(-2, 2, 9)
    torch.library.opcheck(op, (logits, target, support, True, sigma))
    strided = torch.randn(9, 2, 3).to(dtype).permute(2, 1, 0).requires_grad_()
    torch.library.opcheck(op, (strided, target, support, False, sigma))
    backward = torch.ops.amago_kernels.value_cross_entropy_numba_backward.default
    sums = op(logits, target, support, True, sigma)[1].detach()
    torch.library.opcheck(backward, (torch.randn(3, 2), sums, logits.detach(), target, support, False, sigma))


@pytest.mark.filterwarnings("ignore")
def test_compiled() -> None:
    inputs = make_inputs((3, 2), (3, 1), 9)

    def total(logits: Tensor) -> Tensor:
        losses = two_hot_cross_entropy(logits, *inputs[1:], backend="numba")
        return (losses + hl_gauss_cross_entropy(2 * logits, *inputs[1:], 0.4, backend="numba")).sum()

    results = []
    for function in (total, torch.compile(total, fullgraph=True)):
        leaf = inputs[0].clone().requires_grad_()
        results.append((function(leaf), torch.autograd.grad(function(leaf), leaf)[0]))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_refusals() -> None:
    logits, target, support = make_inputs((3,), (3,), 9)
    with pytest.raises(ValueError, match=r"bfloat16 logits, not torch.float16; these can: .*'fused', 'reference'\]"):
        two_hot_cross_entropy(logits.half(), target, support, backend="numba")
    with pytest.raises(ValueError, match="run on the CPU, and the input is on meta"):
        two_hot_cross_entropy(*(x.to("meta") for x in (logits, target, support)), backend="numba")
    expected = two_hot_cross_entropy(logits.half(), target, support, backend="fused")
    assert torch.equal(two_hot_cross_entropy(logits.half(), target, support), expected)
