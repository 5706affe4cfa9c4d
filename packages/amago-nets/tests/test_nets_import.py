from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import amago_nets

FORBIDDEN = ("gymnasium", "wandb", "triton", "matplotlib", "tensordict", "tyro", "rich", "tensorboard")


def loaded_in_a_fresh_interpreter(code: str) -> list[set[str]]:
    """Top-level modules at each call of `show()` in `code`."""
    show = "import sys\ndef show(): print(*{name.partition('.')[0] for name in sys.modules})\n"
    command = [sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy:UserWarning", "-c", show + code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_import_is_light() -> None:
    (loaded,) = loaded_in_a_fresh_interpreter("import amago_nets; amago_nets.__version__; show()")
    assert "amago_nets" in loaded
    assert not loaded & {*FORBIDDEN, "torch", "numpy", "amago_kernels"}


def test_modules_bring_only_what_they_need() -> None:
    modules = ("specs", "tstep_encoders", "heads", "distributions", "traj_encoders")
    imports = ", ".join(f"amago_nets.{name}" for name in modules)
    # torch itself may load an optional package that happens to be installed; only what is ours counts.
    bare, loaded = loaded_in_a_fresh_interpreter(f"import torch; show()\nimport {imports}; show()")
    assert not (loaded - bare) & set(FORBIDDEN)


def test_main_names_resolve() -> None:
    for name in amago_nets.__all__:
        assert getattr(amago_nets, name) is not None
    assert set(amago_nets.__all__) <= set(dir(amago_nets))
    with pytest.raises(AttributeError, match="'Nothing'"):
        amago_nets.Nothing  # noqa: B018


def test_readme_example_runs() -> None:
    readme = Path(__file__).parents[1] / "README.md"
    _, _, rest = readme.read_text(encoding="utf-8").partition("```python\n")
    code, fence, _ = rest.partition("```")
    assert fence
    exec(compile(code, str(readme), "exec"), {})
