"""Backbones around diagonal linear recurrences: unlimited memory, windows in one parallel scan.

Dimensions: `B` batch or lanes, `U` hidden units, `N` complex states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..linear_recurrence import LRUMixer, MinGRUMixer
from ..norms import ACTIVATIONS, NORMS
from ..registry import register
from ..validation import check_choice, check_dropout, check_float, check_int
from .base import TrajEncoderConfig
from .recurrent import RecurrentTrajEncoder


class MinGRUTrajEncoder(RecurrentTrajEncoder):
    """Linear layer, layers `x <- x + drop(mingru(norm(x)))`, norm; the state of a layer is `h [B, U]`.

    Args:
        config: sizes and choices.
        in_dim: features of a timestep.
        max_seq_len: unused; part of the contract.
    """

    state_entries = ("h",)

    def __init__(self, config: MinGRUConfig, in_dim: int, max_seq_len: int) -> None:
        mixers = [
            MinGRUMixer(
                config.d_model,
                config.expand * config.d_model,
                activation=config.activation,
                norm=config.norm,
                max_timescale=config.max_timescale,
            )
            for _ in range(config.n_layers)
        ]
        super().__init__(in_dim, config.d_model, max_seq_len, mixers, norm=config.norm, dropout=config.dropout)


@register("min_gru")
@dataclass(frozen=True, kw_only=True)
class MinGRUConfig(TrajEncoderConfig):
    """minGRU backbone.

    Attributes:
        d_model: width, and features of the output.
        expand: hidden units per feature of `d_model`.
        n_layers: layers.
        max_timescale: the longest time constant of the gates at the start, in timesteps, at least 2.
        dropout: probability, after every layer.
        activation: name of the activation of the output gate.
        norm: name of all norms.
    """

    d_model: int = 256
    expand: int = 2
    n_layers: int = 3
    max_timescale: float = 256.0
    dropout: float = 0.0
    activation: str = "gelu"
    norm: str = "layer"

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        for name in ("d_model", "expand", "n_layers"):
            check_int(name, getattr(self, name))
        check_float("max_timescale", self.max_timescale, low=2.0)
        check_dropout("dropout", self.dropout)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)

    def build(self, in_dim: int, max_seq_len: int) -> MinGRUTrajEncoder:
        """See `TrajEncoderConfig.build`."""
        return MinGRUTrajEncoder(self, in_dim, max_seq_len)


class LRUTrajEncoder(RecurrentTrajEncoder):
    """Linear layer, layers `x <- x + drop(lru(norm(x)))`, norm; the state of a layer is `h [B, N, 2]`.

    Args:
        config: sizes and choices.
        in_dim: features of a timestep.
        max_seq_len: unused; part of the contract.
    """

    state_entries = ("h",)

    def __init__(self, config: LRUConfig, in_dim: int, max_seq_len: int) -> None:
        mixers = [
            LRUMixer(
                config.d_model,
                config.d_model if config.d_state is None else config.d_state,
                activation=config.activation,
                r_min=config.r_min,
                r_max=config.r_max,
                max_phase=config.max_phase,
            )
            for _ in range(config.n_layers)
        ]
        super().__init__(in_dim, config.d_model, max_seq_len, mixers, norm=config.norm, dropout=config.dropout)


@register("lru")
@dataclass(frozen=True, kw_only=True)
class LRUConfig(TrajEncoderConfig):
    """LRU backbone.

    Attributes:
        d_model: width, and features of the output.
        d_state: complex states of a layer; None is `d_model`.
        n_layers: layers.
        r_min: smallest modulus of an eigenvalue at the start, above 0.
        r_max: largest modulus of an eigenvalue at the start, below 1 and not below `r_min`; memory lasts about
            `1 / (1 - r_max)` timesteps.
        max_phase: largest phase of an eigenvalue at the start, above 0 and at most `2 pi`.
        dropout: probability, after every layer.
        activation: name of the activation before the output gate.
        norm: name of all norms.
    """

    d_model: int = 256
    d_state: int | None = None
    n_layers: int = 3
    r_min: float = 0.9
    r_max: float = 0.999
    max_phase: float = 2.0 * math.pi
    dropout: float = 0.0
    activation: str = "gelu"
    norm: str = "layer"

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        for name in ("d_model", "n_layers"):
            check_int(name, getattr(self, name))
        if self.d_state is not None:
            check_int("d_state", self.d_state)
        # Closer to 0 or 1 the logarithms of float32 parameters lose their meaning.
        check_float("r_max", self.r_max, low=1e-6, high=1.0 - 1e-6)
        check_float("r_min", self.r_min, low=1e-6, high=self.r_max)
        check_float("max_phase", self.max_phase, low=1e-3, high=2.0 * math.pi)
        check_dropout("dropout", self.dropout)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)

    def build(self, in_dim: int, max_seq_len: int) -> LRUTrajEncoder:
        """See `TrajEncoderConfig.build`."""
        return LRUTrajEncoder(self, in_dim, max_seq_len)
