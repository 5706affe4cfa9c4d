"""The CUDA kernels of mamba-ssm and causal-conv1d, for those who have installed them and ask for them by name.

Dimensions: `B` batch, `L` timesteps, `D` channels, `N` states per channel, `W` taps. These packages want `[B, D, L]`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class WindowCall:
    """What decides whether a package can serve a call.

    Attributes:
        device_type: where the inputs are, for example "cuda".
        dtype: of the main input.
        resumed: an initial state is given.
        resets: resets are given.
        width: states per channel, or taps.
        dtypes: of all floating inputs.
    """

    device_type: str
    dtype: torch.dtype
    resumed: bool
    resets: bool
    width: int
    dtypes: tuple[torch.dtype, ...] = ()


def selective_scan_refusal(call: WindowCall) -> str | None:
    """Says why `mamba_ssm` cannot serve a call.

    Args:
        call: the call.

    Returns:
        The reason, or None.
    """
    if call.width > 256:
        return f"it keeps at most 256 states per channel, and A asks for {call.width}"
    return _refusal(call)


def conv_refusal(call: WindowCall) -> str | None:
    """Says why `causal_conv1d` cannot serve a call.

    Args:
        call: the call.

    Returns:
        The reason, or None.
    """
    if not 2 <= call.width <= 4:
        return f"it has 2 to 4 taps, and weight has {call.width}"
    return _refusal(call)


def _refusal(call: WindowCall) -> str | None:
    if call.device_type != "cuda":
        return f"it runs on CUDA devices, and the input is on {call.device_type}"
    if call.dtype not in _DTYPES:
        return f"it does not compute in {call.dtype}"
    if call.resumed:
        return "it always begins from zeros, and an initial_state is given"
    if call.resets:
        return "it knows no reset"
    return None


def mamba_ssm_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` by `mamba_ssm`.

    Args:
        u: `[B, L, D]`.
        delta: `[B, L, D]`.
        A: `[D, N]`.
        B: `[B, L, N]`.
        C: `[B, L, N]`.
        D: `[D]` or None.
        z: `[B, L, D]` or None.
        delta_bias: `[D]` or None.
        delta_softplus: apply softplus to the step sizes.

    Returns:
        `y` `[B, L, D]`, and the last state `[B, D, N]`, which carries no gradient.
    """
    function = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    y, last = function(
        _channels_first(u, u.dtype),
        _channels_first(delta, u.dtype),
        A.float(),
        _channels_first(B, u.dtype),
        _channels_first(C, u.dtype),
        D=None if D is None else D.float(),
        z=None if z is None else _channels_first(z, u.dtype),
        delta_bias=None if delta_bias is None else delta_bias.float(),
        delta_softplus=delta_softplus,
        return_last_state=True,
    )
    # A copy: it is a view of what the package keeps for its backward pass.
    return y.transpose(1, 2), last.detach().clone()


def package_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """`causal_conv1d` by the package of that name.

    Args:
        x: `[B, L, D]`.
        weight: `[D, W]`.
        bias: `[D]` or None.
        activation: None or "silu".

    Returns:
        `y` `[B, L, D]`.
    """
    function = importlib.import_module("causal_conv1d").causal_conv1d_fn
    offset = None if bias is None else bias.to(weight.dtype)
    # Its kernels for `[B, L, D]` want strides that are multiples of 8.
    out: Tensor = function(_channels_first(x, x.dtype), weight, offset, activation=activation)
    return out.transpose(1, 2)


def _channels_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).transpose(1, 2).contiguous()
