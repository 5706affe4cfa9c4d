"""The benchmarks of the kernels: counts, budgets and names by hand, promises on made-up rows, one run of the script."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from amago_kernels.builds import MODULES

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "kernels"
OPERATIONS = ("decode", "attention", "linear_scan", "selective_scan", "conv", "returns", "value_losses", "gru")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The modules of a script are found beside it; here for as long as these tests run."""
    before = set(sys.modules)
    folders = [str(FOLDER), str(FOLDER.parent)]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER.parent)):
            del sys.modules[name]


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_script", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    return subprocess.run([sys.executable, str(FOLDER), *arguments], capture_output=True, text=True, env=given)


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (3, 0), (3, 2), (0, 1), (20, 5)])
def test_visible_pairs(window, sink):
    reset = torch.rand(3, 17, generator=torch.Generator().manual_seed(0)) < 0.2
    index = torch.arange(17)
    starts = torch.where(reset, index, 0).cummax(dim=1).values
    seen = 0
    for start in starts.tolist():
        for i in range(17):
            for j in range(start[i], i + 1):
                seen += window is None or i - j <= window or j - start[i] < sink
    assert load("costs").visible_pairs(index - starts, window, sink) == seen


def test_attention_counts():
    pairs = load("costs").visible_pairs(torch.arange(4).expand(2, 4), None, 0)
    assert pairs == 2 * 10
    cost = load("costs").attention(2, 4, 3, 8, 2, pairs)
    # Two lanes, four timesteps, three heads of eight numbers of two bytes; q, k, v and the output.
    assert cost["forward"].bytes == 4 * (2 * 4 * 3 * 8 * 2)
    # Per pair and head two products over eight numbers, each a multiplication and an addition.
    assert cost["forward"].flops == 20 * 3 * 2 * 8 * 2
    assert cost["backward"].flops == 2.5 * cost["forward"].flops
    assert cost["forward+backward"].bytes == cost["forward"].bytes + cost["backward"].bytes


def test_decode_counts_what_is_visible():
    decode = load("decode")
    length = torch.tensor([0, 2, 4, 9])
    inputs = {"length": length, "keys": torch.empty(4, 1, 4, 8)}
    assert decode._visible(inputs, {}).sum(1).tolist() == [1, 3, 4, 4]
    # The lane of nine timesteps holds 6 to 9; the third one 1 to 4: no sink is left, and a window of 2 holds 3.
    assert decode._visible(inputs, {"window": 2, "sink": 1}).sum(1).tolist() == [1, 3, 3, 3]
    assert decode._visible(inputs, {"window": 1, "sink": 1}).sum(1).tolist() == [1, 3, 2, 2]
    cost = load("costs").decode(12, 4, 1, 8, 4)["forward"]
    # Eight older keys and values, four of q, k, v, out, and four keys and values written.
    assert cost.bytes == (2 * 8 + 4 * 4 + 2 * 4) * 8 * 4


def test_other_counts():
    costs = load("costs")
    assert costs.linear_scan(100, 4)["forward"].bytes == 1200
    assert costs.linear_scan(100, 4)["backward"].bytes == 2000
    assert costs.conv(100, 4, 2)["forward"] == costs.Cost(400, 800)
    assert costs.selective_scan(1, 2, 3, 4, 2)["forward"].bytes == 2 * (4 * 6 + 2 * 8)
    assert costs.value_loss(10, 5, 16, 4)["forward"].bytes == 10 * 16 * 4 + 4 * 15
    assert costs.returns(10, 7, 4, True)["forward"].bytes == 10 * 6 + 2 * 280
    assert costs.returns(10, 7, 4, False)["forward"].bytes == 10 * 6 + 280


def test_scans_to_compile_are_right():
    a, b = torch.rand(2, 96, 3), torch.randn(2, 96, 3)
    state, expected = torch.zeros(2, 3), []
    for t in range(96):
        state = a[:, t] * state + b[:, t]
        expected.append(state)
    contenders = load("contenders")
    for length in (1, 5, 32, 64, 96):
        out = contenders.chunked_scan(a[:, :length], b[:, :length])
        torch.testing.assert_close(out, torch.stack(expected[:length], dim=1))


