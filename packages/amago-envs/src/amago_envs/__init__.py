"""Gymnasium environments for meta-learning, memory and long-horizon generalisation.

Importing the package registers its environments, so that `gymnasium.make("amago_envs:MetaFrozenLake-v1", size=4)` and
`gymnasium.make_vec("amago_envs:MetaFrozenLake-v1", num_envs=8, size=4)` work; `amago_envs.registration` lists the ids.
"""

from amago_envs.registration import register_all
from amago_envs.toy.frozen_lake import MetaFrozenLake
from amago_envs.toy.frozen_lake_vector import MetaFrozenLakeVector
from amago_envs.toy.room_key_door import RoomKeyDoor
from amago_envs.toy.room_key_door_vector import RoomKeyDoorVector

__version__ = "0.1.0"

__all__ = [
    "MetaFrozenLake",
    "MetaFrozenLakeVector",
    "RoomKeyDoor",
    "RoomKeyDoorVector",
    "__version__",
    "register_all",
]

register_all()
