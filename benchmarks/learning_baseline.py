"""Learning at the settings the original AMAGO was measured with: return after 800 updates, and what it cost.

MetaFrozenLake 4x4, 5 attempts; timestep encoder 1 x 128 -> 64, transformer d_model 128, 2 layers, 4 heads; default
heads and 7 discounts; batch 24, lr 3e-4, warm-up 100; 16 lanes, 1,280 frames for every 100 updates; exploration
annealed over 3,000 steps per lane. On two CPU cores the original reached 2.02 / 1.95 (two seeds) after 800 updates and
344 / 315 CPU seconds.

    python benchmarks/learning_baseline.py [--seeds 3] [--threads 1] [--out results.json]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import torch
from _report import report

from amago_core import Experiment, ExperimentConfig
from amago_core.exploration import EpsilonGreedyConfig
from amago_core.learner import LearnerConfig
from amago_nets.traj_encoders import TransformerConfig
from amago_nets.tstep_encoders import FFTstepEncoderConfig

ORIGINAL_RETURN = (2.02, 1.95)
ORIGINAL_CPU_SECONDS = (344.0, 315.0)


def run(seed: int, updates: int) -> dict[str, object]:
    """One run; validation is left out of the CPU seconds, as it was for the original."""
    with tempfile.TemporaryDirectory() as folder:
        config = ExperimentConfig(
            run_dir=str(Path(folder) / "run"),
            seed=seed,
            max_seq_len=80,
            tstep_encoder=FFTstepEncoderConfig(n_layers=1, d_hidden=128, d_output=64),
            traj_encoder=TransformerConfig(d_model=128, n_layers=2, n_heads=4, d_ff=512),
            learner=LearnerConfig(lr=3e-4, warmup_updates=100),
            exploration=EpsilonGreedyConfig(steps_anneal=3_000),
            parallel_lanes=16,
            epochs=updates // 100,
            rollout_steps_per_epoch=80,
            batches_per_epoch=100,
            batch_size=24,
            val_interval=0,
            val_lanes=512,
            val_episodes_per_lane=1,
            ckpt_interval=100,
        )
        experiment = Experiment(
            config,
            make_vec_env=lambda lanes: gym.make_vec(
                "amago_envs:MetaFrozenLake-v1", num_envs=lanes, size=4, k_attempts=5
            ),
            progress=False,
        )
        start, start_cpu = time.perf_counter(), time.process_time()
        experiment.learn()
        wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        result = experiment.evaluate().summary()
        experiment.close()
    return {
        "seed": seed,
        "updates": updates,
        "frames": experiment.frames,
        "return": result["return"],
        "first_attempt": result["attempt_0/success"],
        "last_attempt": result["attempt_4/success"],
        "cpu_s": cpu,
        "wall_s": wall,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [run(seed, args.updates) for seed in range(args.seeds)]
    settings = {**vars(args), "original_return": ORIGINAL_RETURN, "original_cpu_s": ORIGINAL_CPU_SECONDS}
    report("learning_baseline", rows, args.out, settings=settings)


if __name__ == "__main__":
    main()
