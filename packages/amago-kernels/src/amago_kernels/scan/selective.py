"""The selective scan of Mamba.

Dimensions: `B` batch, `L` timesteps, `D` channels, `N` states per channel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import choose, numba_refusal, triton_refusal, triton_unasked
from ..external import WindowCall, mamba_ssm_scan, selective_scan_refusal
from ..inputs import accumulation_dtype, check_devices, check_floats, check_reset, check_shape, without_autocast
from .reference import selective_reference
from .selective_ops import compiled_scan, launch_step, triton_step
from .tiled import tiled_scan

_MOST_STATES = 256


def _triton_refusal(call: WindowCall) -> str | None:
    if call.width > _MOST_STATES:
        return f"it keeps at most {_MOST_STATES} states per channel, and A asks for {call.width}"
    return triton_refusal(call.device_type, *call.dtypes)


# "mamba_ssm" comes last, behind one that can always serve: only those who ask for the package get it.
_CANDIDATES: dict[str, Callable[[WindowCall], str | None]] = {
    "triton": _triton_refusal,
    "numba": lambda call: numba_refusal(call.device_type),
    "blocked": lambda call: None,
    "reference": lambda call: None,
    "mamba_ssm": selective_scan_refusal,
}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """State space recurrence whose step size, input and output maps depend on the input, with resets at any timestep.

    With `d_t = delta_t + delta_bias`, or its softplus: `h_t = exp(d_t A) h_{t-1} + d_t B_t u_t`,
    `y_t = (C_t . h_t + D u_t) silu(z_t)`.

    Args:
        u: inputs `[B, L, D]`.
        delta: step sizes `[B, L, D]`.
        A: `[D, N]`, negative for a recurrence that decays.
        B: `[B, L, N]`.
        C: `[B, L, N]`.
        D: `[D]`, the weight of the skip connection; none by default.
        z: gates `[B, L, D]`; none by default.
        delta_bias: `[D]`.
        delta_softplus: apply softplus to the step sizes.
        initial_state: `[B, D, N]`, the state before the first timestep; zeros by default.
        reset: `[B, L]` bool; True takes the state before that timestep as zero, the initial state included.
        backend: "auto", "reference", "blocked" (never holds all states of a window: the backward pass computes them
            again), "numba" (the same in compiled kernels, on the CPU), "triton" (in one launch each way, up to 256
            states per channel), or "mamba_ssm" (that package on CUDA devices, without resets and initial state; its
            last state carries no gradient).

    Returns:
        `y` `[B, L, D]` in the dtype of `u`, and the last state `[B, D, N]` in the dtype that was computed in: float32,
        or float64 if an input is.

    Raises:
        ValueError: if shapes or devices disagree, one is no float, or the backend cannot serve the call.

    Source: Gu & Dao (2023).
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, reset)
    given = [x for x in (u, delta, A, B, C, D, z, delta_bias, initial_state) if x is not None]
    dtypes = tuple(x.dtype for x in given)
    call = WindowCall(u.device.type, u.dtype, initial_state is not None, reset is not None, A.shape[1], dtypes)
    chosen = choose("selective_scan", backend, call, _CANDIDATES)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if chosen == "triton":
        y, last, _ = compiled_scan(
            u, delta, A, B, C, D, z, delta_bias, initial_state, reset, delta_softplus, False, keep
        )
        return y, last
    if chosen == "mamba_ssm":
        return mamba_ssm_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    dtype = accumulation_dtype(u, delta, A, B, C, initial_state)
    if chosen == "numba":
        cast = [None if x is None else x.to(dtype) for x in (u, delta, A, B, C, D, z, delta_bias, initial_state)]
        y, last, _ = compiled_scan(*cast, reset, delta_softplus, True, keep)
        return y.to(u.dtype), last
    state = initial_state
    if state is None:
        state = torch.zeros(u.shape[0], *A.shape, dtype=dtype, device=u.device)
    wide = u.to(dtype)
    sizes = _step_sizes(delta.to(dtype), delta_bias, delta_softplus)
    inputs = (wide, sizes, A.to(dtype), B.to(dtype), C.to(dtype), state.to(dtype), reset)
    y, last = tiled_scan(*inputs)[:2] if chosen == "blocked" else selective_reference(*inputs)
    return _output(y, wide, D, z).to(u.dtype), last


