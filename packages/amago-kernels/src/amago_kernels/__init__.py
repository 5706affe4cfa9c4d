"""Sequence kernels for reinforcement learning: reset-aware attention, GRU and LSTM, ring-buffer decoding, returns.

Every operation has a plain PyTorch reference, a fast path for the machine at hand, and one `backend=` switch.
"""

from __future__ import annotations

from .attention import DecodePlan, RingCache, allocate_storage, attention, decode_attention, plan_decode, reset_lanes
from .conv import causal_conv1d, causal_conv1d_step
from .dispatch import available
from .returns import discounted_returns, lambda_returns, n_step_targets
from .rnn import gru_layer, lstm_layer
from .scan import linear_scan, linear_scan_step, selective_scan, selective_scan_step
from .value_losses import hl_gauss_cross_entropy, hl_gauss_labels, symexp, symlog, two_hot_cross_entropy, two_hot_labels

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "DecodePlan",
    "RingCache",
    "allocate_storage",
    "attention",
    "available",
    "causal_conv1d",
    "causal_conv1d_step",
    "decode_attention",
    "discounted_returns",
    "gru_layer",
    "hl_gauss_cross_entropy",
    "hl_gauss_labels",
    "lambda_returns",
    "linear_scan",
    "linear_scan_step",
    "lstm_layer",
    "n_step_targets",
    "plan_decode",
    "reset_lanes",
    "selective_scan",
    "selective_scan_step",
    "symexp",
    "symlog",
    "two_hot_cross_entropy",
    "two_hot_labels",
]
