from __future__ import annotations

import subprocess
import sys

import amago_envs


def test_exports() -> None:
    for name in ("MetaFrozenLake", "RoomKeyDoor", "MetaFrozenLakeVector", "RoomKeyDoorVector"):
        assert name in amago_envs.__all__ and hasattr(amago_envs, name)
    assert amago_envs.__version__.count(".") == 2


def test_import_is_light() -> None:
    code = (
        "import sys, amago_envs, gymnasium\n"
        "heavy = {'torch', 'pygame', 'matplotlib', 'jax', 'popgym', 'amago_core', 'amago_nets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "gymnasium.make('MetaFrozenLake-v1', size=3)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
