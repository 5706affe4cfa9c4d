"""Attention on Triton kernels as an operator: fake kernels, autograd; does not import Triton before it runs.

Dimensions: `B` batch, `L` timesteps, `H` heads, `E` head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import triton_refusal
from .call import AttentionCall, autocast_dtype

_OPTIONS = "bool causal, int? window, int sink, float sink_bias, float? logit_clip, float scale"


def triton_attention_refusal(call: AttentionCall) -> str | None:
    """Says why this backend cannot serve a call.

    Args:
        call: the options.

    Returns:
        The reason, or None.
    """
    reason = triton_refusal(call.device_type, call.dtype)
    if reason is not None:
        return reason
    if call.head_dim % 8 or not 16 <= call.head_dim <= 128:
        return f"it takes head sizes that are multiples of 8 from 16 to 128, not {call.head_dim}"
    return f"it knows no dropout, and dropout={call.dropout} is given" if call.dropout > 0.0 else None


def triton_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Attention that reads the keys each block of queries needs and no others, forward and backward.

    Args:
        q: `[B, L, H, E]`, any strides.
        k: like `q`.
        v: like `q`.
        call: the options; `dropout` must be 0.

    Returns:
        `[B, L, H, E]` in the dtype of `q`.

    Source: Dao (2023), "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning".
    """
    dtype = autocast_dtype(q)
    out, _, _ = _attention(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        call.reset,
        call.causal,
        call.window,
        call.sink,
        call.sink_bias,
        call.logit_clip,
        call.scale,
    )
    return out.to(q.dtype)


@torch.library.custom_op(
    "amago_kernels::attention_triton",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? reset, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _attention(q: Tensor, k: Tensor, v: Tensor, reset: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_forward import attention_forward

    return attention_forward(q, k, v, reset, *options)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, reset: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    bounds = torch.empty(0 if reset is None else 2, batch, length, dtype=torch.int32, device=q.device)
    return out, lse, bounds


@torch.library.custom_op(
    "amago_kernels::attention_triton_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor bounds, "
        f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)"
    ),
)
def _attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_backward import attention_backward

    return attention_backward(*arguments)


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    return first, second, third


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1], output[2])


def _differentiate(ctx: Any, grad: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * (1 + len(ctx.options))


_attention.register_autograd(_differentiate, setup_context=_save)
