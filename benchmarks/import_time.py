"""Import time of each package in a fresh interpreter, and beside it of what it stands on.

python benchmarks/import_time.py [--repeats 5] [--out results.json]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from _report import report

MODULES = {
    "amago_kernels": "torch",
    "amago_nets": "torch",
    "amago_nets.tstep_encoders, amago_nets.traj_encoders, amago_nets.heads, amago_nets.distributions": "torch",
    "amago_offline": "numpy, torch, tensordict",
    "amago_envs": "gymnasium.vector",
    "amago_core": "torch, gymnasium.vector, tensordict",
}


def seconds(statement: str, repeats: int) -> float:
    """Median seconds that `statement` takes in fresh interpreters."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return statistics.median(runs)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = []
    for module, base in MODULES.items():
        rows.append(
            {
                "package": module,
                "import_s": seconds(f"import {module}", args.repeats),
                "beyond_dependencies_s": seconds(
                    f"import {base}; start = time.perf_counter(); import {module}", args.repeats
                ),
                "dependencies": base,
            }
        )
    report("import_time", rows, args.out, settings=vars(args))


if __name__ == "__main__":
    main()
