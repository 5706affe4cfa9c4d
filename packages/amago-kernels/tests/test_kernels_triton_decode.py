"""`decode_attention` in Triton: equal to `attention` over the history, for any split of the work among programs."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from triton_devices import DEVICES

from amago_kernels import RingCache, attention, decode_attention, plan_decode, reset_lanes
from amago_kernels.attention import decode_ops
from amago_kernels.testing import assert_close_ratio, poisoned

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# Pinned slots, slots of the ring, programs per head, options of the call. One program reads 32 timesteps at a time.
CASES = {
    "plain": (0, 19, 1, {}),
    "split": (0, 70, 2, {}),
    "mostly_idle": (0, 19, 8, {}),
    "one_slot": (0, 1, 2, {}),
    "window": (0, 70, 2, {"window": 40}),
    "window0": (0, 6, 1, {"window": 0}),
    "scale": (0, 6, 1, {"scale": 0.7}),
    "clip": (0, 6, 2, {"logit_clip": 0.3}),
    "pinned": (3, 16, 1, {"sink": 3}),
    "pinned_split": (40, 36, 4, {"sink": 40, "window": 21, "sink_bias": -0.6}),
    "bias": (2, 6, 1, {"sink": 2, "sink_bias": 0.8}),
    "fewer_sinks": (3, 6, 1, {"sink": 1, "sink_bias": 0.8}),
    "all": (2, 33, 2, {"sink": 2, "window": 5, "sink_bias": 0.8, "logit_clip": 0.4, "scale": 0.7}),
}


@pytest.fixture(autouse=True)
def _needs_triton():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")


def make_steps(batch, length, heads, size, dtype=torch.float32, seed=0):
    """Values that the dtype can hold, in float64."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(batch, length, 3, heads, size, generator=generator, dtype=torch.float64)
    return steps.to(dtype).double()


def make_cache(history, lengths, pinned, ring, *, dtype=torch.float32, device="cpu", splits=None):
    """What lanes of these lengths remember of a history `[B, L, 3, H, E]`; NaN everywhere else."""
    batch, _, _, heads, size = history.shape
    keys, values = (poisoned((batch, heads, pinned + ring, size), dtype=dtype) for _ in range(2))
    cache = RingCache(keys, values, torch.tensor(lengths), sink=pinned)
    for lane, length in enumerate(lengths):
        for timestep in range(length):
            slot = cache.slot_of(torch.tensor(timestep))
            keys[lane, :, slot], values[lane, :, slot] = history[lane, timestep, 1:].to(dtype)
    cache = RingCache(keys.to(device), values.to(device), cache.length.to(device), sink=pinned)
    if splits is not None:
        cache._scratch = decode_ops.DecodeScratch.allocate(cache.keys, splits)
        cache.scratch.partials.fill_(float("nan"))
    return cache


def by_windows(history, lengths, ring, *, window=None, **options):
    """The outputs `[B, H, E]` of timestep `lengths[b]` of every lane."""
    band = ring - 1 if window is None else min(window, ring - 1)
    rows = [
        attention(*history[b : b + 1, : n + 1].unbind(2), window=band, backend="reference", **options)[0, -1]
        for b, n in enumerate(lengths)
    ]
    return torch.stack(rows)


def present(history, lengths):
    """Query, key and value `[B, H, E]` of timestep `lengths[b]` of every lane: views, as of a packed projection."""
    return history[torch.arange(len(lengths)), torch.tensor(lengths)].unbind(1)


def assert_at_rest(cache):
    assert not cache.scratch.counters.any()


def check(case, lengths, *, heads=1, size=64, dtype=torch.float32, device="cpu"):
    pinned, ring, splits, options = case
    history = make_steps(len(lengths), max(lengths) + 1, heads, size, dtype)
    expected = by_windows(history, lengths, ring, **options)
    cache = make_cache(history, lengths, pinned, ring, dtype=dtype, device=device, splits=splits)
    q, k, v = (x.to(device, dtype) for x in present(history, lengths))
    out = decode_attention(q, k, v, cache, backend="triton", **options)
    assert out.dtype == dtype
    assert_close_ratio(out.cpu(), expected, TOLERANCE[dtype])
    after = make_cache(history, [n + 1 for n in lengths], pinned, ring, dtype=dtype)
    assert torch.equal(cache.length.cpu(), after.length)
    for held, wanted in ((cache.keys, after.keys), (cache.values, after.values)):
        assert torch.equal(held.cpu().nan_to_num(1e4), wanted.nan_to_num(1e4))
    assert_at_rest(cache)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_equals_attention_over_the_history(name, device):
    """Lanes that are empty, short, about to be full, full, and wrapped more than once; stale slots hold NaN."""
    slots = CASES[name][0] + CASES[name][1]
    check(CASES[name], [0, 1, 3, slots - 1, slots, 2 * slots + 3], device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 2])
