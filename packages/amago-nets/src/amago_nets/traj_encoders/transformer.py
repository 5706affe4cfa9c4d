"""Transformer backbone: attention over the last `max_seq_len` timesteps.

Dimensions: `B` batch or lanes, `L` timesteps, `D` model and output features, `H` heads, `E` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amago_kernels import plan_decode, reset_lanes
from amago_kernels.dispatch import OPERATIONS

from ..attention import Rotary
from ..kv_cache import Prefill, TransformerState
from ..norms import ACTIVATIONS, NORMS, make_norm
from ..positions import POSITIONS, LearnablePositions, fixed_embedding, rotary_angles
from ..registry import register
from ..state import State
from ..transformer import TransformerLayer
from ..validation import check_bool, check_choice, check_dropout, check_float, check_int
from .base import TrajEncoder, TrajEncoderConfig


class TformerTrajEncoder(TrajEncoder):
    """Linear layer, positions, pre-norm Transformer layers, norm.

    A timestep sees the `max_seq_len` timesteps that end with it, in every layer, or with `window` the `window + 1`
    ones if these are fewer: the ring buffer holds as many, and longer windows are masked to a band. What older
    timesteps left in the keys of deeper layers stays visible, in windows as in rollouts.

    With `sink` it also sees the first `sink` timesteps of its episode: the ring buffer pins them. In a window that
    begins in the middle of an episode, without a state, they are the first ones of the window.

    Args:
        config: sizes and choices.
        in_dim: features of a timestep.
        max_seq_len: timesteps that are seen, itself included; sinks come on top.
    """

    position_table: LearnablePositions

    def __init__(self, config: TransformerConfig, in_dim: int, max_seq_len: int) -> None:
        super().__init__(in_dim, config.d_model, max_seq_len)
        self.n_heads = config.n_heads
        self.head_dim = config.d_model // config.n_heads
        self.positions = config.positions
        self.dropout_emb = config.dropout_emb
        # What the window hides is never read again: it needs no slots.
        self.ring = max_seq_len if config.window is None else min(max_seq_len, config.window + 1)
        self.sink = config.sink
        self.sink_bias = config.sink_bias
        self.state_sizes = (config.n_layers, self.n_heads, self.sink + self.ring, self.head_dim, self.sink)
        self.input = nn.Linear(in_dim, config.d_model)
        if config.max_time_idx is not None and config.positions == "learnable":
            self.position_table = LearnablePositions(config.max_time_idx, config.d_model)
        self.layers: Sequence[TransformerLayer] = nn.ModuleList(  # type: ignore[assignment]
            TransformerLayer(
                config.d_model,
                config.n_heads,
                4 * config.d_model if config.d_ff is None else config.d_ff,
                dropout_ff=config.dropout_ff,
                dropout_attn=config.dropout_attn,
                dropout_qkv=config.dropout_qkv,
                activation=config.activation,
                norm=config.norm,
                sigma_reparam=config.sigma_reparam,
                normformer_norms=config.normformer_norms,
                head_scaling=config.head_scaling,
                attention_backend=config.attention_backend,
                sink=config.sink,
                sink_bias=config.sink_bias,
                logit_clip=config.logit_clip,
            )
            for _ in range(config.n_layers)
        )
        self.norm = make_norm(config.norm, config.d_model)

    def _embed(self, x: Tensor, time_idx: Tensor) -> tuple[Tensor, Rotary | None]:
        hidden = self.input(x)
        if self.positions == "rotary":
            cos, sin = rotary_angles(time_idx, self.head_dim, dtype=hidden.dtype)
            return hidden, (cos.unsqueeze(-2), sin.unsqueeze(-2))
        if self.positions == "learnable":
            return hidden + self.position_table(time_idx), None
        return hidden + fixed_embedding(time_idx, self.out_dim, dtype=hidden.dtype), None

    def forward(
        self, x: Tensor, time_idx: Tensor, reset: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See `TrajEncoder.forward`."""
        self._check_window(x, time_idx, reset, state)
        memory = None if state is None else self._memory(state)
        if memory is not None:
            self._check_dtype("state", memory["keys"])
        hidden, rotary = self._embed(x, time_idx)
        if self.training and self.dropout_emb > 0.0:
            hidden = F.dropout(hidden, self.dropout_emb)
        prefill = None if memory is None else Prefill(memory, x.shape[1], reset)
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, rotary=rotary, window=self.ring - 1, reset=reset, prefill=prefill, layer=i)
        if prefill is not None:
            prefill.finish()
        return self.norm(hidden), state

    def initial_state(
        self, lanes: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TransformerState:
        """See `TrajEncoder.initial_state`."""
        place, kind = self._placement(device, dtype)
        layers, heads, slots, head_dim, sink = self.state_sizes
        return TransformerState.allocate(layers, lanes, heads, slots, head_dim, sink=sink, dtype=kind, device=place)

    @torch.no_grad()
    def step(self, x: Tensor, time_idx: Tensor, state: State) -> Tensor:
        """See `TrajEncoder.step`."""
        self._check_step(x, time_idx, state)
        memory = self._memory(state)
        self._check_dtype("state", memory["keys"])
        hidden, rotary = self._embed(x, time_idx)
        plan = plan_decode(memory.clock, sink=self.sink, sink_bias=self.sink_bias)
        for layer, cache in zip(self.layers, memory.caches, strict=True):
            hidden = layer.step(hidden, cache, plan, rotary=rotary)
        memory.clock.advance()
        return self.norm(hidden)

    def reset_state(self, state: State, lanes: Tensor) -> None:
        """See `TrajEncoder.reset_state`; only lengths change, old keys and values are never read again."""
        self._check_lanes(state, lanes)
        reset_lanes(self._memory(state).clock, lanes)

    def _first_parameter(self) -> Tensor:
        # Walking over all parameters at every step takes longer than all other checks together.
        return self.input.weight

    def _memory(self, state: State) -> TransformerState:
        """The state, if this backbone or one of its sizes made it."""
        if not isinstance(state, TransformerState):
            raise ValueError(f"state is a {type(state).__name__}; give what initial_state of this backbone returned")
        if state.sizes != self.state_sizes:
            raise ValueError(
                f"state holds (layers, heads, slots, head size, pinned slots) {state.sizes}, this backbone keeps "
                f"{self.state_sizes}; give what initial_state of this backbone returned"
            )
        return state


@register("transformer")
@dataclass(frozen=True, kw_only=True)
class TransformerConfig(TrajEncoderConfig):
    """Transformer backbone.

    Attributes:
        d_model: width, and features of the output; a multiple of `n_heads`, even for fixed positions.
        n_heads: heads; `d_model / n_heads` must be even for rotary positions.
        d_ff: inner width of a layer; None is `4 * d_model`.
        n_layers: layers.
        dropout_ff: probability, after the feed-forward half of a layer.
        dropout_emb: probability, after the positions are added.
        dropout_attn: probability, on attention weights.
        dropout_qkv: probability, on queries, keys and values.
        activation: name of the activation.
        norm: name of all norms.
        positions: "fixed" (sines), "learnable" (a table) or "rotary".
        max_time_idx: rows of the table of learnable positions: episode length + 1.
        sigma_reparam: learned spectral norms; the learner must call `update_spectral_norms` once per optimiser step.
        normformer_norms: two more norms per layer.
        head_scaling: a learned gain per head.
        window: timesteps before the present one that it sees, at most `max_seq_len - 1`; None is `max_seq_len - 1`.
            Training windows may be longer than what a timestep sees.
        sink: the first `sink` timesteps of an episode stay visible for good (of the training window, if that begins
            later); they come on top of `max_seq_len` and `window`.
        sink_bias: added to the scaled scores of these timesteps.
        logit_clip: scaled scores are clamped to `[-logit_clip, logit_clip]`, after the bias; None is no clamp.
        attention_backend: backend of `amago_kernels.attention` for windows: "auto", "reference", "sdpa",
            "triton" or "flex" (neither with `dropout_attn`), or "flash". "flash" needs the flash-attn package, bfloat16
            or float16 on a CUDA device (`module.to(torch.bfloat16)` or `torch.autocast`), and serves windows without
            resets and without a state; no `sink`, no `logit_clip`.
    """

    d_model: int = 256
    n_heads: int = 8
    d_ff: int | None = None
    n_layers: int = 3
    dropout_ff: float = 0.05
    dropout_emb: float = 0.05
    dropout_attn: float = 0.0
    dropout_qkv: float = 0.0
    activation: str = "leaky_relu"
    norm: str = "layer"
    positions: str = "fixed"
    max_time_idx: int | None = None
    sigma_reparam: bool = True
    normformer_norms: bool = True
    head_scaling: bool = True
    window: int | None = None
    sink: int = 0
    sink_bias: float = 0.0
    logit_clip: float | None = None
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        for name in ("d_model", "n_heads", "n_layers"):
            check_int(name, getattr(self, name))
        for name in ("d_ff", "max_time_idx"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        check_int("sink", self.sink, low=0)
        check_float("sink_bias", self.sink_bias)
        if self.window is not None:
            check_int("window", self.window, low=0)
        if self.logit_clip is not None:
            check_float("logit_clip", self.logit_clip)
            if self.logit_clip <= 0.0:
                raise ValueError(f"logit_clip={self.logit_clip!r} is not allowed; give None or a number > 0")
        for name in ("dropout_ff", "dropout_emb", "dropout_attn", "dropout_qkv"):
            check_dropout(name, getattr(self, name))
        for name in ("sigma_reparam", "normformer_norms", "head_scaling"):
            check_bool(name, getattr(self, name))
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("attention_backend", self.attention_backend, ("auto", *OPERATIONS["attention"]))
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not allowed with n_heads={self.n_heads}; give a multiple")
        if self.positions == "fixed" and self.d_model % 2:
            raise ValueError(f"d_model={self.d_model} is not allowed with positions='fixed'; give an even number")
        if self.positions == "rotary" and (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"d_model={self.d_model} with n_heads={self.n_heads} is not allowed with positions='rotary'; "
                "give an even d_model / n_heads"
            )
        if self.positions == "learnable" and self.max_time_idx is None:
            raise ValueError("max_time_idx=None is not allowed with positions='learnable'; give episode length + 1")

    def build(self, in_dim: int, max_seq_len: int) -> TformerTrajEncoder:
        """See `TrajEncoderConfig.build`."""
        return TformerTrajEncoder(self, in_dim, max_seq_len)
