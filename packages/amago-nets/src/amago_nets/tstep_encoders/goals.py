"""Embeddings of goals: `GL` subgoals of `GD` numbers each.

Dimensions: `GL` length of the list of goals, `GD` numbers in one goal, `K = GL GD`. `...` stands for any leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import ACTIVATIONS, make_activation
from ..registry import register
from ..specs import ArraySpec
from ..validation import check_bool, check_choice, check_int
from .base import ObsEncoder, ObsEncoderConfig, flatten_tail, raw_dtype


def _goal_shape(spec: ArraySpec, key: str) -> tuple[int, int]:
    if len(spec.shape) not in (1, 2):
        raise ValueError(
            f"obs[{key!r}] has the shape {spec.shape}, which is not allowed for a goal; give (GD,) or (GL, GD)"
        )
    return (1, *spec.shape) if len(spec.shape) == 1 else spec.shape  # type: ignore[return-value]


class _GoalEmbedder(ObsEncoder):
    """What both embedders share: the shape of goals, the hidden goal and the output norm."""

    def __init__(self, spec: ArraySpec, key: str, out_dim: int, zero_embedding: bool) -> None:
        super().__init__(spec, key=key)
        self.goal_length, self.goal_dim = _goal_shape(spec, key)
        self.out_dim = out_dim
        self.zero_embedding = zero_embedding
        self.norm = nn.LayerNorm(out_dim)

    def _embed(self, goals: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps goals `[..., GL, GD]` (or `[..., GD]`, as the spec says) to `[..., out_dim]`; see the base class."""
        goals = flatten_tail(self._take(x, mask), len(self.spec.shape))
        if self.zero_embedding:
            return torch.zeros(
                (*goals.shape[:-1], self.out_dim), dtype=self.norm.weight.dtype, device=self.norm.weight.device
            )
        return self.norm(self._embed(goals))


@register("ff_goal")
@dataclass(frozen=True, kw_only=True)
class FFGoalEmbedderConfig(ObsEncoderConfig):
    """Options of `FFGoalEmbedder`.

    Attributes:
        d_output: size of the output.
        activation: see `amago_nets.norms.ACTIVATIONS`.
        zero_embedding: hide the goal: the output is zeros, whatever the goal.

    Raises:
        ValueError: if a field is not allowed.
    """

    d_output: int = 32
    activation: str = "leaky_relu"
    zero_embedding: bool = False

    def __post_init__(self) -> None:
        check_int("d_output", self.d_output)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_bool("zero_embedding", self.zero_embedding)

    def build(self, spec: ArraySpec, *, key: str = "goal") -> FFGoalEmbedder:
        """Builds the part; see the base class."""
        return FFGoalEmbedder(self, spec, key=key)


class FFGoalEmbedder(_GoalEmbedder):
    """All goals of the list, flattened, through a hidden layer of `2 GD`, a linear layer and a layer norm.

    Args:
        config: options.
        spec: the goals of one timestep, of shape `(GL, GD)` or `(GD,)`.
        key: name of the observation, for error messages.

    Raises:
        ValueError: if the shape is not that of goals.
    """

    def __init__(self, config: FFGoalEmbedderConfig, spec: ArraySpec, *, key: str = "goal") -> None:
        super().__init__(spec, key, config.d_output, config.zero_embedding)
        self.config = config
        self.layers = nn.Sequential(
            nn.Linear(spec.numel, 2 * self.goal_dim),
            make_activation(config.activation),
            nn.Linear(2 * self.goal_dim, config.d_output),
        )

    def _embed(self, goals: Tensor) -> Tensor:
        return self.layers(goals.to(self.norm.weight.dtype))


@register("token_goal")
@dataclass(frozen=True, kw_only=True)
class TokenGoalEmbedderConfig(ObsEncoderConfig):
    """Options of `TokenGoalEmbedder`.

    Attributes:
        bound: goals are integers in `[-bound, bound]`; others count as the nearest of these.
        d_embed: size of the embedding of a number.
        d_hidden: size of the recurrent state.
        d_output: size of the output.
        zero_embedding: hide the goal: the output is zeros, whatever the goal.

    Raises:
        ValueError: if a field is not allowed.
    """

    bound: int = 128
    d_embed: int = 16
    d_hidden: int = 64
    d_output: int = 32
    zero_embedding: bool = False

    def __post_init__(self) -> None:
        for name in ("bound", "d_embed", "d_hidden", "d_output"):
            check_int(name, getattr(self, name))
        check_bool("zero_embedding", self.zero_embedding)

    def build(self, spec: ArraySpec, *, key: str = "goal") -> TokenGoalEmbedder:
        """Builds the part; see the base class."""
        return TokenGoalEmbedder(self, spec, key=key)


class TokenGoalEmbedder(_GoalEmbedder):
    """Every number of every goal is a token; a tanh RNN reads them in order, its last state is the embedding.

    Args:
        config: options.
        spec: the goals of one timestep, of shape `(GL, GD)` or `(GD,)`.
        key: name of the observation, for error messages.

    Raises:
        ValueError: if the shape is not that of goals.
    """

    def __init__(self, config: TokenGoalEmbedderConfig, spec: ArraySpec, *, key: str = "goal") -> None:
        super().__init__(spec, key, config.d_output, config.zero_embedding)
        self.config = config
        self.embedding = nn.Embedding(2 * config.bound + 1, config.d_embed)
        self.rnn = nn.RNNCell(config.d_embed, config.d_hidden)
        self.linear = nn.Linear(config.d_hidden, config.d_output)

    def tokens(self, goals: Tensor) -> Tensor:
        """Rounds goals of any shape to integers, and counts them from `-bound`; what lies outside is clamped."""
        bound = self.config.bound
        nearest = goals.to(raw_dtype(goals.dtype)).round()
        return nearest.clamp(-bound, bound).long() + bound

    def _embed(self, goals: Tensor) -> Tensor:
        embedded = self.embedding(self.tokens(goals))
        # The loop is over the few numbers of one goal, and unrolls when compiled; nn.RNN would break the graph.
        inputs = F.linear(embedded, self.rnn.weight_ih, self.rnn.bias_ih)
        hidden = (inputs[..., 0, :] + self.rnn.bias_hh).tanh()
        for k in range(1, inputs.shape[-2]):
            hidden = (inputs[..., k, :] + F.linear(hidden, self.rnn.weight_hh, self.rnn.bias_hh)).tanh()
        return self.linear(hidden)
