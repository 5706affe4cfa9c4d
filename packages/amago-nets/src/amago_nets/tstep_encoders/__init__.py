"""Timestep encoders: one vector per timestep from observation, previous reward and previous action."""

from .base import MetaEncoder, ObsEncoder, ObsEncoderConfig, TstepEncoder, TstepEncoderConfig, symlog
from .cnn import CNNTstepEncoder, CNNTstepEncoderConfig, ImageEncoder, ImageEncoderConfig
from .ff import FFTstepEncoder, FFTstepEncoderConfig, VectorEncoder, VectorEncoderConfig
from .goals import FFGoalEmbedder, FFGoalEmbedderConfig, TokenGoalEmbedder, TokenGoalEmbedderConfig
from .multi import DictTstepEncoder, DictTstepEncoderConfig, default_config
from .tokens import TokenEncoder, TokenEncoderConfig

__all__ = [
    "CNNTstepEncoder",
    "CNNTstepEncoderConfig",
    "DictTstepEncoder",
    "DictTstepEncoderConfig",
    "FFGoalEmbedder",
    "FFGoalEmbedderConfig",
    "FFTstepEncoder",
    "FFTstepEncoderConfig",
    "ImageEncoder",
    "ImageEncoderConfig",
    "MetaEncoder",
    "ObsEncoder",
    "ObsEncoderConfig",
    "TokenEncoder",
    "TokenEncoderConfig",
    "TokenGoalEmbedder",
    "TokenGoalEmbedderConfig",
    "TstepEncoder",
    "TstepEncoderConfig",
    "VectorEncoder",
    "VectorEncoderConfig",
    "default_config",
    "symlog",
]
