"""Every encoder, backbone, head and distribution in a whole run: collect, train, validate, save, load, act."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from experiment_helpers import cartpole, tiny_config

from amago_core import Experiment, Policy
from amago_core.agents import AgentConfig
from amago_core.errors import ConfigError
from amago_nets.distributions import BetaConfig, GMMConfig
from amago_nets.heads import ActorConfig, NCriticsConfig, ResidualActorConfig
from amago_nets.traj_encoders import (
    GRUConfig,
    IdentityConfig,
    LRUConfig,
    LSTMConfig,
    MambaConfig,
    MinGRUConfig,
    TransformerConfig,
)
from amago_nets.tstep_encoders import (
    CNNTstepEncoder,
    CNNTstepEncoderConfig,
    DictTstepEncoder,
    DictTstepEncoderConfig,
    FFTstepEncoder,
)

BACKBONES = {
    "identity": IdentityConfig(),
    "lstm": LSTMConfig(d_hidden=16, d_output=16, n_layers=1),
    "mamba": MambaConfig(d_model=16, d_state=4, n_layers=1),
    "min_gru": MinGRUConfig(d_model=16, n_layers=1),
    "lru": LRUConfig(d_model=16, n_layers=1),
    "transformer with sinks": TransformerConfig(d_model=16, n_heads=2, n_layers=1, window=4, sink=2, logit_clip=5.0),
}


class Pictures(gym.Env):
    """Observations of any space, drawn at random, for a few steps."""

    def __init__(self, space: gym.Space, action_space: gym.Space | None = None) -> None:
        self.observation_space = space
        self.action_space = gym.spaces.Discrete(3) if action_space is None else action_space
        self.left = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.left = 9
        return self.observation_space.sample(), {}

    def step(self, action):
        self.left -= 1
        return self.observation_space.sample(), 1.0, self.left == 0, False, {}


def run(run_dir, make_env, **changes):
    """Train for a moment, and load the policy again."""
    config = tiny_config(run_dir, epochs=1, val_interval=1, **changes)
    experiment = Experiment(config, make_env, progress=False)
    agent = experiment.agent
    summary = experiment.learn()
    assert summary["updates"] == 3 and np.isfinite(summary["val/return"])
    env = make_env()
    obs, _ = env.reset(seed=0)
    policy = Policy.load(run_dir)
    for _ in range(3):
        action = policy.act(obs)
        assert env.action_space.contains(action)
        obs = env.step(action)[0]
    return agent


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(tmp_path, name):
    run(tmp_path / "run", cartpole, traj_encoder=BACKBONES[name])


IMAGE = gym.spaces.Box(0, 255, (12, 12, 3), np.uint8)
MIXED = gym.spaces.Dict({"view": IMAGE, "speed": gym.spaces.Box(-1, 1, (2,)), "word": gym.spaces.MultiDiscrete([5, 5])})


@pytest.mark.parametrize(
    ("space", "kind"),
    [(gym.spaces.Box(-1, 1, (3,)), FFTstepEncoder), (IMAGE, CNNTstepEncoder), (MIXED, DictTstepEncoder)],
    ids=["vector", "image", "mixed"],
)
def test_the_observations_choose_their_encoder(tmp_path, space, kind):
    agent = run(tmp_path / "run", lambda: Pictures(space), tstep_encoder=None)
    assert isinstance(agent.tstep_encoder, kind)


def test_augmentation_and_overrides_are_saved(tmp_path):
    encoder = CNNTstepEncoderConfig(augment=True)
    with pytest.raises(ConfigError, match="36"):  # the default stack is for larger images
        run(tmp_path / "small", lambda: Pictures(IMAGE), tstep_encoder=encoder)
    large = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)
    run(tmp_path / "large", lambda: Pictures(large), tstep_encoder=encoder)
    parts = DictTstepEncoderConfig(overrides={"word": DictTstepEncoderConfig().tokens}, obs_keys=("word", "speed"))
    agent = run(tmp_path / "mixed", lambda: Pictures(MIXED), tstep_encoder=parts)
    assert Policy.load(tmp_path / "mixed").agent.tstep_encoder.config == agent.tstep_encoder.config == parts


BOX = gym.spaces.Box(-2, 2, (2,))
BITS = gym.spaces.MultiBinary(3)


# Without a gradient through its samples a policy learns by filtered behaviour cloning alone.
@pytest.mark.parametrize(
    ("policy", "actions", "online"),
    [(BetaConfig(), BOX, 1.0), (GMMConfig(), BOX, 0.0), (None, BITS, 0.0)],
    ids=["beta", "gmm", "bits"],
)
def test_policies(tmp_path, policy, actions, online):
    agent = AgentConfig(
        gammas=(0.9,),
        policy=policy,
        online_coeff=online,
        offline_coeff=1.0,
        actor=ResidualActorConfig(),
        critics=NCriticsConfig(d_hidden=16, num_critics=2),
    )
    run(tmp_path / "run", lambda: Pictures(gym.spaces.Box(-1, 1, (3,)), actions), agent=agent)


def test_an_online_term_needs_a_gradient(tmp_path):
    agent = AgentConfig(policy=GMMConfig(), actor=ActorConfig(d_hidden=16))
    config = tiny_config(tmp_path / "run", agent=agent, traj_encoder=GRUConfig(d_hidden=16))
    with pytest.raises(ConfigError, match="online_coeff"):
        Experiment(config, lambda: Pictures(gym.spaces.Box(-1, 1, (3,)), BOX))
