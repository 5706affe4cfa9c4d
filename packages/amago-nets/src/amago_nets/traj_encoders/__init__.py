"""Sequence backbones and their configs."""

from __future__ import annotations

from ..state import State
from .base import TrajEncoder, TrajEncoderConfig
from .ff import FFConfig, FFTrajEncoder
from .gru import GRUConfig, GRUTrajEncoder
from .transformer import TformerTrajEncoder, TransformerConfig

__all__ = [
    "FFConfig",
    "FFTrajEncoder",
    "GRUConfig",
    "GRUTrajEncoder",
    "State",
    "TformerTrajEncoder",
    "TrajEncoder",
    "TrajEncoderConfig",
    "TransformerConfig",
]
