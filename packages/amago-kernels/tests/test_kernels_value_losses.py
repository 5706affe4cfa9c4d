"""Two-hot and HL-Gauss cross-entropy: numbers by hand, loops in float64, and all backends against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_devices import without_triton

from amago_kernels import (
    hl_gauss_cross_entropy,
    hl_gauss_labels,
    symexp,
    symlog,
    two_hot_cross_entropy,
    two_hot_labels,
)
from amago_kernels.testing import assert_close_ratio

FIVE = torch.arange(-2.0, 3.0, dtype=torch.float64)
DEFAULT = torch.linspace(-math.log1p(1e5), math.log1p(1e5), 128, dtype=torch.float64)
SPACING = 0.18130591
BACKENDS = without_triton("two_hot_cross_entropy")
LEAN = tuple(backend for backend in BACKENDS if backend != "reference")


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def place(target: float, bins: list[float], transform: str | None) -> float:
    z = math.copysign(math.log1p(abs(target)), target) if transform == "symlog" else target
    return min(max(z, bins[0]), bins[-1])


def loop_two_hot(target: float, bins: list[float], transform: str | None) -> list[float]:
    z = place(target, bins, transform)
    label = [0.0] * len(bins)
    for i in range(len(bins) - 1):
        if bins[i] <= z < bins[i + 1]:
            label[i] = (bins[i + 1] - z) / (bins[i + 1] - bins[i])
            label[i + 1] = 1.0 - label[i]
    if z == bins[-1]:
        label[-1] = 1.0
    return label


def loop_hl_gauss(target: float, bins: list[float], sigma: float, transform: str | None) -> list[float]:
    z = place(target, bins, transform)
    middles = [(a + b) / 2 for a, b in zip(bins, bins[1:], strict=False)]
    edges = [bins[0] - (middles[0] - bins[0]), *middles, bins[-1] + (bins[-1] - middles[-1])]
    cdf = [0.5 * (1.0 + math.erf((e - z) / (sigma * math.sqrt(2.0)))) for e in edges]
    mass = [b - a for a, b in zip(cdf, cdf[1:], strict=False)]
    return [m / sum(mass) for m in mass]


def loop_loss(logits: Tensor, target: Tensor, label: Callable[[float], list[float]]) -> Tensor:
    rows = logits.double().reshape(-1, logits.shape[-1])
    losses = []
    for row, y in zip(rows, target.expand(logits.shape[:-1]).reshape(-1).tolist(), strict=True):
        losses.append(-(f64(*label(y)) * (row - row.exp().sum().log())).sum())
    return torch.stack(losses).view(logits.shape[:-1])


def test_symlog_values() -> None:
    torch.testing.assert_close(symlog(f64(1, 9, 100, 1e5)), f64(0.6931472, 2.3025851, 4.6151205, 11.5129355))
    x = f64(-1e5, -3.0, -1e-9, 0.0, 0.5, 42.0)
    torch.testing.assert_close(symexp(symlog(x)), x, rtol=1e-12, atol=0)
    assert symlog(torch.tensor(-1.0)).item() == pytest.approx(-math.log(2.0))


@pytest.mark.parametrize("function", [symlog, symexp])
def test_slope_at_zero(function) -> None:
    # Fresh critics predict 0: a slope of 0 there would be the end of learning.
    x = f64(-2.0, -0.0, 0.0, 1e-300, 2.0).requires_grad_()
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    far = 1 / 3 if function is symlog else math.exp(2.0)
    torch.testing.assert_close(slope, f64(far, 1, 1, 1, far))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.0, {2: 1.0}),
        (0.25, {2: 0.75, 3: 0.25}),
        (-1.5, {0: 0.5, 1: 0.5}),
        (2.0, {4: 1.0}),
        (3.0, {4: 1.0}),
        (-7.0, {0: 1.0}),
    ],
)
def test_two_hot_by_hand(target: float, expected: dict[int, float]) -> None:
    label = two_hot_labels(torch.tensor(target), FIVE.float(), transform=None)
    assert label.tolist() == [expected.get(i, 0.0) for i in range(5)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (1.0, {2: 0.4218703, 3: 0.5781297}),
        (5.0, {3: 0.5055565, 4: 0.4944435}),
        (-3.0, {0: 0.1562593, 1: 0.8437407}),
    ],
)
def test_two_hot_after_symlog_by_hand(target: float, expected: dict[int, float]) -> None:
    bins = torch.linspace(-2.3978953, 2.3978953, 5, dtype=torch.float64)
    label = two_hot_labels(torch.tensor(target, dtype=torch.float64), bins)
    torch.testing.assert_close(label, f64(*(expected.get(i, 0.0) for i in range(5))), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.0, {63: 0.5, 64: 0.5}),
        (1.0, {67: 0.6769224, 68: 0.3230776}),
        (10.0, {76: 0.2743244, 77: 0.7256756}),
        (100.0, {88: 0.0451407, 89: 0.9548593}),
    ],
)
def test_two_hot_of_the_default_bins(target: float, expected: dict[int, float]) -> None:
    assert (DEFAULT[1] - DEFAULT[0]).item() == pytest.approx(SPACING, rel=1e-6)
    label = two_hot_labels(torch.tensor(target, dtype=torch.float64), DEFAULT)
    torch.testing.assert_close(label, f64(*(expected.get(i, 0.0) for i in range(128))), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("support", [DEFAULT, f64(-3.0, -2.5, 0.0, 0.1, 4.0)])
def test_two_hot_means_are_the_targets(support: Tensor) -> None:
    target = symexp(f64(-2.9, -1.0, 0.0, 0.05, 0.1, 2.0, 3.99, 4.0))
    label = two_hot_labels(target, support)
    torch.testing.assert_close(symexp(label @ support), target, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(label.sum(-1), torch.ones(8, dtype=torch.float64))
    assert label.ge(0).all() and label.gt(0).sum(-1).le(2).all()


@pytest.mark.parametrize(
    ("target", "expected", "mean"),
    [
        (0.0, (0.022340, 0.229940, 0.495440, 0.229940, 0.022340), 0.0),
        (0.25, (0.009707, 0.149059, 0.472599, 0.322125, 0.046509), 0.246670),
        (2.0, (0.000002, 0.000572, 0.029861, 0.307345, 0.662221), 1.631210),
        (50.0, (0.000002, 0.000572, 0.029861, 0.307345, 0.662221), 1.631210),
    ],
)
def test_hl_gauss_by_hand(target: float, expected: tuple[float, ...], mean: float) -> None:
    label = hl_gauss_labels(torch.tensor(target, dtype=torch.float64), FIVE, 0.75, transform=None)
    torch.testing.assert_close(label, f64(*expected), rtol=0, atol=6e-7)
    assert (label @ FIVE).item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_by_hand(backend: str) -> None:
    logits = torch.log(f64(0.1, 0.2, 0.3, 0.25, 0.15)) + 7.0
    target = torch.tensor(0.25, dtype=torch.float64)
    loss = two_hot_cross_entropy(logits, target, FIVE, transform=None, backend=backend)
    assert loss.item() == pytest.approx(1.2495532, rel=1e-7)
    loss = hl_gauss_cross_entropy(logits, target, FIVE, 0.75, transform=None, backend=backend)
    label = f64(0.009707, 0.149059, 0.472599, 0.322125, 0.046509)
    assert loss.item() == pytest.approx(-(label * (logits - 7.0)).sum().item(), rel=1e-5)


SUPPORTS = [f64(-1.0, 1.0), f64(-3.0, -1.0, 0.5, 0.75, 4.0), torch.linspace(-4, 3, 31, dtype=torch.float64)]


@pytest.mark.parametrize("transform", ["symlog", None])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_gradients_match_a_loop(backend: str, support: Tensor, transform: str | None) -> None:
    target = torch.randn(3, 1, 2, generator=generator(1), dtype=torch.float64) * 4
    target[0, 0, 0], target[1, 0, 1] = 1e6, -1e6
    bins = support.tolist()
    for sigma in (None, 0.1, 0.75, 30.0):
        logits = torch.randn(3, 4, 2, len(bins), generator=generator(2), dtype=torch.float64).requires_grad_()
        if sigma is None:
            loss = two_hot_cross_entropy(logits, target, support, transform=transform, backend=backend)
            expected = loop_loss(logits, target, lambda y: loop_two_hot(y, bins, transform))
        else:
            loss = hl_gauss_cross_entropy(logits, target, support, sigma, transform=transform, backend=backend)
            expected = loop_loss(logits, target, lambda y, s=sigma: loop_hl_gauss(y, bins, s, transform))
        assert loss.shape == (3, 4, 2)
        assert_close_ratio(loss, expected, 1e-10)
        upstream = torch.randn(3, 4, 2, generator=generator(3), dtype=torch.float64)
        (grad,) = torch.autograd.grad(loss, logits, upstream)
        (expected_grad,) = torch.autograd.grad(expected, logits, upstream)
        assert_close_ratio(grad, expected_grad, 1e-10, "gradient")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("bins", [2, 3, 40, 128])
@pytest.mark.parametrize("sigma", [None, 0.75])
@pytest.mark.parametrize("lean", LEAN)
def test_as_good_as_its_dtype(lean: str, bins: int, sigma: float | None, dtype: torch.dtype, tolerance: float) -> None:
    if lean == "numba" and dtype == torch.float16:
        pytest.skip("refused")
    support = torch.linspace(-8, 8, bins, dtype=torch.float64)
    logits = (3 * torch.randn(5, 63, bins, generator=generator())).to(dtype)
    target = 100 * torch.randn(5, 1, generator=generator(1), dtype=torch.float64)
    results = []
    # Targets and bins stay in float32, as callers keep them; the reference sees the same rounded logits.
    for backend, compute, scalars in ((lean, dtype, torch.float32), ("reference", torch.float64, torch.float64)):
        leaf = logits.detach().to(compute, copy=True).requires_grad_()
        args = (leaf, target.to(scalars), support.to(scalars))
        if sigma is None:
            loss = two_hot_cross_entropy(*args, backend=backend)
        else:
            loss = hl_gauss_cross_entropy(*args, sigma * 16 / (bins - 1), backend=backend)
        loss.sum().backward()
        results.append((loss, leaf.grad))
    (loss, grad), (expected, expected_grad) = results
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert_close_ratio(loss, expected, 1e-5)
    assert_close_ratio(grad, expected_grad, tolerance, "gradient")


@pytest.mark.parametrize("sigma", [None, 0.1])
def test_extreme_logits_stay_finite(sigma: float | None) -> None:
    logits = torch.zeros(3, 128)
    logits[0, 5], logits[1] = 1e4, -1e4
    logits[2] = torch.linspace(-50, 50, 128)
    for backend in BACKENDS:
        leaf = logits.clone().requires_grad_()
        target = torch.tensor([1e5, -1e5, 0.0])
        if sigma is None:
            loss = two_hot_cross_entropy(leaf, target, DEFAULT.float(), backend=backend)
        else:
            loss = hl_gauss_cross_entropy(leaf, target, DEFAULT.float(), sigma, backend=backend)
        loss.sum().backward()
        assert loss.isfinite().all() and leaf.grad is not None and leaf.grad.isfinite().all()
        assert loss[0].item() == pytest.approx(1e4, rel=1e-3)
        # Softmax minus label: rows sum to zero.
        torch.testing.assert_close(leaf.grad.sum(-1), torch.zeros(3), rtol=0, atol=1e-5)


def test_targets_outside_count_as_the_end() -> None:
    logits = torch.randn(4, 5, generator=generator())
    for loss in (
        lambda y: two_hot_cross_entropy(logits, y, FIVE.float(), transform=None),
        lambda y: hl_gauss_cross_entropy(logits, y, FIVE.float(), 0.75, transform=None),
    ):
        assert torch.equal(loss(torch.full((4,), 2.0)), loss(torch.full((4,), 1e30)))
        assert torch.equal(loss(torch.full((4,), -2.0)), loss(torch.full((4,), -float("inf"))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend: str) -> None:
    support = FIVE.float()
    assert two_hot_cross_entropy(torch.randn(5), torch.tensor(0.3), support, backend=backend).shape == ()
    assert two_hot_cross_entropy(torch.randn(0, 5), torch.zeros(1), support, backend=backend).shape == (0,)
    assert hl_gauss_cross_entropy(torch.randn(0, 3, 5), torch.zeros(3), support, 1.0, backend=backend).shape == (0, 3)
    wide = torch.randn(5, 7, 6, generator=generator())
    logits, target = wide.permute(2, 1, 0), torch.randn(6, 14)[:, ::2]
    expected = two_hot_cross_entropy(logits.contiguous(), target.contiguous(), support, backend="reference")
    torch.testing.assert_close(two_hot_cross_entropy(logits, target, support, backend=backend), expected)
    leaf = wide.clone().requires_grad_()
    two_hot_cross_entropy(leaf.permute(2, 1, 0), target, support, backend=backend).sum().backward()
    assert leaf.grad is not None and leaf.grad.sum(0).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transposed_target(backend: str) -> None:
    """Without a word of warning, which pytest makes an error."""
    logits, target = torch.randn(6, 7, 5, generator=generator()), torch.randn(7, 6, generator=generator(1)).t()
    expected = two_hot_cross_entropy(logits, target.contiguous(), FIVE.float(), backend=backend)
    assert torch.equal(two_hot_cross_entropy(logits, target, FIVE.float(), backend=backend), expected)


@pytest.mark.parametrize("backend", LEAN)
def test_more_rows_than_one_piece(backend: str) -> None:
    logits = torch.randn(4099, 3, generator=generator())
    target = torch.randn(4099, generator=generator(1))
    support = torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(
        two_hot_cross_entropy(logits, target, support, backend=backend),
        two_hot_cross_entropy(logits, target, support, backend="reference"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_target_spoils_its_own_row_only(backend: str) -> None:
    target = torch.tensor([0.5, float("nan"), 1.0])
    logits = torch.randn(3, 5, generator=generator(), requires_grad=True)
    for sigma in (None, 0.75):
        if sigma is None:
            loss = two_hot_cross_entropy(logits, target, FIVE.float(), backend=backend)
        else:
            loss = hl_gauss_cross_entropy(logits, target, FIVE.float(), sigma, backend=backend)
        assert loss.isfinite().tolist() == [True, False, True]
        (grad,) = torch.autograd.grad(loss[[0, 2]].sum(), logits)
        assert grad[[0, 2]].isfinite().all()


def test_no_gradient_to_targets() -> None:
    target = torch.zeros(3, requires_grad=True)
    for backend in BACKENDS:
        logits = torch.zeros(3, 5, requires_grad=True)
        loss = two_hot_cross_entropy(logits, target, FIVE.float(), backend=backend).sum()
        assert torch.autograd.grad(loss, [logits, target], allow_unused=True)[1] is None


@pytest.mark.parametrize("sigma", [None, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(sigma: float | None, dtype: torch.dtype) -> None:
    op = torch.ops.amago_kernels.value_cross_entropy.default
    logits = torch.randn(3, 2, 9, generator=generator()).to(dtype).requires_grad_()
    target, support = torch.randn(3, 1, generator=generator(1)), torch.linspace(-2, 2, 9)
    torch.library.opcheck(op, (logits, target, support, True, sigma))
    backward = torch.ops.amago_kernels.value_cross_entropy_backward.default
    torch.library.opcheck(backward, (torch.randn(3, 2), logits.detach(), target, support, False, sigma))
    strided = torch.randn(9, 2, 3).to(dtype).permute(2, 1, 0).requires_grad_()
    torch.library.opcheck(op, (strided, target, support, False, sigma))


@pytest.mark.filterwarnings("ignore")
def test_compiled() -> None:
    support = torch.linspace(-2, 2, 9)

    def total(logits: Tensor, target: Tensor) -> Tensor:
        loss = two_hot_cross_entropy(logits * 2, target, support)
        return (loss + hl_gauss_cross_entropy(logits, target, support, 0.4)).sum()

    target = torch.randn(3, 1, generator=generator(1))
    results = []
    for function in (total, torch.compile(total, fullgraph=True)):
        logits = torch.randn(3, 2, 9, generator=generator()).requires_grad_()
        loss = function(logits, target)
        loss.backward()
        results.append((loss, logits.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("sigma", [None, 0.13])
def test_on_the_device(sigma: float | None) -> None:
    logits = torch.randn(24, 4, 7, 128, generator=generator())
    target = 10 * torch.randn(24, 1, 7, generator=generator(1))
    results = []
    for device, backend in (("cuda", "fused"), ("cpu", "reference")):
        leaf = logits.detach().to(device, copy=True).requires_grad_()
        args = (leaf, target.to(device), DEFAULT.float().to(device))
        if sigma is None:
            loss = two_hot_cross_entropy(*args, backend=backend)
        else:
            loss = hl_gauss_cross_entropy(*args, sigma, backend=backend)
        loss.sum().backward()
        results.append((loss, leaf.grad))
    for on_device, expected in zip(*results, strict=True):
        assert_close_ratio(on_device, expected, 1e-5)


def test_refusals() -> None:
    logits, target, support = torch.zeros(3, 2, 5), torch.zeros(3, 1), FIVE.float()
    with pytest.raises(ValueError, match="transform='log'"):
        two_hot_cross_entropy(logits, target, support, transform="log")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"support has shape \(4,\)"):
        two_hot_cross_entropy(logits, target, support[:4])
    with pytest.raises(ValueError, match="N >= 2"):
        two_hot_cross_entropy(logits[..., :1], target, support[:1])
    with pytest.raises(ValueError, match=r"target has shape \(2, 1\).*\(3, 2\)"):
        hl_gauss_cross_entropy(logits, target[:2], support, 0.5)
    with pytest.raises(ValueError, match=r"target has shape \(1, 3, 2\)"):
        two_hot_cross_entropy(logits, torch.zeros(1, 3, 2), support)
    with pytest.raises(ValueError, match="logits is torch.int64"):
        two_hot_cross_entropy(logits.long(), target, support)
    for sigma in (0.0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="sigma="):
            hl_gauss_cross_entropy(logits, target, support, sigma)
    with pytest.raises(ValueError, match="backend='quick' is not known for two_hot_cross_entropy"):
        two_hot_cross_entropy(logits, target, support, backend="quick")
    assert set(BACKENDS) == set(without_triton("hl_gauss_cross_entropy")) >= {"reference", "fused"}


@pytest.mark.parametrize(
    ("support", "wrong"),
    [
        ((0.0, 1.0, 1.0), "does not ascend"),
        ((0.0, 2.0, 1.0), "does not ascend"),
        ((0.0, 1.0, float("nan")), "is not finite"),
        ((float("-inf"), 0.0, 1.0), "is not finite"),
    ],
)
def test_bins_are_finite_and_ascend(support: tuple[float, ...], wrong: str) -> None:
    logits, target = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match=f"support {wrong}"):
        two_hot_cross_entropy(logits, target, torch.tensor(support))
    with pytest.raises(ValueError, match=f"support {wrong}"):
        hl_gauss_cross_entropy(logits, target, torch.tensor(support), 0.5)
    with pytest.raises(ValueError, match=f"support {wrong}"):
        two_hot_labels(target, torch.tensor(support))


def test_labels_are_checked() -> None:
    target = torch.zeros(2)
    with pytest.raises(ValueError, match="2 is followed by 1 at index 2; give finite, ascending bin centres"):
        hl_gauss_labels(target, torch.tensor((0.0, 2.0, 1.0)), 0.5)
    with pytest.raises(ValueError, match="sigma=-1.0"):
        hl_gauss_labels(target, FIVE, -1.0)
    with pytest.raises(ValueError, match="transform='log'"):
        two_hot_labels(target, FIVE, transform="log")
    with pytest.raises(ValueError, match="N >= 2"):
        two_hot_labels(target, FIVE[None])


def test_one_device() -> None:
    with pytest.raises(ValueError, match="target is on meta and logits on cpu"):
        two_hot_cross_entropy(torch.zeros(2, 5), torch.zeros(2, device="meta"), FIVE)
    with pytest.raises(ValueError, match="support is on meta and logits on cpu"):
        two_hot_cross_entropy(torch.zeros(2, 5), torch.zeros(2), FIVE.to("meta"))


@pytest.mark.parametrize("sigma", [None, 0.75])
def test_results_are_contiguous_as_the_compiler_believes(sigma: float | None) -> None:
    logits = torch.randn(9, 2, 3).permute(2, 1, 0)
    args = (torch.randn(3, 1), torch.linspace(-2, 2, 9), True, sigma)
    assert torch.ops.amago_kernels.value_cross_entropy(logits, *args).is_contiguous()
    grad = torch.randn(2, 3).t()
    assert torch.ops.amago_kernels.value_cross_entropy_backward(grad, logits, *args).is_contiguous()
