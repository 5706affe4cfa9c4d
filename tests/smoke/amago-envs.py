"""The wheel of amago-envs, installed alone, makes environments, one or many, and brings no torch."""

import importlib.util

import gymnasium

for absent in ("torch", "tensordict", "amago_core"):
    assert importlib.util.find_spec(absent) is None, f"{absent} came along"

for name in ("MetaFrozenLake-v1", "RoomKeyDoor-v1"):
    env = gymnasium.make(f"amago_envs:{name}")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    lanes = gymnasium.make_vec(f"amago_envs:{name}", num_envs=3)
    lanes.reset(seed=0)
    _, rewards, *_ = lanes.step(lanes.action_space.sample())
    assert rewards.shape == (3,)
print("amago-envs works alone, without torch")
