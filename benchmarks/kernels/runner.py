"""Takes the measurements of one operation: correctness first, then times and memory."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from cases import BACKWARD, FORWARD, Case, Contender, Inputs, Operation, Row, Rows, Run
from contenders import auto_choice
from costs import Cost
from machine import Machine
from timing import Clock, captured, peak_bytes
from torch import Tensor

from amago_kernels.testing import error_ratio

# Largest relative errors, of the output and of every gradient: ours, and others, who may round more often.
_TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 2e-2), torch.float16: (1e-2, 2e-2)}
# What torch.compile takes, or a little more: nobody begins to compile with less time left.
_COMPILE_SECONDS = 20.0
# Where a call takes longer, the host plays no part.
_GRAPH_MS = 2.0
_UNTIMED: dict[str, Any] = {"ms": None, "spread": None, "runs": 0, "graph_ms": None, "peak_bytes": None}


class DeviceLost(Exception):
    """A CUDA error after which nothing runs in this process any more."""


@dataclass
class Outcome:
    """What became of one operation.

    Attributes:
        rows: of the table.
        left_out: labels of cases for which no time was left.
        remarks: who has no time, why, and for which case.
        broken: the same, of ours only: what is wrong or failed.
        lost: whether a CUDA error has ended all use of the device.
    """

    rows: Rows = field(default_factory=Rows)
    left_out: list[str] = field(default_factory=list)
    remarks: list[tuple[str, str, str]] = field(default_factory=list)
    broken: list[tuple[str, str, str]] = field(default_factory=list)
    lost: bool = False


@dataclass(frozen=True)
class Bench:
    """How to measure.

    Attributes:
        machine: where.
        clock: of its device.
        seconds: to spend on each contender and direction.
        most: repeats at most.
        deadline: `time.monotonic()` after which no case begins.
    """

    machine: Machine
    clock: Clock
    seconds: float
    most: int
    deadline: float


def run_operation(operation: Operation, bench: Bench, say: Callable[[str], None]) -> Outcome:
    """Measures the cases of an operation until its time is used up; the first one always.

    Args:
        operation: what to measure.
        bench: how.
        say: told what is done now.

    Returns:
        What became of it; `lost` if the device is of no more use to this process.
    """
    outcome = Outcome()
    for number, case in enumerate(operation.cases):
        if outcome.lost or (number and time.monotonic() > bench.deadline):
            outcome.left_out.append(case.label)
            continue
        say(f"{operation.name}: {case.label}")
        try:
            _CaseRun(case, bench, outcome).measure()
        except DeviceLost as lost:
            outcome.broken.append(("the device", f"lost to {lost}", case.label))
            outcome.lost = True
        finally:
            operation.finish()
        if bench.machine.device.type == "cuda" and not outcome.lost:
            gc.collect()
            torch.cuda.empty_cache()
    return outcome


class _CaseRun:
    """One case: everything that is known while it is measured."""

    def __init__(self, case: Case, bench: Bench, outcome: Outcome) -> None:
        self.case, self.bench, self.outcome = case, bench, outcome
        self.device = bench.machine.device

    def measure(self) -> None:
        torch.manual_seed(0)
        inputs = self.case.make()
        leaves = [inputs[name].requires_grad_() for name in self.case.differentiable]
        auto = self.attempt("auto", lambda: auto_choice(lambda: self.case.auto(inputs)))
        judge = self.attempt("the reference", lambda: _Judge(self.case, inputs, leaves))
        if judge is None:
            return
        judged = self.judge_all(judge)
        limits = {name: _limit(self.case, contender) for name, (contender, _, _) in judged.items()}
        right = {name: judged[name][:2] for name, limit in limits.items() if judged[name][2] <= limit}
        cost = self.case.cost(inputs)
        for direction in self.case.directions:
            measured = self.measure_direction(judge, right, direction)
            here = Rows()
            for name, (contender, _, error) in judged.items():
                if name in right and name not in measured:
                    continue
                row = {
                    "kind": self.case.kind,
                    "shape": self.case.shape,
                    **self.case.sizes,
                    "dtype": self.case.dtype_name,
                    "direction": direction,
                    "contender": name,
                    "auto": contender.backend is not None and contender.backend == auto,
                    "error": error,
                    "wrong": name not in right,
                    **_UNTIMED,
                    **measured.get(name, {}),
                }
                here.append(with_rates(row, cost[direction], self.bench.machine))
            self.outcome.rows += with_ratios(here)

    def late(self) -> bool:
        """Whether there is no time to compile; for the first case of an operation there is."""
        return bool(self.outcome.rows) and time.monotonic() > self.bench.deadline - _COMPILE_SECONDS

    def judge_all(self, judge: _Judge) -> dict[str, tuple[Contender, Run, float]]:
        """Everybody's relative error; who is wrong is told."""
        judged = {}
        for contender in self.case.contenders:
            if contender.compiled and self.late():
                self.remark(contender.name, "no time was left to compile it")
                continue
            made = self.attempt(contender.name, lambda one=contender: judge.judge(one), contender.ours)
            if made is None:
                continue
            judged[contender.name] = contender, *made
            limit = _limit(self.case, contender)
            if not made[1] <= limit:
                text = f"wrong, relative error {made[1]:.2g} instead of {limit:g} at most"
                self.remark(contender.name, text, contender.ours)
        return judged

    def measure_direction(
        self, judge: _Judge, right: dict[str, tuple[Contender, Run]], direction: str
    ) -> dict[str, dict[str, Any]]:
        """Memory, times and, where asked for, times of CUDA graphs, by contender."""
        steps, restores, values = {}, {}, {}
        for name, (contender, run) in right.items():
            if not (contender.forward if direction == FORWARD else contender.backward):
                continue
            step = self.attempt(name, lambda one=run: judge.step(one, direction), contender.ours)
            if step is None:
                continue
            run.restore()
            peak = self.attempt(name, lambda one=step: peak_bytes(one, self.device), contender.ours)
            if peak is None:
                continue
            steps[name], restores[name] = step, run.restore
            values[name] = {"peak_bytes": None if direction == BACKWARD else peak}
        for name, times in (self.attempt("timing", lambda: self.times(steps, restores), True) or {}).items():
            values[name].update(ms=times.ms, spread=times.spread, runs=times.runs)
        if self.case.graph and self.device.type == "cuda" and all("ms" in found for found in values.values()):
            graphs = {}
            for name in steps:
                contender = right[name][0]
                # The reference may ask the host; what torch.compile made has a way of its own into graphs.
                if values[name]["ms"] < _GRAPH_MS and not contender.compiled and contender.backend != "reference":
                    capture = partial(captured, steps[name], restores[name])
                    graph = self.attempt(f"{name} in a CUDA graph", capture, contender.backend == "triton")
                    if graph is not None:
                        graphs[name] = graph
            for name, times in (self.attempt("replay", lambda: self.times(graphs, restores)) or {}).items():
                values[name]["graph_ms"] = times.ms
        return values

    def times(self, steps: dict[str, Callable[[], object]], restores: dict[str, Callable[[], object]]) -> Any:
        return self.bench.clock.medians(steps, seconds=self.bench.seconds, most=self.bench.most, restores=restores)

    def remark(self, name: str, reason: str, ours: bool = False) -> None:
        told = (name, reason, self.case.label)
        for there in (self.outcome.remarks, *([self.outcome.broken] if ours else [])):
            if told not in there:
                there.append(told)

    def attempt(self, name: str, action: Callable[[], Any], ours: bool = False) -> Any:
        """The result, or None and a remark; to refuse or to run out of memory is no failure."""
        try:
            return action()
        except torch.OutOfMemoryError:
            self.remark(name, "out of memory")
            torch.cuda.empty_cache()
        except Exception as error:  # Whatever a contender raises, the others are measured.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            # Compilers begin with the place and end with the cause.
            text = " ... ".join(dict.fromkeys((lines[0], lines[-1])))[:300]
            reason = f"{type(error).__name__}: {text}"
            if self.device.type == "cuda":
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    raise DeviceLost(f"{name}: {reason}") from error
            refuses = isinstance(error, ValueError) and "cannot serve" in text
            if ours and not refuses:
                traceback.print_exc()
            self.remark(name, text.split("call: ", 1)[-1] if refuses else reason, ours and not refuses)
        return None


