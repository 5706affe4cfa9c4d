"""Kernels of amago-kernels beside every alternative that this machine has.

Per operation: every contender is compared with the reference in float64 first, gradients included, on the first and
the last lane; who is wrong gets no time. Then contenders take turns, call by call, and medians are printed in one
table, with the bytes and FLOPs that the operation cannot do without (benchmarks/kernels/costs.py) over what this
machine copies and multiplies. Promises of the specification are checked under each table. Needs torch, for Triton's
kernels triton, and matplotlib for plots; the package need not be installed.

    python benchmarks/kernels [--device cuda] [--only decode attention] [--quick] [--out DIR]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
# Seconds of the whole are shared out by these weights: mostly compiling. In the order of the tables.
_WEIGHTS = {
    "decode": 25,
    "attention": 110,
    "linear_scan": 30,
    "selective_scan": 35,
    "value_losses": 50,
    "returns": 25,
    "conv": 20,
    "gru": 5,
}
# Set by a run that lost its device and began again with what was left.
_BEFORE = "AMAGO_KERNELS_BENCH_BROKEN"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        given: as on the command line.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        prog="python benchmarks/kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=_WEIGHTS, default=list(_WEIGHTS), help="operations"
    )
    parser.add_argument("--quick", action="store_true", help="a few small shapes; saved only with --out")
    parser.add_argument("--out", type=Path, help="folder for JSON and plots; default benchmarks/results/DEVICE/kernels")
    parser.add_argument(
        "--budget-seconds", type=_seconds, help="beyond them no shape begins (285 on CUDA devices, else 900)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on the CPU (%(default)s)")
    parser.add_argument(
        "--builds",
        type=int,
        nargs="+",
        metavar="ARCH",
        choices=(80, 90),
        help="registers and spills on these; default: this GPU's",
    )
    args = parser.parse_args(given)
    if args.threads < 1:
        parser.error(f"--threads {args.threads} is not allowed; give an integer >= 1")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: times of Triton's interpreter mean nothing; unset it")
    return args


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give seconds > 0")
    return seconds


def make_importable() -> None:
    """Puts the package and the helpers of all benchmarks on the path, where they are not."""
    sys.path.append(str(_ROOT / "benchmarks"))
    if importlib.util.find_spec("torch") is None:
        sys.exit("torch is not installed: pip install 'torch>=2.7'")
    if importlib.util.find_spec("amago_kernels") is None:
        source = _ROOT / "packages" / "amago-kernels" / "src"
        print(f"amago-kernels is not installed: taken from {source.relative_to(_ROOT)}")
        sys.path.insert(0, str(source))


def shares(names: list[str], seconds: float) -> dict[str, float]:
    """When each operation should be done, if it takes its share.

    Args:
        names: operations in their order.
        seconds: for all of them.

    Returns:
        Name to seconds from the start.
    """
    whole = sum(_WEIGHTS[name] for name in names)
    done, ends = 0.0, {}
    for name in names:
        done += _WEIGHTS[name]
        ends[name] = seconds * done / whole
    return ends


def main() -> None:
    """Command line."""
    start = time.monotonic()
    args = arguments()
    make_importable()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: no CUDA device found")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    sys.exit(_run(args, device, start))


def _run(args: argparse.Namespace, device: Any, start: float) -> int:
    import torch
    from machine import OTHERS, installed, slug, survey
    from output import check_targets, grouped, print_remarks, print_table, save_results
    from plots import draw
    from resources import compile_all, print_builds
    from runner import Bench, run_operation
    from timing import Clock

    cuda = device.type == "cuda"
    budget = args.budget_seconds or (285.0 if cuda else 900.0)
    # Why a backend of SDPA cannot serve is said below its table, not once per call.
    warnings.simplefilter("ignore")
    # Products of float32 are in float32, also those of convolutions and recurrent layers.
    torch.backends.cudnn.allow_tf32 = False
    machine = survey(device)
    print(f"{machine.name}: {', '.join(f'{name} {version}' for name, version in machine.versions.items() if version)}")
    print(f"copy {1e-9 * machine.copy_rate:,.0f} GB/s, matmul {1e-12 * machine.matmul_rate:,.3g} TFLOP/s")
    if not cuda:
        print(f"{torch.get_num_threads()} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        print("what stays in the processor's caches can be faster than that copy")
    absent = [package for module, package in OTHERS.items() if not installed(module)]
    if absent:
        print(f"not installed: {', '.join(absent)}")
    folder = args.out or (None if args.quick else _ROOT / "benchmarks" / "results" / slug(machine.name) / "kernels")
    built = _builds(args.builds or ([_arch(torch)] if cuda else []), compile_all)
    settings = {
        "quick": args.quick,
        "budget_seconds": budget,
        "tuned": cuda and os.environ.get("AMAGO_KERNELS_TUNE", "1") != "0",
        "threads": None if cuda else torch.get_num_threads(),
    }
    names = [name for name in _WEIGHTS if name in args.only]
    begin = time.monotonic()
    ends = shares(names, budget - (begin - start))
    broken = [text for text in os.environ.get(_BEFORE, "").split("\n") if text]
    clock = Clock(device)
    for number, name in enumerate(names):
        operation = importlib.import_module(name).operation(device, args.quick)
        seconds, most = (0.15, 50) if cuda else (0.3 if args.quick else 1.5, 30)
        bench = Bench(machine, clock, seconds, most, begin + ends[name])
        outcome = run_operation(operation, bench, _say)
        if outcome.rows:
            print_table(operation, outcome, machine)
        else:
            print(f"\n## {name}: nothing could be measured\n")
        print_remarks(outcome)
        targets = check_targets(operation, outcome, device.type)
        own = [line for line in built if line["module"].startswith(operation.builds)]
        print_builds(own)
        if folder is not None and outcome.rows:
            folder.mkdir(parents=True, exist_ok=True)
            save_results(operation, outcome, machine, folder, settings, targets, own)
            _plot(draw, operation, outcome.rows, folder, machine.name)
        broken += [f"{name}, {text}" for text in grouped(outcome.broken)]
        sys.stdout.flush()
        if outcome.lost and names[number + 1 :]:
            _begin_again(args, names[number + 1 :], broken, budget - (time.monotonic() - start))
    print(f"\n{time.monotonic() - start:.0f} s in all")
    for text in broken:
        print(f"BROKEN {text}")
    return 1 if broken else 0


def _builds(archs: list[int], compile_all: Any) -> list[dict[str, Any]]:
    if not archs or importlib.util.find_spec("triton") is None:
        return []
    begin = time.monotonic()
    built, problem = compile_all(archs, os.cpu_count() or 1, 120.0 if len(archs) == 1 else 600.0)
    print(f"{len(built)} builds for {', '.join(f'sm_{arch}' for arch in archs)} in {time.monotonic() - begin:.0f} s")
    if problem:
        print(f"building failed: {problem}")
    return built


def _arch(torch: Any) -> int:
    """What the builds know that is nearest to this GPU."""
    return 90 if torch.cuda.get_device_capability() >= (9, 0) else 80


def _plot(draw: Any, operation: Any, rows: Any, folder: Path, device_name: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    path = draw(operation, rows, folder, device_name)
    print("no plot: nothing was measured at two lengths" if path is None else f"saved {path}")


def _say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def _begin_again(args: argparse.Namespace, names: list[str], broken: list[str], seconds: float) -> None:
    """After an error that CUDA does not recover from: a new process for the operations that are left."""
    print(f"\nthe device is lost to this process: a new one goes on with {', '.join(names)}", flush=True)
    given = ["--device", "cuda", "--only", *names, "--budget-seconds", str(max(seconds, 30.0))]
    given += [*(["--quick"] if args.quick else []), *(["--out", str(args.out)] if args.out else [])]
    os.environ[_BEFORE] = "\n".join(text[:400] for text in broken)
    os.execv(sys.executable, [sys.executable, str(Path(__file__).parent), *given])


if __name__ == "__main__":
    main()
