"""`linear_scan`: every backend against a loop over complex or real numbers in float64, with every gradient."""

from __future__ import annotations

import pytest
import torch
from linear_scan_cases import compare, make_inputs, scalar
from reset_patterns import PATTERNS, make_reset
from triton_devices import without_triton

from amago_kernels import linear_scan, linear_scan_step
from amago_kernels.scan import blocked
from amago_kernels.testing import assert_close_ratio, poisoned

BACKENDS = without_triton("linear_scan")


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_state_and_gradients(backend, pairs, kind):
    for batch, length in ((3, 1), (3, 63), (2, 130)):
        inputs = make_inputs(batch, length, 5, pairs)
        compare(inputs, make_reset(kind, batch, length), pairs, backend, torch.float64, 1e-12)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", ["none", "some"])
@pytest.mark.parametrize("wide", [False, True])
def test_blocks_and_one_pass_in_float32(wide, kind, pairs, monkeypatch):
    monkeypatch.setattr(blocked, "WIDE", 1 if wide else 1 << 40)
    for constant in (False, True):
        inputs = make_inputs(2, 130, 60, pairs, constant)
        compare(inputs, make_reset(kind, 2, 130), pairs, "blocked", torch.float32, 1e-5)


@pytest.mark.parametrize("length", [31, 32, 33, 272, 520])
@pytest.mark.parametrize("backend", BACKENDS)
def test_borders_of_blocks(backend, length):
    compare(make_inputs(1, length, 2, False), make_reset("some", 1, length), False, backend, torch.float64, 1e-12)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_begins_with_zeros(backend, pairs):
    compare(make_inputs(2, 40, 3, pairs), make_reset("some", 2, 40), pairs, backend, torch.float64, 1e-12, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_accumulates_in_float32(backend, dtype):
    inputs = [x.to(dtype).double() for x in make_inputs(2, 63, 8, False)]
    compare(inputs, make_reset("some", 2, 63), False, backend, dtype, 1e-2)
    a, b = torch.full((1,), 1.0), torch.full((1, 1000, 1), 2.0**-9, dtype=dtype)
    assert linear_scan(a, b, backend=backend)[1].item() == 1000 * 2.0**-9


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_before_a_reset_is_forgotten(backend, pairs):
    for length, at in ((1, 0), (9, 4), (70, 0), (70, 37)):
        a, b, _ = make_inputs(2, length, 3, pairs)
        reset = torch.zeros(2, length, dtype=torch.bool)
        reset[0, at] = True
        a[0, :at], b[0, :at] = float("nan"), float("nan")
        state = poisoned(b[:, 0].shape, dtype=torch.float64)
        state[1] = 0.0
        h, last = linear_scan(a, b, initial_state=state, reset=reset, pairs=pairs, backend=backend)
        assert h[0, :at].isnan().any(dim=-1).all()
        assert h[0, at:].isfinite().all() and h[1].isfinite().all() and last.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_crosses_a_reset(backend):
    a, b, state = (x.requires_grad_() for x in make_inputs(1, 80, 4, False))
    reset = torch.zeros(1, 80, dtype=torch.bool)
    reset[0, 50] = True
    h, _ = linear_scan(a, b, initial_state=state, reset=reset, backend=backend)
    grads = torch.autograd.grad(h[:, 50:].sum(), [a, b, state])
    assert not grads[0][:, :51].any() and not grads[1][:, :50].any() and not grads[2].any()
    assert grads[1][:, 50].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_that_overflow_do_no_harm(backend):
    for factor in (40.0, 256.0):
        a, b = torch.full((1, 300, 3), factor), torch.zeros(1, 300, 3)
        b[:, 285:] = 1.0
        h, last = linear_scan(a, b, backend=backend)
        assert not h[:, :285].any() and h.isfinite().all()
        assert_close_ratio(last, torch.full((1, 3), sum(factor**n for n in range(15))), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_that_overflow_meet_small_states(backend):
    """They meet states so small that the results are not large: 2^-98 * (2^16)^14 = 2^126."""
    for start in range(120, 144, 4):
        a, b = torch.full((1, 300, 3), 0.5), torch.zeros(1, 300, 3)
        a[:, start : start + 14] = 2.0**16
        b[:, 20] = 2.0
        h, last = linear_scan(a, b, backend=backend)
        assert h[0, start + 13].tolist() == [2.0 ** (246 - start)] * 3
        assert last.tolist() == [[2.0 ** (246 - start - (299 - start - 13))] * 3]


@pytest.fixture
def blind(monkeypatch):
    """Blocks as on an accelerator, where a look at a value is a stall."""
    monkeypatch.setattr(blocked, "_visible", lambda x: False)


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("pairs", [False, True])
def test_blocks_without_a_look_at_values(pairs, kind, blind):
    for length in (63, 130, 300):
        inputs = make_inputs(2, length, 5, pairs)
        compare(inputs, make_reset(kind, 2, length), pairs, "blocked", torch.float64, 1e-12)
    compare(make_inputs(2, 130, 5, pairs), make_reset(kind, 2, 130), pairs, "blocked", torch.float32, 1e-5)


def test_blocks_without_a_look_at_values_are_safe(blind):
    test_products_that_overflow_do_no_harm("blocked")
    test_products_that_overflow_meet_small_states("blocked")
    for pairs in (False, True):
        test_nan_before_a_reset_is_forgotten("blocked", pairs)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, pairs):
    inputs = make_inputs(3, 40, 4, pairs)
    twisted = [x.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    plain = [x.requires_grad_() for x in inputs]
    reset = make_reset("some", 3, 40)
    results = []
    for a, b, state in (plain, twisted):
        h, last = linear_scan(a, b, initial_state=state, reset=reset.t().contiguous().t(), pairs=pairs, backend=backend)
        results.append([h, last, *torch.autograd.grad(scalar(h, last), [a, b, state])])
    for one, other in zip(*results, strict=True):
        assert_close_ratio(one, other, 1e-14)


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_at_odd_places_in_memory(backend, lanes):
    """Complex numbers must begin at even places; pairs in a larger buffer need not, however contiguous they are."""
    inputs = make_inputs(2, 40, 4, True)
    shifted = [torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)[:lanes].requires_grad_() for x in inputs]
    plain = [x[:lanes].requires_grad_() for x in inputs]
    results = []
    for a, b, state in (plain, shifted):
        h, last = linear_scan(a, b, initial_state=state, pairs=True, backend=backend)
        results.append([h, last, *torch.autograd.grad(scalar(h, last), [a, b, state])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pairs", [False, True])
def test_steps_equal_the_scan(pairs):
    a, b, state = (x.float() for x in make_inputs(2, 40, 3, pairs))
    h, last = linear_scan(a, b, initial_state=state, pairs=pairs)
    lane, address = state.clone(), None
    for t in range(40):
        address = address or lane.data_ptr()
        out = linear_scan_step(a[:, t], b[:, t], lane, pairs=pairs)
        assert_close_ratio(out, h[:, t], 1e-6)
        assert out.data_ptr() != lane.data_ptr() == address
    assert_close_ratio(lane, last, 1e-6)
    out = linear_scan_step(a[:, 0].bfloat16(), b[:, 0].bfloat16(), lane, pairs=pairs)
    assert out.dtype == torch.bfloat16 and lane.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """`i` three times, from 1: `i + 1`, `i (i + 1) + 1 = i`, `i i + 1 = 0`."""
    state = torch.tensor([[[1.0, 0.0]]])
    term = torch.tensor([1.0, 0.0]).expand(1, 3, 1, 2)
    h, _ = linear_scan(torch.tensor([[0.0, 1.0]]), term, initial_state=state, pairs=True, backend=backend)
    assert h.flatten().tolist() == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("by_numba", [False, "numba" in BACKENDS])
def test_registration(by_numba, pairs):
    a, b, state = (x.float().requires_grad_() for x in make_inputs(2, 20, 3, pairs))
    reset = make_reset("some", 2, 20)
    arguments = (a, b, state, reset, pairs, by_numba)
    torch.library.opcheck(torch.ops.amago_kernels.linear_scan.default, arguments)
    torch.library.opcheck(torch.ops.amago_kernels.linear_scan.default, (*arguments[:3], None, *arguments[4:]))
    h, last = (x.detach() for x in torch.ops.amago_kernels.linear_scan(*arguments))
    torch.library.opcheck(
        torch.ops.amago_kernels.linear_scan_backward.default,
        (torch.randn_like(h), torch.randn_like(last), a.detach(), h, state.detach(), reset, pairs, by_numba),
    )


def test_refusals_say_why():
    a, b, state = make_inputs(2, 5, 3, False)
    with pytest.raises(ValueError, match="b has shape"):
        linear_scan(a[0], b[0])
    with pytest.raises(ValueError, match="a has shape"):
        linear_scan(a[..., :2], b)
    with pytest.raises(ValueError, match="a has shape"):
        linear_scan(torch.ones(4, 2, 5, 3), b)
    with pytest.raises(ValueError, match=r"give \[B, L, D, 2\]"):
        linear_scan(a, b, pairs=True)
    with pytest.raises(ValueError, match="initial_state has shape"):
        linear_scan(a, b, initial_state=state[:1])
    with pytest.raises(ValueError, match="reset is torch.float32"):
        linear_scan(a, b, reset=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="pairs=True"):
        linear_scan(a, b.to(torch.complex64))
    with pytest.raises(ValueError, match="backend='cumsum' is not known"):
        linear_scan(a, b, backend="cumsum")
    with pytest.raises(ValueError, match="initial_state is torch.int64; give a floating dtype"):
        linear_scan(a, b, initial_state=state.long())
    for options in ({"initial_state": state.to("meta")}, {"reset": torch.zeros(2, 5, dtype=torch.bool, device="meta")}):
        with pytest.raises(ValueError, match="is on meta and b on cpu; give one device"):
            linear_scan(a, b, **options)
    with pytest.raises(ValueError, match=r"b has shape \(1, 3\); give \(2, 3\)"):
        linear_scan_step(a[:, 0], b[:1, 0], state)
    with pytest.raises(ValueError, match="a has shape"):
        linear_scan_step(a[:, 0, :2], b[:, 0], state)
    with pytest.raises(ValueError, match="state is torch.int64"):
        linear_scan_step(a[:, 0], b[:, 0], state.long())
