"""Action distributions built from the output of an actor head."""

from __future__ import annotations

from .base import DistributionConfig, IndexedDistribution, PolicyDistribution
from .beta import Beta, BetaConfig
from .discrete import Discrete, DiscreteConfig
from .gmm import GMM, GMMConfig
from .multi_binary import MultiBinary, MultiBinaryConfig
from .multi_discrete import MultiDiscrete, MultiDiscreteConfig
from .straight_through import StraightThrough, straight_through
from .tanh_gaussian import TanhGaussian, TanhGaussianConfig

__all__ = [
    "Beta",
    "BetaConfig",
    "Discrete",
    "DiscreteConfig",
    "DistributionConfig",
    "GMM",
    "GMMConfig",
    "IndexedDistribution",
    "MultiBinary",
    "MultiBinaryConfig",
    "MultiDiscrete",
    "MultiDiscreteConfig",
    "PolicyDistribution",
    "StraightThrough",
    "TanhGaussian",
    "TanhGaussianConfig",
    "straight_through",
]
