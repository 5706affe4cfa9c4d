"""Numba behind the CPU's paths: when it is taken, its exponentials, its threads, its cache."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from linear_scan_cases import make_inputs, scalar
from reset_patterns import make_reset

from amago_kernels import available, dispatch, linear_scan
from amago_kernels.dispatch import OPERATIONS, choose

numba_jit = pytest.importorskip("amago_kernels.numba_jit", reason="Numba is not installed", exc_type=ImportError)
numba_math = pytest.importorskip("amago_kernels.numba_math", exc_type=ImportError)

WITH_NUMBA = [operation for operation, backends in OPERATIONS.items() if "numba" in backends]


def run(code, **variables):
    """What a fresh process prints."""
    out = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


@numba_jit.jit(allocates=False)
def functions(x, size, exp2, log, log1p, erf, sigmoid, softplus):
    for i in range(x.shape[0]):
        exp2[i] = numba_math.exp2(x[i])
        log[i] = numba_math.log(size[i])
        log1p[i] = numba_math.log1p(size[i])
        erf[i] = numba_math.erf(x[i])
        sigmoid[i] = numba_math.sigmoid(x[i])
        softplus[i] = numba_math.softplus(x[i])


NAMES = ("exp2", "log", "log1p", "erf", "sigmoid", "softplus")


def values(x):
    """Of every function; logarithms are of sizes."""
    out = {name: torch.empty_like(x) for name in NAMES}
    functions(*(numba_jit.array(y) for y in (x, x.abs(), *out.values())))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions(dtype):
    x = torch.cat(
        [torch.linspace(-6.0, 6.0, 40001), torch.linspace(-150.0, 150.0, 40001), torch.logspace(-30, 30, 999)]
    )
    x = torch.cat([x, -x, torch.tensor([127.99, 88.72])]).to(dtype)
    x = x[x != 0]
    exact = x.double()
    wanted = {
        "exp2": exact.exp2(),
        "log": exact.abs().log(),
        "log1p": exact.abs().log1p(),
        "erf": exact.erf(),
        "sigmoid": 1.0 / (1.0 + (-exact).exp()),
        "softplus": exact.clamp_min(0.0) + (-exact.abs()).exp().log1p(),
    }
    least = {"exp2": 2.4e-38, "sigmoid": 1e-37, "softplus": 1e-37, "erf": 1.0}
    for name, got in values(x).items():
        units = 4 + 2 * exact.abs() if name in ("sigmoid", "softplus") else torch.full_like(exact, 4)
        there = wanted[name].to(dtype).isfinite()
        assert torch.equal(got.isfinite(), there), name
        error = (got.double() - wanted[name]).abs()[there]
        allowed = units[there] * torch.finfo(dtype).eps * wanted[name][there].abs().clamp_min(least.get(name, 0.0))
        assert (error <= allowed.clamp_min(2.4e-38 if dtype == torch.float32 else 0.0)).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_what_is_no_number(dtype):
    out = values(torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype))
    ends = {"exp2": (math.inf, 0.0), "erf": (1.0, -1.0), "sigmoid": (1.0, 0.0), "softplus": (math.inf, 0.0)}
    for name, wanted in ends.items():
        assert out[name][:2].tolist() == pytest.approx(wanted, abs=4e-7), name
        assert out[name][2].isnan(), name
    assert out["log1p"][2].isnan()


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("wanted", "count", "numbers", "pieces"), [(4, 10, 1 << 30, 4), (4, 3, 1 << 30, 3), (4, 10, 9, 1)]
)
def test_pieces_cover_everything_once(threads, wanted, count, numbers, pieces):
    threads(wanted)
    seen, workers = [], set()

    def work(first, end):
        seen.extend(range(first, end))
        workers.add(threading.get_ident())

    numba_jit.in_threads(work, count, numbers)
    assert sorted(seen) == list(range(count))
    assert threading.get_ident() in workers and len(workers) <= pieces


def test_what_fails_in_a_thread_is_heard(threads):
    def work(first, end):
        if first > 0:
            raise RuntimeError("second half")

    threads(2)
    with pytest.raises(RuntimeError, match="second half"):
        numba_jit.in_threads(work, 4, 1 << 30)


@pytest.mark.parametrize("pairs", [False, True])
def test_linear_scan_is_the_same_on_any_number_of_threads(threads, pairs, monkeypatch):
    monkeypatch.setattr(numba_jit, "_PER_THREAD", 1)
    inputs = [x.float().requires_grad_() for x in make_inputs(5, 40, 3, pairs)]
    results = []
    for count in (1, 3):
        threads(count)
        h, last = linear_scan(
            *inputs[:2], initial_state=inputs[2], reset=make_reset("some", 5, 40), pairs=pairs, backend="numba"
        )
        results.append([h, last, *torch.autograd.grad(scalar(h, last), inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_forked_process_goes_on():
    """As workers of data loaders and vector environments do."""
    code = """
