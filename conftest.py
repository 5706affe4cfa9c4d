"""Shared by every test of the repository: tests marked `gpu` are skipped, with the reason, where no CUDA device is."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # Here and not above: amago-envs is tested where no torch is installed.

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none found"))
