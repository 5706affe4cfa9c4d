"""The operators behind the Triton and Numba backends of the value losses.

Dimensions: `N` bins, `...` any leading axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import save_inputs, wide_dtype


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


@torch.library.custom_op("amago_kernels::value_cross_entropy_numba", mutates_args=())
def numba_cross_entropy(
    logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None
) -> tuple[Tensor, Tensor]:
    """Both losses, two-hot if `sigma` is None; and the logarithms of the sums of exponentials."""
    from .numba_value_losses import forward

    out = _scalars(logits), _scalars(logits)
    forward(logits, target, support, use_symlog, sigma, out)
    return out


def _scalars(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[:-1], dtype=wide_dtype(logits), device=logits.device)


@numba_cross_entropy.register_fake
def _(logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None) -> tuple[Tensor, Tensor]:
    return _scalars(logits), _scalars(logits)


@torch.library.custom_op("amago_kernels::value_cross_entropy_numba_backward", mutates_args=())
def _numba_backward(
    grad: Tensor, sums: Tensor, logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None
) -> Tensor:
    """`grad (softmax(logits) - label)`, in the dtype of the logits."""
    from .numba_value_losses import backward

    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backward(grad, sums, logits, target, support, use_symlog, sigma, out)
    return out


@_numba_backward.register_fake
def _(
    grad: Tensor, sums: Tensor, logits: Tensor, target: Tensor, support: Tensor, use_symlog: bool, sigma: float | None
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, support, ctx.use_symlog, ctx.sigma = inputs
    ctx.save_for_backward(output[1], logits, target, support)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_numba(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return _numba_backward(grad, *ctx.saved_tensors, ctx.use_symlog, ctx.sigma), None, None, None, None


numba_cross_entropy.register_autograd(_differentiate_numba, setup_context=_save_sums)
