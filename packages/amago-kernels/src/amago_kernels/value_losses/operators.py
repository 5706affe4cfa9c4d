"""The operators behind the Triton backend of the value losses.

Dimensions: `N` bins, `...` any leading axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import save_inputs


@torch.library.custom_op("amago_kernels::value_cross_entropy_triton", mutates_args=())
def triton_cross_entropy(
    logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None
) -> Tensor:
    """Both losses; two-hot if `sigma` is None."""
    from .triton_value_losses import launch_forward

    return launch_forward(logits, target, support, use_symlog, sigma)


@triton_cross_entropy.register_fake
def _(logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None) -> Tensor:
    return torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)


@torch.library.custom_op("amago_kernels::value_cross_entropy_triton_backward", mutates_args=())
def _backward_op(
    grad: Tensor, logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None
) -> Tensor:
    """`grad (softmax(logits) - label)`, in the dtype of the logits."""
    from .triton_value_losses import launch_backward

    return launch_backward(grad, logits, target, support, use_symlog, sigma)


@_backward_op.register_fake
def _(grad: Tensor, logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_op(grad, *ctx.saved_tensors, ctx.use_symlog, ctx.sigma), None, None, None, None


triton_cross_entropy.register_autograd(_differentiate, setup_context=save_inputs)