def _limit(case: Case, contender: Contender) -> float:
    return _TOLERANCE[case.dtype][0 if contender.ours else 1]


def with_rates(row: Row, cost: Cost, machine: Machine) -> Row:
    """Adds what the counts and the time amount to.

    Args:
        row: with `ms` and `graph_ms`.
        cost: bytes and FLOPs.
        machine: what percentages are of.

    Returns:
        A new row.
    """
    rates: dict[str, float | int | None] = {"bytes": cost.bytes, "flops": cost.flops}
    for prefix in ("", "graph_"):
        ms = row[f"{prefix}ms"]
        moved, counted = (None, None) if ms is None else (1e3 * cost.bytes / ms, 1e3 * cost.flops / ms)
        rates[f"{prefix}gb_per_s"] = None if moved is None else 1e-9 * moved
        rates[f"{prefix}tflop_per_s"] = None if counted is None else 1e-12 * counted
        rates[f"{prefix}percent_of_copy"] = None if moved is None else 100 * moved / machine.copy_rate
        rates[f"{prefix}percent_of_matmul"] = None if counted is None else 100 * counted / machine.matmul_rate
    return {**row, **rates}


def with_ratios(rows: Rows) -> Rows:
    """Adds the time beside ours: Triton's where it ran, else that of what "auto" takes.

    Args:
        rows: of one case and direction.

    Returns:
        New rows.
    """
    timed = [row for row in rows if row["ms"] is not None]
    mine = [row for row in timed if row["contender"] == "ours: triton"] or [row for row in timed if row["auto"]]
    return Rows({**row, "ratio": row["ms"] / mine[0]["ms"] if mine and row["ms"] is not None else None} for row in rows)


