"""Compiles every Triton kernel and configuration for named GPUs, with none at hand, and reads what the code needs.

    python -m amago_kernels.builds [--arch 80 90] [--only NAME] [--first]

prints a table: registers per thread, bytes spilled, shared memory. Every Triton module lists what is built in
`builds()`: default shapes, one line per variant that users meet.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tuning import TunedKernel

# Modules with a function `builds() -> list[Build]`.
MODULES: tuple[str, ...] = (
    "amago_kernels.attention.triton_backward",
    "amago_kernels.attention.triton_decode",
    "amago_kernels.attention.triton_forward",
    "amago_kernels.returns.triton_returns",
    "amago_kernels.scan.triton_linear",
    "amago_kernels.scan.triton_selective",
    "amago_kernels.scan.triton_selective_step",
    "amago_kernels.triton_conv",
    "amago_kernels.value_losses.triton_value_losses",
)
# Shared memory that one program may have, by compute capability.
SHARED_LIMIT = {80: 166_912, 90: 232_448}


@dataclass(frozen=True)
class Build:
    """A kernel with arguments of the kind and size it is called with.

    Attributes:
        name: of the operation and variant, for the table.
        kernel: the kernel.
        arguments: parameter name to a pointer type such as "*bf16", a number, or None. Tunable parameters are left out.
    """

    name: str
    kernel: TunedKernel
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Built:
    """What one configuration became.

    Attributes:
        name: of the build.
        arch: compute capability times 10.
        config: the configuration, as text.
        first: whether it is the kernel's first configuration.
        registers: per thread.
        spilled: bytes per thread that did not fit into registers.
        shared: bytes of shared memory per program.
    """

    name: str
    arch: int
    config: str
    first: bool
    registers: int
    spilled: int
    shared: int


def all_builds() -> list[Build]:
    """What all Triton modules list."""
    return [build for module in MODULES for build in importlib.import_module(module).builds()]


def compile_one(build: Build, number: int, arch: int) -> Built:
    """Compiles one configuration.

    Args:
        build: what to compile.
        number: index of the configuration.
        arch: compute capability times 10.

    Returns:
        What it needs.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chosen = build.kernel.configs[number]
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(build.kernel.fn.params):
        name, special = parameter.name, not parameter.do_not_specialize
        value = chosen.kwargs.get(name, build.arguments.get(name))
        # What is annotated as constexpr, and what the just-in-time compiler would treat so.
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[name], constants[name], divisible = "constexpr", value, False
        elif isinstance(value, float):
            signature[name] = "fp32"
            continue
        elif isinstance(value, str):
            signature[name], divisible = value, True
        else:
            signature[name], divisible = "i64" if abs(value) >= 1 << 31 else "i32", special and value % 16 == 0
        # Down to empty lists what the just-in-time compiler writes, which then finds on disk what is compiled here.
        attributes[(place,)] = [["tt.divisibility", 16]] if divisible else []
    source = ASTSource(fn=build.kernel.fn, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    text = ", ".join(f"{key}={value}" for key, value in {**chosen.kwargs, **options}.items())
    return Built(build.name, arch, text, number == 0, registers, spilled, compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack, which is where Triton's code puts what it spills."""
    from triton.backends.nvidia import compiler

    tool = os.path.join(os.path.dirname(compiler.__file__), "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    fields = dict(part.split(":", 1) for part in text.split() if part.count(":") == 1)
    return int(fields["REG"]), int(fields["STACK"])


def _jobs(archs: list[int], only: str, first: bool) -> Iterator[tuple[int, int, int]]:
    for index, build in enumerate(all_builds()):
        if only in build.name:
            for number in range(1 if first else len(build.kernel.configs)):
                yield from ((index, number, arch) for arch in archs)


def _work(job: tuple[int, int, int]) -> Built:
    return compile_one(all_builds()[job[0]], job[1], job[2])


def main(arguments: list[str] | None = None) -> None:
    """Command line.

    Args:
        arguments: as on the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capability times 10")
    parser.add_argument("--only", default="", help="builds whose name contains this")
    parser.add_argument("--first", action="store_true", help="the first configuration of each alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: nothing is compiled in Triton's interpreter; unset it")
    if min(args.arch) < 80:
        parser.error(f"argument --arch: {min(args.arch)} is not allowed; give 80 or more")
    if args.workers < 1:
        parser.error(f"argument --workers: {args.workers} is not allowed; give 1 or more")
    jobs = list(_jobs(args.arch, args.only, args.first))
    if not jobs:
        names = sorted({build.name.split()[0] for build in all_builds()})
        parser.error(f"argument --only: no build has {args.only!r} in its name; names begin with {', '.join(names)}")
    with ProcessPoolExecutor(args.workers) as pool:
        for built in pool.map(_work, jobs):
            if args.json:
                print(json.dumps(asdict(built)), flush=True)
                continue
            warning = "  over the limit" if built.shared > SHARED_LIMIT.get(built.arch, built.shared) else ""
            print(
                f"sm_{built.arch}  {built.registers:3d} registers  {built.spilled:4d} bytes spilled  "
                f"{built.shared:6d} shared  {built.name}  {built.config}{warning}",
                flush=True,
            )


if __name__ == "__main__":
    main()