import os, torch
from amago_kernels import linear_scan, numba_jit
numba_jit._PER_THREAD = 1
torch.set_num_threads(2)
a, b = torch.rand(4, 30, 3), torch.rand(4, 30, 3)
before = linear_scan(a, b, backend="numba")[0]
child = os.fork()
if child == 0:
    same = torch.equal(before, linear_scan(a, b, backend="numba")[0])
    os._exit(0 if same else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run(code) == "0"


def test_kernels_stay_within_their_memory(tmp_path):
    """Numba looks only where it is told to; what it compiles then is kept apart."""
    code = """
import torch
from amago_kernels import hl_gauss_cross_entropy, linear_scan, selective_scan, two_hot_cross_entropy
for length, channels, states in ((1, 1, 1), (33, 5, 3), (34, 129, 17)):
    reset = torch.rand(3, length) < 0.2
    u, x = torch.rand(2, 3, length, channels).requires_grad_()
    B, C = torch.rand(2, 3, length, states)
    for options in ({}, {"reset": reset, "z": u, "D": x[0, 0], "delta_bias": x[0, 0], "delta_softplus": True}):
        y, last = selective_scan(u, x, -torch.rand(channels, states), B, C, backend="numba", **options)
        (y.sum() + last.sum()).backward()
    for a in (u, u[0], u[:, :1], u[:1, :, :1]):
        linear_scan(a, x, reset=reset, backend="numba")[0].sum().backward()
for bins, target in ((2, (5, 1)), (9, (70,)), (40, ()), (40, (0, 70))):
    logits = torch.randn(0 if target == (0, 70) else 5, 70, bins).requires_grad_()
    shared = torch.randn(target), torch.linspace(-2, 2, bins)
    loss = two_hot_cross_entropy(logits, *shared, backend="numba")
    for sigma in (0.01, 0.5, 100.0):
        loss = loss + hl_gauss_cross_entropy(logits, *shared, sigma, backend="numba")
    loss.sum().backward()
"""
    run(code, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))


def test_no_place_for_a_cache(tmp_path):
    (tmp_path / "file").touch()
    code = "import torch; from amago_kernels import linear_scan; print(linear_scan(*torch.ones(2, 1, 2, 1))[1].item())"
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path / "file")) == "2.0"


CALLER = """
import numpy as np
from amago_kernels import numba_jit
from callee import twice
@numba_jit.jit
def kernel(x):
    return twice(x[0])
"""


