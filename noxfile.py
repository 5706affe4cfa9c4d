"""Every check and every chore of the repository, one session each: `nox -l` lists them, `nox` runs what CI runs.

Plain venv and pip. Each session gets a fresh environment with the built wheels of our packages and only what those
declare, at the versions of `constraints/ci.txt`. torch with its own dependencies is installed once, into
`.nox/shared/torch`, and linked into the sessions whose packages declare it: a copy each would be most of the wait.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent.resolve()
SHARED = ROOT / ".nox" / "shared"
WHEELS = SHARED / "wheels"
CONSTRAINTS = ROOT / "constraints" / "ci.txt"

# What `pip install NAME` must bring of ours and of torch: exactly this.
BRINGS = {
    "amago-kernels": {"amago-kernels", "torch"},
    "amago-nets": {"amago-nets", "amago-kernels", "torch"},
    "amago-offline": {"amago-offline", "torch"},
    "amago-envs": {"amago-envs"},
    "amago-core": {"amago-core", "amago-nets", "amago-kernels", "amago-offline", "torch"},
}
PACKAGES = list(BRINGS)
SOURCES = os.pathsep.join(str(ROOT / "packages" / name / "src") for name in PACKAGES)

# The command lines that run each example within seconds; {out} is an empty folder.
TINY = {
    "00_meta_frozen_lake.py": [
        "--out {out} --epochs 1 --lake-size 3 --attempts 2",
        "--watch {out}",
    ],
}

# The same for the scripts that put our backbones into other people's loops.
REUSE = {
    "ppo_popgym.py": "--steps 512 --lanes 4 --length 16",
    "sb3_memory_extractor.py": "--steps 64 --pulls 5",
    "torchrl_recurrent_policy.py": "--updates 2 --lanes 8 --window 8",
}

OURS = WHEELS / "constraints.txt"
_wheels: dict[str, Path] = {}

# One thread: tests use tensors too small for more. Compiled code is never taken from, or left for, anybody else.
TEST_ENV = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_CACHE_DIR": str(SHARED / "inductor"),
    "TRITON_CACHE_DIR": str(SHARED / "triton"),
    "NUMBA_CACHE_DIR": str(SHARED / "numba"),
}

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "layers", "test", "wheels", "integration", "examples", "reuse"]


def shared_venv(session: nox.Session, name: str, *requirements: str) -> Path:
    """Make `.nox/shared/NAME` with these requirements, unless it is there already; returns its Python."""
    home = SHARED / name
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = "\n".join([sys.version, *requirements, CONSTRAINTS.read_text()])
    stamp = home / "made-from.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        session.log(f"Installing {', '.join(requirements)} into {home.relative_to(ROOT)}")
        shutil.rmtree(home, ignore_errors=True)
        session.run_install(sys.executable, "-m", "venv", str(home), external=True, silent=True, log=False)
        pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS)]
        session.run_install(*pip, *requirements, external=True, silent=True)
        stamp.write_text(wanted)
    return python


def site_packages(session: nox.Session, python: str | Path = "python") -> Path:
    """The folder where this Python's distributions lie."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(str(session.run_install(str(python), "-c", code, external=True, silent=True, log=False)).strip())


def link_torch(session: nox.Session) -> None:
    """Make the shared torch, and nothing but torch and what it depends on, visible in the session's environment."""
    shared = site_packages(session, shared_venv(session, "torch", "torch"))
    (site_packages(session) / "shared-torch.pth").write_text(f"{shared}\n")


