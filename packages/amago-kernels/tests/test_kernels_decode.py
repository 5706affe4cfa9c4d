"""`decode_attention` over a ring buffer: equal to `attention` over the same history, whatever lies in stale slots."""

from __future__ import annotations

import pytest
import torch
from triton_devices import without_triton

from amago_kernels import RingCache, attention, decode_attention, plan_decode, reset_lanes
from amago_kernels.testing import assert_close_ratio, poisoned

BACKENDS = ("auto", *without_triton("decode_attention"))
OPTIONS = {
    "plain": {},
    "window": {"window": 3},
    "clip": {"logit_clip": 0.5},
    "scale": {"scale": 0.2},
    "bias": {"sink": 2, "sink_bias": 0.8},
    "sink": {"window": 2, "sink": 1, "sink_bias": -0.4},
    "clip_sink": {"window": 2, "sink": 1, "sink_bias": -0.4, "logit_clip": 0.3},
}
WRAPPING = ("plain", "window", "clip", "scale")


def poisoned_cache(batch, heads, slots, size, *, dtype=torch.float32):
    shape = (batch, heads, slots, size)
    return RingCache(
        poisoned(shape, dtype=dtype), poisoned(shape, dtype=dtype), torch.zeros(batch, dtype=torch.int64), steps=0
    )


def make_steps(batch, length, heads, size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 3, heads, size, generator=generator, dtype=torch.float64).to(dtype)


# Slots and timesteps; nothing is pinned here, so sinks leave with the first wrap, and are compared before it.
SIZES = [(1, 4), (5, 17), (8, 8), (16, 11)]
CASES = [
    (backend, name, slots, length)
    for backend in BACKENDS
    for name, options in OPTIONS.items()
    for slots, length in SIZES
    if (backend != "sdpa" or "logit_clip" not in options) and (name in WRAPPING or length <= slots)
]


def decode_all(qkv, cache, reset, *, backend, forget_steps=False, **options):
    outputs = []
    for t in range(qkv.shape[1]):
        reset_lanes(cache, reset[:, t])
        if forget_steps:
            cache.steps = None
        outputs.append(decode_attention(*qkv[:, t].unbind(1), cache, backend=backend, **options))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("forget_steps", [False, True])
