"""Prints one table per operation and saves it, and draws time against length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _report import save
from cases import Operation, Row, Target
from machine import Machine
from runner import Outcome

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def amount(number: float, unit: str) -> str:
    """A number with three digits.

    Args:
        number: what to write.
        unit: of it.

    Returns:
        For example "1.23 GB".
    """
    for size, prefix in _UNITS:
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 10**digits else f"{value:.{digits}g}"


def print_table(operation: Operation, outcome: Outcome, machine: Machine) -> None:
    """One line per contender under one line per case and direction.

    Args:
        operation: what was measured.
        outcome: what became of it.
        machine: what percentages are of.
    """
    rate = "TFLOP/s" if operation.bound == "matmul" else "GB/s"
    keys = ("tflop_per_s", "percent_of_matmul") if operation.bound == "matmul" else ("gb_per_s", "percent_of_copy")
    graphs = any(row["graph_ms"] is not None for row in outcome.rows)
    head = ["", "ms", "±%", *(["replay ms"] if graphs else []), "x ours", rate, f"% {operation.bound}", "peak MiB"]
    head += ["error"]
    lines: list[list[str]] = [head]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in outcome.rows:
        groups.setdefault(tuple(row[key] for key in ("kind", "shape", "dtype", "direction")), []).append(row)
    for (kind, shape, dtype, direction), rows in groups.items():
        counted = f"{amount(rows[0]['bytes'], 'B')}, {amount(rows[0]['flops'], 'FLOP')}"
        lines.append([f"{kind}, {shape}, {dtype}, {direction} ({counted})"])
        for row in rows:
            peak = row["peak_bytes"]
            cells = [f"  {row['contender']}{' *' if row['auto'] else ''}", _number(row["ms"])]
            cells.append("-" if row["spread"] is None else f"{100 * row['spread']:.0f}")
            cells += [_number(row["graph_ms"])] if graphs else []
            cells += [_number(row["ratio"], 2), _number(row[keys[0]]), _number(row[keys[1]], 2)]
            cells += ["-" if peak is None else _number(peak / 2**20), f"{row['error']:.1e}"]
            if row["wrong"]:
                cells[1] = "wrong"
            lines.append(cells)
    widths = [max(len(line[i]) for line in lines if len(line) > 1) for i in range(len(head))]
    print(f"\n## {operation.name} on {machine.name}\n")
    for line in lines:
        if len(line) == 1:
            print(line[0])
        else:
            text = "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            print(text.rstrip())
    print("\n* what backend='auto' takes. x ours: time over that of Triton, or without Triton of what is taken.")
    for note in operation.notes:
        print(note)


def print_remarks(outcome: Outcome) -> None:
    """Who has no time and why, one line per reason; which cases were left out.

    Args:
        outcome: what became of the operation.
    """
    for line in grouped(outcome.remarks):
        print(f"no time for {line}")
    if outcome.left_out:
        print(f"left out, the time was up: {'; '.join(outcome.left_out)}")


def grouped(remarks: Sequence[tuple[str, str, str]]) -> list[str]:
    """One line for all cases that share a reason.

    Args:
        remarks: who, why, and for which case.

    Returns:
        The lines.
    """
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, reason, label in remarks:
        reasons.setdefault((name, reason), []).append(label)
    more = {key: f" and {len(labels) - 1} more" if len(labels) > 1 else "" for key, labels in reasons.items()}
    return [f"{key[0]}: {key[1]} ({labels[0]}{more[key]})" for key, labels in reasons.items()]


def check_targets(operation: Operation, outcome: Outcome, device_type: str) -> list[dict[str, Any]]:
    """Looks at every promise, and prints whether it is kept.

    Args:
        operation: what was measured.
        outcome: what became of it.
        device_type: where.

    Returns:
        One dictionary per promise.
    """
    results = []
    for target in operation.targets:
        value = target.value(outcome.rows) if target.device == device_type else None
        if target.device == device_type:
            print(f"target: {target.text}, at least {target.at_least:g}: {_verdict(target, value)}")
            reached = None if value is None else value >= target.at_least
            results.append({"text": target.text, "at_least": target.at_least, "value": value, "reached": reached})
    return results


def _verdict(target: Target, value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{'reached' if value >= target.at_least else 'not reached'}, {value:.3g}"


def save_results(
    operation: Operation,
    outcome: Outcome,
    machine: Machine,
    folder: Path,
    settings: dict[str, Any],
    targets: Sequence[dict[str, Any]],
    builds: Sequence[dict[str, Any]],
) -> None:
    """Writes `<operation>.json`, and `<operation>.png` if matplotlib is there.

    Args:
        operation: what was measured.
        outcome: what became of it.
        machine: where.
        folder: gets the files.
        settings: how.
        targets: promises and whether they are kept.
        builds: what the kernels need.
    """
    extra = {
        "device": {
            "name": machine.name,
            "copy_gb_per_s": 1e-9 * machine.copy_rate,
            "matmul_tflop_per_s": 1e-12 * machine.matmul_rate,
            **machine.versions,
        },
        "notes": list(operation.notes),
        "targets": list(targets),
        "builds": list(builds),
        "remarks": [{"contender": n, "reason": r, "case": c} for n, r, c in outcome.remarks],
        "left_out": outcome.left_out,
    }
    path = save(operation.name, list(outcome.rows), folder, settings=settings, extra=extra)
    print(f"saved {path}")
