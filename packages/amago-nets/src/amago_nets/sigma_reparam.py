"""Linear layers with a learned spectral norm (sigma-reparametrisation).

The power iteration that tracks the largest singular value runs in `update_spectral_norms`, once per optimiser step,
and never in a forward pass: a forward pass is then free of side effects in training mode as well, whatever the number
of micro-batches, frozen copies or checkpointed segments.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SigmaReparamLinear(nn.Module):
    """`y = (gamma / sigma) W x + b` with `sigma = u' W v`, close to the largest singular value of `W`.

    `gamma` is a learned scalar. `u` and `v` are buffers: constants to autograd, so that the gradient of `sigma` flows
    through `W` alone. At the start they are the exact top singular vectors, and the layer has spectral norm 1.

    Args:
        in_features: inputs.
        out_features: outputs.
        bias: adds a bias, initialised like that of `nn.Linear`.
        fast_init: draws `u`, `v` at random and `W` like `nn.Linear`: no singular value decomposition, but outputs are
            too large until `update_spectral_norms` has run several times. For modules whose weights are loaded next.

    Source: Zhai et al. (2023), "Stabilizing Transformer Training by Preventing Attention Entropy Collapse".
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, fast_init: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.gamma = nn.Parameter(torch.ones(()))
        self.u: Tensor
        self.v: Tensor
        self.register_buffer("u", torch.empty(out_features))
        self.register_buffer("v", torch.empty(in_features))
        self.reset_parameters(fast_init=fast_init)

    @torch.no_grad()
    def reset_parameters(self, *, fast_init: bool = False) -> None:
        """Draws fresh weights.

        Args:
            fast_init: see the class.
        """
        if fast_init:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5.0))
            self.u.copy_(F.normalize(torch.randn_like(self.u), dim=0))
            self.v.copy_(F.normalize(torch.randn_like(self.v), dim=0))
        else:
            nn.init.trunc_normal_(self.weight, std=0.02)
            left, _, right = torch.linalg.svd(self.weight, full_matrices=False)
            # copy_ keeps the buffers contiguous; columns of the factors are strided views.
            self.u.copy_(left[:, 0])
            self.v.copy_(right[0])
        nn.init.ones_(self.gamma)
        if self.bias is not None:
            bound = 1.0 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def gain(self) -> Tensor:
        """`gamma / sigma`, a scalar tensor."""
        return self.gamma / torch.dot(self.u, torch.mv(self.weight, self.v))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., in_features]` to `[..., out_features]`."""
        gain = self.gain()
        if x.dim() == 2 and not torch.is_grad_enabled():
            # A few rows: scaling the outputs touches less memory than scaling the weights.
            out = F.linear(x, self.weight).mul_(gain)
            return out if self.bias is None else out.add_(self.bias)
        return F.linear(x, self.weight * gain, self.bias)

    @torch.no_grad()
    def power_iteration(self) -> None:
        """One step of power iteration, in place: `u <- W v / |W v|`, then `v <- W' u / |W' u|`."""
        self.u.copy_(F.normalize(torch.mv(self.weight, self.v), dim=0, eps=1e-12))
        self.v.copy_(F.normalize(torch.mv(self.weight.t(), self.u), dim=0, eps=1e-12))

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def update_spectral_norms(module: nn.Module) -> None:
    """Runs one power iteration in every `SigmaReparamLinear` below a module.

    Call it once per optimiser step, before the forward pass of training; forward passes never change the buffers. It
    does not matter whether the module is in training mode or frozen: what is passed is updated, nothing else.

    Args:
        module: the module to search, itself included.
    """
    for child in module.modules():
        if isinstance(child, SigmaReparamLinear):
            child.power_iteration()


def make_linear(in_features: int, out_features: int, *, bias: bool = True, sigma_reparam: bool = False) -> nn.Module:
    """A linear layer, plain or sigma-reparametrised.

    Args:
        in_features: inputs.
        out_features: outputs.
        bias: adds a bias.
        sigma_reparam: builds a `SigmaReparamLinear`.

    Returns:
        A module from `[..., in_features]` to `[..., out_features]`.
    """
    if sigma_reparam:
        return SigmaReparamLinear(in_features, out_features, bias=bias)
    return cast(nn.Module, nn.Linear(in_features, out_features, bias=bias))
