"""A checker for sequence backbones, ours and yours.

`check_backbone` takes a function that builds a backbone and raises an `AssertionError` that names the property that
does not hold:

=====  ==========================================================================================================
P1     a window equals stepping through it, with resets anywhere, also when the window is fed in pieces with a state
P2     outputs do not depend on later inputs, exactly
P3     a reset forgets everything, NaN included, in steps; and no gradient crosses it in windows
P4     lanes are independent bit for bit; reordered lanes give reordered outputs
P5     timesteps appended on the right change neither earlier outputs nor gradients
P6     P1 holds beyond `max_seq_len`
P7     evaluation changes no parameter and no buffer, and repeats itself
P8     without dropout training equals evaluation; with dropout only training drops, and steps never do
P9     if asked: a constant added to the time changes nothing, or something
P10    the state neither grows nor moves, and can be saved, restored and selected from
=====  ==========================================================================================================

Dimensions: `B` lanes, `L` timesteps, `D` input features, `E` output features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PATTERNS = ("none", "some", "first", "last", "all")


@dataclass
class _Case:
    module: Any
    x: Tensor
    time_idx: Tensor
    tolerance: float
    max_seq_len: int
    generator: torch.Generator

    @property
    def lanes(self) -> int:
        return self.x.shape[0]

    @property
    def length(self) -> int:
        return self.x.shape[1]

    def resets(self, pattern: str) -> Tensor | None:
        reset = torch.zeros(self.lanes, self.length, dtype=torch.bool)
        if pattern == "none":
            return None
        if pattern == "first":
            reset[:, 0] = True
        elif pattern == "last":
            reset[:, -1] = True
        elif pattern == "all":
            reset[:] = True
        else:
            reset[:] = torch.rand(self.lanes, self.length, generator=self.generator) < 0.15
            # One lane without a reset, so that something goes beyond max_seq_len.
            reset[0] = False
        return reset.to(self.x.device)

    def times(self, reset: Tensor | None) -> Tensor:
        """Times that start at 0 after every reset."""
        if reset is None:
            return self.time_idx
        start = torch.where(reset, self.time_idx, 0).cummax(dim=1).values
        return self.time_idx - start

    def steps(self, x: Tensor, time_idx: Tensor, reset: Tensor | None, state: Any = None) -> Tensor:
        state = self.module.initial_state(x.shape[0]) if state is None else state
        outputs = []
        for t in range(x.shape[1]):
            if reset is not None:
                self.module.reset_state(state, reset[:, t])
            outputs.append(self.module.step(x[:, t], time_idx[:, t], state))
        return torch.stack(outputs, dim=1)


def check_backbone(
    factory: Callable[[int, int], Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    in_dim: int = 6,
    max_seq_len: int = 7,
    lanes: int = 4,
    length: int | None = None,
    dropout: bool = False,
    time_offset: str | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> None:
    """Holds a sequence backbone to the contract of `TrajEncoder`.

    Args:
        factory: builds the backbone from `in_dim` and `max_seq_len`, for example `GRUConfig(d_hidden=16).build`.
        dtype: float32 or float64.
        device: where to run.
        in_dim: features `D` of the random inputs.
        max_seq_len: given to the factory.
        lanes: `B`, at least 3.
        length: timesteps `L`; by default `3 * max_seq_len + 2`. Times run from 0 to `L - 1`, and to `L + 8` with
            `time_offset`.
        dropout: whether the backbone was built with dropout.
        time_offset: "invariant" (rotary positions), "sensitive" (absolute positions), or None: not checked.
        tolerance: largest difference allowed, relative to the largest output or to 1; by default 1e-5 for float32 and
            1e-10 for float64.
        seed: of weights and inputs; the global generator of torch is left as it was.

    Raises:
        AssertionError: naming the property that does not hold.
        ValueError: if an argument is out of range.
    """
    if lanes < 3:
        raise ValueError(f"lanes={lanes} is not allowed; give an integer >= 3")
    if time_offset not in (None, "invariant", "sensitive"):
        raise ValueError(f"time_offset={time_offset!r} is not allowed; choose None, 'invariant' or 'sensitive'")
    steps = 3 * max_seq_len + 2 if length is None else length
    if steps < 4:
        raise ValueError(f"length={length} is not allowed; give None or an integer >= 4")
    if tolerance is None:
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = factory(in_dim, max_seq_len).to(device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(lanes, steps, in_dim, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
        time_idx = torch.arange(steps, device=device).expand(lanes, steps).contiguous()
        case = _Case(module, x, time_idx, tolerance, max_seq_len, generator)
        module.eval()
        _check_windows_equal_steps(case)
        _check_causality(case)
        _check_resets_in_steps(case)
        _check_resets_in_windows(case)
        _check_lanes(case)
        _check_padding(case)
        _check_purity(case)
        _check_dropout(case, dropout)
        _check_time_offset(case, time_offset)
        _check_state(case)


def _close(case: _Case, out: Tensor, ref: Tensor, message: str) -> None:
    assert out.shape == ref.shape, f"{message}: shapes {tuple(out.shape)} and {tuple(ref.shape)} differ"
    assert bool(torch.isfinite(out).all()), f"{message}: NaN or infinite values"
    difference = float((out - ref).abs().max())
    limit = case.tolerance * max(1.0, float(ref.abs().max()))
    assert difference <= limit, f"{message}: differs by {difference:.3g}, allowed is {limit:.3g}"


def _same(out: Tensor, ref: Tensor, message: str) -> None:
    assert torch.equal(out, ref), f"{message}: differs by {float((out - ref).abs().max()):.3g}, allowed is nothing"


def _loss(out: Tensor) -> Tensor:
    """A loss that no norm makes constant, unlike the plain sum or the sum of squares of a normalised output."""
    weights = torch.arange(1.0, out.shape[-1] + 1, device=out.device, dtype=out.dtype)
    return (out.square() * weights).mean()


@torch.no_grad()
def _check_windows_equal_steps(case: _Case) -> None:
    module = case.module
    for pattern in _PATTERNS:
        reset = case.resets(pattern)
        time_idx = case.times(reset)
        out, state = module(case.x, time_idx, reset)
        assert state is None, "P1 (window = steps): forward without a state returns a state; return None"
        shape = (case.lanes, case.length, module.out_dim)
        assert out.shape == shape, f"P1 (window = steps): forward returns {tuple(out.shape)}; out_dim says {shape}"
        assert out.dtype == case.x.dtype, f"P1 (window = steps): forward returns {out.dtype} for {case.x.dtype}"
        by_steps = case.steps(case.x, time_idx, reset)
        inside = slice(0, case.max_seq_len)
        _close(case, by_steps[:, inside], out[:, inside], f"P1 (window = steps), resets: {pattern}")
        _close(case, by_steps, out, f"P6 (window = steps beyond max_seq_len), resets: {pattern}")
        _check_pieces(case, reset, out, f"P1 (window in pieces with a state), resets: {pattern}")


def _check_pieces(case: _Case, reset: Tensor | None, expected: Tensor, message: str) -> None:
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
    _close(case, torch.cat(outputs, dim=1), expected, message)


@torch.no_grad()
def _check_causality(case: _Case) -> None:
    for pattern in ("none", "some"):
        reset = case.resets(pattern)
        before = case.module(case.x, case.times(reset), reset)[0]
        for cut in sorted({1, case.length // 2, case.length - 1}):
            x = case.x.clone()
            x[:, cut:] = torch.randn(x[:, cut:].shape, generator=case.generator, dtype=torch.float64).to(x)
            after = case.module(x, case.times(reset), reset)[0]
            _same(after[:, :cut], before[:, :cut], f"P2 (causal): inputs from timestep {cut} on change earlier outputs")


@torch.no_grad()
def _check_resets_in_steps(case: _Case) -> None:
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
        _close(case, out[1], fresh[1], f"P3 (reset): a lane reset after {before} NaN inputs is not as good as new")


def _check_resets_in_windows(case: _Case) -> None:
    cut = case.length // 2
    reset = torch.zeros(case.lanes, case.length, dtype=torch.bool, device=case.x.device)
    reset[1, cut] = True
    x = case.x.clone().requires_grad_()
    out = case.module(x, case.times(reset), reset)[0]
    (grad,) = torch.autograd.grad(_loss(out[1, cut:]), x)
    assert bool(torch.isfinite(grad).all()), "P3 (reset): gradients hold NaN or infinite values"
    assert not grad[1, :cut].any(), "P3 (reset): a gradient flows back across a reset inside a window"
    assert grad[1, cut].any(), "P3 (reset): no gradient reaches the timestep of the reset"


@torch.no_grad()
def _check_lanes(case: _Case) -> None:
    module, length = case.module, case.length
    quiet = torch.zeros(case.lanes, length, dtype=torch.bool, device=case.x.device)
    busy = quiet.clone()
    busy[1, length // 3] = True
    busy[1:, length // 2] = True
    x = case.x.clone()
    x[1:] = torch.randn(x[1:].shape, generator=case.generator, dtype=torch.float64).to(x)
    expected = case.steps(case.x, case.time_idx, quiet)
    other = case.steps(x, case.time_idx, busy)
    _same(other[0], expected[0], "P4 (lanes): inputs or resets of other lanes change a lane in step")
    window = module(case.x, case.time_idx, quiet)[0]
    _same(module(x, case.time_idx, busy)[0][0], window[0], "P4 (lanes): other rows change a row of a window")
    order = torch.arange(case.lanes - 1, -1, -1, device=x.device)
    turned = case.steps(x[order], case.time_idx, busy[order])
    _close(case, turned[order], other, "P4 (lanes): reordered lanes do not give reordered outputs")


def _check_padding(case: _Case) -> None:
    module, kept = case.module, case.length // 2
    parameters = [p for p in module.parameters() if p.requires_grad]
    results = []
    for length in (kept, case.length):
        reset = torch.zeros(case.lanes, length, dtype=torch.bool, device=case.x.device)
        reset[:, 0] = True
        out = module(case.x[:, :length], case.time_idx[:, :length], reset)[0][:, :kept]
        grads = torch.autograd.grad(_loss(out), parameters, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        results.append((out.detach(), flat))
    _close(case, results[1][0], results[0][0], "P5 (padding): timesteps on the right change earlier outputs")
    size = float(results[0][1].norm())
    error = float((results[1][1] - results[0][1]).norm())
    assert error <= 10 * case.tolerance * max(1.0, size), (
        f"P5 (padding): timesteps on the right change gradients by {error:.3g} of {size:.3g}"
    )


def _check_purity(case: _Case) -> None:
    module = case.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    reset = case.resets("some")
    first = module(case.x, case.times(reset), reset)[0].detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = module(case.x, case.times(reset), reset)[0].clone()
            by_steps = [case.steps(case.x, case.times(reset), reset).clone() for _ in range(2)]
        _close(case, again, first, f"P7 (eval is pure): forward under {mode.__name__} differs")
        _same(by_steps[1], by_steps[0], "P7 (eval is pure): two runs of steps differ")
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"P7 (eval is pure): {name} has changed"


@torch.no_grad()
def _check_dropout(case: _Case, dropout: bool) -> None:
    module, reset = case.module, case.resets("some")
    expected = module(case.x, case.times(reset), reset)[0]
    by_steps = case.steps(case.x, case.times(reset), reset)
    module.train()
    try:
        in_training = [module(case.x, case.times(reset), reset)[0] for _ in range(2)]
        _same(case.steps(case.x, case.times(reset), reset), by_steps, "P8 (dropout): step in training mode differs")
    finally:
        module.eval()
    if dropout:
        assert not torch.equal(*in_training), "P8 (dropout): training mode drops nothing although dropout=True"
    else:
        _close(case, in_training[0], expected, "P8 (dropout): training differs from evaluation; pass dropout=True?")
    _same(module(case.x, case.times(reset), reset)[0], expected, "P8 (dropout): evaluation does not repeat itself")


@torch.no_grad()
def _check_time_offset(case: _Case, time_offset: str | None) -> None:
    if time_offset is None:
        return
    out = case.module(case.x, case.time_idx)[0]
    moved = case.module(case.x, case.time_idx + 9)[0]
    if time_offset == "invariant":
        _close(case, moved, out, "P9 (time offset): adding 9 to every time changes the outputs")
    else:
        difference = float((moved - out).abs().max())
        assert difference > 100 * case.tolerance, "P9 (time offset): adding 9 to every time changes nothing"


@torch.no_grad()
def _check_state(case: _Case) -> None:
    module, half = case.module, case.length // 2
    state = module.initial_state(case.lanes)
    sizes = {name: tuple(value.shape) for name, value in state.state_dict().items()}
    addresses = {name: value.data_ptr() for name, value in getattr(state, "tensors", {}).items()}
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
    for name, value in getattr(state, "tensors", {}).items():
        assert value.data_ptr() == addresses[name], f"P10 (state): {name} moves to another address"
    restored = module.initial_state(case.lanes)
    restored.load_state_dict(snapshot)
    out = case.steps(second, case.time_idx[:, half:], reset[:, half:], restored)
    _same(out, expected, "P10 (state): a restored snapshot goes on differently; is it a copy, is it complete?")
    out = case.steps(second[order], case.time_idx[order, half:], reset[order, half:], picked)
    _close(case, out, expected[order], "P10 (state): selected lanes go on differently; are they copies?")
