"""Checks of what flows back: P3, P5 and P11."""

from __future__ import annotations

import torch
from torch import Tensor

from ._case import Case, gradients, loss, trained

# A weaker dependence may have a gradient too small for any number but zero.
_PLAIN = 1e-3


def check_resets_in_windows(case: Case) -> None:
    """P3: one lane with a reset in the middle."""
    cut = case.length // 2
    reset = case.no_resets()
    reset[1, cut] = True
    x = case.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(case.window(x, reset)[1, cut:]), x)
    assert bool(torch.isfinite(grad).all()), "P3 (reset): gradients hold NaN or infinite values"
    assert not grad[1, :cut].any(), "P3 (reset): a gradient flows back across a reset inside a window"
    assert grad[1, cut].any(), "P3 (reset): no gradient reaches the timestep of the reset"


def check_padding(case: Case) -> None:
    """P5: a window, and the same window with as many timesteps again behind it."""
    kept = case.length // 2
    outputs, grads = [], []
    for length in (kept, case.length):
        reset = case.no_resets()[:, :length]
        reset[:, 0] = True
        x = case.x[:, :kept].clone().requires_grad_()
        padded = torch.cat([x, case.x[:, kept:length]], dim=1)
        out = case.module(padded, case.time_idx[:, :length], reset)[0][:, :kept]
        grads.append(gradients(loss(out), [x, *trained(case.module)]))
        outputs.append(out)
    case.close(outputs[1], outputs[0], "P5 (padding): timesteps on the right change earlier outputs")
    case.close_gradients(grads[1], grads[0], "P5 (padding): timesteps on the right change gradients")


def check_gradients(case: Case, memory: bool) -> None:
    """P11: gradients of one output are compared with what a changed input does to it."""
    last = case.length - 1
    x = case.x.clone().requires_grad_()
    grad = gradients(loss(case.window(x)[:, last]), [x]).view(x.shape)
    with torch.no_grad():  # Without gradients, like what it is compared with: the code may take another path.
        expected = case.window(case.x)[:, last]
    if not memory:
        assert not grad[:, :last].any(), "P11 (gradient): memory=False, but a gradient reaches earlier timesteps"
    depends = False
    near = {last - 1, last - 2, last - case.max_seq_len // 2, last - case.max_seq_len + 1, 0}
    for t in sorted(t for t in near if 0 <= t < last):
        changed = _difference(case, expected, t)
        silent = (changed > _PLAIN) & ~grad[:, t].any(dim=-1)
        assert not silent.any(), (
            f"P11 (gradient): timestep {t} changes output {last} by {float(changed[silent].max()):.3g}, and gets no "
            "gradient from it"
        )
        depends = depends or bool(changed.any())
    if memory:
        # With one timestep of context there may be nothing to remember.
        remembers = depends or case.max_seq_len == 1
        assert remembers, "P11 (gradient): no earlier timestep changes the last output; pass memory=False?"
    else:
        assert not depends, "P11 (gradient): memory=False, but earlier timesteps change the last output"
    _check_gradients_with_a_state(case)


@torch.no_grad()
def _difference(case: Case, expected: Tensor, t: int) -> Tensor:
    """How much other inputs at timestep `t` change the last outputs, `[B]`."""
    x = case.x.clone()
    x[:, t] = case.noise(x[:, t])
    return (case.window(x)[:, -1] - expected).abs().amax(dim=-1)


def _check_gradients_with_a_state(case: Case) -> None:
    """What autograd saved must survive that the state is updated in place by what comes next."""
    grads = []
    for with_state in (False, True):
        x = case.x.clone().requires_grad_()
        state = case.module.initial_state(case.lanes) if with_state else None
        out = case.module(x, case.time_idx, None, state)[0]
        if with_state:
            case.steps(case.x, case.time_idx, None, state)
            held = [name for name, value in getattr(state, "tensors", {}).items() if value.requires_grad]
            assert not held, f"P10 (state): {', '.join(held)} holds a gradient after forward; detach it"
        grads.append(gradients(loss(out), [x, *trained(case.module)]))
    case.close_gradients(grads[1], grads[0], "P11 (gradient): a state that is updated later changes gradients")
