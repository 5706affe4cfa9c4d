"""Checks of the state: P10."""

from __future__ import annotations

from typing import Any

import torch

from ._case import Case, same


@torch.no_grad()
def check_state(case: Case) -> None:
    """P10: snapshots and selections in the middle of a window, and the addresses of everything."""
    module, half = case.module, case.length // 2
    state = module.initial_state(case.lanes)
    sizes = {name: tuple(value.shape) for name, value in state.state_dict().items()}
    addresses = _addresses(state)
    reset = case.resets("some")
    assert reset is not None
    first, second = (case.x[:, :half], case.x[:, half:])
    case.steps(first, case.time_idx[:, :half], reset[:, :half], state)
    snapshot = state.state_dict()
    order = torch.arange(case.lanes - 1, -1, -1, device=case.x.device)[:-1]
    picked = state.select(order)
    expected = case.steps(second, case.time_idx[:, half:], reset[:, half:], state)
    after = {name: tuple(value.shape) for name, value in state.state_dict().items()}
    assert after == sizes, f"P10 (state): shapes change from {sizes} to {after}"
    _stays(state, addresses, "step")
    restored = module.initial_state(case.lanes)
    restored.load_state_dict(snapshot)
    out = case.steps(second, case.time_idx[:, half:], reset[:, half:], restored)
    same(out, expected, "P10 (state): a restored snapshot goes on differently; is it a copy, is it complete?")
    out = case.steps(second[order], case.time_idx[order, half:], reset[order, half:], picked)
    case.close(out, expected[order], "P10 (state): selected lanes go on differently; are they copies?")
    _check_addresses(case)


def _check_addresses(case: Case) -> None:
    module = case.module
    state = module.initial_state(case.lanes)
    addresses = _addresses(state)
    module(case.x, case.time_idx, None, state)
    _stays(state, addresses, "forward")
    module.reset_state(state, case.no_resets()[:, 0])
    _stays(state, addresses, "reset_state")
    module.reset_state(state, torch.ones_like(case.no_resets()[:, 0]))
    _stays(state, addresses, "reset_state")
    state.load_state_dict(module.initial_state(case.lanes).state_dict())
    _stays(state, addresses, "load_state_dict")


def _addresses(state: Any) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in getattr(state, "tensors", {}).items()}


def _stays(state: Any, addresses: dict[str, int], cause: str) -> None:
    now = _addresses(state)
    assert set(now) == set(addresses), f"P10 (state): {cause} changes the entries {sorted(addresses)} to {sorted(now)}"
    for name, address in now.items():
        assert address == addresses[name], f"P10 (state): {cause} moves {name} to another address"
