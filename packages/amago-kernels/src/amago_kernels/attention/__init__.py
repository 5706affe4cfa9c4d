"""Attention for training and prefill (`attention`) and for acting (`decode_attention` over a ring buffer)."""

from __future__ import annotations

from .decode import DecodePlan, RingCache, allocate_storage, decode_attention, plan_decode, reset_lanes
from .dense import attention

__all__ = ["DecodePlan", "RingCache", "allocate_storage", "attention", "decode_attention", "plan_decode", "reset_lanes"]
