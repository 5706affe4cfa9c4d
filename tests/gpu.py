"""Runs the tests that need a CUDA device, then the benchmarks of the kernels: `make gpu`, `nox -s gpu`.

By the Python that runs this and the torch that it has; none of our packages need be installed, and a package of ours
whose dependencies are missing is left out. Tests run in several processes side by side, because most of their time is
compiling; the benchmarks run alone. Unknown options go to pytest.

    python3 tests/gpu.py [--out DIR] [--seconds 480] [--workers 8] [--no-bench] [-k decode]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("amago-kernels", "amago-nets", "amago-offline", "amago-core")
# Tests that one process runs: starting it takes as long as several of them.
CHUNK = 25
# Of the whole, what tests may take; the rest is for benchmarks.
TEST_SHARE = 0.45
_MARKED = re.compile(r"mark\.gpu|DEVICES")


@dataclass(frozen=True)
class Result:
    """What one process said.

    Attributes:
        code: its exit status; None if it never began, or did not end in time.
        text: all it printed.
        seconds: it took.
        what: the tests, in words.
    """

    code: int | None
    text: str
    seconds: float
    what: str


def missing(package: str) -> list[str]:
    """Dependencies of one of our packages that are not installed.

    Args:
        package: its name.

    Returns:
        Their names; ours do not count.
    """
    project = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in project["dependencies"]]
    return [name for name in names if not name.startswith("amago-") and not _installed(name)]


def _installed(name: str) -> bool:
    if importlib.util.find_spec(name.replace("-", "_")) is not None:
        return True
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def chunks(tests: Sequence[str], size: int) -> list[list[str]]:
    """Groups of tests of one file each: first those of Triton's kernels, which compile most, then the largest.

    Args:
        tests: node ids in the order of pytest.
        size: tests per group at most.

    Returns:
        The groups.
    """
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.split("::", 1)[0], []).append(test)
    groups = [ids[i : i + size] for ids in by_file.values() for i in range(0, len(ids), size)]
    return sorted(groups, key=lambda group: ("triton" not in group[0].split("::")[0], -len(group)))


def environment() -> dict[str, str]:
    """Our sources first; one thread each, for processes are many."""
    sources = [str(ROOT / "packages" / name / "src") for name in (*PACKAGES, "amago-envs")]
    given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    few = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return {**os.environ, **few, "PYTHONPATH": os.pathsep.join([*sources, *given])}


def pytest(arguments: Sequence[str], seconds: float, what: str) -> Result:
    """Runs pytest on what is marked `gpu`.

    Args:
        arguments: more for it.
        seconds: it may take.
        what: the tests, in words.

    Returns:
        What it said.
    """
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-q", *arguments]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=max(seconds, 1.0)
        )
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        code, text = None, late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else ""
    return Result(code, text, time.monotonic() - begin, what)


def run_tests(options: Sequence[str], workers: int, seconds: float) -> bool:
    """Collects, runs and sums up.

    Args:
        options: for pytest.
        workers: processes.
        seconds: beyond which no process begins, and a minute later none goes on.

    Returns:
        Whether all is well.
    """
    begin = time.monotonic()
    files = []
    for package in PACKAGES:
        absent = missing(package)
        if absent:
            print(f"{package}: left out, not installed: {', '.join(absent)}")
            continue
        found = sorted((ROOT / "packages" / package / "tests").rglob("test_*.py"))
        files += [str(path.relative_to(ROOT)) for path in found if _MARKED.search(path.read_text())]
    if not files:
        print("no tests marked gpu")
        return False
    collected = pytest(["--collect-only", "--continue-on-collection-errors", *options, *files], 120, "collecting")
    tests = [line for line in collected.text.splitlines() if re.match(r"packages/\S+\.py::", line)]
    if collected.code != 0:
        print(collected.text)
    groups = chunks(tests, CHUNK)
    print(f"{len(tests)} tests in {len(groups)} groups, {workers} at a time", flush=True)

    def run(group: list[str]) -> Result:
        what = f"{group[0].split('::', 1)[0]} ({len(group)})"
        left = seconds - (time.monotonic() - begin)
        result = Result(None, "", 0.0, what) if left <= 0 else pytest([*options, *group], left + 60, what)
        _tell(result)
        return result

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(run, groups))
    skipped = sorted({line for result in results for line in result.text.splitlines() if line.startswith("SKIPPED")})
    print("\n".join(skipped))
    late = [result.what for result in results if result.code is None]
    if late:
        print(f"not done in {seconds:.0f} s: {', '.join(late)}")
    bad = [result.what for result in results if result.code not in (0, None)]
    if bad:
        print(f"failed: {', '.join(bad)}")
    print(f"tests: {time.monotonic() - begin:.0f} s", flush=True)
    return collected.code == 0 and not late and not bad


def _tell(result: Result) -> None:
    """The last line of pytest; all of it if something failed."""
    last = (result.text.strip().splitlines() or ["not begun" if result.seconds == 0 else "not done"])[-1]
    if result.code not in (0, None):
        print(result.text)
    print(f"{result.what}: {last.strip('= ')}", flush=True)


def main() -> None:
    """Command line."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", help="folder for the tables and plots of the benchmarks")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything (%(default)s)")
    parser.add_argument("--workers", type=int, default=min(8, max(1, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--no-bench", action="store_true", help="tests alone")
    args, options = parser.parse_known_args()
    for module in ("torch", "pytest"):
        if not _installed(module):
            sys.exit(f"{module} is not installed for {sys.executable}")
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"no CUDA device found by torch {torch.__version__} of {sys.executable}: nothing to run")
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {'triton is' if _installed('triton') else 'no triton is'} installed")
    well = run_tests(options, args.workers, args.seconds if args.no_bench else TEST_SHARE * args.seconds)
    if not args.no_bench:
        # A shape that is begun just before the end, and its compiler, take a while.
        left = max(args.seconds - (time.monotonic() - begin) - 40, 60.0)
        command = [sys.executable, str(ROOT / "benchmarks" / "kernels"), "--device", "cuda"]
        command += ["--budget-seconds", f"{left:.0f}", *(["--out", args.out] if args.out else [])]
        try:
            done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, timeout=left + 180)
            well &= done.returncode == 0
        except subprocess.TimeoutExpired:
            print("the benchmarks hang: ended")
            well = False
    print(f"everything: {time.monotonic() - begin:.0f} s")
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
