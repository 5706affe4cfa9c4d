"""PPO from TorchRL's parts with an amago-nets backbone: a T-maze whose turn must be remembered.

A sign at the start of a corridor says which way to turn at its end. Between them there is nothing but noise, and every
corridor has its own length, so that lanes begin new episodes at different moments. Without memory half of the turns are
wrong, whatever the policy.

`TrajEncoderModule` carries the memory in the tensordict: the collector steps it, the loss runs it over whole windows
that go on from the memory stored with their first timestep.

    pip install "amago-nets[torchrl]"
    python torchrl_recurrent_policy.py                     # a GRU
    python torchrl_recurrent_policy.py --backbone ff       # the same without memory
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, InitTracker, TransformedEnv, set_exploration_type
from torchrl.envs.utils import ExplorationType
from torchrl.modules import ProbabilisticActor, ValueOperator, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from amago_nets.registry import lookup, names
from amago_nets.torchrl import TrajEncoderModule
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


def make_backbone(name: str, in_dim: int, max_seq_len: int) -> TrajEncoder:
    """A small backbone of that name."""
    config = lookup("traj_encoder", name)
    fields = {field.name for field in dataclasses.fields(config)}
    return config(**{key: value for key, value in SMALL.items() if key in fields}).build(in_dim, max_seq_len)


class TMaze(EnvBase):
    """Corridors of random length, one per lane; the reward is 1 for the right turn at the end.

    Args:
        lanes: mazes side by side.
        longest: steps of the longest corridor; the shortest has a third of them.
        seed: of signs, lengths and noise.
    """

    def __init__(self, lanes: int, longest: int, seed: int) -> None:
        super().__init__(batch_size=[lanes])
        self.longest = longest
        self.generator = torch.Generator().manual_seed(seed)
        self.sign = torch.zeros(lanes)
        self.to_go = torch.zeros(lanes, dtype=torch.int64)
        self.observation_spec = Composite(observation=Unbounded((lanes, 3)), shape=(lanes,))
        self.action_spec = Categorical(2, shape=(lanes,))
        self.reward_spec = Unbounded((lanes, 1))
        self.done_spec = Binary(1, shape=(lanes, 1), dtype=torch.bool)

    def _observe(self, seen: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(seen.shape, generator=self.generator)
        return torch.stack([seen, (self.to_go == 0).float(), noise], dim=-1)

    def _reset(self, tensordict: TensorDictBase | None, **kwargs) -> TensorDict:
        lanes = self.batch_size[0]
        new = torch.ones(lanes, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict.keys():
            new = tensordict["_reset"].reshape(lanes)
        sign = torch.randint(2, (lanes,), generator=self.generator) * 2.0 - 1.0
        to_go = torch.randint(self.longest // 3, self.longest + 1, (lanes,), generator=self.generator)
        self.sign = torch.where(new, sign, self.sign)
        self.to_go = torch.where(new, to_go, self.to_go)
        return TensorDict({"observation": self._observe(self.sign)}, batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        done = self.to_go == 0
        right = tensordict["action"] == (self.sign > 0)
        self.to_go = (self.to_go - 1).clamp_min(0)
        step = {"observation": self._observe(torch.zeros_like(self.sign))}
        step |= {"reward": (done & right).float()[:, None], "terminated": done[:, None], "done": done[:, None]}
        return TensorDict(step, batch_size=self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(seed or 0)


def make_env(lanes: int, longest: int, seed: int, memory: TrajEncoderModule) -> TransformedEnv:
    """The primer makes the environment carry the policy's memory; `InitTracker` says where episodes begin."""
    env = TransformedEnv(TMaze(lanes, longest, seed), InitTracker())
    return env.append_transform(memory.make_tensordict_primer())


def success_rate(data: TensorDictBase) -> float:
    """Right turns among the episodes that ended in these data."""
    return float(data["next", "reward"].sum() / data["next", "done"].sum().clamp_min(1))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="gru", choices=names("traj_encoder"))
    parser.add_argument("--updates", type=int, default=80, help="batches collected and learned from")
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--window", type=int, default=32, help="timesteps per lane and batch")
    parser.add_argument("--longest", type=int, default=24, help="steps of the longest corridor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    memory = TrajEncoderModule(make_backbone(args.backbone, 3, args.longest + 1), "observation", "memory")
    width = memory.backbone.out_dim
    logits = TensorDictModule(nn.Linear(width, 2), in_keys=["memory"], out_keys=["logits"])
    actor = ProbabilisticActor(
        TensorDictSequential(memory, logits),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = TensorDictSequential(memory, ValueOperator(nn.Linear(width, 1), in_keys=["memory"]))
    # `shifted`: one pass over T + 1 timesteps gives values and next values, so that memory is right for both.
    advantage = GAE(gamma=0.98, lmbda=0.95, value_network=critic, shifted=True)
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.01, critic_coeff=0.5)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)

    frames = args.lanes * args.window
    collector = Collector(
        make_env(args.lanes, args.longest, args.seed, memory),
        actor,
        frames_per_batch=frames,
        total_frames=frames * args.updates,
    )
    start = time.perf_counter()
    for update, data in enumerate(collector, start=1):
        for _ in range(4):
            with torch.no_grad(), set_recurrent_mode(True):  # The loss sets it itself.
                advantage(data)
            for rows in torch.randperm(args.lanes).chunk(4):  # Whole windows: lanes are shuffled, timesteps never.
                losses = loss(data[rows])
                optimizer.zero_grad()
                sum(losses[name] for name in ("loss_objective", "loss_critic", "loss_entropy")).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
        if update % 10 == 0 or update == args.updates:
            seconds = time.perf_counter() - start
            print(f"update {update:4d}  frames {update * frames:7d}  {seconds:4.0f} s  right {success_rate(data):.3f}")
    collector.shutdown()

    test = make_env(512, args.longest, args.seed + 1, memory)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        reached = success_rate(test.rollout(args.longest + 1, actor, break_when_any_done=False))
    print(f"{args.backbone}: {reached:.3f} of the turns are right; 0.5 is all that a policy without memory can reach")


if __name__ == "__main__":
    main()
