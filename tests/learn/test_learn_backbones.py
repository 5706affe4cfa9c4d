"""Every sequence backbone learns what needs memory, and what has no memory does not (`nox -s learn`)."""

from __future__ import annotations

import time

import pytest
import torch
from memory_tasks import COPY_TASK, CORRIDOR_TASK, Recipe, learn

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

# A backbone, and how it learns to copy. With PyTorch's initial gates the LSTM stays at chance, the GRU does not.
GATED = {"d_hidden": 128, "n_layers": 1, "d_output": 128}
FAST, PLAIN, GENTLE = Recipe(5000, 1e-2), Recipe(2000, 3e-3), Recipe(1000, 1e-3)
TRANSFORMER = {"d_model": 32, "n_heads": 4, "n_layers": 2, "dropout_ff": 0.0, "dropout_emb": 0.0}
WITH_MEMORY = {
    "gru": (GRUConfig(**GATED), FAST),
    "lstm": (LSTMConfig(max_timescale=64.0, **GATED), FAST),
    "min_gru": (MinGRUConfig(d_model=32, n_layers=2), PLAIN),
    "lru": (LRUConfig(d_model=32, n_layers=2), PLAIN),
    "mamba": (MambaConfig(d_model=64, n_layers=1), PLAIN),
    "transformer_fixed": (TransformerConfig(**TRANSFORMER), GENTLE),
    "transformer_learnable": (TransformerConfig(positions="learnable", max_time_idx=65, **TRANSFORMER), GENTLE),
    "transformer_rotary": (TransformerConfig(positions="rotary", **TRANSFORMER), PLAIN),
}
WITHOUT_MEMORY = {"identity": IdentityConfig(), "ff": FFConfig(d_model=64, n_layers=2)}
LIMIT_S = 120.0


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def held_to_it(config, task, recipe):
    start = time.process_time()
    result = learn(config, task, recipe, seed=0)
    assert result > 0.95
    assert time.process_time() - start < LIMIT_S


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_memory_copies_what_was_seen_20_timesteps_ago(name):
    config, recipe = WITH_MEMORY[name]
    held_to_it(config, COPY_TASK, recipe)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_memory_carries_a_cue_through_64_timesteps(name):
    held_to_it(WITH_MEMORY[name][0], CORRIDOR_TASK, Recipe(1000, 3e-3))


# Guessing gets 1 of 8 right, and 1 of 2; each bound is five standard deviations of the held-out answers away and more.
@pytest.mark.parametrize(("task", "bound"), [(COPY_TASK, 0.15), (CORRIDOR_TASK, 0.62)])
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_without_memory_it_stays_a_guess(name, task, bound):
    assert learn(WITHOUT_MEMORY[name], task, Recipe(300, 3e-3), seed=0) < bound