def test_sinks_beyond_the_pinned_ones(splits, device):
    """They leave with the ring, and those that leave are the oldest."""
    lengths = [1, 4, 9, 12, 40]
    history = make_steps(5, 41, 1, 16)
    q, k, v = (x.float().to(device) for x in present(history, lengths))
    outputs = []
    for backend in ("triton", "reference"):
        cache = make_cache(history, lengths, 2, 9, device=device, splits=splits)
        outputs.append(decode_attention(q, k, v, cache, sink=6, window=2, sink_bias=0.8, backend=backend))
    assert_close_ratio(*outputs, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_beyond_the_range_of_the_exponential(device):
    history = make_steps(1, 61, 1, 64) * torch.tensor([60.0, 1.0, 1.0])[:, None, None]
    expected = by_windows(history, [60], 70)
    cache = make_cache(history, [60], 0, 70, device=device, splits=2)
    q, k, v = (x.float().to(device) for x in present(history, [60]))
    assert_close_ratio(decode_attention(q, k, v, cache, backend="triton").cpu(), expected, 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [16, 24, 40, 64, 128])
def test_head_sizes_and_dtypes(size, dtype, device):
    check((0, 11, 2, {}), [25], heads=2, size=size, dtype=dtype, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", range(3))
def test_every_configuration(number, device, monkeypatch):
    kernel = importlib.import_module("amago_kernels.attention.triton_decode").decode_kernel
    assert len(kernel.configs) == 3
    monkeypatch.setattr(kernel, "configs", [kernel.configs[number]])
    check((3, 40, 2, {"sink": 3, "window": 37}), [50, 90], device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 2])
def test_acting_with_resets(splits, device):
    """Step by step; the interpreter cannot show a race, but it shows counters that are not put back."""
    qkv = make_steps(3, 9, 2, 16)
    reset = torch.zeros(3, 9, dtype=torch.bool)
    reset[1, 5] = True
    reset[2, [1, 2, 6]] = True
    expected = attention(*qkv.unbind(2), reset=reset, window=3, sink=1, backend="reference")
    shape = (3, 2, 5, 16)
    cache = RingCache(poisoned(shape), poisoned(shape), torch.zeros(3, dtype=torch.int64), sink=1)
    cache = RingCache(cache.keys.to(device), cache.values.to(device), cache.length.to(device), steps=0, sink=1)
    cache._scratch = decode_ops.DecodeScratch.allocate(cache.keys, splits)
    addresses = [t.data_ptr() for t in (cache.keys, cache.values, cache.length, cache.scratch.counters)]
    steps = qkv.float().to(device)
    for t in range(9):
        reset_lanes(cache, reset[:, t].to(device))
        out = decode_attention(*steps[:, t].unbind(1), cache, sink=1, backend="triton")
        assert_close_ratio(out.cpu(), expected[:, t], 1e-5, f"timestep {t}")
        assert_at_rest(cache)
    assert cache.length.tolist() == [9, 4, 3] and cache.steps == 9
    assert [t.data_ptr() for t in (cache.keys, cache.values, cache.length, cache.scratch.counters)] == addresses


@pytest.mark.parametrize("device", DEVICES)
def test_layers_share_a_plan(device):
    """The plan works nothing out, the length stays, and layers read one length."""
    history = make_steps(2, 8, 1, 16)
    lengths = [7, 2]
    first = make_cache(history, lengths, 1, 4, device=device)
    second = make_cache(history, lengths, 1, 4, device=device, splits=2)
    second.length = first.length
    plan = plan_decode(first, sink=1, window=2)
    q, k, v = (x.float().to(device) for x in present(history, lengths))
    expected = by_windows(history, lengths, 4, window=2, sink=1)
    for cache in (first, second):
        out = decode_attention(q, k, v, cache, plan=plan, backend="triton")
        assert_close_ratio(out.cpu(), expected, 1e-5)
        assert cache.length.tolist() == lengths
        assert_at_rest(cache)
    assert plan._masks is None
    other = make_cache(history, lengths, 1, 5, device=device)
    with pytest.raises(ValueError, match="plan is for 2 lanes of 5 slots; give one for 2 of 6"):
        decode_attention(q, k, v, other, plan=plan, backend="triton")


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of NumPy, in Triton's interpreter
@pytest.mark.parametrize("device", DEVICES)
def test_lanes_do_not_touch_each_other(device):
    """Bit for bit: NaN in other lanes, and their lengths, change nothing."""
    history = make_steps(2, 40, 1, 64)
    outputs = []
    for other, spoiled in ((3, 1.0), (39, float("nan"))):
        lengths = [30, other]
        steps = history.clone()
        steps[1] *= spoiled
        cache = make_cache(steps, lengths, 0, 36, device=device, splits=2)
        q, k, v = (x.float().to(device) for x in present(steps, lengths))
        outputs.append(decode_attention(q, k, v, cache, logit_clip=1.0, backend="triton"))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert outputs[0].isfinite().all() and outputs[1][1].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_keys_are_not_clipped_away(device):
    """A clamp that prefers numbers would make a score of NaN."""
    history = make_steps(1, 3, 1, 16)
    history[0, 1, 1] = float("nan")
    cache = make_cache(history, [2], 0, 4, device=device)
    q, k, v = (x.float().to(device) for x in present(history, [2]))
    assert decode_attention(q, k, v, cache, logit_clip=0.5, backend="triton").isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides(device):
    """Queries, keys and values with strides of any kind, and buffers that lie in memory as on the CPU."""
    history = make_steps(2, 9, 2, 16)
    lengths = [8, 5]
    expected = by_windows(history, lengths, 4)
    cache = make_cache(history, lengths, 0, 4, device=device, splits=2)
    cache.keys = cache.keys.transpose(2, 3).contiguous().transpose(2, 3)
    q, k, v = (x.float().to(device) for x in present(history, lengths))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([k, k], dim=-1)[..., :16]
    v = v.transpose(0, 1).contiguous().transpose(0, 1)
    assert not (q.is_contiguous() or k.is_contiguous() or v.is_contiguous() or cache.keys.is_contiguous())
    out = decode_attention(q, k, v, cache, backend="triton")
    assert_close_ratio(out.cpu(), expected, 1e-5)
    assert torch.equal(cache.keys[:, :, 0][0].cpu(), history[0, 8, 1].float())


@pytest.mark.parametrize("device", DEVICES)
def test_queries_of_another_dtype(device):
    """The output has the dtype of the query; scores are those of the dtype of the cache."""
    history = make_steps(1, 4, 1, 16, torch.bfloat16)
    cache = make_cache(history, [3], 0, 4, dtype=torch.bfloat16, device=device)
    q, k, v = (x.to(device) for x in present(history, [3]))
    out = decode_attention(q.float(), k.half(), v.bfloat16(), cache, backend="triton")
    assert out.dtype == torch.float32
    assert_close_ratio(out.cpu(), by_windows(history, [3], 4), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator(device):
    """What graphs call does what eager code does, and says all that it changes."""
    history = make_steps(1, 4, 1, 16)
    q, k, v = (x.float().to(device) for x in present(history, [3]))
    for splits, advance in ((1, True), (2, False)):
        cache = make_cache(history, [3], 0, 6, device=device, splits=splits)
        scratch = cache.scratch
        tensors = (q, k, v, cache.keys, cache.values, cache.length, scratch.counters, scratch.partials)
        # The check takes NaN for a difference.
        for tensor in (cache.keys, cache.values, scratch.partials):
            tensor.nan_to_num_()
        options = (0, None, 0, 0.0, None, 0.25, advance, splits)
        torch.library.opcheck(decode_ops.decode_op, (*tensors, *options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
def test_inside_of_compiled_code(device):
    history = make_steps(1, 4, 1, 16)
    expected = by_windows(history, [3], 6)
    cache = make_cache(history, [3], 0, 6, device=device, splits=1)

    def act(q, k, v):
        return decode_attention(q * 1.0, k, v, cache, backend="triton")

    torch.compiler.reset()
    out = torch.compile(act, fullgraph=True)(*(x.float().to(device) for x in present(history, [3])))
    assert_close_ratio(out.cpu(), expected, 1e-5)
    assert cache.length.tolist() == [4]
    assert torch.equal(cache.keys[0, :, 3].cpu(), history[0, 3, 1].float())


def test_splits_depend_on_sizes_alone():
    cpu = torch.device("cpu")
    assert decode_ops.count_splits(256, 8, 1024, cpu) == 1
    assert decode_ops.count_splits(64, 8, 1024, cpu) == 4
    assert decode_ops.count_splits(8, 4, 4096, cpu) == 16
    assert decode_ops.count_splits(8, 4, 128, cpu) == 1
    assert decode_ops.count_splits(1, 1, 1 << 20, cpu) == 32


def test_scratch_follows_the_cache():
    cache = RingCache.allocate(2, 1, 4, 16)
    held = cache.scratch
    assert held is cache.scratch
    cache.keys = torch.zeros(3, 1, 4, 16)
    assert cache.scratch is not held and cache.scratch.counters.shape == (3, 2)


@pytest.mark.parametrize("device", DEVICES)
def test_refusals_say_why(device):
    def attempt(size=16, dtype=torch.float32, query=None):
        cache = RingCache.allocate(1, 1, 4, size, dtype=dtype, device=device)
        q = torch.zeros(1, 1, size, dtype=query or dtype, device=device)
        decode_attention(q, q.to(dtype), q.to(dtype), cache, backend="triton")

    for size in (8, 20, 136):
        with pytest.raises(ValueError, match=f"multiples of 8 from 16 to 128, not {size}"):
            attempt(size)
    with pytest.raises(ValueError, match="not torch.float64"):
        attempt(dtype=torch.float64)
    with pytest.raises(ValueError, match="not torch.float64"):
        attempt(query=torch.float64)
    q = torch.zeros(1, 1, 16, device="meta")
    with pytest.raises(ValueError, match=r"q on meta, k on meta and v on meta must be on (cpu|cuda:0), like the cache"):
        decode_attention(q, q, q, RingCache.allocate(1, 1, 4, 16, device=device))


def test_never_on_the_cpu_for_real(monkeypatch):
    choose = importlib.import_module("amago_kernels.attention.decode")._choose
    monkeypatch.setattr("amago_kernels.dispatch.INTERPRETING", False)
    cache, q = RingCache.allocate(1, 1, 4, 16), torch.zeros(1, 1, 16)
    choose.cache_clear()
    try:
        with pytest.raises(ValueError, match="Triton kernels run on CUDA devices, and the input is on cpu"):
            decode_attention(q, q, q, cache, backend="triton")
    finally:
        choose.cache_clear()
    assert cache.length.tolist() == [0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("batch", "heads", "slots", "size"), [(256, 8, 1024, 32), (8, 4, 4096, 64), (1, 1, 20000, 40)])
def test_large_caches(batch, heads, slots, size, dtype):
    """As chosen for the device, lanes of all lengths, twice in a row."""
    shape = (batch, heads, slots, size)
    keys, values = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    length = torch.randint(0, 3 * slots, (batch,), device="cuda")
    caches = [RingCache(keys.clone(), values.clone(), length.clone(), sink=4) for _ in range(2)]
    options = {"sink": 4, "sink_bias": 0.5, "window": slots // 2}
    for _ in range(2):
        q, k, v = torch.randn(batch, 3, heads, size, device="cuda", dtype=dtype).unbind(1)
        out, expected = (
            decode_attention(q, k, v, cache, backend=backend, **options)
            for cache, backend in zip(caches, ("triton", "reference"), strict=True)
        )
        assert_close_ratio(out, expected, TOLERANCE[dtype])
        assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].length, caches[1].length)
        assert_at_rest(caches[0])


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 2, 32])
def test_many_launches_lose_no_count(splits):
    """The last to arrive advances the lane, and there is always exactly one."""
    cache = RingCache.allocate(64, 8, 512, 32, dtype=torch.bfloat16, device="cuda")
    cache._scratch = decode_ops.DecodeScratch.allocate(cache.keys, splits)
    q = torch.randn(64, 8, 32, device="cuda", dtype=torch.bfloat16)
    for _ in range(2000):
        out = decode_attention(q, q, q, cache, backend="triton")
    assert cache.length.tolist() == [2000] * 64
    # All values are the same, so is their mean.
    assert_close_ratio(out, q, 1e-2)
    assert_at_rest(cache)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 4])
