"""The wheel of amago-kernels, installed alone, attends, decodes and computes targets."""

import sys

import torch

import amago_kernels as ak

assert not {"gymnasium", "triton", "amago_nets", "amago_core"} & sys.modules.keys()

batch, length, heads, dim = 2, 5, 2, 8
q, k, v = (torch.randn(batch, length, heads, dim) for _ in range(3))
expected = ak.attention(q, k, v, backend="reference")
assert torch.allclose(ak.attention(q, k, v), expected, atol=1e-5)

cache = ak.RingCache.allocate(batch, heads, length, dim, dtype=torch.float32, device=torch.device("cpu"))
for t in range(length):
    stepped = ak.decode_attention(q[:, t], k[:, t], v[:, t], cache)
    assert torch.allclose(stepped, expected[:, t], atol=1e-5), t

ones = torch.ones(batch, length)
targets = ak.n_step_targets(ones, ones > 1, ones.unsqueeze(-1), torch.tensor([0.5]), ones > 0)
assert torch.allclose(targets, torch.full((batch, length, 1), 1.5))
print("amago-kernels works alone")
