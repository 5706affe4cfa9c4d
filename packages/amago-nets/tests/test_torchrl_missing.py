from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize("absent", ["tensordict", "torchrl.data"])
def test_missing_extra_is_named(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.delitem(sys.modules, "amago_nets.torchrl", raising=False)
    with pytest.raises(ImportError, match=r'pip install "amago-nets\[torchrl\]"'):
        importlib.import_module("amago_nets.torchrl")