class _Judge:
    """Compares contenders with the reference in float64, on the first and the last lane, gradients included."""

    def __init__(self, case: Case, inputs: Inputs, leaves: Sequence[Tensor]) -> None:
        self.case, self.inputs, self.leaves = case, inputs, leaves
        lanes = next(len(x) for name, x in inputs.items() if name not in case.shared)
        self.lanes = sorted({0, lanes - 1})
        few = {name: _widened(x if name in case.shared else x[self.lanes]) for name, x in inputs.items()}
        wide = [few[name].requires_grad_() for name in case.differentiable]
        out = case.reference(few)
        weight = torch.randn((lanes, *out.shape[1:]), device=out.device).to(case.dtype)
        # Gradients of shared inputs then come from the lanes that are compared, and from no other.
        only = torch.zeros_like(weight)
        only[self.lanes] = weight[self.lanes]
        self.gradients = torch.autograd.grad(out, wide, only[self.lanes].to(out.dtype)) if wide else ()
        self.out = out.detach()
        # Losses of bfloat16 logits are float32.
        self.weights = {dtype: weight.to(dtype) for dtype in {case.dtype, torch.float32}}
        self.weights_of_few = {dtype: only.to(dtype) for dtype in self.weights}

    def judge(self, contender: Contender) -> tuple[Run, float]:
        """Runs a contender once.

        Args:
            contender: whom.

        Returns:
            The contender with its inputs, and its largest relative error.
        """
        run = contender.make(self.inputs)
        run.restore()
        differentiates = bool(self.gradients) and contender.backward
        with torch.set_grad_enabled(differentiates):
            out = run.call()
        errors = [error_ratio(out[self.lanes], self.out)]
        if differentiates:
            gradients = torch.autograd.grad(out, self.leaves_of(run), self.weights_of_few[out.dtype])
            names, given = self.case.differentiable, run.gradients(gradients)
            for name, one, expected in zip(names, given, self.gradients, strict=True):
                errors.append(error_ratio(one if name in self.case.shared else one[self.lanes], expected))
        return run, max(errors)

    def leaves_of(self, run: Run) -> Sequence[Tensor]:
        return self.leaves if run.leaves is None else run.leaves

    def step(self, run: Run, direction: str) -> Callable[[], object]:
        """What is timed.

        Args:
            run: the contender.
            direction: forward, backward or both.

        Returns:
            A function without arguments.
        """
        leaves = self.leaves_of(run)
        if direction == FORWARD:
            return torch.no_grad()(run.call)
        if direction == BACKWARD:
            run.restore()
            out = run.call()
            weight = self.weights[out.dtype]
            return lambda: torch.autograd.grad(out, leaves, weight, retain_graph=True)

        def both() -> object:
            result = run.call()
            return torch.autograd.grad(result, leaves, self.weights[result.dtype])

        return both


def _widened(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64, copy=True) if x.is_floating_point() else x.detach().clone()