@pytest.mark.parametrize(("backend", "name", "slots", "length"), CASES)
def test_equals_attention_over_the_history(backend, name, slots, length, forget_steps):
    options = OPTIONS[name]
    qkv = make_steps(4, length, 2, 12)
    reset = torch.zeros(4, length, dtype=torch.bool)
    reset[1, length // 2] = True
    reset[2, 1:3] = True
    reset[3, :] = True
    window = min(options.get("window", slots - 1), slots - 1)
    expected = attention(*qkv.unbind(2), reset=reset, backend="reference", **{**options, "window": window})
    cache = poisoned_cache(4, 2, slots, 12)
    out = decode_all(qkv.float(), cache, reset, backend=backend, forget_steps=forget_steps, **options)
    assert_close_ratio(out, expected, 1e-5)
    since = [length, length - length // 2, length - 2, 1]
    assert cache.length.tolist() == since


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "name", "slots", "length"), CASES)
def test_equals_attention_on_the_gpu(backend, name, slots, length):
    options = OPTIONS[name]
    qkv = make_steps(4, length, 2, 16)
    reset = torch.zeros(4, length, dtype=torch.bool)
    reset[2, 1:3] = True
    window = min(options.get("window", slots - 1), slots - 1)
    expected = attention(*qkv.unbind(2), reset=reset, backend="reference", **{**options, "window": window})
    buffers = (poisoned((4, 2, slots, 16), device="cuda") for _ in range(2))
    cache = RingCache(*buffers, torch.zeros(4, dtype=torch.int64, device="cuda"))
    out = decode_all(qkv.float().cuda(), cache, reset.cuda(), backend=backend, **options)
    assert_close_ratio(out.cpu(), expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_precision(backend):
    qkv = make_steps(3, 11, 2, 8)
    reset = torch.zeros(3, 11, dtype=torch.bool)
    reset[0, 4] = True
    expected = attention(*qkv.unbind(2), reset=reset, window=4, backend="reference")
    out = decode_all(qkv, poisoned_cache(3, 2, 5, 8, dtype=torch.float64), reset, backend=backend)
    assert_close_ratio(out, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_half_precision_cache(backend, dtype):
    qkv = make_steps(3, 11, 2, 8).to(dtype).double()
    reset = torch.zeros(3, 11, dtype=torch.bool)
    expected = attention(*qkv.unbind(2), window=4, backend="reference")
    out = decode_all(qkv.float(), poisoned_cache(3, 2, 5, 8, dtype=dtype), reset, backend=backend)
    assert out.dtype == torch.float32
    assert_close_ratio(out, expected, 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_cast_the_cache(backend):
    qkv = make_steps(3, 11, 2, 8, torch.bfloat16)
    reset = torch.zeros(3, 11, dtype=torch.bool)
    expected = decode_all(qkv.float(), poisoned_cache(3, 2, 5, 8), reset, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = decode_all(qkv.float(), poisoned_cache(3, 2, 5, 8), reset, backend=backend)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_poison_after_a_reset_never_leaks(backend):
    """A lane is reset, and all it left behind becomes NaN; so does a cache whose lengths were set by hand."""
    qkv = make_steps(3, 20, 2, 8)
    cache = poisoned_cache(3, 2, 8, 8)
    none = torch.zeros(3, 20, dtype=torch.bool)
    decode_all(qkv[:, :10].float(), cache, none, backend=backend)
    reset_lanes(cache, torch.tensor([False, True, False]))
    cache.keys[1] = float("nan")
    cache.values[1] = float("inf")
    out = decode_all(qkv[:, 10:].float(), cache, none, backend=backend)
    expected = attention(*qkv.unbind(2), window=7, backend="reference")[:, 10:]
    expected[1] = attention(*qkv[1:2, 10:].unbind(2), window=7, backend="reference")[0]
    assert_close_ratio(out, expected, 1e-5)

    by_hand = poisoned_cache(3, 2, 8, 8)
    by_hand.length.copy_(torch.tensor([0, 3, 9]))
    history = make_steps(3, 10, 2, 8, seed=4).float()
    for lane, length in enumerate(by_hand.length.tolist()):
        for p in range(max(0, length - 8), length):
            by_hand.keys[lane, :, p % 8] = history[lane, p, 1]
            by_hand.values[lane, :, p % 8] = history[lane, p, 2]
    before = by_hand.length.tolist()
    new = make_steps(3, 1, 2, 8, seed=6).float()
    out = decode_attention(*new[:, 0].unbind(1), by_hand, backend=backend)
    for lane, length in enumerate(before):
        full = torch.cat([history[lane : lane + 1, :length], new[lane : lane + 1]], dim=1)
        expected = attention(*full.unbind(2), window=7, backend="reference")[0, -1]
        assert_close_ratio(out[lane], expected, 1e-5, f"lane {lane}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_lanes_do_not_touch_each_other(backend):
    """Bit for bit: neither a reset, nor NaN in another lane, nor a reset of all other lanes changes a lane."""
    qkv = make_steps(4, 30, 2, 16, dtype=torch.float32)
    quiet = torch.zeros(4, 30, dtype=torch.bool)
    busy = quiet.clone()
    busy[2, [3, 4, 11, 25]] = True
    busy[1:, 14] = True
    expected = decode_all(qkv, RingCache.allocate(4, 2, 12, 16), quiet, backend=backend)
    out = decode_all(qkv, RingCache.allocate(4, 2, 12, 16), busy, backend=backend)
    assert torch.equal(out[0], expected[0])
    spoiled = qkv.clone()
    spoiled[3] = float("nan")
    out = decode_all(spoiled, RingCache.allocate(4, 2, 12, 16), busy, backend=backend)
    assert torch.equal(out[0], expected[0])
    assert out[3].isnan().all()


def test_nan_inputs_leave_with_the_episode():
    qkv = make_steps(2, 6, 1, 8, dtype=torch.float32)
    qkv[1, 2] = float("nan")
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[1, 3] = True
    out = decode_all(qkv, RingCache.allocate(2, 1, 4, 8), reset, backend="auto")
    assert out[1, 2].isnan().all()
    assert not out[1, 3:].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_out_of_the_window_is_out_of_sight(backend):
    """And it is still there for a call with a wider window."""
    qkv = make_steps(2, 8, 1, 8, dtype=torch.float32)
    qkv[0, 2] = float("nan")
    none = torch.zeros(2, 8, dtype=torch.bool)
    cache = RingCache.allocate(2, 1, 16, 8)
    out = decode_all(qkv[:, :7], cache, none, backend=backend, window=2)
    assert out[0].isfinite().all(dim=(-1, -2)).tolist() == [True, True, False, False, False, True, True]
    assert out[1].isfinite().all()
    assert decode_attention(*qkv[:, 7].unbind(1), cache, backend=backend)[0].isnan().all()


def test_in_place_at_fixed_addresses():
    cache = RingCache.allocate(2, 3, 4, 8)
    addresses = [t.data_ptr() for t in (cache.keys, cache.values, cache.length)]
    qkv = make_steps(2, 9, 3, 8, dtype=torch.float32)
    decode_all(qkv, cache, torch.zeros(2, 9, dtype=torch.bool), backend="auto")
    assert [t.data_ptr() for t in (cache.keys, cache.values, cache.length)] == addresses
    assert cache.length.tolist() == [9, 9]
    torch.testing.assert_close(cache.keys[:, :, 8 % 4], qkv[:, 8, 1])
    torch.testing.assert_close(cache.values[:, :, 7 % 4], qkv[:, 7, 2])


def test_layers_share_one_length():
    """One plan for several caches gives what each cache gives alone."""
    first = [make_steps(3, 12, 2, 8, dtype=torch.float32, seed=i) for i in range(2)]
    alone = [RingCache.allocate(3, 2, 5, 8) for _ in range(2)]
    length = torch.zeros(3, dtype=torch.int64)
    shared = [RingCache(torch.zeros(3, 2, 5, 8), torch.zeros(3, 2, 5, 8), length, steps=0) for _ in range(2)]
    for t in range(12):
        mask = torch.tensor([t == 4, False, t == 9])
        for cache in alone:
            reset_lanes(cache, mask)
        reset_lanes(shared[0], mask)
        plan = plan_decode(shared[0])
        for layer in range(2):
            expected = decode_attention(*first[layer][:, t].unbind(1), alone[layer])
            out = decode_attention(*first[layer][:, t].unbind(1), shared[layer], plan=plan)
            assert torch.equal(out, expected)
        shared[0].advance()


def test_lengths_set_by_hand_are_noticed():
    """`steps` says that no lane is longer; if one is, all slots are looked at."""
    cache = RingCache.allocate(1, 1, 6, 8)
    cache.keys.normal_()
    cache.values.normal_()
    cache.length.fill_(5)
    assert plan_decode(cache).masks.looked == 6


def test_no_graph_is_recorded():
    cache = RingCache.allocate(1, 1, 4, 8)
    q = torch.randn(1, 1, 8, requires_grad=True)
    assert not decode_attention(q, q, q, cache).requires_grad
    assert not cache.keys.requires_grad


def test_works_across_inference_mode():
    with torch.inference_mode():
        cache = RingCache.allocate(1, 1, 4, 8)
        decode_attention(*torch.randn(3, 1, 1, 8).unbind(0), cache)
    decode_attention(*torch.randn(3, 1, 1, 8).unbind(0), cache)
    assert cache.length.tolist() == [2]


def test_refusals_say_why():
    cache = RingCache.allocate(2, 1, 4, 8)
    q = torch.zeros(2, 1, 8)
    with pytest.raises(ValueError, match="lanes, heads and head size"):
        decode_attention(q[:1], q[:1], q[:1], cache)
    with pytest.raises(ValueError, match="backend='triton' cannot serve"):
        decode_attention(q, q, q, cache, backend="triton")
    with pytest.raises(ValueError, match="backend='flash' is not known"):
        decode_attention(q, q, q, cache, backend="flash")
    with pytest.raises(ValueError, match="SDPA"):
        decode_attention(q, q, q, cache, backend="sdpa", logit_clip=1.0)
    with pytest.raises(ValueError, match="accumulate in torch.bfloat16"):
        decode_attention(q, q, q, RingCache.allocate(2, 1, 4, 8, dtype=torch.bfloat16), backend="matmul")
    with pytest.raises(ValueError, match="window=-1"):
        decode_attention(q, q, q, cache, window=-1)
    with pytest.raises(ValueError, match="sink=-1"):
        decode_attention(q, q, q, cache, sink=-1)
    with pytest.raises(ValueError, match="logit_clip=-1"):
        decode_attention(q, q, q, cache, logit_clip=-1.0)
    with pytest.raises(ValueError, match="mask is torch.int64"):
        reset_lanes(cache, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="slots=0"):
        RingCache.allocate(2, 1, 0, 8)
    with pytest.raises(ValueError, match="share one dtype and one shape"):
        RingCache(torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 5, 8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="length is torch.int32"):
        RingCache(torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="length is on meta and keys on cpu"):
        RingCache(torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8), torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="keys is torch.int64"):
        RingCache.allocate(2, 1, 4, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="q is torch.int64.*give floating dtypes"):
        decode_attention(q.long(), q, q, cache)
    with pytest.raises(ValueError, match="window=1.5"):
        decode_attention(q, q, q, cache, window=1.5)
    assert cache.length.tolist() == [0, 0]
