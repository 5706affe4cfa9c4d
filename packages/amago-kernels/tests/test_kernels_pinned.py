"""Ring buffers that pin the first timesteps of an episode: equal to `attention`, however often they wrap."""

from __future__ import annotations

import pytest
import torch
from triton_devices import without_triton

from amago_kernels import RingCache, attention, decode_attention, plan_decode, reset_lanes
from amago_kernels.testing import assert_close_ratio, poisoned

BACKENDS = ("auto", *without_triton("decode_attention"))
LENGTH = 24
# Pinned slots, slots of the ring, and the options of the call.
CACHES = [(1, 1), (1, 5), (2, 7), (4, 2), (3, 6)]
OPTIONS = {
    "sink": {},
    "bias": {"sink_bias": 0.8},
    "window": {"window": 2},
    "window0": {"window": 0, "sink_bias": -0.5},
    "wide_window": {"window": 6},
    "clip": {"logit_clip": 0.4},
    "all": {"window": 1, "sink_bias": -0.6, "logit_clip": 0.5, "scale": 0.7},
}
CASES = [
    (backend, name, pinned, ring)
    for backend in BACKENDS
    for name, options in OPTIONS.items()
    for pinned, ring in CACHES
    if backend != "sdpa" or "logit_clip" not in options
]


def make_steps(batch, length, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 3, 2, 8, generator=generator, dtype=torch.float64).to(dtype)


def make_resets() -> torch.Tensor:
    """One lane without, one with a single reset, one with neighbours, one that never gets past its sinks."""
    reset = torch.zeros(4, LENGTH, dtype=torch.bool)
    reset[1, 9] = True
    reset[2, [1, 2, 20]] = True
    reset[3, ::2] = True
    return reset


def poisoned_cache(batch, pinned, ring, *, dtype=torch.float32, device=None):
    keys, values = (poisoned((batch, 2, pinned + ring, 8), dtype=dtype, device=device) for _ in range(2))
    return RingCache(keys, values, torch.zeros(batch, dtype=torch.int64, device=device), steps=0, sink=pinned)


def decode_all(qkv, cache, reset, *, forget_steps=False, **options):
    outputs = []
    for t in range(qkv.shape[1]):
        reset_lanes(cache, reset[:, t])
        if forget_steps:
            cache.steps = None
        outputs.append(decode_attention(*qkv[:, t].unbind(1), cache, **options))
    return torch.stack(outputs, dim=1)


def by_windows(qkv, reset, ring, sink, *, window=None, **options):
    band = ring - 1 if window is None else min(window, ring - 1)
    return attention(*qkv.unbind(2), reset=reset, window=band, sink=sink, backend="reference", **options)


def test_slots_by_hand():
    """Two pinned slots, three in the ring."""
    cache = RingCache.allocate(2, 1, 5, 4, sink=2)
    assert (cache.slots, cache.ring, cache.sink) == (5, 3, 2)
    assert cache.slot_of(torch.arange(10)).tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 2, 3]
    assert cache.held_timesteps(torch.tensor([7, 9])).tolist() == [[0, 1, 5, 6, 7], [0, 1, 8, 9, 7]]
    assert cache.held_timesteps(torch.tensor([4, 1]))[:, :2].tolist() == [[0, 1], [0, 1]]
    plain = RingCache.allocate(1, 1, 3, 4)
    assert plain.slot_of(torch.arange(5)).tolist() == [0, 1, 2, 0, 1]
    assert plain.held_timesteps(torch.tensor([4])).tolist() == [[3, 4, 2]]


def test_what_lies_where():
    cache = RingCache.allocate(1, 2, 5, 8, sink=2)
    qkv = make_steps(1, 8, torch.float32)
    decode_all(qkv, cache, torch.zeros(1, 8, dtype=torch.bool), sink=2)
    for slot, timestep in enumerate([0, 1, 5, 6, 7]):
        assert torch.equal(cache.keys[0, :, slot], qkv[0, timestep, 1])
        assert torch.equal(cache.values[0, :, slot], qkv[0, timestep, 2])


@pytest.mark.parametrize("forget_steps", [False, True])
@pytest.mark.parametrize(("backend", "name", "pinned", "ring"), CASES)
def test_equals_attention_over_the_history(backend, name, pinned, ring, forget_steps):
    qkv, reset = make_steps(4, LENGTH), make_resets()
    expected = by_windows(qkv, reset, ring, pinned, **OPTIONS[name])
    cache = poisoned_cache(4, pinned, ring)
    options = {**OPTIONS[name], "sink": pinned, "backend": backend}
    out = decode_all(qkv.float(), cache, reset, forget_steps=forget_steps, **options)
    assert_close_ratio(out, expected, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "name", "pinned", "ring"), CASES)
