"""Actor and critic heads on top of a backbone."""

from __future__ import annotations

from .actor import Actor, ActorConfig
from .critic import NCritics, NCriticsConfig, discount_feature

__all__ = ["Actor", "ActorConfig", "NCritics", "NCriticsConfig", "discount_feature"]
