"""The code that pages show runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# docs/nets/reuse.md needs other libraries: the session `reuse` runs it.
PAGES = [
    *sorted(page for page in (ROOT / "docs" / "nets").glob("*.md") if page.name not in ("README.md", "reuse.md")),
    ROOT / "packages" / "amago-nets" / "README.md",
    ROOT / "packages" / "amago-kernels" / "README.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert blocks
    exec(compile("\n".join(blocks), str(page), "exec"), {})
