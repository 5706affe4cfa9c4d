"""Updates per second of the learner.

Fixed workload: transformer d_model 128, 2 layers, 4 heads; batch 24, windows of 128 transitions, 5 discrete actions,
7 discounts, 4 critics; once with full windows and once with windows as MetaFrozenLake makes them (about half padding).

    python benchmarks/learner.py [--threads 2] [--device cpu] [--encoders transformer gru mamba ff] [--out results.json]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from _report import report

from amago_core.agents import AgentConfig
from amago_core.learner import Learner, LearnerConfig
from amago_nets.specs import ActionSpec, ArraySpec
from amago_nets.traj_encoders import FFConfig, GRUConfig, MambaConfig, TransformerConfig
from amago_nets.tstep_encoders import FFTstepEncoderConfig
from amago_offline.datasets import InMemoryDataset
from amago_offline.schema import Field, Schema, Trajectory

ENCODERS = {
    "transformer": TransformerConfig(d_model=128, n_layers=2, n_heads=4, d_ff=512),
    "gru": GRUConfig(d_hidden=128, n_layers=2, d_output=128),
    "mamba": MambaConfig(d_model=128, n_layers=2),
    "ff": FFConfig(d_model=128, n_layers=2),
}


def dataset(lengths: np.ndarray, rng: np.random.Generator) -> InMemoryDataset:
    """Random trajectories of the given numbers of transitions."""
    schema = Schema(obs={"observation": Field((4,), "float32")}, action=Field((), "int8"))
    data = InMemoryDataset(schema)
    for length in lengths:
        rows = int(length) + 1
        terminated = np.zeros(rows, bool)
        terminated[-1] = True
        data.append(
            Trajectory(
                obs={"observation": rng.random((rows, 4), np.float32)},
                prev_action=np.concatenate([[-1], rng.integers(0, 5, rows - 1)]).astype(np.int8),
                prev_reward=(rng.random(rows) < 0.05).astype(np.float32),
                terminated=terminated,
                truncated=np.zeros(rows, bool),
                time_idx=np.arange(rows),
                meta={},
            )
        )
    return data


def measure(encoder: str, lengths: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of an update, wall clock and CPU."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    agent = (
        AgentConfig()
        .build(
            obs_specs={"observation": ArraySpec(shape=(4,), dtype="float32")},
            action_spec=ActionSpec(kind="discrete", size=5),
            tstep_encoder=FFTstepEncoderConfig(n_layers=1, d_hidden=128, d_output=64),
            traj_encoder=ENCODERS[encoder],
            max_seq_len=args.length,
        )
        .to(args.device)
    )
    learner = Learner(agent, LearnerConfig())
    data = dataset(lengths, rng)
    wall, cpu = [], []
    for step in range(args.warmup + args.updates):
        batch = data.sample(args.batch_size, args.length, rng).trim().to(args.device)
        start, start_cpu = time.perf_counter(), time.process_time()
        learner.update(batch)
        if args.device != "cpu":
            torch.cuda.synchronize()
        if step >= args.warmup:
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
    return {
        "encoder": encoder,
        "mean_window": float(np.minimum(lengths, args.length).mean()),
        "updates_per_s": 1 / float(np.median(wall)),
        "wall_s": float(np.median(wall)),
        "cpu_s": float(np.median(cpu)),
        "trained_parameters": sum(p.numel() for p in agent.parameters() if p.requires_grad),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    full = np.full(256, 4 * args.length)
    varied = np.random.default_rng(1).integers(args.length // 8, args.length, 1024)
    rows = [
        {"windows": name, **measure(encoder, lengths, args)}
        for encoder in args.encoders
        for name, lengths in (("full", full), ("varied", varied))
    ]
    report("learner", rows, args.out, settings=vars(args))


if __name__ == "__main__":
    main()
