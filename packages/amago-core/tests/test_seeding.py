"""One seed, many independent streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from amago_core.seeding import child_seed, numpy_generator, torch_generator


def test_children_are_reproducible_and_differ() -> None:
    children = {
        key: child_seed(*key)
        for key in [
            (0, "env"),
            (0, "env", 0),
            (0, "env", 0, 0),
            (0, "env", 1),
            (0, "env", 0, 1),
            (0, "env", 1, 0),
            (1, "env"),
            (2**32, "env"),
            (0, "sampler"),
            (0, "sampler", 0),
        ]
    }
    assert all(child_seed(*key) == value for key, value in children.items())
    assert len(set(children.values())) == len(children)
    assert all(0 <= value < 2**31 for value in children.values())


def test_no_collisions_and_even_bits_over_many_indices() -> None:
    seeds = np.array([child_seed(3, "env", epoch, lane) for epoch in range(40) for lane in range(50)])
    assert len(np.unique(seeds)) == len(seeds)
    bits = (seeds[:, None] >> np.arange(31)) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 0.06


@pytest.mark.parametrize("numbers", [(-1,), (0, -1), (0, 1, -2)])
def test_negative_numbers_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=">= 0"):
        child_seed(numbers[0], "env", *numbers[1:])


def test_generators() -> None:
    ours, same, other = (numpy_generator(5, name, 2).random(4) for name in ("a", "a", "b"))
    assert np.array_equal(ours, same) and not np.array_equal(ours, other)
    first, second, third = (torch.rand(4, generator=torch_generator(5, name, 2)) for name in ("a", "a", "b"))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_generators_leave_global_state_alone() -> None:
    before = torch.get_rng_state()
    torch_generator(0, "policy")
    numpy_generator(0, "sampler")
    assert torch.equal(before, torch.get_rng_state())
