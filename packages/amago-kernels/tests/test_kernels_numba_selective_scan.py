"""`selective_scan` by Numba's kernels: shapes around their cuts, threads, registration, and numbers at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from reset_patterns import PATTERNS, make_reset
from test_kernels_selective_scan import compare, make_inputs, run, scalar

from amago_kernels import selective_scan
from amago_kernels.testing import assert_close_ratio

pytest.importorskip("numba")

# Below and above a vector, a part of the channels, and a chunk of timesteps.
SHAPES = ((2, 1, 1, 1), (2, 63, 5, 16), (3, 33, 60, 3), (1, 40, 130, 3), (5, 32, 300, 1))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(inputs, reset):
    given = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, last = run(given, reset, "numba")
    return [y, last, *torch.autograd.grad(scalar(y, last), list(given.values()))]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_around_every_cut(shape):
    for kind in ("none", "some"):
        compare(make_inputs(*shape), make_reset(kind, *shape[:2]), "numba", torch.float32, 1e-5)
        compare(make_inputs(*shape), make_reset(kind, *shape[:2]), "numba", torch.float64, 1e-12)


@pytest.mark.parametrize("kind", PATTERNS)
def test_resets_in_float32(kind):
    compare(make_inputs(3, 130, 20, 3), make_reset(kind, 3, 130), "numba", torch.float32, 1e-5)


@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias", "initial_state"])
def test_gradients_without_one_option(left_out):
    results = []
    for backend in ("numba", "reference"):
        inputs = {name: x.requires_grad_() for name, x in make_inputs(2, 40, 6, 3).items() if name != left_out}
        positional, optional = list(inputs.values())[:5], dict(list(inputs.items())[5:])
        y, last = selective_scan(*positional, **optional, backend=backend)
        results.append([y, last, *torch.autograd.grad(scalar(y, last), list(inputs.values()))])
    for one, other in zip(*results, strict=True):
        assert_close_ratio(one, other, 1e-12)


@pytest.mark.parametrize("shape", [(4, 130, 160, 8), (1, 130, 1030, 4)])
def test_bits_do_not_depend_on_threads(shape, threads):
    """Lanes among threads, and the channels of one lane."""
    inputs = {name: x.float() for name, x in make_inputs(*shape).items()}
    reset = make_reset("some", *shape[:2])
    assert math.prod(shape) >= 4 * (1 << 17)
    collected = []
    for count in (1, 2, 3):
        threads(count)
        collected.append(results(inputs, reset))
    for others in collected[1:]:
        for one, other in zip(collected[0], others, strict=True):
            assert torch.equal(one, other)


def test_every_kind_of_stride():
    """Slices of a projection, repeated lanes, and numbers that start in the middle of their memory."""
    inputs = {name: x.float() for name, x in make_inputs(2, 40, 20, 3).items()}
    odd = dict(inputs)
    odd["u"], odd["z"] = torch.cat([inputs["u"], inputs["z"]], -1).split(20, -1)
    odd["delta"] = torch.cat([torch.zeros(1), inputs["delta"].flatten()])[1:].view(2, 40, 20)
    for name in ("B", "C"):
        inputs[name] = inputs[name][:1].repeat(2, 1, 1)
        odd[name] = inputs[name][:1].expand(2, 40, 3)
    odd["A"] = inputs["A"].t().contiguous().t()
    reset = make_reset("some", 2, 40)
    for one, other in zip(results(odd, reset.t().contiguous().t()), results(inputs, reset), strict=True):
        assert torch.equal(one, other)


def test_inputs_are_not_written():
    inputs = make_inputs(2, 40, 20, 3)
    copies = {name: x.clone() for name, x in inputs.items()}
    results(inputs, make_reset("some", 2, 40))
    assert all(torch.equal(x, copies[name]) for name, x in inputs.items())


def test_keeps_states_for_a_backward_pass_only():
    inputs = [x.float() for x in make_inputs(2, 70, 20, 3).values()]
    for keep, chunks in ((False, 0), (True, 3)):
        y, _, starts = torch.ops.amago_kernels.selective_scan(*inputs, None, True, True, keep)
        assert starts.shape == (2, chunks, 3, 20)
        assert_close_ratio(y, run(dict(zip(make_inputs(1, 1, 1, 1), inputs, strict=True)), None, "reference")[0], 1e-5)


def test_a_backward_pass_that_was_not_foreseen():
    """As of a program that was exported with inputs that wanted no gradients."""
    inputs = {name: x.float() for name, x in make_inputs(2, 70, 20, 3).items()}
    reset = make_reset("some", 2, 70)
    given = [x.clone().requires_grad_() for x in inputs.values()]
    y, last, _ = torch.ops.amago_kernels.selective_scan(*given, reset, True, True, False)
    for one, other in zip(torch.autograd.grad(scalar(y, last), given), results(inputs, reset)[2:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore")
def test_registration():
    inputs = [x.float().requires_grad_() for x in make_inputs(2, 20, 4, 3).values()]
    scan = torch.ops.amago_kernels.selective_scan
    backward = torch.ops.amago_kernels.selective_scan_backward
    for reset in (None, make_reset("some", 2, 20)):
        torch.library.opcheck(scan.default, (*inputs, reset, True, True, True))
    sparse = [*inputs[:5], None, None, None, None]
    torch.library.opcheck(scan.default, (*sparse, None, False, True, True))
    for given in (inputs, sparse):
        plain = [None if x is None else x.detach() for x in given]
        y, last, starts = scan(*plain, reset, True, True, True)
        torch.library.opcheck(backward.default, (torch.randn_like(y), last, starts, *plain, reset, True, True))


@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_break():
    inputs = {name: x.float().requires_grad_() for name, x in make_inputs(2, 20, 4, 3).items()}
    reset = make_reset("some", 2, 20)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, expected = (
        torch.autograd.grad(scalar(*call(inputs, reset, "numba")), list(inputs.values())) for call in (compiled, run)
    )
    for one, other in zip(got, expected, strict=True):
        assert_close_ratio(one, other, 1e-6)


def test_refuses_other_devices():
    inputs = {name: x.to("meta") for name, x in make_inputs(2, 20, 4, 3).items()}
    with pytest.raises(ValueError, match="Numba's kernels run on the CPU, and the input is on meta"):
        run(inputs, None, "numba")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_step_sizes_and_gates(dtype):
    """Decays of zero and infinity, softplus far from zero, closed and open gates; and NaN wherever there is one."""
    sizes = torch.tensor([-200.0, -90.0, -20.0, -1.0, 0.0, 1.0, 20.0, 90.0, 200.0, math.inf, -math.inf, math.nan])
    sizes = sizes.to(dtype).repeat(3)
    ones = torch.ones(1, 1, sizes.numel(), dtype=dtype)
    options = {"z": sizes.view(1, 1, -1), "initial_state": ones.view(1, -1, 1)}
    for rate in (-1.0, 1.0):
        for softplus in (False, True):
            given = (ones, sizes.view(1, 1, -1), rate * ones.view(-1, 1), ones[..., :1], ones[..., :1])
            expected, wanted = selective_scan(*given, **options, delta_softplus=softplus, backend="reference")
            y, last = selective_scan(*given, **options, delta_softplus=softplus, backend="numba")
            # float32 has no subnormal decays here.
            torch.testing.assert_close(last, wanted, rtol=1e-5, atol=1e-30, equal_nan=True)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-30, equal_nan=True)
