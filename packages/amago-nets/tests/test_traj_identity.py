"""The identity backbone: nothing in, nothing out, but the whole contract."""

from __future__ import annotations

import pytest
import torch

from amago_nets.registry import lookup
from amago_nets.testing import check_backbone
from amago_nets.traj_encoders import IdentityConfig, TrajEncoderConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contract(dtype):
    check_backbone(IdentityConfig().build, dtype=dtype, memory=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_is_the_input(dtype):
    model = IdentityConfig().build(3, 4)
    assert model.out_dim == 3
    assert not list(model.parameters()) and not model.state_dict()
    x, time_idx = torch.randn(2, 5, 3, dtype=dtype, requires_grad=True), torch.arange(5).expand(2, 5)
    out, state = model(x, time_idx)
    assert state is None and out.dtype == dtype and torch.equal(out, x)
    (grad,) = torch.autograd.grad((out * 3.0).sum(), x)
    assert torch.equal(grad, torch.full_like(x, 3.0))


def test_steps_return_their_own_memory_and_no_gradient():
    model = IdentityConfig().build(3, 4)
    state = model.initial_state(2, device="cpu", dtype=torch.float64)
    x = torch.randn(2, 3, requires_grad=True)
    kept = x.detach().clone()
    out = model.step(x, torch.zeros(2, dtype=torch.int64), state)
    assert not out.requires_grad
    with torch.no_grad():
        x.zero_()
    assert torch.equal(out, kept)
    model.reset_state(state, torch.tensor([True, False]))
    assert state.tensors == {} and state.select(torch.tensor([1, 1, 0])).lanes == 3


def test_config_and_errors():
    assert lookup("traj_encoder", "identity") is IdentityConfig
    assert isinstance(IdentityConfig(), TrajEncoderConfig)
    with pytest.raises(ValueError, match="in_dim=0"):
        IdentityConfig().build(0, 4)
    model = IdentityConfig().build(3, 4)
    with pytest.raises(ValueError, match=r"give \[B, L, 3\]"):
        model(torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="x .* and time_idx"):
        model.step(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), model.initial_state(2))
