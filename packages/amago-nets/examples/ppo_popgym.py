"""PPO in one file with an amago-nets backbone, on POPGym: repeat the card that was dealt some cards ago.

Three things differ from PPO without memory:

1. acting, `step` advances a state that is carried along, and `reset_state` empties the lanes that begin an episode;
2. the state before a rollout is kept, and training runs `forward` over the whole rollout from there, with `reset`
   marking where episodes begin;
3. minibatches are made of lanes, never of single timesteps.

    pip install amago-nets popgym
    python ppo_popgym.py                                   # a GRU
    python ppo_popgym.py --backbone ff                     # the same without memory

Dimensions: `B` lanes, `L` timesteps of a rollout, `D` features, `A` actions.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import gymnasium as gym
import numpy as np
import popgym  # noqa: F401  (registers the environments)
import torch
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import FlattenObservation
from popgym.wrappers import DiscreteAction
from torch import Tensor, nn
from torch.distributions import Categorical

from amago_kernels import lambda_returns
from amago_nets.registry import lookup, names
from amago_nets.traj_encoders import State, TrajEncoder

# What each backbone's config takes of it.
SMALL = {
    "d_model": 64,
    "d_hidden": 64,
    "d_output": 64,
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


class ActorCritic(nn.Module):
    """A backbone with a linear policy and a linear value on top."""

    def __init__(self, backbone: TrajEncoder, actions: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.actor = nn.Linear(backbone.out_dim, actions)
        self.critic = nn.Linear(backbone.out_dim, 1)
        nn.init.zeros_(self.actor.weight)

    def heads(self, y: Tensor) -> tuple[Categorical, Tensor]:
        """Policy and value."""
        return Categorical(logits=self.actor(y)), self.critic(y).squeeze(-1)

    @torch.no_grad()
    def act(self, x: Tensor, time_idx: Tensor, first: Tensor, state: State) -> tuple[Categorical, Tensor]:
        """One timestep `[B, D]`; updates the state in place."""
        self.backbone.reset_state(state, first)
        return self.heads(self.backbone.step(x, time_idx, state))

    def forward(self, x: Tensor, time_idx: Tensor, first: Tensor, state: State) -> tuple[Categorical, Tensor]:
        """A rollout `[B, L, D]` that goes on from a state."""
        return self.heads(self.backbone(x, time_idx, first, state)[0])


class Lanes:
    """Environments side by side, and what the policy sees of each: observation, last action, last reward.

    Args:
        env_id: of POPGym.
        lanes: `B`.
        seed: of the environments.
        memoryless: leaves out last action and reward, which are a memory of one timestep.
    """

    def __init__(self, env_id: str, lanes: int, seed: int, memoryless: bool) -> None:
        def make() -> gym.Env:
            env = FlattenObservation(gym.make(env_id, disable_env_checker=True))
            return env if isinstance(env.action_space, gym.spaces.Discrete) else DiscreteAction(env)

        self.env = gym.vector.SyncVectorEnv([make] * lanes, autoreset_mode=AutoresetMode.SAME_STEP)
        self.memoryless = memoryless
        self.actions = int(self.env.single_action_space.n)
        self.first = torch.ones(lanes, dtype=torch.bool)
        self.time_idx = torch.zeros(lanes, dtype=torch.int64)
        self.running = torch.zeros(lanes)
        self.returns: list[float] = []
        obs, _ = self.env.reset(seed=seed)
        self.x = self._features(obs, torch.full((lanes,), -1), torch.zeros(lanes))

    def _features(self, obs: np.ndarray, action: Tensor, reward: Tensor) -> Tensor:
        seen = torch.as_tensor(obs, dtype=torch.float32)
        if self.memoryless:
            return seen
        one_hot = (action[:, None] == torch.arange(self.actions)).float()
        return torch.cat([seen, one_hot, reward[:, None]], dim=-1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Runs an action `[B]` in every lane; returns reward and end of episode, `[B]`. POPGym never truncates."""
        obs, reward, terminated, _, _ = self.env.step(action.numpy())
        reward, done = torch.as_tensor(reward, dtype=torch.float32), torch.as_tensor(terminated)
        self.running += reward
        self.returns += self.running[done].tolist()
        self.running.masked_fill_(done, 0.0)
        self.time_idx = (self.time_idx + 1).masked_fill(done, 0)
        self.first = done
        self.x = self._features(obs, action.masked_fill(done, -1), reward.masked_fill(done, 0.0))
        return reward, done


