"""What every benchmark prints and saves."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def report(name: str, rows: list[dict[str, Any]], out: str | None, *, settings: dict[str, Any]) -> None:
    """Print rows as a table and save them as JSON.

    Args:
        name: of the benchmark.
        rows: one dictionary per line, all with the same keys.
        out: file to write, or a directory that gets `<name>.json`; None writes nothing.
        settings: what the numbers depend on; `out`, which they do not depend on, is left out.
    """
    settings = {name: value for name, value in settings.items() if name != "out"}
    columns = list(rows[0])
    cells = [[_text(row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    for line in (columns, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if out is not None:
        print(f"saved {save(name, rows, Path(out), settings=settings)}")


def save(
    name: str,
    rows: list[dict[str, Any]],
    path: Path,
    *,
    settings: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> Path:
    """Save rows as JSON, with the machine they are from.

    Args:
        name: of the benchmark.
        rows: one dictionary per line.
        path: file to write, or a directory that gets `<name>.json`.
        settings: what the numbers depend on.
        extra: more to save, beside the rows.

    Returns:
        The file.
    """
    if path.suffix != ".json":
        path = path / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "numba": _numba(),
    }
    content = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "settings": settings,
        **(extra or {}),
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _numba() -> str | None:
    """The version behind the CPU's compiled kernels; None where "auto" does without."""
    if os.environ.get("AMAGO_KERNELS_NUMBA") == "0":
        return None
    try:
        return version("numba")
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
