"""The snippets of docs/nets/reuse.md run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "nets" / "reuse.md"
SNIPPETS = dict(
    re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
)
NEEDS = {"Your own loop": (), "TorchRL": ("torchrl", "gymnasium"), "Stable-Baselines3": ("stable_baselines3",)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", NEEDS)
def test_snippet(title: str) -> None:
    for module in NEEDS[title]:
        pytest.importorskip(module)
    exec(compile(SNIPPETS[title], f"{PAGE.name}: {title}", "exec"), {})


def test_every_snippet_is_known() -> None:
    assert set(SNIPPETS) == set(NEEDS)
