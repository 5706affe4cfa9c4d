"""Gated recurrent layers over windows that may hold several episodes."""

from __future__ import annotations

from .gru import gru_layer
from .lstm import lstm_layer

__all__ = ["gru_layer", "lstm_layer"]
