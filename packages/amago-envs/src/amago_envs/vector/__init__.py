"""Building blocks for environments that step many lanes at once with NumPy."""

from amago_envs.vector.base import LaneVectorEnv
from amago_envs.vector.infos import InfoBuilder
from amago_envs.vector.streams import LaneStreams

__all__ = ["InfoBuilder", "LaneStreams", "LaneVectorEnv"]
