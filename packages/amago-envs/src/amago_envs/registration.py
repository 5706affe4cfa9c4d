"""Names under which Gymnasium finds the environments."""

from __future__ import annotations

import gymnasium

_TOY = "amago_envs.toy"

ENTRY_POINTS: dict[str, tuple[str, str]] = {
    "MetaFrozenLake": (f"{_TOY}.frozen_lake:MetaFrozenLake", f"{_TOY}.frozen_lake_vector:MetaFrozenLakeVector"),
    "RoomKeyDoor": (f"{_TOY}.room_key_door:RoomKeyDoor", f"{_TOY}.room_key_door_vector:RoomKeyDoorVector"),
}


def environment_ids(name: str) -> tuple[str, str]:
    """Ids under which one environment is registered.

    Args:
        name: key of `ENTRY_POINTS`.

    Returns:
        `<name>-v1` for `gymnasium.make("amago_envs:<name>-v1")`, and `amago_envs/<name>-v0`; both are the same thing.
    """
    return f"{name}-v1", f"amago_envs/{name}-v0"


def register_all() -> None:
    """Register every environment that is not registered yet; safe to call again."""
    for name, (single, vector) in ENTRY_POINTS.items():
        for env_id in environment_ids(name):
            if env_id not in gymnasium.registry:
                gymnasium.register(env_id, entry_point=single, vector_entry_point=vector)
