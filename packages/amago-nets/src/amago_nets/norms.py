"""Normalisation layers and activations, chosen by name.

Dimensions: `D` features of the last axis.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .validation import check_choice, check_int

NORMS = ("layer", "rmsnorm", "unitball", "unitball-detach", "hypersphere", "simnorm", "none")
ACTIVATIONS = ("leaky_relu", "relu", "gelu", "mish", "adaptive")

_EPS = 1e-5
_SIMNORM_GROUP = 8
# A fit to leaky_relu around zero.
_ADAPTIVE_TOP = (0.0297928, 0.6183735, 2.3233091, 3.0519362, 1.4854203, 0.2510244)
_ADAPTIVE_BOTTOM = (-1.1419549, 4.3931600, 0.8714712, 0.3471966)


class UnitBall(nn.Module):
    """Divides by the Euclidean norm: `x / (|x| + 1e-5)`.

    Args:
        detach: if True no gradient flows through the norm.
    """

    def __init__(self, *, detach: bool = False) -> None:
        super().__init__()
        self.detach = detach

    def forward(self, x: Tensor) -> Tensor:
        """Scales `[..., D]` to (almost) unit length."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / ((norm.detach() if self.detach else norm) + _EPS)


class HyperSphere(nn.Module):
    """Projects on the sphere of radius `sqrt(D)`; norms below 1e-12 count as 1e-12."""

    def forward(self, x: Tensor) -> Tensor:
        """Scales `[..., D]` to length `sqrt(D)`."""
        return F.normalize(x, dim=-1, eps=1e-12) * math.sqrt(x.shape[-1])


class SimNorm(nn.Module):
    """Softmax inside groups of neighbouring features.

    Args:
        group: features in one group; `D` must be a multiple of it.

    Source: Lavoie et al. (2022), "Simplicial Embeddings in Self-Supervised Learning".
    """

    def __init__(self, group: int = _SIMNORM_GROUP) -> None:
        super().__init__()
        check_int("group", group)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., D]` to simplices of `group` features each."""
        return F.softmax(x.unflatten(-1, (-1, self.group)), dim=-1).flatten(-2)


class Adaptive(nn.Module):
    """A learned activation: `sum_i a_i x^i / (1 + sum_j |b_j x^j|)`, i = 0..5, j = 1..4; close to leaky_relu at first.

    The denominator is never below 1, so there are no poles.

    Attributes:
        top: `[6]` coefficients `a`.
        bottom: `[4]` coefficients `b`.

    Source: Delfosse et al. (2021), "Adaptive Rational Activations to Boost Deep Reinforcement Learning".
    """

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.tensor(_ADAPTIVE_TOP))
        self.bottom = nn.Parameter(torch.tensor(_ADAPTIVE_BOTTOM))

    def forward(self, x: Tensor) -> Tensor:
        """Maps any shape to the same shape; half precision is computed in float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        value = x.to(wide)
        upper = _polynomial(value, self.top.to(wide))
        lower = 1.0 + value.abs() * _polynomial(value.abs(), self.bottom.abs().to(wide))
        return (upper / lower).to(x.dtype)


def _polynomial(x: Tensor, coefficients: Tensor) -> Tensor:
    """Horner's rule; coefficients from the constant up."""
    *lower, result = coefficients.unbind()
    for coefficient in reversed(lower):
        result = torch.addcmul(coefficient, result, x)
    return result


def make_norm(name: str, dim: int) -> nn.Module:
    """Builds a normalisation over the last axis.

    Args:
        name: one of `NORMS`.
        dim: size `D` of the last axis.

    Returns:
        A module from `[..., D]` to `[..., D]`.

    Raises:
        ValueError: if the name is unknown, `dim < 1`, or `dim` does not fit the groups of "simnorm".
    """
    check_choice("norm", name, NORMS)
    check_int("dim", dim)
    if name == "layer":
        return nn.LayerNorm(dim, eps=_EPS)
    if name == "rmsnorm":
        return nn.RMSNorm(dim, eps=_EPS)
    if name in ("unitball", "unitball-detach"):
        return UnitBall(detach=name == "unitball-detach")
    if name == "hypersphere":
        return HyperSphere()
    if name == "simnorm":
        if dim % _SIMNORM_GROUP:
            raise ValueError(f"dim={dim} is not allowed with norm='simnorm'; give a multiple of {_SIMNORM_GROUP}")
        return SimNorm()
    return nn.Identity()


def make_activation(name: str, *, inplace: bool = False) -> nn.Module:
    """Builds an activation.

    Args:
        name: one of `ACTIVATIONS`.
        inplace: let "leaky_relu" and "relu" overwrite their input; the others never do.

    Returns:
        A module with the same shape in and out; only "adaptive" has parameters, one set for each module made.

    Raises:
        ValueError: if the name is unknown.
    """
    check_choice("activation", name, ACTIVATIONS)
    if name == "leaky_relu":
        return nn.LeakyReLU(0.01, inplace=inplace)
    if name == "relu":
        return nn.ReLU(inplace=inplace)
    if name == "gelu":
        return nn.GELU()
    return nn.Mish() if name == "mish" else Adaptive()
