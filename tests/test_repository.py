"""The five packages' metadata keep the promises of the house: ranges, lower bounds, licence, documents."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGES = ("amago-core", "amago-envs", "amago-kernels", "amago-nets", "amago-offline")
INSTALLED_EXTRAS = ("plot", "test")
RETIRED = {"gym", "gin-config"}


def project(package: str) -> dict:
    return tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]


def requirements(package: str, extras: tuple[str, ...] | None = None) -> list[Requirement]:
    """Hard dependencies and those of the named extras; None takes every extra."""
    table = project(package)
    optional = table["optional-dependencies"]
    lines = list(table["dependencies"])
    for extra in optional if extras is None else extras:
        lines += optional.get(extra, [])
    return [Requirement(line) for line in lines]


def pins(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints" / name).read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^=]+", line) for line in lines), "every line is an exact version"
    return {name.lower(): Version(version) for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("package", PACKAGES)
def test_documents(package: str) -> None:
    folder = ROOT / "packages" / package
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (folder / "README.md").read_text().splitlines()[0] == f"# {package}"
    assert project(package)["version"] in (folder / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("package", PACKAGES)
def test_version_is_one(package: str) -> None:
    assert importlib.metadata.version(package) == project(package)["version"]


@pytest.mark.parametrize("package", PACKAGES)
def test_ranges(package: str) -> None:
    for requirement in requirements(package):
        assert requirement.name not in RETIRED
        specifiers = {specifier.operator for specifier in requirement.specifier}
        assert "==" not in specifiers, f"{requirement}: exact versions belong into constraints/"
        if requirement.name in PACKAGES and not requirement.name == package:
            version = Version(project(requirement.name)["version"])
            low, high = f"{version.major}.{version.minor}", f"{version.major}.{version.minor + 1}"
            assert str(requirement.specifier) == str(Requirement(f"x>={low},<{high}").specifier)


@pytest.mark.parametrize("package", PACKAGES)
def test_constraints_cover_what_is_tested(package: str) -> None:
    exact, oldest = pins("ci.txt"), pins("minimums.txt")
    for requirement in requirements(package, INSTALLED_EXTRAS):
        if requirement.name in PACKAGES:
            continue
        assert requirement.specifier.contains(exact[requirement.name]), requirement
        lowest = next(Version(s.version) for s in requirement.specifier if s.operator == ">=")
        assert oldest[requirement.name] == lowest, f"{requirement}: constraints/minimums.txt has another version"


def test_other_libraries_share_our_versions() -> None:
    ours, theirs = pins("ci.txt"), pins("reuse.txt")
    differ = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert differ == {"tensordict"}  # TorchRL's release wants an older one.


# How one would write an operation of amago-kernels a second time.
REWRITTEN = re.compile(
    r"scaled_dot_product_attention|flex_attention|MultiheadAttention|associative_scan|cumprod|selective_scan_fn"
    r"|nn\.(GRU|LSTM|RNN)\(|^\s*(import|from) (flash_attn|mamba_ssm|causal_conv1d)\b"
    r"|gamma \*|\* gamma"
)


def test_kernels_are_written_once() -> None:
    sources = [path for path in (ROOT / "packages").glob("*/src/**/*.py") if "amago_kernels" not in path.parts]
    sources += (ROOT / "examples").glob("*.py")
    sources += (ROOT / "packages").glob("*/examples/*.py")
    assert len(sources) > 100
    again = {
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if REWRITTEN.search(line)
    }
    assert not again, "attention, scans, returns and value losses live in amago-kernels"
