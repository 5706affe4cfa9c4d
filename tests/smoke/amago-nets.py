"""The wheel of amago-nets, installed without any of ours but amago-kernels, encodes and acts in plain torch."""

import sys

import torch

from amago_nets.distributions import DiscreteConfig
from amago_nets.heads import ActorConfig
from amago_nets.specs import ActionSpec, ArraySpec
from amago_nets.traj_encoders import FFConfig, GRUConfig, TransformerConfig
from amago_nets.tstep_encoders import FFTstepEncoderConfig

assert not {"gymnasium", "matplotlib", "triton", "tyro", "wandb", "amago_core"} & sys.modules.keys()

batch, length, actions = 2, 6, 3
obs_specs = {"observation": ArraySpec(shape=(4,), dtype="float32")}
action_spec = ActionSpec(kind="discrete", size=actions)
encoder = FFTstepEncoderConfig(d_hidden=16, d_output=16).build(obs_specs, action_spec)
obs = {"observation": torch.randn(batch, length, 4)}
prev_action = action_spec.encode(torch.full((batch, length), -1))
x = encoder(obs, prev_action, torch.zeros(batch, length), torch.ones(batch, length, dtype=torch.bool))
time_idx = torch.arange(length).expand(batch, length)

configs = [
    FFConfig(d_model=16),
    GRUConfig(d_hidden=16, d_output=16),
    TransformerConfig(d_model=16, n_heads=2, n_layers=1),
]
for config in configs:
    backbone = config.build(encoder.out_dim, max_seq_len=length).eval()
    y, _ = backbone(x, time_idx)
    state = backbone.initial_state(batch)
    for t in range(length):
        stepped = backbone.step(x[:, t], time_idx[:, t], state)
        assert torch.allclose(stepped, y[:, t], atol=1e-4), (config, t)
    distribution = DiscreteConfig()
    actor = ActorConfig(d_hidden=16).build(backbone.out_dim, distribution.param_size(actions), num_gammas=2)
    assert distribution.build(actor(y)).sample().shape == (batch, length, 2)
print("amago-nets works with amago-kernels alone")
