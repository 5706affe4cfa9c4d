"""Sequence kernels for reinforcement learning: reset-aware attention and GRU, ring-buffer decoding, return targets.

Every operation has a plain PyTorch reference, a fast path for the machine at hand, and one `backend=` switch.
"""

from __future__ import annotations

from .attention import DecodePlan, RingCache, allocate_storage, attention, decode_attention, plan_decode, reset_lanes
from .dispatch import available
from .gru import gru_layer
from .returns import n_step_targets

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "DecodePlan",
    "RingCache",
    "allocate_storage",
    "attention",
    "available",
    "decode_attention",
    "gru_layer",
    "n_step_targets",
    "plan_decode",
    "reset_lanes",
]
