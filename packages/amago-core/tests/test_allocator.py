"""Keeping freed memory: accepted by glibc, harmless elsewhere."""

from __future__ import annotations

import platform
import sys

from amago_core.allocator import keep_freed_memory


def test_accepted_by_glibc_only() -> None:
    assert keep_freed_memory() is (sys.platform == "linux" and platform.libc_ver()[0] == "glibc")
    assert keep_freed_memory() is keep_freed_memory()


def test_nothing_happens_elsewhere(monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
