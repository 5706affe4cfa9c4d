"""Timestep encoders, sequence backbones, actor and critic heads, and action distributions in plain PyTorch.

Names are resolved on first use, so that `import amago_nets` itself stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cnn import (
        DrQCNNConfig,
        GridworldCNNConfig,
        ImpalaCNNConfig,
        NatureCNNConfig,
    )
    from .distributions import (
        GMM,
        Beta,
        BetaConfig,
        Discrete,
        DiscreteConfig,
        DistributionConfig,
        GMMConfig,
        MultiBinary,
        MultiBinaryConfig,
        MultiDiscrete,
        MultiDiscreteConfig,
        PolicyDistribution,
        StraightThrough,
        TanhGaussian,
        TanhGaussianConfig,
    )
    from .heads import (
        Actor,
        ActorConfig,
        NCritics,
        NCriticsConfig,
        NCriticsTwoHot,
        NCriticsTwoHotConfig,
        ResidualActor,
        ResidualActorConfig,
    )
    from .registry import (
        lookup,
        register,
    )
    from .specs import (
        ActionSpec,
        ArraySpec,
    )
    from .state import (
        State,
    )
    from .traj_encoders import (
        FFConfig,
        FFTrajEncoder,
        GRUConfig,
        GRUTrajEncoder,
        IdentityConfig,
        IdentityTrajEncoder,
        LRUConfig,
        LRUTrajEncoder,
        LSTMConfig,
        LSTMTrajEncoder,
        MambaConfig,
        MambaTrajEncoder,
        MinGRUConfig,
        MinGRUTrajEncoder,
        TformerTrajEncoder,
        TrajEncoder,
        TrajEncoderConfig,
        TransformerConfig,
    )
    from .tstep_encoders import (
        CNNTstepEncoder,
        CNNTstepEncoderConfig,
        DictTstepEncoder,
        DictTstepEncoderConfig,
        FFTstepEncoder,
        FFTstepEncoderConfig,
        TstepEncoder,
        TstepEncoderConfig,
    )

__version__ = "0.1.0"

_HOMES = {
    "cnn": (
        "DrQCNNConfig",
        "GridworldCNNConfig",
        "ImpalaCNNConfig",
        "NatureCNNConfig",
    ),
    "distributions": (
        "Beta",
        "BetaConfig",
        "Discrete",
        "DiscreteConfig",
        "DistributionConfig",
        "GMM",
        "GMMConfig",
        "MultiBinary",
        "MultiBinaryConfig",
        "MultiDiscrete",
        "MultiDiscreteConfig",
        "PolicyDistribution",
        "StraightThrough",
        "TanhGaussian",
        "TanhGaussianConfig",
    ),
    "heads": (
        "Actor",
        "ActorConfig",
        "NCritics",
        "NCriticsConfig",
        "NCriticsTwoHot",
        "NCriticsTwoHotConfig",
        "ResidualActor",
        "ResidualActorConfig",
    ),
    "registry": (
        "lookup",
        "register",
    ),
    "specs": (
        "ActionSpec",
        "ArraySpec",
    ),
    "state": ("State",),
    "traj_encoders": (
        "FFConfig",
        "FFTrajEncoder",
        "GRUConfig",
        "GRUTrajEncoder",
        "IdentityConfig",
        "IdentityTrajEncoder",
        "LRUConfig",
        "LRUTrajEncoder",
        "LSTMConfig",
        "LSTMTrajEncoder",
        "MambaConfig",
        "MambaTrajEncoder",
        "MinGRUConfig",
        "MinGRUTrajEncoder",
        "TformerTrajEncoder",
        "TrajEncoder",
        "TrajEncoderConfig",
        "TransformerConfig",
    ),
    "tstep_encoders": (
        "CNNTstepEncoder",
        "CNNTstepEncoderConfig",
        "DictTstepEncoder",
        "DictTstepEncoderConfig",
        "FFTstepEncoder",
        "FFTstepEncoderConfig",
        "TstepEncoder",
        "TstepEncoderConfig",
    ),
}
_HOME_OF = {name: module for module, members in _HOMES.items() for name in members}

__all__ = [
    "ActionSpec",
    "Actor",
    "ActorConfig",
    "ArraySpec",
    "Beta",
    "BetaConfig",
    "CNNTstepEncoder",
    "CNNTstepEncoderConfig",
    "DictTstepEncoder",
    "DictTstepEncoderConfig",
    "Discrete",
    "DiscreteConfig",
    "DistributionConfig",
    "DrQCNNConfig",
    "FFConfig",
    "FFTrajEncoder",
    "FFTstepEncoder",
    "FFTstepEncoderConfig",
    "GMM",
    "GMMConfig",
    "GRUConfig",
    "GRUTrajEncoder",
    "GridworldCNNConfig",
    "IdentityConfig",
    "IdentityTrajEncoder",
    "ImpalaCNNConfig",
    "LRUConfig",
    "LRUTrajEncoder",
    "LSTMConfig",
    "LSTMTrajEncoder",
    "MambaConfig",
    "MambaTrajEncoder",
    "MinGRUConfig",
    "MinGRUTrajEncoder",
    "MultiBinary",
    "MultiBinaryConfig",
    "MultiDiscrete",
    "MultiDiscreteConfig",
    "NCritics",
    "NCriticsConfig",
    "NCriticsTwoHot",
    "NCriticsTwoHotConfig",
    "NatureCNNConfig",
    "PolicyDistribution",
    "ResidualActor",
    "ResidualActorConfig",
    "State",
    "StraightThrough",
    "TanhGaussian",
    "TanhGaussianConfig",
    "TformerTrajEncoder",
    "TrajEncoder",
    "TrajEncoderConfig",
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
