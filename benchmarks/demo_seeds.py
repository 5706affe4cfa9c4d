"""The demo over several seeds, with and without memory: one table, one picture.

Runs `examples/00_meta_frozen_lake.py` once per sequence model and seed (finished runs are taken as they are, unfinished
ones resumed), then compares success per attempt on lakes never trained on.

    python benchmarks/demo_seeds.py [--seeds 3] [--encoders transformer ff] [--runs runs/demo_seeds] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _report import report

from amago_core.plots import plot_success_per_attempt

EXAMPLE = Path(__file__).parents[1] / "examples" / "00_meta_frozen_lake.py"
LABELS = {"transformer": "Transformer", "gru": "GRU", "ff": "no memory"}


def finished_run(runs: Path, encoder: str, seed: int, threads: int | None) -> dict[str, Any]:
    """The summary of one run, after running it if need be."""
    out = runs / f"{encoder}-seed{seed}"
    summary = out / "summary.json"
    if not summary.exists() or "success_per_attempt" not in json.loads(summary.read_text()):
        started = (out / "config.json").exists()
        arguments = ["--resume", out] if started else ["--traj-encoder", encoder, "--seed", seed, "--out", out]
        if threads is not None and not started:
            arguments += ["--threads", threads]
        subprocess.run([sys.executable, str(EXAMPLE), *map(str, arguments)], check=True)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    returns = [record["val/return"] for record in records if "val/return" in record]
    return {**json.loads(summary.read_text()), "val_returns": returns}


def row(encoder: str, seed: int, summary: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    success, returns = summary["success_per_attempt"], summary["val_returns"]
    last_quarter = returns[-len(returns) // 4 :]
    return {
        "encoder": encoder,
        "seed": seed,
        **{f"attempt_{i + 1}": value for i, value in enumerate(success)},
        "sum": sum(success),
        "last_quarter_over_best": float(np.mean(last_quarter) / max(returns)),
        "frames": summary["frames"],
        "updates": summary["updates"],
        "seconds": summary["seconds"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--encoders", nargs="+", default=["transformer", "ff"], choices=list(LABELS))
    parser.add_argument("--runs", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out")
    args = parser.parse_args()
    rows, curves, baselines = [], {}, {}
    for encoder in args.encoders:
        results = [finished_run(args.runs, encoder, seed, args.threads) for seed in range(args.seeds)]
        rows += [row(encoder, seed, result) for seed, result in enumerate(results)]
        success = np.array([result["success_per_attempt"] for result in results])
        curves[LABELS[encoder]] = (success.mean(0), success.min(0), success.max(0))
        baselines = results[0]["baselines"]
    curves |= {name: (np.array(values), None, None) for name, values in baselines.items()}
    settings = {**vars(args), "runs": str(args.runs), "n_eval": results[0]["n_eval"], "baselines": baselines}
    report("demo_seeds", rows, args.out, settings=settings)
    picture = (Path(args.out) if args.out and not args.out.endswith(".json") else args.runs) / "demo_seeds.png"
    plot_success_per_attempt(
        picture,
        curves,
        "Success per attempt on lakes never trained on",
        subtitle=f"MetaFrozenLake 4x4, {args.seeds} seeds, {settings['n_eval']:,} lakes each",
        interval="lowest and highest seed",
    )
    print(f"saved {picture}")


if __name__ == "__main__":
    main()
