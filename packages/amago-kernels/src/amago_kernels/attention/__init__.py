"""Attention for training and prefill (`attention`) and for acting (`decode_attention` over a ring buffer)."""

from __future__ import annotations

from .decode import DecodePlan, decode_attention, plan_decode
from .dense import attention
from .ring import RingCache, allocate_storage, reset_lanes

__all__ = ["DecodePlan", "RingCache", "allocate_storage", "attention", "decode_attention", "plan_decode", "reset_lanes"]
