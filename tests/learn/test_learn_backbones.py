"""Every sequence backbone learns what needs memory, and what has no memory does not (`nox -s learn`)."""

from __future__ import annotations

import time

import pytest
import torch
from memory_tasks import TASKS, Recipe, learn

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

TRANSFORMER = {"d_model": 32, "n_heads": 4, "n_layers": 2, "dropout_ff": 0.0, "dropout_emb": 0.0}
WITH_MEMORY = {
    "gru": GRUConfig(d_hidden=128, n_layers=1, d_output=64),
    "lstm": LSTMConfig(d_hidden=128, n_layers=1, d_output=64),
    "min_gru": MinGRUConfig(d_model=32, n_layers=2),
    "lru": LRUConfig(d_model=32, n_layers=2),
    "mamba": MambaConfig(d_model=32, d_state=8, n_layers=2),
    **{
        f"transformer_{positions}": TransformerConfig(positions=positions, max_time_idx=64, **TRANSFORMER)
        for positions in ("fixed", "learnable", "rotary")
    },
}
WITHOUT_MEMORY = {"identity": IdentityConfig(), "ff": FFConfig(d_model=64, n_layers=2)}
RECIPES = {"copy": Recipe(3000, 3e-3), "corridor": Recipe(1500, 3e-3)}
# Guessing gives 1/8 and 1/2; the bounds are five standard deviations of 512 sequences away and more.
CHANCE = {"copy": 0.2, "corridor": 0.62}
LIMIT_S = 120.0


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", WITH_MEMORY)
def test_memory_is_learned(name, task):
    start = time.process_time()
    result = learn(WITH_MEMORY[name], TASKS[task], RECIPES[task], seed=0)
    assert result > 0.95
    assert time.process_time() - start < LIMIT_S


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_without_memory_it_stays_a_guess(name, task):
    result = learn(WITHOUT_MEMORY[name], TASKS[task], Recipe(300, 3e-3), seed=0)
    assert result < CHANCE[task]