def built_wheels(session: nox.Session) -> dict[str, Path]:
    """The wheel of each package, built once per run of nox."""
    if not _wheels:
        python = shared_venv(session, "build", "hatchling")
        shutil.rmtree(WHEELS, ignore_errors=True)
        sources = [str(ROOT / "packages" / name) for name in PACKAGES]
        pip = [str(python), "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(WHEELS)]
        session.run_install(*pip, *sources, external=True, silent=True)
        _wheels.update({name: next(WHEELS.glob(f"{name.replace('-', '_')}-*.whl")) for name in PACKAGES})
        # As constraints, so that pip takes these files and never something of the same name from an index.
        OURS.write_text("".join(f"{name} @ {wheel.as_uri()}\n" for name, wheel in _wheels.items()))
    return _wheels


def install(session: nox.Session, *requirements: str, torch: bool = True, versions: Path = CONSTRAINTS) -> None:
    """Install requirements, ours from the wheels just built, others at the constrained versions.

    `torch` links the shared one, at the version of `constraints/ci.txt`.
    """
    wheels = built_wheels(session)
    if torch:
        link_torch(session)
    if session.virtualenv.reuse_existing:  # pip keeps an installed version 0.1.0, whatever the new wheel holds.
        session.run_install("python", "-m", "pip", "uninstall", "--quiet", "--yes", *PACKAGES, silent=True)
    files = [f"{r} @ {wheels[name].as_uri()}" if (name := r.split("[")[0]) in wheels else r for r in requirements]
    session.install("--quiet", "-c", str(versions), "-c", str(OURS), *files)


def scratch(session: nox.Session) -> Path:
    """An empty folder of the session."""
    folder = Path(session.virtualenv.location).resolve() / "scratch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def tools(session: nox.Session, *requirements: str) -> None:
    """Install tools that need none of our packages."""
    session.install("--quiet", "-c", str(CONSTRAINTS), *requirements)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, documentation of every public symbol, formatting (`nox -s lint -- --fix` repairs what can be)."""
    tools(session, "ruff")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")


@nox.session
def types(session: nox.Session) -> None:
    """Type-check the sources of all five packages."""
    install(session, "amago-core[plot]", "amago-envs", "mypy")
    session.run("mypy", *session.posargs)


@nox.session
def layers(session: nox.Session) -> None:
    """Check who imports whom (contracts in pyproject.toml)."""
    tools(session, "import-linter")
    session.run("lint-imports", env={"PYTHONPATH": SOURCES})


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def test(session: nox.Session, package: str) -> None:
    """Run the tests of one package where only what it declares is installed."""
    extras = "plot,test" if package == "amago-core" else "test"  # That plots are optional, its smoke test shows.
    install(session, f"{package}[{extras}]", torch="torch" in BRINGS[package])
    session.run("pytest", f"packages/{package}/tests", *session.posargs, env=TEST_ENV)


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def wheels(session: nox.Session, package: str) -> None:
    """Install one built wheel alone: does it hold what it should, bring what it should, and work?"""
    wheel = built_wheels(session)[package]
    module = package.replace("-", "_")
    names = zipfile.ZipFile(wheel).namelist()
    strays = [name for name in names if not name.startswith((f"{module}/", f"{module}-"))]
    absent = [end for end in (f"{module}/py.typed", "/licenses/LICENSE") if not any(n.endswith(end) for n in names)]
    if strays or absent:
        session.error(f"{wheel.name}: does not belong there: {strays}; is missing: {absent}")

    install(session, package, torch="torch" in BRINGS[package])
    # What pip would bring into an empty environment: asked of pip, because torch is linked into this one.
    folder = scratch(session)
    report = folder / "report.json"
    pip = ["python", "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
    session.run_install(*pip, "-c", str(CONSTRAINTS), "-c", str(OURS), package, silent=True)
    brought = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
    ours = {name for name in brought if name.startswith("amago") or name == "torch"}
    if ours != BRINGS[package]:
        session.error(f"{package} brings {sorted(ours)}, and should bring {sorted(BRINGS[package])}")
    session.log(f"{package} brings {', '.join(sorted(brought))}")

    with session.chdir(folder):  # Away from the checkout: only what is installed can be imported.
        session.run("python", str(ROOT / "tests" / "smoke" / f"{package}.py"))


@nox.session
def integration(session: nox.Session) -> None:
    """Run the tests that cross packages."""
    install(session, "amago-core[plot,test]", "amago-envs[test]")
    session.run("pytest", "tests", *session.posargs, env=TEST_ENV)


@nox.session
def examples(session: nox.Session) -> None:
    """Run every example as a user would, on a tiny budget."""
    install(session, "amago-core[plot]", "amago-envs")
    folder = scratch(session)
    for example in sorted((ROOT / "examples").glob("[0-9]*.py")):
        if example.name not in TINY:
            session.error(f"{example.name} has no tiny budget: add its arguments to TINY in noxfile.py")
        out = folder / example.stem
        for arguments in TINY[example.name]:
            session.run("python", str(example), *arguments.format(out=out).split(), env=TEST_ENV)


@nox.session
def reuse(session: nox.Session) -> None:
    """Run the backbones inside TorchRL, Stable-Baselines3 and a plain PPO loop, on tiny budgets."""
    others = ("stable-baselines3", "popgym", "pytest")
    install(session, "amago-nets[torchrl]", *others, versions=ROOT / "constraints" / "reuse.txt")
    package = ROOT / "packages" / "amago-nets"
    for script in sorted((package / "examples").glob("*.py")):
        if script.name not in REUSE:
            session.error(f"{script.name} has no tiny budget: add its arguments to REUSE in noxfile.py")
        session.run("python", str(script), *REUSE[script.name].split(), env=TEST_ENV)
    tests = [str(package / "tests" / f"test_{name}.py") for name in ("torchrl_adapter", "reuse_page")]
    session.run("pytest", *tests, *session.posargs, env=TEST_ENV)


@nox.session(default=False, reuse_venv=True)
def demo(session: nox.Session) -> None:
    """Train example 00 on the CPU and plot what it learned (`make demo`)."""
    install(session, "amago-core[plot]", "amago-envs")
    arguments = list(session.posargs)
    if not {argument.split("=")[0] for argument in arguments} & {"--out", "--resume", "--watch"}:
        names = ("demo" if count == 1 else f"demo-{count}" for count in itertools.count(1))
        arguments += ["--out", next(out for name in names if not Path(out := f"runs/{name}").exists())]
    session.run("python", "examples/00_meta_frozen_lake.py", *arguments)
    session.log("For the commands above: . .nox/demo/bin/activate")


@nox.session(default=False)
def learn(session: nox.Session) -> None:
    """Run the slow checks that agents learn (tests/learn)."""
    install(session, "amago-core[plot,test]", "amago-envs[test]")
    session.run("pytest", "tests/learn", *session.posargs, env=TEST_ENV)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Run the benchmarks and save their JSON (`nox -s bench -- NAME...` picks; demo_seeds runs only when named)."""
    install(session, "amago-core[plot]", "amago-kernels[numba]", "amago-envs")
    folder = ROOT / "runs" / "bench"
    outs = {script.stem: (script, folder / f"{script.stem}.json") for script in (ROOT / "benchmarks").glob("[!_]*.py")}
    outs["kernels"] = (ROOT / "benchmarks" / "kernels", folder / "kernels")
    for name, (script, out) in sorted(outs.items()):
        if name in (session.posargs or [name for name in outs if name != "demo_seeds"]):
            session.run("python", str(script), "--out", str(out))


@nox.session(default=False, venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device and the benchmarks of the kernels, with the machine's own `python3`."""
    session.run("python3", str(ROOT / "tests" / "gpu.py"), *session.posargs)


@nox.session(default=False)
def minimums(session: nox.Session) -> None:
    """Run every package's tests on the oldest versions that the metadata allow (downloads another torch)."""
    everything = [f"{name}[test]" for name in PACKAGES]
    install(session, *everything, "amago-core[plot]", torch=False, versions=ROOT / "constraints" / "minimums.txt")
    for name in PACKAGES:
        session.run("pytest", f"packages/{name}/tests", *session.posargs, env=TEST_ENV)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the API pages into site/."""
    # With what kernels are written in: their modules are pages too.
    install(session, "amago-core[plot]", "amago-kernels[numba,triton]", "amago-envs", "pdoc")
    sources = [ROOT / "packages" / name / "src" for name in PACKAGES]
    paths = [path.relative_to(source).with_suffix("") for source in sources for path in sorted(source.rglob("*.py"))]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    # torchrl wants an older tensordict than the others have; docs/nets/reuse.md describes its adapter.
    public = [module for module in modules if "._" not in module and module != "amago_nets.torchrl"]
    session.run("pdoc", "--docformat", "google", "--output-directory", "site", *public)
