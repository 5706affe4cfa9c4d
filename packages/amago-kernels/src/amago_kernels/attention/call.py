"""What one attention call asks for, in a form that backends can inspect.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """One `attention` call after validation: its options, and what it is made of.

    Attributes:
        causal: as in `attention`.
        window: as in `attention`; None when it would change nothing.
        sink: as in `attention`.
        sink_bias: as in `attention`.
        logit_clip: as in `attention`.
        reset: as in `attention`; None when it would change nothing.
        scale: factor on the scores.
        dropout: as in `attention`.
        dtype: of queries, keys and values.
        device_type: where they are, for example "cuda".
        head_dim: `E`.
        differentiable: whether a gradient may be asked for.
    """

    causal: bool
    window: int | None
    sink: int
    sink_bias: float
    logit_clip: float | None
    reset: Tensor | None
    scale: float
    dropout: float
    dtype: torch.dtype
    device_type: str
    head_dim: int
    differentiable: bool

    @property
    def plain(self) -> bool:
        """True if every key is visible, up to causality, and scores are used as they are."""
        return self.window is None and self.reset is None and self.logit_clip is None and not self.biased

    @property
    def biased(self) -> bool:
        """True if sink keys get an additive bias."""
        return self.sink > 0 and self.sink_bias != 0.0


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What autocast would have products of a tensor computed in.

    Args:
        x: floats.

    Returns:
        A floating dtype: that of `x` where autocast is off, and for float64, which it leaves alone.
    """
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def segment_starts(reset: Tensor) -> Tensor:
    """Index of the first timestep of the segment each timestep belongs to.

    Args:
        reset: `[B, L]` bool; True starts a segment at that timestep.

    Returns:
        `[B, L]` int64; 0 before the first reset.
    """
    index = torch.arange(reset.shape[1], device=reset.device)
    return torch.where(reset, index, 0).cummax(dim=1).values


def visible_keys(call: AttentionCall, length: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Which keys each query sees, and which of them are sinks.

    Args:
        call: the options.
        length: timesteps `L`.
        device: device of the masks.

    Returns:
        `visible` bool `[L, L]` (rows are queries) or `[B, 1, L, L]` with resets; `sinks` bool of a shape that
        broadcasts with it, None without sinks.
    """
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    visible = distance >= 0 if call.causal else torch.ones(length, length, dtype=torch.bool, device=device)
    in_segment, sinks = None, None
    position = index
    if call.reset is not None:
        starts = segment_starts(call.reset)
        in_segment = starts[:, None, :, None] == starts[:, None, None, :]
        position = (index - starts)[:, None, None, :]
    if call.sink > 0:
        sinks = position < call.sink
    if call.window is not None:
        near = distance <= call.window
        visible = visible & (near if sinks is None else near | sinks)
    return (visible if in_segment is None else visible & in_segment), sinks
