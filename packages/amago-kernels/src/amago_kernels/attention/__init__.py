"""Attention for training and prefill (`attention`) and for acting (`decode_attention` over a ring buffer).

`dense` checks and dispatches `attention` to `reference`, `sdpa`, `flex`, `flash` or `triton_op`. The last is an
operator that launches `triton_forward` and `triton_backward`, whose two kernels lie in `triton_backward_queries` and
`triton_backward_keys`, all of them made of `triton_blocks` and started by `triton_launch`. `decode` dispatches
`decode_attention` over the cache of `ring`; its operator lies in `decode_ops`, its kernel in `triton_decode`.
"""

from __future__ import annotations

from .decode import DecodePlan, decode_attention, plan_decode
from .dense import attention
from .ring import RingCache, allocate_storage, reset_lanes

__all__ = ["DecodePlan", "RingCache", "allocate_storage", "attention", "decode_attention", "plan_decode", "reset_lanes"]
