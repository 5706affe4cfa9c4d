"""Checks of what comes out: P1 to P4 and P6."""

from __future__ import annotations

import torch
from torch import Tensor

from ._case import PATTERNS, Case, same


@torch.no_grad()
def check_windows_equal_steps(case: Case) -> None:
    """P1 and P6, for all patterns of resets."""
    module = case.module
    for pattern in PATTERNS:
        reset = case.resets(pattern)
        time_idx = case.times(reset)
        out, state = module(case.x, time_idx, reset)
        assert state is None, "P1 (window = steps): forward without a state returns a state; return None"
        shape = (case.lanes, case.length, module.out_dim)
        assert out.shape == shape, f"P1 (window = steps): forward returns {tuple(out.shape)}; out_dim says {shape}"
        assert out.dtype == case.x.dtype, f"P1 (window = steps): forward returns {out.dtype} for {case.x.dtype}"
        by_steps = case.steps(case.x, time_idx, reset)
        assert by_steps.dtype == case.x.dtype, f"P1 (window = steps): step returns {by_steps.dtype} for {case.x.dtype}"
        inside = slice(0, case.max_seq_len)
        case.close(by_steps[:, inside], out[:, inside], f"P1 (window = steps), resets: {pattern}")
        case.close(by_steps, out, f"P6 (window = steps beyond max_seq_len), resets: {pattern}")
        _check_pieces(case, reset, out, f"P1 (window in pieces with a state), resets: {pattern}")


def _check_pieces(case: Case, reset: Tensor | None, expected: Tensor, message: str) -> None:
    """Feeds the window by `forward` with a state and by `step`, alternating."""
    module, time_idx = case.module, case.times(reset)
    state = module.initial_state(case.lanes)
    length = case.length
    cuts = sorted({0, 1, min(3, length), length // 2, length - 1, length})
    outputs = []
    for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        part = slice(start, stop)
        piece = None if reset is None else reset[:, part]
        if i % 2:
            outputs.append(case.steps(case.x[:, part], time_idx[:, part], piece, state))
            continue
        out, returned = module(case.x[:, part], time_idx[:, part], piece, state)
        assert returned is state, f"{message}: forward must return the state it was given, updated in place"
        outputs.append(out)
    case.close(torch.cat(outputs, dim=1), expected, message)


@torch.no_grad()
def check_causality(case: Case) -> None:
    """P2: other inputs from a timestep on, the same outputs before it."""
    for pattern in ("none", "some"):
        reset = case.resets(pattern)
        before = case.window(case.x, reset)
        for cut in sorted({1, case.length // 2, case.length - 1}):
            x = case.x.clone()
            x[:, cut:] = case.noise(x[:, cut:])
            after = case.window(x, reset)
            same(after[:, :cut], before[:, :cut], f"P2 (causal): inputs from timestep {cut} on change earlier outputs")


@torch.no_grad()
def check_resets_in_steps(case: Case) -> None:
    """P3: what a lane remembers is poisoned with NaN before it is reset."""
    module, cut = case.module, case.length // 2
    for before in (1, case.max_seq_len + 1):
        state = module.initial_state(case.lanes)
        spoiled = case.x[:, :before].clone()
        spoiled[1] = float("nan")
        case.steps(spoiled, case.time_idx[:, :before], None, state)
        module.reset_state(state, torch.arange(case.lanes, device=case.x.device) == 1)
        rest, times = case.x[:, cut:], case.time_idx[:, : case.length - cut]
        out = case.steps(rest, times, None, state)
        fresh = case.steps(rest, times, None)
        case.close(out[1], fresh[1], f"P3 (reset): a lane reset after {before} NaN inputs is not as good as new")


@torch.no_grad()
def check_lanes(case: Case) -> None:
    """P4: lane 0 beside quiet and busy neighbours, and all lanes in another order."""
    length = case.length
    quiet = case.no_resets()
    busy = quiet.clone()
    busy[1, length // 3] = True
    busy[1:, length // 2] = True
    x = case.x.clone()
    x[1:] = case.noise(x[1:])
    expected = case.steps(case.x, case.time_idx, quiet)
    other = case.steps(x, case.time_idx, busy)
    same(other[0], expected[0], "P4 (lanes): inputs or resets of other lanes change a lane in step")
    windows = [case.module(inputs, case.time_idx, busy)[0] for inputs in (case.x, x)]
    same(windows[1][0], windows[0][0], "P4 (lanes): other rows change a row of a window")
    # Without any reset a window may take another path, that rounds differently; a step may not.
    window = case.module(case.x, case.time_idx, quiet)[0]
    case.close(windows[0][0], window[0], "P4 (lanes): resets of other rows change a row of a window")
    order = torch.arange(case.lanes - 1, -1, -1, device=x.device)
    turned = case.steps(x[order], case.time_idx, busy[order])
    case.close(turned[order], other, "P4 (lanes): reordered lanes do not give reordered outputs")
