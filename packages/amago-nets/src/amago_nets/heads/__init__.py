"""Actor and critic heads on top of a backbone."""

from __future__ import annotations

from .actor import Actor, ActorConfig, ActorHead
from .critic import NCritics, NCriticsConfig
from .ensemble import CriticEnsemble, CriticEnsembleConfig, discount_feature
from .residual import ResidualActor, ResidualActorConfig
from .two_hot import NCriticsTwoHot, NCriticsTwoHotConfig

__all__ = [
    "Actor",
    "ActorConfig",
    "ActorHead",
    "CriticEnsemble",
    "CriticEnsembleConfig",
    "NCritics",
    "NCriticsConfig",
    "NCriticsTwoHot",
    "NCriticsTwoHotConfig",
    "ResidualActor",
    "ResidualActorConfig",
    "discount_feature",
]
