from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from amago_nets.registry import lookup, names
from amago_nets.specs import ArraySpec
from amago_nets.tstep_encoders import (
    FFGoalEmbedderConfig,
    TokenEncoder,
    TokenEncoderConfig,
    TokenGoalEmbedder,
    TokenGoalEmbedderConfig,
    VectorEncoderConfig,
)

GOALS = ArraySpec(shape=(3, 2), dtype="float32")


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def token_spec(*shape: int, num_classes: int | None = 7) -> ArraySpec:
    return ArraySpec(shape=shape, dtype="int8", kind="tokens", num_classes=num_classes)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)


def build(spec: ArraySpec | None = None, **options: Any) -> TokenEncoder:
    torch.manual_seed(0)
    return TokenEncoderConfig(**{"d_embed": 4, "d_output": 5, "d_hidden": 6, **options}).build(spec or token_spec(4))


def test_registered() -> None:
    assert names("obs_encoder") == ("ff_goal", "image", "token_goal", "tokens", "vector")
    assert lookup("obs_encoder", "tokens") is TokenEncoderConfig
    assert lookup("obs_encoder", "vector") is VectorEncoderConfig


def test_goal_parameter_counts() -> None:
    assert count(FFGoalEmbedderConfig().build(GOALS)) == 252
    assert count(TokenGoalEmbedderConfig().build(GOALS)) == 11_504


@pytest.mark.parametrize("config", [FFGoalEmbedderConfig(), TokenGoalEmbedderConfig()])
@pytest.mark.parametrize("lead", [(), (4,), (2, 5)])
@pytest.mark.parametrize("shape", [(3, 2), (2,)])
def test_goal_shapes(config: Any, lead: tuple[int, ...], shape: tuple[int, ...]) -> None:
    embedder = config.build(ArraySpec(shape=shape, dtype="float32"))
    assert (embedder.goal_length, embedder.goal_dim) == ((1, 2) if len(shape) == 1 else (3, 2))
    assert embedder(torch.randn(*lead, *shape)).shape == (*lead, 32)


def test_ff_goal_by_hand() -> None:
    embedder = FFGoalEmbedderConfig().build(GOALS).double()
    goals = torch.randn(4, 3, 2, dtype=torch.float64)
    w1, b1, w2, b2 = embedder.layers.parameters()
    assert w1.shape == (4, 6)
    y = F.leaky_relu(goals.flatten(1) @ w1.T + b1, 0.01) @ w2.T + b2
    torch.testing.assert_close(embedder(goals), F.layer_norm(y, (32,)))


def test_token_goal_is_a_tanh_rnn() -> None:
    torch.manual_seed(0)
    embedder = TokenGoalEmbedderConfig().build(GOALS).double()
    goals = torch.randint(-128, 129, (2, 4, 3, 2), dtype=torch.int16)
    rnn = torch.nn.RNN(16, 64, batch_first=True).double()
    rnn.load_state_dict({f"{name}_l0": value for name, value in embedder.rnn.state_dict().items()})
    embedded = embedder.embedding(goals.flatten(2).flatten(0, 1).long() + 128)
    last = rnn(embedded)[0][:, -1].reshape(2, 4, 64)
    torch.testing.assert_close(embedder(goals), embedder.norm(embedder.linear(last)))


@pytest.mark.parametrize(
    ("goal", "row"),
    [(-128, 0), (0, 128), (128, 256), (129, 256), (-129, 0), (1e6, 256), (0.9, 129), (-0.4, 128), (math.inf, 256)],
)
def test_token_goals_are_rounded_and_clamped(goal: float, row: int) -> None:
    embedder: TokenGoalEmbedder = TokenGoalEmbedderConfig().build(GOALS)
    goals = torch.full((1, 3, 2), goal)
    assert embedder.tokens(goals).eq(row).all()
    assert embedder(goals).isfinite().all()
    assert embedder.embedding.num_embeddings == 257


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bfloat16])
def test_token_goals_of_other_dtypes(dtype: torch.dtype) -> None:
    embedder: TokenGoalEmbedder = TokenGoalEmbedderConfig().build(GOALS)
    assert embedder.tokens(torch.tensor([-128, -3, 127]).to(dtype)).tolist() == [
        0,
        125,
        256 if dtype == torch.bfloat16 and float(torch.tensor(127, dtype=dtype)) == 128 else 255,
    ]


@pytest.mark.parametrize("kind", [FFGoalEmbedderConfig, TokenGoalEmbedderConfig])
def test_zero_embedding(kind: Any) -> None:
    embedder = kind(zero_embedding=True, d_output=6).build(GOALS).to(torch.bfloat16)
    y = embedder(torch.randn(2, 5, 3, 2))
    assert y.shape == (2, 5, 6)
    assert y.dtype == torch.bfloat16
    assert y.eq(0).all()


@pytest.mark.parametrize("kind", [FFGoalEmbedderConfig, TokenGoalEmbedderConfig])
def test_goals_of_a_wrong_shape(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"obs\['target'\] has the shape \(3, 2, 2\).*\(GL, GD\)"):
        kind().build(ArraySpec(shape=(3, 2, 2), dtype="float32"), key="target")
    with pytest.raises(ValueError, match=r"obs\['goal'\].shape=\(4, 2, 3\).*\(3, 2\)"):
        kind().build(GOALS)(torch.zeros(4, 2, 3))


