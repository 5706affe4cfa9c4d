"""Timestep encoders, sequence backbones, actor and critic heads, and action distributions in plain PyTorch.

Names are resolved on first use, so that `import amago_nets` itself stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distributions import (
        Discrete,
        DiscreteConfig,
        DistributionConfig,
        PolicyDistribution,
        TanhGaussian,
        TanhGaussianConfig,
    )
    from .heads import Actor, ActorConfig, NCritics, NCriticsConfig
    from .registry import lookup, register
    from .specs import ActionSpec, ArraySpec
    from .traj_encoders import (
        FFConfig,
        FFTrajEncoder,
        GRUConfig,
        GRUTrajEncoder,
        TformerTrajEncoder,
        TrajEncoder,
        TransformerConfig,
    )
    from .tstep_encoders import FFTstepEncoder, FFTstepEncoderConfig, TstepEncoder, TstepEncoderConfig

__version__ = "0.1.0"

_HOMES = {
    "distributions": (
        "Discrete",
        "DiscreteConfig",
        "DistributionConfig",
        "PolicyDistribution",
        "TanhGaussian",
        "TanhGaussianConfig",
    ),
    "heads": ("Actor", "ActorConfig", "NCritics", "NCriticsConfig"),
    "registry": ("lookup", "register"),
    "specs": ("ActionSpec", "ArraySpec"),
    "traj_encoders": (
        "FFConfig",
        "FFTrajEncoder",
        "GRUConfig",
        "GRUTrajEncoder",
        "TformerTrajEncoder",
        "TrajEncoder",
        "TransformerConfig",
    ),
    "tstep_encoders": ("FFTstepEncoder", "FFTstepEncoderConfig", "TstepEncoder", "TstepEncoderConfig"),
}
_HOME_OF = {name: module for module, members in _HOMES.items() for name in members}

__all__ = [
    "ActionSpec",
    "Actor",
    "ActorConfig",
    "ArraySpec",
    "Discrete",
    "DiscreteConfig",
    "DistributionConfig",
    "FFConfig",
    "FFTrajEncoder",
    "FFTstepEncoder",
    "FFTstepEncoderConfig",
    "GRUConfig",
    "GRUTrajEncoder",
    "NCritics",
    "NCriticsConfig",
    "PolicyDistribution",
    "TanhGaussian",
    "TanhGaussianConfig",
    "TformerTrajEncoder",
    "TrajEncoder",
    "TransformerConfig",
    "TstepEncoder",
    "TstepEncoderConfig",
    "__version__",
    "lookup",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
