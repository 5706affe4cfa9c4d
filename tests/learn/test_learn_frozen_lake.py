"""The promise of the demo: an agent with memory learns to learn, one without does not (`nox -s learn`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "00_meta_frozen_lake.py"


def train(out: Path, *arguments: str) -> tuple[list[float], list[float]]:
    """Success per attempt at the end, and the return of every validation."""
    subprocess.run([sys.executable, str(EXAMPLE), "--out", str(out), *arguments], check=True)
    summary = json.loads((out / "summary.json").read_text())
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return summary["success_per_attempt"], [r["val/return"] for r in records if "val/return" in r]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_memory_learns_to_learn(tmp_path: Path, seed: int) -> None:
    success, returns = train(tmp_path / "run", "--seed", str(seed), "--traj-encoder", "transformer")
    assert success[-1] >= 0.85
    assert success[-1] >= success[0] + 0.30
    assert sum(success) >= 3.3
    last_quarter = returns[-len(returns) // 4 :]
    assert np.mean(last_quarter) >= 0.9 * max(returns)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_memory_there_is_no_rise(tmp_path: Path, seed: int) -> None:
    success, _ = train(tmp_path / "run", "--seed", str(seed), "--traj-encoder", "ff")
    assert success[-1] < success[0] + 0.05
