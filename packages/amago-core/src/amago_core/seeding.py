"""One integer seed, fanned out by name."""

from __future__ import annotations

import random
import zlib

import numpy as np
import torch


def child_seed(seed: int, name: str, *indices: int) -> int:
    """Derive an independent seed from the run's seed.

    The same `(seed, name, indices)` always gives the same child; different names give statistically independent
    streams, so that adding a consumer of randomness never shifts the others.

    Args:
        seed: the run's seed, >= 0.
        name: what the child is for, such as `"env"` or `"sampler"`.
        indices: further integers >= 0, such as an epoch or a restart count.

    Returns:
        An integer in `[0, 2**31)`.

    Raises:
        ValueError: if a number is negative.
    """
    if min((seed, *indices)) < 0:
        raise ValueError(f"seed and indices must be >= 0; got {(seed, *indices)}")
    # From 1: `SeedSequence` does not tell a trailing 0 from nothing.
    numbers = [index + 1 for index in indices]
    words = np.random.SeedSequence([seed, zlib.crc32(name.encode()), *numbers]).generate_state(1, np.uint32)
    return int(words[0] >> 1)


def numpy_generator(seed: int, name: str, *indices: int) -> np.random.Generator:
    """A NumPy generator seeded with `child_seed(seed, name, *indices)`."""
    return np.random.Generator(np.random.PCG64(child_seed(seed, name, *indices)))


def torch_generator(seed: int, name: str, *indices: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device` seeded with `child_seed(seed, name, *indices)`."""
    generator = torch.Generator(device=device)
    generator.manual_seed(child_seed(seed, name, *indices))
    return generator


def seed_globals(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, for environments and networks that draw from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
