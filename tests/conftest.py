"""The cross-package tests share the helpers of amago-core's own."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "packages" / "amago-core" / "tests"))