def random_return(env_id: str, lanes: int, seed: int) -> float:
    """Mean return of random play."""
    env = Lanes(env_id, lanes, seed, memoryless=True)
    while len(env.returns) < 2 * lanes:
        env.step(torch.randint(env.actions, (lanes,)))
    return float(np.mean(env.returns))


def collect(lanes: Lanes, agent: ActorCritic, state: State, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """A rollout of `length` timesteps, every entry `[B, L, ...]`, and the value `[B]` of what comes after it."""
    rows = []
    for _ in range(length):
        row = {"x": lanes.x, "time_idx": lanes.time_idx, "first": lanes.first}
        policy, value = agent.act(lanes.x, lanes.time_idx, lanes.first, state)
        action = policy.sample()
        reward, done = lanes.step(action)
        row |= {"action": action, "log_prob": policy.log_prob(action), "value": value}
        rows.append(row | {"reward": reward, "done": done})
    # A copy looks one timestep ahead: the next rollout steps over that timestep itself.
    ahead = state.select(torch.arange(state.lanes))
    _, next_value = agent.act(lanes.x, lanes.time_idx, lanes.first, ahead)
    return {name: torch.stack([row[name] for row in rows], dim=1) for name in rows[0]}, next_value


def gae(rollout: dict[str, Tensor], next_value: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages `[B, L]` (Schulman et al., 2016): what lambda returns exceed the values by."""
    next_values = torch.cat([rollout["value"][:, 1:], next_value[:, None]], dim=1)
    done, real = rollout["done"], torch.ones_like(rollout["done"])
    returns = lambda_returns(
        rollout["reward"], done, next_values[..., None], torch.tensor([gamma]), real, lambda_=lam
    ).squeeze(-1)
    return returns - rollout["value"]


def ppo_loss(agent: ActorCritic, batch: dict[str, Tensor], start: State, clip: float, entropy: float) -> Tensor:
    """Clipped objective, value error and entropy bonus (Schulman et al., 2017)."""
    policy, value = agent(batch["x"], batch["time_idx"], batch["first"], start)
    ratio = (policy.log_prob(batch["action"]) - batch["log_prob"]).exp()
    advantage = (batch["advantage"] - batch["advantage"].mean()) / (batch["advantage"].std() + 1e-8)
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    return 0.5 * F.mse_loss(value, batch["target"]) - objective - entropy * policy.entropy().mean()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="popgym-RepeatPreviousEasy-v0", help="any of POPGym's with discrete actions")
    parser.add_argument("--backbone", default="gru", choices=names("traj_encoder"))
    parser.add_argument("--steps", type=int, default=300_000, help="timesteps of all lanes together")
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="timesteps of a rollout")
    parser.add_argument("--context", type=int, default=64, help="timesteps a Transformer sees")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--gamma", type=float, default=0.95)
    parser.add_argument("--lam", type=float, default=0.9)
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--entropy", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    lanes = Lanes(args.env, args.lanes, args.seed, memoryless=args.backbone in MEMORYLESS)
    agent = ActorCritic(make_backbone(args.backbone, lanes.x.shape[-1], args.context), lanes.actions)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, eps=1e-5)
    state = agent.backbone.initial_state(args.lanes)
    updates = max(args.steps // (args.lanes * args.length), 1)
    best, begin = float("nan"), time.perf_counter()
    for update in range(1, updates + 1):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - (update - 1) / updates)
        start = state.select(torch.arange(args.lanes))
        rollout, next_value = collect(lanes, agent, state, args.length)
        rollout["advantage"] = gae(rollout, next_value, args.gamma, args.lam)
        rollout["target"] = rollout["advantage"] + rollout["value"]
        for _ in range(args.epochs):
            for rows in torch.randperm(args.lanes).chunk(args.minibatches):
                # `select` copies: forward may update the state that it is given.
                batch = {name: tensor[rows] for name, tensor in rollout.items()}
                loss = ppo_loss(agent, batch, start.select(rows), args.clip, args.entropy)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        recent = float(np.mean(lanes.returns[-2 * args.lanes :])) if lanes.returns else float("nan")
        if len(lanes.returns) >= args.lanes:
            best = float(np.fmax(best, recent))
        if update % max(updates // 12, 1) == 0 or update == updates:
            steps = update * args.lanes * args.length
            print(f"steps {steps:7d}  {time.perf_counter() - begin:4.0f} s  return {recent:6.3f}  best {best:6.3f}")
    chance = random_return(args.env, args.lanes, args.seed)
    print(f"{args.backbone} on {args.env}: return {recent:.3f}, best {best:.3f}; random play gets {chance:.3f}")


if __name__ == "__main__":
    main()