def test_what_is_kept_knows_every_file(tmp_path):
    """A kernel's own file has not changed, and its compiled form is still out of date."""
    (tmp_path / "caller.py").write_text(CALLER)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from amago_kernels import numba_jit;"
        "numba_jit._SOURCES = (Path(sys.argv[1]) / 'callee.py').read_text(); import caller, numpy;"
        "print(caller.kernel(numpy.ones(1)), sum(caller.kernel.stats.cache_hits.values()))"
    )
    printed = []
    for factor in (2, 2, 3):
        (tmp_path / "callee.py").write_text(
            f"from numba import njit\n\n@njit\ndef twice(x):\n    return {factor} * x\n"
        )
        command = [sys.executable, "-B", "-c", code, str(tmp_path)]
        out = subprocess.run(command, env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}, capture_output=True)
        printed.append(out.stdout.decode().strip() or out.stderr.decode())
    assert printed == ["2.0 0", "2.0 1", "3.0 0"]


@pytest.mark.parametrize("error", [RuntimeError, AttributeError])
def test_a_cache_that_numba_refuses(monkeypatch, error):
    def refusing(**options):
        if "cache" in options:
            raise error("not here")
        return lambda function: ("compiled", function)

    monkeypatch.setattr(numba_jit, "njit", refusing)
    assert numba_jit.jit(len, allocates=False) == ("compiled", len)


@pytest.mark.parametrize("operation", WITH_NUMBA)
def test_listed_where_it_is_installed(operation, monkeypatch):
    assert "numba" in available()[operation]
    monkeypatch.setattr(dispatch, "_NUMBA_FOUND", False)
    assert "numba" not in available()[operation]


@pytest.mark.parametrize(
    ("switch", "installed", "taken"), [(True, True, "numba"), (True, False, "blocked"), (False, True, "blocked")]
)
def test_auto(monkeypatch, switch, installed, taken):
    monkeypatch.setattr(dispatch, "_AUTO_NUMBA", switch)
    monkeypatch.setattr(dispatch, "_NUMBA_FOUND", installed)
    table = {"numba": dispatch.numba_refusal, "blocked": lambda call: None}
    assert choose("linear_scan", "auto", "cpu", table) == taken
    assert choose("linear_scan", "auto", "cuda", table) == "blocked"


def test_refusals_say_why(monkeypatch):
    a = torch.ones(1, 2, 3, device="meta")
    with pytest.raises(ValueError, match=r"kernels run on the CPU, and the input is on meta; these can: .*'blocked'"):
        linear_scan(a, a, backend="numba")
    a = torch.ones(1, 2, 3)
    monkeypatch.setattr(dispatch, "_NUMBA_FOUND", False)
    with pytest.raises(ValueError, match=r"numba is not installed \(pip install 'amago-kernels\[numba\]'\)"):
        linear_scan(a, a, backend="numba")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("raise ImportError('numba needs another numpy')", "cannot be imported: numba needs another numpy"),
        ("__version__, version_info = '0.57.1', (0, 57, 1)", "numba 0.57.1 is installed, and 0.61 or later is needed"),
    ],
)
def test_one_that_does_not_work(tmp_path, module, reason):
    """Then "auto" takes what there is in plain PyTorch, and who asks for it hears why."""
    (tmp_path / "numba.py").write_text(module)
    code = """
import torch
from amago_kernels import linear_scan
a = torch.ones(1, 2, 3)
assert linear_scan(a, a)[1].tolist() == [[2.0, 2.0, 2.0]]
try:
    linear_scan(a, a, backend="numba")
except ValueError as error:
    print(error)
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    assert reason in run(code, PYTHONPATH=path)


def test_switches_of_the_environment():
    code = """
import torch
from amago_kernels import available, dispatch, linear_scan
a = torch.ones(1, 2, 3)
linear_scan(a, a)
import sys
try:
    linear_scan(a, a, backend="numba")
    asked = "served"
except ValueError as error:
    asked = str(error)
print("numba" in available()["linear_scan"], "numba" in sys.modules, asked)
"""
    assert run(code, AMAGO_KERNELS_NUMBA="0") == "True True served"
    answer = run(code, NUMBA_DISABLE_JIT="1")
    assert answer.startswith("False False") and "NUMBA_DISABLE_JIT is set" in answer
