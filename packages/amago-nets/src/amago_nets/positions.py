"""Where a timestep stands in its episode: fixed, learnable and rotary positions.

All of them read `time_idx`, the time since the episode began, never the offset inside a window, so that a window and
a ring buffer agree. Dimensions: `D` model, `H` heads, `E` head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITIONS = ("fixed", "learnable", "rotary")
_BASE = 10_000.0


def _angles(time_idx: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`time * base^(-2i/size)` as `[..., size/2]`, in float32 at least: bfloat16 cannot tell large times apart."""
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, size, 2, device=time_idx.device, dtype=wide)
    return time_idx.to(wide).unsqueeze(-1) * torch.exp(exponent * (-math.log(_BASE) / size))


def fixed_embedding(time_idx: Tensor, dim: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sines (even features) and cosines (odd features) of the time at geometric frequencies.

    Args:
        time_idx: `[...]` int64.
        dim: features `D`, even.
        dtype: of the result; angles are computed in float32 at least.

    Returns:
        `[..., D]`.

    Raises:
        ValueError: if `dim` is odd.

    Source: Vaswani et al. (2017), "Attention Is All You Need", section 3.5.
    """
    if dim % 2:
        raise ValueError(f"dim={dim} is not allowed for fixed positions; give an even number")
    angles = _angles(time_idx, dim, dtype)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2).to(dtype)


class LearnablePositions(nn.Module):
    """A table of position embeddings, one row per time.

    Args:
        max_time_idx: rows; times run from 0 to `max_time_idx - 1`, so an episode of N transitions needs N + 1.
        dim: features `D`.
    """

    def __init__(self, max_time_idx: int, dim: int) -> None:
        super().__init__()
        self.max_time_idx = max_time_idx
        self.table = nn.Embedding(max_time_idx, dim)

    def forward(self, time_idx: Tensor) -> Tensor:
        """Looks times up.

        Args:
            time_idx: `[...]` int64.

        Returns:
            `[..., D]`.

        Raises:
            ValueError: if a time is outside the table (checked on the CPU only: elsewhere it would stall the device).
        """
        if time_idx.device.type == "cpu" and time_idx.numel() > 0 and not torch.compiler.is_compiling():
            low, high = (int(end) for end in time_idx.aminmax())
            if low < 0 or high >= self.max_time_idx:
                raise ValueError(
                    f"time_idx runs from {low} to {high}; learnable positions allow 0 to max_time_idx-1="
                    f"{self.max_time_idx - 1}; give a larger max_time_idx, or other positions"
                )
        return F.embedding(time_idx, self.table.weight)


def rotary_angles(time_idx: Tensor, head_dim: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines that `apply_rotary` turns queries and keys by; the same for every layer.

    Args:
        time_idx: `[...]` int64.
        head_dim: `E`, even.
        dtype: of the result; angles are computed in float32 at least.

    Returns:
        Two tensors `[..., 1, E/2]`; the 1 stands for the heads.

    Raises:
        ValueError: if `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is not allowed for rotary positions; give an even number")
    angles = _angles(time_idx, head_dim, dtype).unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs `(x_i, x_{i + E/2})` by the angles of their time.

    Args:
        x: `[..., H, E]` queries or keys.
        cos: `[..., 1, E/2]` from `rotary_angles`.
        sin: like `cos`.

    Returns:
        Like `x`.

    Source: Su et al. (2021), "RoFormer", in the half-split layout.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
