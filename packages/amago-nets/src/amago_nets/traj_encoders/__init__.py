"""Sequence backbones and their configs."""

from __future__ import annotations

from ..state import State
from .base import TrajEncoder, TrajEncoderConfig
from .ff import FFConfig, FFTrajEncoder
from .gru import GRUConfig, GRUTrajEncoder
from .identity import IdentityConfig, IdentityTrajEncoder
from .linear_rnn import LRUConfig, LRUTrajEncoder, MinGRUConfig, MinGRUTrajEncoder
from .lstm import LSTMConfig, LSTMTrajEncoder
from .mamba import MambaConfig, MambaTrajEncoder
from .transformer import TformerTrajEncoder, TransformerConfig

__all__ = [
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
    "State",
    "TformerTrajEncoder",
    "TrajEncoder",
    "TrajEncoderConfig",
    "TransformerConfig",
]