def test_flatten_tells_positions_apart() -> None:
    encoder = build()
    tokens = random_tokens(3, 4)
    expected = encoder.linear(encoder.embedding.weight[tokens.long()].flatten(1))
    assert torch.equal(encoder(tokens), expected)
    assert not torch.allclose(encoder(tokens), encoder(tokens.flip(1)))
    assert count(encoder) == 7 * 4 + 16 * 5 + 5


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0, 5)])
@pytest.mark.parametrize("pool", ["flatten", "mean", "gru"])
def test_token_shapes(pool: str, lead: tuple[int, ...], shape: tuple[int, ...]) -> None:
    encoder = build(token_spec(*shape), pool=pool)
    assert encoder(random_tokens(*lead, *shape)).shape == (*lead, 5)


def test_mean_ignores_order_and_padding() -> None:
    encoder = build(pool="mean", pad_token=0)
    tokens = torch.tensor([[3, 5, 0, 0], [5, 3, 0, 0], [0, 5, 0, 3], [0, 0, 0, 0]])
    y = encoder(tokens)
    table = encoder.embedding.weight
    torch.testing.assert_close(y[:3], encoder.linear((table[3] + table[5]) / 2).expand(3, -1))
    assert torch.equal(y[3], encoder.linear.bias)
    every = build(pool="mean")
    torch.testing.assert_close(every(tokens[:1])[0], every.linear((table[3] + table[5] + 2 * table[0]) / 4))


def test_flatten_zeros_padding() -> None:
    encoder = build(pad_token=0)
    (y,) = encoder(torch.tensor([[3, 0, 5, 0]]))
    table, zero = encoder.embedding.weight, torch.zeros(4)
    torch.testing.assert_close(y, encoder.linear(torch.cat([table[3], zero, table[5], zero])))


@pytest.mark.parametrize("pad_token", [None, 0])
def test_gru_reads_up_to_the_last_token(pad_token: int | None) -> None:
    encoder = build(pool="gru", pad_token=pad_token).double()
    tokens = torch.tensor([[3, 5, 0, 0], [1, 2, 6, 4], [4, 0, 2, 0], [0, 0, 0, 0]])
    gru = torch.nn.GRU(4, 6, batch_first=True).double()
    assert encoder.gru is not None
    gru.load_state_dict({f"{name}_l0": value for name, value in encoder.gru.state_dict().items()})
    embedded = encoder.embedding(tokens)
    if pad_token is None:
        last = gru(embedded)[0][:, -1]
    else:
        embedded = embedded * (tokens != 0).unsqueeze(-1)
        states = gru(embedded)[0]
        last = torch.stack([states[0, 1], states[1, 3], states[2, 2], torch.zeros(6).double()])
    torch.testing.assert_close(encoder(tokens), encoder.linear(last))


def test_gru_gradients() -> None:
    encoder = build(pool="gru", pad_token=0).double()
    tokens = torch.tensor([[3, 5, 0, 0], [1, 2, 6, 4]])
    params = tuple(encoder.parameters())

    def loss(*values: torch.Tensor) -> torch.Tensor:
        named = dict(zip((name for name, _ in encoder.named_parameters()), values, strict=True))
        return torch.func.functional_call(encoder, named, (tokens,)).square().sum()

    assert torch.autograd.gradcheck(loss, params)


@pytest.mark.parametrize("wrong", [-1, 7])
def test_tokens_out_of_range(wrong: int) -> None:
    tokens = random_tokens(2, 3, 4)
    tokens[1, 2, 3] = wrong
    encoder = TokenEncoderConfig().build(token_spec(4), key="mission")
    with pytest.raises(ValueError, match=rf"obs\['mission'\] holds the token {wrong}, .* 0 to 6"):
        encoder(tokens)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    assert encoder(tokens, mask).isfinite().all()


def test_number_of_classes() -> None:
    with pytest.raises(ValueError, match=r"num_classes=None.*obs\['word'\].*TokenEncoderConfig\(num_classes"):
        TokenEncoderConfig().build(token_spec(4, num_classes=None), key="word")
    assert TokenEncoderConfig(num_classes=9).build(token_spec(4, num_classes=None)).num_classes == 9
    assert TokenEncoderConfig(num_classes=9).build(token_spec(4)).embedding.num_embeddings == 9
    with pytest.raises(ValueError, match=r"pad_token=7.*\[0, 6\]"):
        TokenEncoderConfig(pad_token=7).build(token_spec(4))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: TokenEncoderConfig(pool="max"), "pool='max'.*'gru'"),
        (lambda: TokenEncoderConfig(d_embed=0), "d_embed=0"),
        (lambda: TokenEncoderConfig(num_classes=0), "num_classes=0"),
        (lambda: TokenEncoderConfig(num_classes=4, pad_token=4), r"pad_token=4.*\[0, 3\]"),
        (lambda: FFGoalEmbedderConfig(d_output=0), "d_output=0"),
        (lambda: FFGoalEmbedderConfig(zero_embedding=1), "zero_embedding=1"),
        (lambda: TokenGoalEmbedderConfig(bound=0), "bound=0"),
        (lambda: VectorEncoderConfig(n_layers=0), "n_layers=0"),
    ],
)
def test_configs_refuse(build: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()