@torch.no_grad()
def selective_scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """One timestep of `selective_scan`, for acting: no gradients.

    Args:
        u: `[B, D]`.
        delta: `[B, D]`.
        A: `[D, N]`.
        B: `[B, N]`.
        C: `[B, N]`.
        state: `[B, D, N]`, updated in place.
        D: `[D]` or None.
        z: `[B, D]` or None.
        delta_bias: `[D]` or None.
        delta_softplus: apply softplus to the step sizes.

    Returns:
        `y` `[B, D]` in the dtype of `u`.

    Raises:
        ValueError: if shapes or devices disagree, or one is no float.
    """
    _check_step(u, delta, A, B, C, D, z, delta_bias, state)
    if _step_by_triton(u, delta, A, B, C, state, D, z, delta_bias):
        # To call an operator takes longer than the kernel; it is there to be traced.
        step = triton_step if torch.compiler.is_compiling() else launch_step
        return step(u, delta, A, B, C, D, z, delta_bias, state, delta_softplus)
    dtype = state.dtype
    wide = u.to(dtype)
    sizes = _step_sizes(delta.to(dtype), delta_bias, delta_softplus)
    state.mul_((sizes.unsqueeze(-1) * A.to(dtype)).exp_())
    state.addcmul_((sizes * wide).unsqueeze(-1), B.to(dtype).unsqueeze(1))
    with without_autocast(state.device):
        y = torch.bmm(state, C.to(dtype).unsqueeze(-1)).squeeze(-1)
    return _output(y, wide, D, z).to(u.dtype)


def _step_by_triton(*given: Tensor | None) -> bool:
    if given[0] is None or given[0].device.type != "cuda" or not triton_unasked():
        return False
    return triton_refusal("cuda", *[x.dtype for x in given if x is not None]) is None


def _step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    shifted = delta if bias is None else delta + bias.to(delta.dtype)
    return F.softplus(shifted) if softplus else shifted


def _output(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    out = y if D is None else torch.addcmul(y, u, D.to(y.dtype))
    return out if z is None else out * F.silu(z.to(y.dtype))


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
) -> None:
    if u.dim() != 3 or u.shape[1] < 1:
        raise ValueError(f"u has shape {tuple(u.shape)}; give [B, L, D] with L >= 1")
    batch, length, channels = u.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] < 1:
        raise ValueError(f"A has shape {tuple(A.shape)}; give [D, N] with D={channels} and N >= 1")
    states = A.shape[1]
    check_shape("delta", delta, (batch, length, channels))
    check_shape("B", B, (batch, length, states))
    check_shape("C", C, (batch, length, states))
    check_shape("D", D, (channels,))
    check_shape("z", z, (batch, length, channels))
    check_shape("delta_bias", delta_bias, (channels,))
    check_shape("initial_state", initial_state, (batch, channels, states))
    check_reset(reset, batch, length)
    check_floats(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    check_devices(u=u, reset=reset)


def _check_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
) -> None:
    if state.dim() != 3:
        raise ValueError(f"state has shape {tuple(state.shape)}; give [B, D, N]")
    batch, channels, states = state.shape
    check_shape("u", u, (batch, channels))
    check_shape("delta", delta, (batch, channels))
    check_shape("A", A, (channels, states))
    check_shape("B", B, (batch, states))
    check_shape("C", C, (batch, states))
    check_shape("D", D, (channels,))
    check_shape("z", z, (batch, channels))
    check_shape("delta_bias", delta_bias, (channels,))
    check_floats(state=state, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
