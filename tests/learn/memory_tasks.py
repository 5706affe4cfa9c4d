"""Two supervised memory tasks, and a loop that trains a sequence backbone on them.

Dimensions: `B` batch, `L` timesteps, `D` input features, `N` classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amago_nets.positions import fixed_embedding
from amago_nets.traj_encoders import TrajEncoderConfig

NOT_ASKED = -100
DELAY = 20
COPY_LENGTH = 40
TOKENS = 8
CLOCK = 16
CORRIDOR = 64
CUES = 2
NOISE = 4


@dataclass(frozen=True)
class Batch:
    """Inputs `[B, L, D]`, and the classes to name `[B, L]`, `NOT_ASKED` where none is."""

    x: Tensor
    target: Tensor


@dataclass(frozen=True)
class Task:
    """A generator of batches (size, random numbers, whether for training), and the sizes a network for it needs."""

    sample: Callable[[int, torch.Generator, bool], Batch]
    in_dim: int
    classes: int
    length: int


@dataclass(frozen=True)
class Recipe:
    """How to train: `steps` batches at most, fewer once the task is solved."""

    steps: int
    learning_rate: float
    batch_size: int = 32


def sample_copy(batch_size: int, generator: torch.Generator, training: bool) -> Batch:
    """Random tokens, and a clock; which token was it 20 timesteps ago?

    The clock is there because only a Transformer looks at the time by itself.
    """
    tokens = torch.randint(TOKENS, (batch_size, COPY_LENGTH), generator=generator)
    target = torch.full((batch_size, COPY_LENGTH), NOT_ASKED)
    target[:, DELAY:] = tokens[:, :-DELAY]
    clock = fixed_embedding(torch.arange(COPY_LENGTH), CLOCK).expand(batch_size, COPY_LENGTH, CLOCK)
    return Batch(torch.cat([F.one_hot(tokens, TOKENS).float(), clock], dim=-1), target)


def sample_corridor(batch_size: int, generator: torch.Generator, training: bool) -> Batch:
    """A T-maze without the walking: a cue, a corridor of noise, and a question at its end that only the cue answers.

    In training one timestep in ten asks as well: with the last one alone, recurrent networks find no beginning.
    """
    cue = torch.randint(CUES, (batch_size, 1), generator=generator)
    asks = torch.rand(batch_size, CORRIDOR, generator=generator) < (0.1 if training else 0.0)
    asks[:, 0], asks[:, -1] = False, True
    x = torch.zeros(batch_size, CORRIDOR, CUES + NOISE + 1)
    x[:, :1, :CUES] = F.one_hot(cue, CUES).float()
    x[:, 1:, CUES:-1] = torch.randn(batch_size, CORRIDOR - 1, NOISE, generator=generator)
    x[..., -1] = asks.float()
    return Batch(x, torch.where(asks, cue, NOT_ASKED))


COPY_TASK = Task(sample_copy, TOKENS + CLOCK, TOKENS, COPY_LENGTH)
CORRIDOR_TASK = Task(sample_corridor, CUES + NOISE + 1, CUES, CORRIDOR)


class Classifier(nn.Module):
    """A backbone, and a linear layer."""

    def __init__(self, config: TrajEncoderConfig, task: Task) -> None:
        super().__init__()
        self.backbone = config.build(task.in_dim, task.length)
        self.head = nn.Linear(self.backbone.out_dim, task.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, L, N]`."""
        time_idx = torch.arange(x.shape[1]).expand(x.shape[:2])
        return self.head(self.backbone(x, time_idx)[0])


@torch.no_grad()
def accuracy(model: Classifier, batch: Batch) -> float:
    """Share of right answers in evaluation mode."""
    model.eval()
    right = model(batch.x).argmax(-1) == batch.target
    model.train()
    return float(right[batch.target != NOT_ASKED].float().mean())


def learn(
    config: TrajEncoderConfig, task: Task, recipe: Recipe, seed: int, log: Callable[[str], None] = print
) -> float:
    """Trains from scratch and returns the accuracy on 512 fresh sequences; stops early above 0.99."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    held_out = task.sample(512, torch.Generator().manual_seed(seed + 1), False)
    model = Classifier(config, task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, recipe.steps)
    start = time.process_time()
    result = 0.0
    for step in range(1, recipe.steps + 1):
        batch = task.sample(recipe.batch_size, generator, True)
        loss = F.cross_entropy(model(batch.x).flatten(0, 1), batch.target.flatten(), ignore_index=NOT_ASKED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        if step % 50 == 0 or step == recipe.steps:
            result = accuracy(model, held_out)
            seconds = time.process_time() - start
            log(f"{step} steps, {seconds:.0f} s: loss {float(loss.detach()):.3f}, accuracy {result:.3f}")
            if result > 0.99:
                break
    return result
