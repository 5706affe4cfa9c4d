"""Mamba backbone: unlimited memory in a state of constant size, with decays chosen by the input.

Dimensions: `B` batch or lanes, `C` channels, `N` states per channel, `W` taps of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

from amago_kernels.dispatch import OPERATIONS

from ..mamba import MambaMixer
from ..norms import NORMS
from ..registry import register
from ..validation import check_choice, check_int
from .base import TrajEncoderConfig
from .recurrent import RecurrentTrajEncoder


class MambaTrajEncoder(RecurrentTrajEncoder):
    """Linear layer, layers `x <- x + mamba(norm(x))`, norm.

    The state of a layer is `conv [B, C, W - 1]`, the last inputs of the convolution, and `h [B, C, N]`.

    Args:
        config: sizes and choices.
        in_dim: features of a timestep.
        max_seq_len: unused; part of the contract.
    """

    state_entries = ("conv", "h")

    def __init__(self, config: MambaConfig, in_dim: int, max_seq_len: int) -> None:
        mixers = [
            MambaMixer(
                config.d_model,
                d_state=config.d_state,
                d_conv=config.d_conv,
                expand=config.expand,
                scan_backend=config.scan_backend,
            )
            for _ in range(config.n_layers)
        ]
        super().__init__(in_dim, config.d_model, max_seq_len, mixers, norm=config.norm)


@register("mamba")
@dataclass(frozen=True, kw_only=True)
class MambaConfig(TrajEncoderConfig):
    """Mamba backbone.

    Attributes:
        d_model: width, and features of the output.
        d_state: states per channel.
        d_conv: taps of the convolution, 2 to 4.
        expand: channels per feature of `d_model`.
        n_layers: layers.
        norm: name of all norms.
        scan_backend: backend of `amago_kernels.selective_scan` for windows; "mamba_ssm" needs that package and a CUDA
            device, and refuses windows with a `reset` tensor or a state.
    """

    d_model: int = 256
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    n_layers: int = 3
    norm: str = "layer"
    scan_backend: str = "auto"

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        for name in ("d_model", "d_state", "expand", "n_layers"):
            check_int(name, getattr(self, name))
        check_int("d_conv", self.d_conv, low=2, high=4)
        check_choice("norm", self.norm, NORMS)
        check_choice("scan_backend", self.scan_backend, ("auto", *OPERATIONS["selective_scan"]))

    def build(self, in_dim: int, max_seq_len: int) -> MambaTrajEncoder:
        """See `TrajEncoderConfig.build`."""
        return MambaTrajEncoder(self, in_dim, max_seq_len)
