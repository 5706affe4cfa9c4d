"""Checks of the module as such: P7 to P9, P12 and P13."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._case import Case, same


def check_purity(case: Case) -> None:
    """P7: twice the same, under every way to switch gradients off."""
    module = case.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    reset = case.resets("some")
    first = case.window(case.x, reset).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = case.window(case.x, reset).clone()
            by_steps = [case.steps(case.x, case.times(reset), reset).clone() for _ in range(2)]
        case.close(again, first, f"P7 (eval is pure): forward under {mode.__name__} differs")
        same(by_steps[1], by_steps[0], "P7 (eval is pure): two runs of steps differ")
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"P7 (eval is pure): {name} has changed"


@torch.no_grad()
def check_dropout(case: Case, dropout: bool) -> None:
    """P8: training mode beside evaluation mode."""
    module, reset = case.module, case.resets("some")
    expected = case.window(case.x, reset)
    by_steps = case.steps(case.x, case.times(reset), reset)
    module.train()
    try:
        in_training = [case.window(case.x, reset) for _ in range(2)]
        same(case.steps(case.x, case.times(reset), reset), by_steps, "P8 (dropout): step in training mode differs")
    finally:
        module.eval()
    if dropout:
        assert not torch.equal(*in_training), "P8 (dropout): training mode drops nothing although dropout=True"
    else:
        case.close(in_training[0], expected, "P8 (dropout): training differs from evaluation; pass dropout=True?")
    same(case.window(case.x, reset), expected, "P8 (dropout): evaluation does not repeat itself")


@torch.no_grad()
def check_time_offset(case: Case, time_offset: str | None) -> None:
    """P9: the same window nine timesteps later."""
    if time_offset is None:
        return
    out = case.module(case.x, case.time_idx)[0]
    moved = case.module(case.x, case.time_idx + 9)[0]
    if time_offset == "invariant":
        case.close(moved, out, "P9 (time offset): adding 9 to every time changes the outputs")
    else:
        difference = float((moved - out).abs().max())
        least = max(1e-3, 2 * case.tolerance)
        assert difference > least, "P9 (time offset): adding 9 to every time changes nothing"


@torch.no_grad()
def check_weights(case: Case, twin: Any) -> None:
    """P12: a second module from the same factory, with the weights of the first."""
    state_dict = {name: value.clone() for name, value in case.module.state_dict().items()}
    try:
        twin.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise AssertionError(f"P12 (weights): a second module refuses the state_dict of the first: {error}") from error
    reset = case.resets("some")
    expected = case.window(case.x, reset)
    same(twin(case.x, case.times(reset), reset)[0], expected, "P12 (weights): a module with loaded weights differs")
    steps = Case(twin, case.x, case.time_idx, case.tolerance, case.max_seq_len, case.generator).steps
    expected = case.steps(case.x, case.times(reset), reset)
    out = steps(case.x, case.times(reset), reset)
    same(out, expected, "P12 (weights): steps of a module with loaded weights differ")


@torch.no_grad()
def check_bad_input(case: Case) -> None:
    """P13: one wrong shape at a time."""
    module, x, time_idx = case.module, case.x, case.time_idx
    state = module.initial_state(case.lanes)
    case.steps(x[:, :2], time_idx[:, :2], None, state)
    before = state.state_dict()
    wide, narrow = torch.cat([x, x[..., :1]], dim=-1), x[:-1]
    reset = case.no_resets()
    calls: dict[str, Callable[[], Any]] = {
        "forward with a wrong last dimension of x": lambda: module(wide, time_idx),
        "forward with too few lanes in time_idx": lambda: module(x, time_idx[:-1]),
        "forward with too few timesteps in reset": lambda: module(x, time_idx, reset[:, :-1]),
        "forward with a state of other lanes": lambda: module(narrow, time_idx[:-1], None, state),
        "step with a wrong last dimension of x": lambda: module.step(wide[:, 0], time_idx[:, 0], state),
        "step with too few lanes": lambda: module.step(narrow[:, 0], time_idx[:-1, 0], state),
        "reset_state with too few lanes": lambda: module.reset_state(state, reset[:-1, 0]),
        "reset_state with lane numbers instead of flags": lambda: module.reset_state(state, time_idx[:, 0]),
    }
    for name, call in calls.items():
        _refuses(name, call)
        for key, value in state.state_dict().items():
            same(_comparable(value), _comparable(before[key]), f"P13 (bad input): {name} changes {key} of the state")


def _refuses(name: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except ValueError:
        return
    except Exception as error:
        raise AssertionError(f"P13 (bad input): {name} raises {type(error).__name__}, not ValueError") from error
    raise AssertionError(f"P13 (bad input): {name} is accepted; raise ValueError")


def _comparable(value: Tensor) -> Tensor:
    """NaN in memory that was never written equals itself."""
    return value.nan_to_num(nan=1.5) if value.is_floating_point() else value