def test_cuda_graph_equals_eager(splits):
    """One captured timestep of two layers, replayed 20 times, with a reset on the way."""
    steps = torch.randn(20, 16, 3, 4, 32, device="cuda")

    def make():
        length = torch.zeros(16, dtype=torch.int64, device="cuda")
        shape = (16, 4, 8, 32)
        layers = [RingCache(*(poisoned(shape, device="cuda") for _ in range(2)), length, sink=2) for _ in range(2)]
        for layer in layers:
            layer._scratch = decode_ops.DecodeScratch.allocate(layer.keys, splits)
        return layers

    def act(layers, qkv, resets):
        reset_lanes(layers[0], resets)
        plan = plan_decode(layers[0], sink=2, window=3)
        first = decode_attention(*qkv.unbind(1), layers[0], plan=plan, backend="triton")
        return decode_attention(first, *qkv[:, 1:].unbind(1), layers[1], plan=None, sink=2, window=3, backend="triton")

    eager, graphed = make(), make()
    qkv, resets = steps[0].clone(), torch.zeros(16, dtype=torch.bool, device="cuda")
    act(make(), qkv, resets)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = act(graphed, qkv, resets)
    for t in range(20):
        resets.copy_(torch.arange(16, device="cuda") == t - 5)
        qkv.copy_(steps[t])
        graph.replay()
        assert torch.equal(out, act(eager, steps[t], resets))
    assert torch.equal(graphed[0].length, eager[0].length)