def test_auto_choice_listens_and_stops_listening():
    contenders = load("contenders")
    from amago_kernels import dispatch, linear_scan
    from amago_kernels.scan import linear

    x = torch.rand(1, 4, 2)
    assert contenders.auto_choice(lambda: linear_scan(x, x)) == "blocked"
    assert linear.choose is dispatch.choose
    assert contenders.auto_choice(lambda: None) == "?"


def test_names():
    machine = load("machine")
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert machine.slug("cpu 2core") == "cpu-2core"
    assert machine.slug(" (A) ") == "a"


def test_repeats():
    repeats = load("timing").repeats
    assert repeats(1.0, 0.05, 100) == 50
    assert repeats(0.001, 1.0, 100) == 100
    assert repeats(40.0, 0.1, 100) == 20, "twenty where a call is not slow"
    assert repeats(400.0, 0.1, 100) == 5
    assert repeats(400.0, 0.1, 3) == 3


def test_times_and_peak_memory():
    timing = load("timing")
    times = timing.Times.of([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (times.ms, times.runs) == (3.0, 5)
    assert times.spread == pytest.approx(2 / 3)
    assert timing.peak_bytes(lambda: torch.ones(1000) + torch.ones(1000), CPU) == pytest.approx(12_000, rel=0.1)
    turns = []
    steps = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
    timing.Clock(CPU).medians(steps, seconds=1.0, most=4, restores={"b": lambda: turns.append("undo")})
    assert turns[-6:] == ["a", "undo", "b", "a", "undo", "b"]


def test_shares_add_up():
    main = script()
    ends = main.shares(["decode", "conv"], 100.0)
    assert ends["conv"] == pytest.approx(100.0)
    assert ends["decode"] == pytest.approx(100.0 * 25 / 45)
    assert set(main._WEIGHTS) == set(OPERATIONS)


def test_a_lost_device_costs_one_operation(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    main, begun = script(), []
    args = main.arguments(["--device", "cuda", "--quick", "--out", str(tmp_path), "--only", "decode", "conv", "gru"])
    monkeypatch.setenv(main._BEFORE, "")
    monkeypatch.setattr(os, "execv", lambda program, given: begun.append(given))
    main._begin_again(args, ["conv", "gru"], ["decode, the device: lost"], 50.0)
    again = main.arguments(begun[0][2:])
    assert (again.device, again.only, again.quick, again.out) == ("cuda", ["conv", "gru"], True, tmp_path)
    assert again.budget_seconds == 50.0
    assert os.environ[main._BEFORE] == "decode, the device: lost"


def test_no_case_begins_after_the_deadline():
    runner, cases, machine = load("runner"), load("cases"), load("machine")
    operation = load("returns").operation(CPU, quick=True)
    bench = runner.Bench(machine.Machine(CPU, "here", 1e9, 1e9, {}), load("timing").Clock(CPU), 0.01, 3, 0.0)
    said: list[str] = []
    outcome = runner.run_operation(operation, bench, said.append)
    assert len(said) == 1, "the first one always"
    assert outcome.left_out == [case.label for case in operation.cases[1:]]
    assert {row["contender"] for row in outcome.rows} == {"ours: blocked", cases.REFERENCE}
    assert not outcome.broken


def broken_case(case: Any, name: str, call: Any) -> Any:
    from dataclasses import replace

    cases = load("cases")
    wrong = cases.Contender(name, lambda inputs: cases.Run(lambda: call(inputs)), backend="fused", backward=True)
    return replace(case, contenders=[wrong, *case.contenders])


def test_who_is_wrong_gets_no_time(capsys):
    runner, tables, machine = load("runner"), load("output"), load("machine")
    from dataclasses import replace

    operation = load("conv").operation(CPU, quick=True)
    good = operation.cases[0]

    def shifted(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return good.reference(inputs) * 1.01

    def failing(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    bad = broken_case(broken_case(good, "ours: shifted", shifted), "ours: failing", failing)
    device = machine.Machine(CPU, "here", 1e9, 1e9, {})
    bench = runner.Bench(device, load("timing").Clock(CPU), 0.01, 3, 1e12)
    outcome = runner.run_operation(replace(operation, cases=[bad]), bench, lambda text: None)
    wrong = [row for row in outcome.rows if row["contender"] == "ours: shifted"]
    assert len(wrong) == 2
    assert all(row["ms"] is None and row["error"] == pytest.approx(0.01, rel=0.1) for row in wrong)
    assert {name for name, _, _ in outcome.broken} == {"ours: shifted", "ours: failing"}
    tables.print_table(operation, outcome, device)
    tables.print_remarks(outcome)
    text = capsys.readouterr().out
    assert "no time for ours: failing: RuntimeError: no such kernel (no resets, B2 L64 D64 W4, float32)" in text
    assert "no time for ours: shifted: wrong, relative error 0.01 instead of 1e-05 at most" in text


def made_up(operation: Any) -> list[dict[str, Any]]:
    """A row for everybody who takes part, and for Triton."""
    runner, machine = load("runner"), load("machine")
    rows = []
    for case in operation.cases:
        for direction in case.directions:
            for name in dict.fromkeys(["ours: triton", "flex_attention, compiled", *(c.name for c in case.contenders)]):
                row = {"kind": case.kind, "shape": case.shape, **case.sizes, "dtype": case.dtype_name}
                row |= {"direction": direction, "contender": name, "auto": False, "error": 0.0, "spread": 0.0}
                ours = name.startswith("ours")
                row |= {"ms": 1.0 if ours else 6.0, "graph_ms": 1.0 if ours else 6.0, "runs": 20}
                row["peak_bytes"] = 10**9 if ours else 6 * 10**9
                cost = load("costs").Cost(10**9, 10**9)
                rows.append(runner.with_rates(row, cost, machine.Machine(CPU, "here", 1e12, 1e12, {})))
    return rows


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_promise_finds_its_rows(name, device):
    operation = load(name).operation(torch.device(device), quick=False)
    labels = [case.label for case in operation.cases]
    assert len(set(labels)) == len(labels)
    assert operation.bound in ("copy", "matmul")
    rows = load("cases").Rows(made_up(operation))
    for target in operation.targets:
        if target.device == device:
            assert target.value(rows) is not None, target.text
            assert target.value(load("cases").Rows()) is None


def test_every_triton_module_is_shown_beside_one_operation():
    found = [load(name).operation(CPU, quick=True).builds for name in OPERATIONS]
    for module in MODULES:
        assert sum(module.startswith(builds) for builds in found if builds) == 1, module


def test_lines_of_a_plot_have_two_points():
    plots = load("plots")
    row = {"kind": "k", "direction": "forward", "dtype": "float32", "contender": "a"}
    rows = [{**row, "shape": f"B2 L{length} D4", "B": 2, "L": length, "D": 4, "ms": 0.1 * length} for length in (8, 4)]
    rows += [{**rows[0], "contender": "b"}, {**rows[0], "contender": "c", "ms": None}]
    assert plots.series(rows, "L") == {"k, forward\nB2 D4, float32": {"a": [(4, 0.4), (8, 0.8)]}}


def test_the_script(tmp_path):
    done = run("--device", "cpu", "--quick", "--only", "returns", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((tmp_path / "returns.json").read_text())
    assert {row["kind"] for row in saved["rows"]} == {"lambda", "discounted", "n-step"}
    assert all(row["ms"] > 0 and row["error"] < 1e-5 for row in saved["rows"])
    assert len(saved["targets"]) == 3
    assert f"saved {tmp_path / 'returns.png'}" in done.stdout or "matplotlib is not installed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "nothing"), "invalid choice: 'nothing'"),
        (("--threads", "0"), "--threads 0 is not allowed"),
        (("--budget-seconds", "-1"), "-1 is not allowed; give seconds > 0"),
        (("--quikc",), "unrecognized arguments: --quikc"),
    ],
)
def test_wrong_options(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        script().arguments(list(arguments))
    assert message in capsys.readouterr().err


def test_no_times_of_the_interpreter():
    done = run("--device", "cpu", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "times of Triton's interpreter mean nothing" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device():
    done = run("--device", "cuda")
    assert (done.returncode, done.stderr.strip()) == (1, "--device cuda: no CUDA device found")
