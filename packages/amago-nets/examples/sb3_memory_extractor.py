"""Stable-Baselines3 PPO with an amago-nets backbone over the recent past: bandits to explore and then exploit.

One arm pays in every episode, another one each time, and nothing can be seen: only its own actions and rewards tell the
agent which. Whoever forgets them picks the right arm once in `--arms` times; whoever remembers tries one after another
and then stays.

SB3's buffers know no recurrent state, so the memory is a window: a wrapper keeps the last timesteps in the observation,
a features extractor runs the backbone over them and takes the present one. Any of SB3's algorithms can use the two.

    pip install amago-nets stable-baselines3
    python sb3_memory_extractor.py                         # a Transformer
    python sb3_memory_extractor.py --backbone ff           # the same without memory
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from amago_nets.registry import lookup, names
from amago_nets.traj_encoders import TrajEncoder

# What each backbone's config takes of it.
SMALL = {
    "d_model": 32,
    "d_hidden": 32,
    "d_output": 32,
    "n_heads": 2,
    "n_layers": 1,
    "dropout_ff": 0.0,
    "dropout_emb": 0.0,
    "sigma_reparam": False,  # Else the learner must call update_spectral_norms.
}
MEMORYLESS = ("ff", "identity")


def make_backbone(name: str, in_dim: int, max_seq_len: int) -> TrajEncoder:
    """A small backbone of that name."""
    config = lookup("traj_encoder", name)
    fields = {field.name for field in dataclasses.fields(config)}
    return config(**{key: value for key, value in SMALL.items() if key in fields}).build(in_dim, max_seq_len)


class Bandit(gym.Env):
    """One of several arms pays 1; which, is drawn at every reset.

    Args:
        arms: how many there are.
        pulls: steps of an episode.
    """

    def __init__(self, arms: int, pulls: int) -> None:
        self.pulls = pulls
        self.observation_space = spaces.Box(0.0, 0.0, (1,), np.float32)
        self.action_space = spaces.Discrete(arms)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.pulls
        self.paying = int(self.np_random.integers(self.action_space.n))
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), float(action == self.paying), self.left == 0, False, {}


class History(gym.Wrapper):
    """Observations become the last timesteps of the episode: observation, action that led to it, reward with it.

    Args:
        env: with a flat observation and discrete actions.
        length: timesteps kept. Rows before the episode began are zero; `age` says how many there are.
        hidden: leaves out action and reward, as a policy without memory must.
    """

    def __init__(self, env: gym.Env, length: int, hidden: bool = False) -> None:
        super().__init__(env)
        self.length, self.hidden, self.actions = length, hidden, int(env.action_space.n)
        features = env.observation_space.shape[0] + (0 if hidden else self.actions + 1)
        self.observation_space = spaces.Dict(
            window=spaces.Box(-np.inf, np.inf, (length, features), np.float32),
            age=spaces.Box(0, np.inf, (1,), np.float32),
        )

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.age = 0
        self.window = np.zeros(self.observation_space["window"].shape, np.float32)
        self.window[-1] = self._timestep(obs, np.zeros(self.actions), 0.0)
        return self._observe(), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.age += 1
        self.window = np.roll(self.window, -1, axis=0)
        self.window[-1] = self._timestep(obs, np.eye(self.actions)[action], reward)
        return self._observe(), reward, terminated, truncated, info

    def _timestep(self, obs: np.ndarray, action: np.ndarray, reward: float) -> np.ndarray:
        return obs if self.hidden else np.concatenate([obs, action, [reward]])

    def _observe(self) -> dict[str, np.ndarray]:
        return {"window": self.window.copy(), "age": np.array([self.age], np.float32)}


class MemoryExtractor(BaseFeaturesExtractor):
    """Runs a backbone over a window and returns what it makes of the present timestep.

    Args:
        observation_space: of `History`.
        backbone: name of a registered backbone.
    """

    def __init__(self, observation_space: spaces.Dict, backbone: str) -> None:
        length, features = observation_space["window"].shape
        encoder = make_backbone(backbone, features, max_seq_len=length)
        super().__init__(observation_space, features_dim=encoder.out_dim)
        self.backbone = encoder

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        window, age = observations["window"], observations["age"].long()
        length = window.shape[1]
        time_idx = age + torch.arange(1 - length, 1, device=window.device)
        # What lies before the reset is not seen; of an older episode the window holds nothing but itself.
        return self.backbone(window, time_idx.clamp_min(0), time_idx == 0)[0][:, -1]


class Progress(BaseCallback):
    """Prints the mean return of the last episodes."""

    def __init__(self) -> None:
        super().__init__()
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        returns = [episode["r"] for episode in self.model.ep_info_buffer]
        seconds = time.perf_counter() - self.start
        print(f"steps {self.num_timesteps:7d}  {seconds:4.0f} s  return {np.mean(returns) if returns else np.nan:6.2f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="transformer", choices=names("traj_encoder"))
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--arms", type=int, default=5)
    parser.add_argument("--pulls", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def make_env() -> gym.Env:
        return History(Bandit(args.arms, args.pulls), length=args.pulls, hidden=args.backbone in MEMORYLESS)

    steps_per_env = min(256, max(args.steps // 16, 1))
    model = PPO(
        "MultiInputPolicy",
        make_vec_env(make_env, n_envs=16, seed=args.seed),
        n_steps=steps_per_env,
        batch_size=min(512, 16 * steps_per_env),
        n_epochs=4,
        learning_rate=1e-3,
        gamma=0.95,
        ent_coef=0.01,
        policy_kwargs={
            "features_extractor_class": MemoryExtractor,
            "features_extractor_kwargs": {"backbone": args.backbone},
            "net_arch": [],
            "ortho_init": False,  # SB3 would draw the backbone's weights anew.
        },
        seed=args.seed,
        device="cpu",
    )
    model.learn(args.steps, callback=Progress())

    test = make_vec_env(make_env, n_envs=16, seed=args.seed + 1)
    mean, _ = evaluate_policy(model, test, n_eval_episodes=256, deterministic=False)
    chance, best = args.pulls / args.arms, args.pulls - (args.arms - 1) / 2
    print(
        f"{args.backbone}: return {mean:.2f} of at most {best:.2f}; "
        f"{chance:.2f} is all that a policy without memory can reach"
    )


if __name__ == "__main__":
    main()
