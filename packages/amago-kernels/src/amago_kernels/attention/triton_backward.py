"""Attention backward in Triton: one kernel for queries, one for keys and values; no atomics, so it is deterministic.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from ..tuning import on_device
from .triton_backward_keys import key_kernels
from .triton_backward_queries import query_kernels
from .triton_launch import built_variants, kind_of, options_of, rows_of, strides_of

if TYPE_CHECKING:
    from ..builds import Build


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    causal: bool,
    window: int | None,
    sink: int,
    sink_bias: float,
    logit_clip: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward kernels.

    Args:
        grad: gradient of the output, `[B, L, H, E]`, any strides.
        q: `[B, L, H, E]`.
        k: like `q`.
        v: like `q`.
        out: what `attention_forward` returned.
        lse: likewise.
        bounds: likewise.
        causal: as in `attention`.
        window: as in `attention`.
        sink: as in `attention`.
        sink_bias: as in `attention`.
        logit_clip: as in `attention`.
        scale: as in `attention`.

    Returns:
        Gradients of `q`, `k` and `v`, each `[B, L, H, E]`.
    """
    batch, length, heads, _ = q.shape
    grads = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
    delta = torch.empty_like(lse)
    resets = bounds.shape[0] > 0
    starts, stops = (bounds[0], bounds[1]) if resets else (None, None)
    q, k, v, grad = rows_of(q), rows_of(k), rows_of(v), rows_of(grad)
    strides = [step for x in (q, k, v, grad) for step in strides_of(x)]
    options = options_of(q, resets, causal, window, sink, sink_bias, logit_clip, scale)
    by_query, by_key = query_kernels[kind_of(q)], key_kernels[kind_of(q)]
    with on_device(q):
        # First: it writes `delta`, which the other reads.
        by_query[lambda meta: (triton.cdiv(length, meta["BLOCK_M"]) * batch * heads,)](
            q, k, v, out, grad, lse, delta, starts, stops, grads[0], *strides, **options
        )
        by_key[lambda meta: (triton.cdiv(length, meta["BLOCK_N"]) * batch * heads,)](
            q, k, v, grad, lse, delta, starts, stops, grads[1], grads[2], *strides, **options
        )
    return grads[0], grads[1], grads[2]


def builds() -> list[Build]:
    """What `amago_kernels.builds` compiles."""
    from ..builds import Build

    result = []
    for name, q, arguments in built_variants(("q", "k", "v", "grad")):
        half = "*fp32" if q.dtype == torch.float32 else "*bf16"
        names = ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")
        arguments |= {**dict.fromkeys(names, half), "lse": "*fp32", "delta": "*fp32"}
        result.append(Build(f"attention backward queries {name}", query_kernels[kind_of(q)], arguments))
        result.append(Build(f"attention backward keys {name}", key_kernels[kind_of(q)], arguments))
    return result