def test_equals_attention_on_the_gpu(backend, name, pinned, ring):
    qkv, reset = make_steps(4, LENGTH), make_resets()
    expected = by_windows(qkv, reset, ring, pinned, **OPTIONS[name])
    cache = poisoned_cache(4, pinned, ring, device="cuda")
    out = decode_all(qkv.float().cuda(), cache, reset.cuda(), sink=pinned, backend=backend, **OPTIONS[name])
    assert_close_ratio(out.cpu(), expected, 1e-5)


@pytest.mark.parametrize("sink", [0, 1, 2])
@pytest.mark.parametrize("window", [None, 1])
def test_a_call_may_use_fewer_sinks_than_the_cache_pins(sink, window):
    """What is pinned and no sink is seen as long as the ring would have held it, and no longer."""
    qkv, reset = make_steps(4, LENGTH), make_resets()
    expected = by_windows(qkv, reset, 5, sink, window=window)
    out = decode_all(qkv.float(), poisoned_cache(4, 2, 5), reset, sink=sink, window=window)
    assert_close_ratio(out, expected, 1e-5)


def test_sinks_beyond_the_pinned_ones_leave_with_the_ring():
    qkv, reset = make_steps(1, 8), torch.zeros(1, 8, dtype=torch.bool)
    out = decode_all(qkv.float(), poisoned_cache(1, 1, 4), reset, sink=2, window=1)
    expected = by_windows(qkv, reset, 4, 2, window=1)
    assert_close_ratio(out[:, :5], expected[:, :5], 1e-5)
    assert_close_ratio(out[:, 5:], by_windows(qkv, reset, 4, 1, window=1)[:, 5:], 1e-5)


def test_a_full_cache_needs_no_mask():
    """Without window and bias all that is stored is visible, pinned or not: acting then costs what it costs without."""
    cache = RingCache.allocate(3, 2, 6, 8, sink=2)
    decode_all(make_steps(3, 9, torch.float32), cache, torch.zeros(3, 9, dtype=torch.bool), sink=2)
    for window in (None, 3, 5):
        masks = plan_decode(cache, sink=2, window=window).masks
        assert masks.hidden is None and masks.sinks is None
        assert masks.place[2] == 2 + (9 - 2) % 4
    assert plan_decode(cache, sink=2, window=2).masks.hidden is not None
    assert plan_decode(cache, sink=1).masks.hidden is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_lanes_do_not_touch_each_other(backend):
    qkv, reset = make_steps(4, LENGTH, torch.float32), make_resets()
    quiet = torch.zeros_like(reset)
    options = {"sink": 2, "sink_bias": 0.3, "backend": backend}
    expected = decode_all(qkv, RingCache.allocate(4, 2, 6, 8, sink=2), quiet, **options)
    spoiled = qkv.clone()
    spoiled[3] = float("nan")
    out = decode_all(spoiled, RingCache.allocate(4, 2, 6, 8, sink=2), reset, **options)
    assert torch.equal(out[0], expected[0])
    assert out[3].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pinned_poison_leaves_with_the_episode(backend):
    qkv = make_steps(2, 12, torch.float32)
    qkv[1, 0] = float("nan")
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[1, 8] = True
    cache = RingCache.allocate(2, 2, 5, 8, sink=2)
    out = decode_all(qkv, cache, reset, sink=2, backend=backend)
    assert out[1, :8].isnan().all()
    assert out[1, 8:].isfinite().all() and out[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    qkv, reset = make_steps(4, LENGTH).to(dtype).double(), make_resets()
    expected = by_windows(qkv, reset, 5, 2, sink_bias=0.4)
    out = decode_all(qkv.to(dtype), poisoned_cache(4, 2, 5, dtype=dtype), reset, sink=2, sink_bias=0.4)
    assert out.dtype == dtype
    assert_close_ratio(out, expected, 1e-2 if dtype == torch.bfloat16 else 1e-12)


def test_refusals_say_why():
    for sink in (-1, 4):
        with pytest.raises(ValueError, match=rf"sink={sink} is not allowed with 4 slots; give an integer in \[0, 3\]"):
            RingCache.allocate(2, 1, 4, 8, sink=sink)
