"""Losses as pure functions of tensors, in float32, without trailing dimensions of size 1.

Dimensions: B batch, T transitions, C critics, G discounts; values are `[B, T, C, G]`, reduced ones `[B, T, G]`.
"""

from amago_core.losses.actor import advantages, offline_loss, online_loss
from amago_core.losses.critic import discrete_action_values, discrete_state_values, squared_error
from amago_core.losses.filters import (
    BinaryFilterConfig,
    ExpFilterConfig,
    Filter,
    FilterConfig,
    LeakyFilterConfig,
    binary_filter,
    exp_filter,
    leaky_filter,
)
from amago_core.losses.masking import fill_masked, masked_mean, masked_sum
from amago_core.losses.popart import PopArtLayer
from amago_core.losses.td import reduce_ensemble, td_targets

__all__ = [
    "BinaryFilterConfig",
    "ExpFilterConfig",
    "Filter",
    "FilterConfig",
    "LeakyFilterConfig",
    "PopArtLayer",
    "advantages",
    "binary_filter",
    "discrete_action_values",
    "discrete_state_values",
    "exp_filter",
    "fill_masked",
    "leaky_filter",
    "masked_mean",
    "masked_sum",
    "offline_loss",
    "online_loss",
    "reduce_ensemble",
    "squared_error",
    "td_targets",
]
