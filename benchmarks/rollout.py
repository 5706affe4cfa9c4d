"""Environment frames per second of collecting, policy and environment included.

MetaFrozenLake 4x4 in its native vector form, context 128, policies as in `learner.py`; beside it the environment with
random actions alone.

    python benchmarks/rollout.py [--threads 2] [--device cpu] [--out results.json]
"""

from __future__ import annotations

import argparse
import time

import gymnasium as gym
import numpy as np
import torch
from _report import report
from learner import ENCODERS

from amago_core.agents import AgentConfig
from amago_core.exploration import EpsilonGreedyConfig
from amago_core.policy import Policy
from amago_core.recorder import Recorder
from amago_core.rollout import Rollout
from amago_core.spaces import SpaceAdapter
from amago_nets.tstep_encoders import FFTstepEncoderConfig

CONTEXT = 128


def measure(encoder: str | None, lanes: int, args: argparse.Namespace) -> dict[str, object]:
    """Median frames per second over repeated stretches; `encoder=None` acts at random."""
    env = gym.make_vec("amago_envs:MetaFrozenLake-v1", num_envs=lanes, size=4, k_attempts=40)
    rates, cpu = [], []
    if encoder is None:
        env.reset(seed=0)
        actions = np.random.default_rng(0).integers(0, 5, (args.steps, lanes))

        def collect(steps: int) -> None:
            for step in range(steps):
                env.step(actions[step])

    else:
        adapter = SpaceAdapter(env.single_observation_space, env.single_action_space)
        torch.manual_seed(0)
        agent = (
            AgentConfig()
            .build(
                obs_specs=adapter.obs_specs,
                action_spec=adapter.action_spec,
                tstep_encoder=FFTstepEncoderConfig(n_layers=1, d_hidden=128, d_output=64),
                traj_encoder=ENCODERS[encoder],
                max_seq_len=CONTEXT,
            )
            .to(args.device)
        )
        recorder = Recorder(adapter.schema, lanes, lambda trajectory: None)
        exploration = EpsilonGreedyConfig().build(lanes, adapter.action_spec, 0)
        rollout = Rollout(env, Policy(agent, adapter), exploration=exploration, recorder=recorder)
        rollout.restart(0)
        collect = rollout.collect
        collect(CONTEXT)
    for _ in range(args.repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        collect(args.steps)
        rates.append(args.steps * lanes / (time.perf_counter() - start))
        cpu.append((time.process_time() - start_cpu) / (args.steps * lanes))
    env.close()
    return {
        "policy": encoder or "random actions",
        "lanes": lanes,
        "frames_per_s": float(np.median(rates)),
        "cpu_us_per_frame": 1e6 * float(np.median(cpu)),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(encoder, lanes, args) for encoder in (*ENCODERS, None) for lanes in (8, 32, 128)]
    report("rollout", rows, args.out, settings=vars(args))


if __name__ == "__main__":
    main()
