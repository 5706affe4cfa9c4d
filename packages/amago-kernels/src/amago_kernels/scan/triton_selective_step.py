"""One timestep of the selective scan in one Triton launch, on states at a fixed address.

Dimensions: `B` batch, `D` channels, `N` states per channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import config, on_device, tuned
from .triton_selective_tiles import sigmoid, softplus

if TYPE_CHECKING:
    from ..builds import Build


@tuned([config(2, CHANNELS=16), config(4, CHANNELS=64)], key=("channels", "states"), restore=("state",))
@triton.jit
def step_kernel(
    u,
    delta,
    A,
    B,
    C,
    skip,
    z,
    bias,
    state,
    y,
    channels,
    states,
    u_batch,
    delta_batch,
    B_batch,
    C_batch,
    z_batch,
    state_batch,
    state_channel,
    state_state,
    SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Advances states `[B, D, N]` in place and writes `y` `[B, D]`."""
    blocks = tl.cdiv(channels, CHANNELS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    exists, kept = d < channels, n < states
    alive = exists[:, None] & kept[None, :]
    place = state + batch * state_batch + d[:, None] * state_channel + n[None, :] * state_state
    h = tl.load(place, mask=alive, other=0.0).to(tl.float32)
    rates = tl.load(A + d[:, None] * states + n[None, :], mask=alive, other=0.0).to(tl.float32)
    steps = tl.load(delta + batch * delta_batch + d, mask=exists, other=0.0).to(tl.float32)
    inputs = tl.load(u + batch * u_batch + d, mask=exists, other=0.0).to(tl.float32)
    maps_in = tl.load(B + batch * B_batch + n, mask=kept, other=0.0).to(tl.float32)
    maps_out = tl.load(C + batch * C_batch + n, mask=kept, other=0.0).to(tl.float32)
    if bias is not None:
        steps += tl.load(bias + d, mask=exists, other=0.0).to(tl.float32)
    if SOFTPLUS:
        steps = softplus(steps)
    h = tl.exp(steps[:, None] * rates) * h + (steps * inputs)[:, None] * maps_in[None, :]
    # Small states lie in several warps at once: all of them have read before one writes.
    tl.debug_barrier()
    tl.store(place, h.to(state.dtype.element_ty), mask=alive)
    out = tl.sum(h * maps_out[None, :], axis=1)
    if skip is not None:
        out += tl.load(skip + d, mask=exists, other=0.0).to(tl.float32) * inputs
    if z is not None:
        gate = tl.load(z + batch * z_batch + d, mask=exists, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + batch * channels + d, out.to(y.dtype.element_ty), mask=exists)


def step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    softplus: bool,
) -> Tensor:
    """Launches the kernel.

    Args:
        u: `[B, D]`.
        delta: `[B, D]`.
        A: `[D, N]`.
        B: `[B, N]`.
        C: `[B, N]`.
        D: `[D]` or None.
        z: `[B, D]` or None.
        delta_bias: `[D]` or None.
        state: `[B, D, N]`, updated in place.
        softplus: apply softplus to the step sizes.

    Returns:
        `y` `[B, D]` in the dtype of `u`.
    """
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if y.numel() == 0:
        return y
    batch, channels = u.shape
    states = A.shape[1]
    u, delta, B, C = (x if x.stride(-1) == 1 else x.contiguous() for x in (u, delta, B, C))
    if z is not None and z.stride(-1) != 1:
        z = z.contiguous()
    with on_device(u):
        step_kernel[lambda meta: (batch * triton.cdiv(channels, meta["CHANNELS"]),)](
            u,
            delta,
            A.contiguous(),
            B,
            C,
            None if D is None else D.contiguous(),
            z,
            None if delta_bias is None else delta_bias.contiguous(),
            state,
            y,
            channels,
            states,
            u.stride(0),
            delta.stride(0),
            B.stride(0),
            C.stride(0),
            0 if z is None else z.stride(0),
            *state.stride(),
            SOFTPLUS=softplus,
            STATES=triton.next_power_of_2(states),
        )
    return y


def builds() -> list[Build]:
    """B=256, D=512, N=16: what acting calls."""
    from ..builds import Build

    channels, states = 512, 16
    sizes = {"channels": channels, "states": states, "SOFTPLUS": True, "STATES": states}
    sizes |= {f"{name}_batch": channels for name in ("u", "delta", "z")}
    sizes |= {f"{name}_batch": states for name in ("B", "C")}
    sizes |= {"state_batch": channels * states, "state_channel": states, "state_state": 1}
    pointers = {name: "*fp32" for name in ("A", "skip", "bias", "state")}
    return [
        Build(
            f"selective scan, one timestep, {dtype}",
            step_kernel,
            sizes | pointers | {name: f"*{dtype}" for name in ("u", "delta", "B", "C", "z", "y")},
        )
        for dtype in ("bf16", "fp32")
    ]
