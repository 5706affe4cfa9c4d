"""The wheel of amago-core, with what it brings, learns for a moment, saves, and gives a policy that acts."""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium

from amago_core import Experiment, ExperimentConfig, Policy
from amago_nets.traj_encoders import GRUConfig
from amago_nets.tstep_encoders import FFTstepEncoderConfig

assert importlib.util.find_spec("amago_envs") is None
assert not {"matplotlib", "wandb", "tensorboard", "ray"} & sys.modules.keys()


def make_env() -> gymnasium.Env:
    return gymnasium.make("CartPole-v1")


with tempfile.TemporaryDirectory() as folder:
    run_dir = str(Path(folder) / "run")
    config = ExperimentConfig(
        run_dir=run_dir,
        max_seq_len=8,
        tstep_encoder=FFTstepEncoderConfig(d_hidden=16, d_output=16),
        traj_encoder=GRUConfig(d_hidden=16, d_output=16, n_layers=1),
        parallel_lanes=2,
        epochs=1,
        rollout_steps_per_epoch=50,
        batches_per_epoch=2,
        batch_size=4,
        val_interval=1,
        val_lanes=1,
        val_episodes_per_lane=1,
    )
    Experiment(config, make_env=make_env).learn()

    policy = Policy.load(run_dir)
    env = make_env()
    observation, _ = env.reset(seed=0)
    policy.reset()
    assert env.action_space.contains(policy.act(observation))

amago = Path(sys.executable).parent / "amago"
subprocess.run([amago, "--help"], check=True, stdout=subprocess.DEVNULL)
print("amago-core works with what it brings")
