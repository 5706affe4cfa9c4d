"""Small environments with hidden tasks, each as a single environment and natively vectorised, and scripted policies."""

from amago_envs.toy.frozen_lake import MetaFrozenLake
from amago_envs.toy.frozen_lake_vector import MetaFrozenLakeVector
from amago_envs.toy.planner import FrozenLakePlanner
from amago_envs.toy.random_policy import RandomPolicy
from amago_envs.toy.room_key_door import RoomKeyDoor
from amago_envs.toy.room_key_door_vector import RoomKeyDoorVector

__all__ = [
    "FrozenLakePlanner",
    "MetaFrozenLake",
    "MetaFrozenLakeVector",
    "RandomPolicy",
    "RoomKeyDoor",
    "RoomKeyDoorVector",
]
