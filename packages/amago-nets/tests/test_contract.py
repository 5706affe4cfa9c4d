"""Every backbone against the contract."""

from __future__ import annotations

import pytest
import torch

from amago_nets.testing import check_backbone
from amago_nets.traj_encoders import (
    FFConfig,
    GRUConfig,
    IdentityConfig,
    LRUConfig,
    LSTMConfig,
    MambaConfig,
    MinGRUConfig,
    TransformerConfig,
)

SMALL = {"d_model": 16, "n_heads": 2, "d_ff": 24, "n_layers": 2, "dropout_ff": 0.0, "dropout_emb": 0.0}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def transformer(**options) -> TransformerConfig:
    return TransformerConfig(**{**SMALL, "max_time_idx": 64, **options})


BACKBONES = {
    "identity": (IdentityConfig(), {"memory": False}),
    "ff": (FFConfig(d_model=16, n_layers=2), {"memory": False}),
    "gru": (GRUConfig(d_hidden=16, d_output=12), {}),
    "gru_one_layer": (GRUConfig(d_hidden=8, n_layers=1, d_output=12, norm="none"), {}),
    "lstm": (LSTMConfig(d_hidden=16, d_output=12), {}),
    "lstm_one_layer": (LSTMConfig(d_hidden=8, n_layers=1, d_output=12, norm="none"), {}),
    "mamba": (MambaConfig(d_model=16, d_state=4, n_layers=2), {}),
    "mamba_odd_sizes": (MambaConfig(d_model=10, d_state=3, d_conv=2, expand=1, n_layers=1, norm="rmsnorm"), {}),
    "min_gru": (MinGRUConfig(d_model=16, n_layers=2), {}),
    "lru": (LRUConfig(d_model=16, n_layers=2), {}),
    "lru_odd_sizes": (LRUConfig(d_model=9, d_state=5, n_layers=1), {}),
    **{
        f"transformer_{positions}_{'sigma' if sigma else 'plain'}": (
            transformer(positions=positions, sigma_reparam=sigma, normformer_norms=sigma, head_scaling=sigma),
            {"time_offset": "invariant" if positions == "rotary" else "sensitive"},
        )
        for positions in ("fixed", "learnable", "rotary")
        for sigma in (True, False)
    },
    "transformer_reference": (transformer(attention_backend="reference"), {}),
    "transformer_window": (transformer(window=2), {}),
    "transformer_sink": (transformer(window=3, sink=2), {}),
    "transformer_sink_bias": (transformer(window=2, sink=1, sink_bias=1.5, positions="rotary"), {}),
    "transformer_sink_in_a_full_window": (transformer(sink=2, sink_bias=-1.0), {}),
    "transformer_logit_clip": (transformer(logit_clip=0.5), {}),
    "transformer_everything": (transformer(window=3, sink=1, sink_bias=0.5, logit_clip=0.5, positions="rotary"), {}),
    "transformer_rmsnorm_gelu": (transformer(norm="rmsnorm", activation="gelu", n_layers=1), {}),
}
DROPOUTS = {
    "ff": (FFConfig(d_model=16, dropout=0.3), {"memory": False}),
    "min_gru": (MinGRUConfig(d_model=16, n_layers=2, dropout=0.3), {}),
    "lru": (LRUConfig(d_model=16, n_layers=2, dropout=0.3), {}),
    "transformer_ff": (transformer(dropout_ff=0.3), {}),
    "transformer_emb": (transformer(dropout_emb=0.3), {}),
    "transformer_attn": (transformer(dropout_attn=0.3), {}),
    "transformer_qkv": (transformer(dropout_qkv=0.3), {}),
}
COMPILED = {
    "identity": (IdentityConfig(), {"memory": False}),
    "ff": (FFConfig(d_model=4), {"memory": False}),
    "gru": (GRUConfig(d_hidden=4, n_layers=1, d_output=4), {}),
    "lstm": (LSTMConfig(d_hidden=4, n_layers=1, d_output=4), {}),
    "mamba": (MambaConfig(d_model=4, d_state=2, n_layers=1), {}),
    "min_gru": (MinGRUConfig(d_model=4, n_layers=1), {}),
    "lru": (LRUConfig(d_model=4, n_layers=1), {}),
    "transformer": (transformer(d_model=4, n_layers=1, d_ff=8), {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(name, dtype):
    config, options = BACKBONES[name]
    check_backbone(config.build, dtype=dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_on_the_gpu(name, dtype):
    config, options = BACKBONES[name]
    tolerance = 1e-4 if dtype == torch.float32 else None
    with torch.backends.cudnn.flags(allow_tf32=False):
        check_backbone(config.build, device="cuda", dtype=dtype, tolerance=tolerance, **options)


@pytest.mark.parametrize("max_seq_len", [1, 2, 40])
@pytest.mark.parametrize(
    "name", ["gru", "lstm", "mamba", "min_gru", "lru", "transformer_fixed_sigma", "transformer_rotary_plain"]
)
def test_other_context_lengths(name, max_seq_len):
    check_backbone(BACKBONES[name][0].build, max_seq_len=max_seq_len, length=19, lanes=3)


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout(name):
    config, options = DROPOUTS[name]
    check_backbone(config.build, dropout=True, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training(name):
    config, options = COMPILED[name]
    check_backbone(config.build, in_dim=3, max_seq_len=3, length=6, lanes=3, compile=True, **options)


@pytest.mark.parametrize("name", BACKBONES)
def test_recurrent_memory_is_never_narrow(name):
    module = BACKBONES[name][0].build(6, 7)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        floats = {k: v for k, v in module.to(dtype).initial_state(3).tensors.items() if v.is_floating_point()}
        for key, value in floats.items():
            wide = dtype if key in ("keys", "values") else torch.promote_types(dtype, torch.float32)
            assert value.dtype == wide, key


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    check_backbone(FFConfig(d_model=8).build, memory=False)
    assert torch.equal(torch.rand(1), expected)
