"""Sliding windows, pinned sinks, clipped scores, bfloat16, compilation and errors of the Transformer backbone."""

from __future__ import annotations

import itertools

import pytest
import torch

from amago_nets.positions import LearnablePositions
from amago_nets.testing import check_backbone
from amago_nets.traj_encoders import FFConfig, GRUConfig, TformerTrajEncoder, TransformerConfig

SMALL = {"d_model": 16, "n_heads": 2, "d_ff": 24, "n_layers": 2, "dropout_ff": 0.0, "dropout_emb": 0.0}
POSITIONS = ("fixed", "learnable", "rotary")
# Largest relative error |bfloat16 - float32| / |float32| of outputs; 0.009 was seen over all positions and options.
BFLOAT16 = 0.02


def config(**options) -> TransformerConfig:
    return TransformerConfig(**{**SMALL, "max_time_idx": 64, **options})


def build(max_seq_len: int = 5, **options):
    torch.manual_seed(0)
    return config(**options).build(3, max_seq_len).eval()


def run_steps(module, x, time_idx, reset=None, state=None):
    state = module.initial_state(x.shape[0]) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        if reset is not None:
            module.reset_state(state, reset[:, t])
        outputs.append(module.step(x[:, t], time_idx[:, t], state))
    return torch.stack(outputs, dim=1)


GRID = [
    {"window": window, "sink": sink, "sink_bias": bias, "logit_clip": clip, "positions": POSITIONS[i % 3]}
    for i, (window, (sink, bias), clip) in enumerate(
        itertools.product((None, 0, 2, 9), ((0, 0.0), (1, 0.0), (3, -0.8)), (None, 0.7))
    )
]


@pytest.mark.parametrize("options", GRID, ids=lambda options: "-".join(map(str, options.values())))
def test_contract(options):
    """Five timesteps of context, fed with so many that the ring wraps three times behind the pinned slots."""
    check_backbone(
        config(**options).build,
        max_seq_len=5,
        length=3 * 5 + options["sink"] + 2,
        lanes=3,
        memory=options["window"] != 0 or options["sink"] > 0,
        time_offset="invariant" if options["positions"] == "rotary" else "sensitive",
    )


EVERYTHING = {"window": 2, "sink": 2, "sink_bias": 0.5, "logit_clip": 0.7}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
def test_contract_in_other_dtypes(positions, dtype):
    check_backbone(config(positions=positions, **EVERYTHING).build, dtype=dtype, max_seq_len=4, length=16, lanes=3)


@pytest.mark.parametrize("max_seq_len", [1, 2])
def test_contract_with_more_sinks_than_context(max_seq_len):
    check_backbone(config(sink=4, sink_bias=0.3).build, max_seq_len=max_seq_len, length=13, lanes=3)


@pytest.mark.gpu
@pytest.mark.parametrize("options", GRID, ids=lambda options: "-".join(map(str, options.values())))
def test_contract_on_the_gpu(options):
    memory = options["window"] != 0 or options["sink"] > 0
    check_backbone(config(**options).build, device="cuda", max_seq_len=5, lanes=3, memory=memory, tolerance=1e-4)


# Timesteps that timestep 11 of an episode sees, with max_seq_len=4 and one layer.
SEEN = [
    ({}, [8, 9, 10, 11]),
    ({"window": 1}, [10, 11]),
    ({"window": 30}, [8, 9, 10, 11]),
    ({"sink": 2}, [0, 1, 8, 9, 10, 11]),
    ({"sink": 1, "window": 0}, [0, 11]),
    ({"sink": 10}, list(range(12))),
]


@pytest.mark.parametrize(("options", "seen"), SEEN)
def test_what_a_timestep_sees(options, seen):
    """In a window, in steps, and in a window whose beginning is already in memory."""
    module = build(4, n_layers=1, **options)
    x, time_idx = torch.randn(1, 12, 3), torch.arange(12)[None]

    def last(x, kind):
        with torch.no_grad():
            if kind == "window":
                return module(x, time_idx)[0][:, -1]
            if kind == "steps":
                return run_steps(module, x, time_idx)[:, -1]
            state = module.initial_state(1)
            module(x[:, :9], time_idx[:, :9], None, state)
            return module(x[:, 9:], time_idx[:, 9:], None, state)[0][:, -1]

    for kind in ("window", "steps", "state"):
        before = last(x, kind)
        found = []
        for t in range(12):
            changed = x.clone()
            changed[:, t] += 1.0
            if not torch.equal(last(changed, kind), before):
                found.append(t)
        assert found == seen, kind


def test_a_window_from_the_middle_of_an_episode_has_sinks_of_its_own():
    module = build(4, n_layers=1, sink=2)
    x, time_idx = torch.randn(1, 10, 3, requires_grad=True), torch.arange(30, 40)[None]
    out = module(x, time_idx)[0][:, -1]
    weights = torch.arange(1.0, out.shape[-1] + 1)
    (grad,) = torch.autograd.grad((out.square() * weights).sum(), x)
    assert grad[0].abs().sum(-1).nonzero().flatten().tolist() == [0, 1, 6, 7, 8, 9]


def test_the_ring_holds_what_can_be_seen_and_no_more():
    for options, slots in (({}, 9), ({"window": 3}, 4), ({"window": 50}, 9), ({"window": 0, "sink": 2}, 3)):
        state = build(9, **options).initial_state(2)
        assert state["keys"].shape == state["values"].shape == (2, 2, 2, slots, 8)
        assert state.clock.sink == options.get("sink", 0)
        assert state.select(torch.tensor([1])).clock.sink == options.get("sink", 0)


@pytest.mark.parametrize("seed", range(12))
def test_any_pieces_with_a_state(seed):
    """Pieces of any length, by windows and by steps, with resets anywhere; memory may hold NaN to begin with."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    sink, lanes, length = draw(0, 5), 3, 26
    window = None if draw(0, 2) else draw(0, 4)
    module = build(draw(1, 6), n_layers=1, sink=sink, sink_bias=0.4, window=window, positions="rotary").double()
    x = torch.randn(lanes, length, 3, generator=generator, dtype=torch.float64)
    time_idx = torch.arange(length).expand(lanes, length)
    reset = torch.rand(lanes, length, generator=generator) < 0.1
    reset[0] = False
    state = module.initial_state(lanes)
    for name in ("keys", "values"):
        state[name].fill_(float("nan"))
    outputs, start = [], 0
    with torch.no_grad():
        expected = module(x, time_idx, reset)[0]
        while start < length:
            part = slice(start, min(length, start + draw(1, 9)))
            if draw(0, 3):
                outputs.append(module(x[:, part], time_idx[:, part], reset[:, part], state)[0])
            else:
                outputs.append(run_steps(module, x[:, part], time_idx[:, part], reset[:, part], state))
            start = part.stop
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-10, rtol=0)


def test_clipping_and_bias_change_something():
    x, time_idx = 5 * torch.randn(2, 9, 3), torch.arange(9).expand(2, 9)
    plain = build(sigma_reparam=False)(x, time_idx)[0]
    for options in ({"logit_clip": 0.01}, {"sink": 1, "sink_bias": 3.0}):
        assert not torch.allclose(build(sigma_reparam=False, **options)(x, time_idx)[0], plain, atol=1e-4)


BAD_CONFIGS = {
    "window=-1 is not allowed": {"window": -1},
    "window=1.5 is not allowed": {"window": 1.5},
    "sink=-1 is not allowed": {"sink": -1},
    "sink=None is not allowed": {"sink": None},
    "sink_bias=inf is not allowed": {"sink_bias": float("inf")},
    "logit_clip=0.0 is not allowed": {"logit_clip": 0.0},
    "logit_clip=-2 is not allowed": {"logit_clip": -2},
    "logit_clip=True is not allowed": {"logit_clip": True},
    "even d_model / n_heads": {"d_model": 18, "n_heads": 6, "positions": "rotary"},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs_are_refused(message):
    with pytest.raises(ValueError, match=message):
        config(**BAD_CONFIGS[message])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("extra", [{}, EVERYTHING], ids=["plain", "everything"])
def test_bfloat16(positions, extra):
    module = build(16, positions=positions, **extra)
    half = build(16, positions=positions, **extra).to(torch.bfloat16)
    x, time_idx = torch.randn(3, 40, 3).bfloat16(), torch.arange(40).expand(3, 40)
    reset = torch.zeros(3, 40, dtype=torch.bool)
    reset[1, 9] = True
    with torch.no_grad():
        expected = module(x.float(), time_idx, reset)[0]
        out = half(x, time_idx, reset)[0]
        state = half.initial_state(3)
        steps = run_steps(half, x, time_idx, reset, state)
    assert state["keys"].dtype == state["values"].dtype == out.dtype == steps.dtype == torch.bfloat16
    size = expected.norm()
    assert float((out.float() - expected).norm() / size) < BFLOAT16
    assert float((steps.float() - expected).norm() / size) < BFLOAT16
    assert float((steps.float() - out.float()).norm() / size) < BFLOAT16


COMPILED = [{"positions": "fixed"}, {"positions": "learnable"}, {"positions": "rotary", **EVERYTHING}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", COMPILED, ids=POSITIONS)
def test_compiled_training(options):
    """One graph, forward and backward, and the same numbers as without."""
    torch.compiler.reset()
    module = build(4, d_model=8, d_ff=12, n_layers=1, **options).train()
    compiled = torch.compile(module, fullgraph=True)
    x, time_idx = torch.randn(2, 7, 3), torch.arange(7).expand(2, 7)
    some = torch.zeros(2, 7, dtype=torch.bool)
    some[1, 3] = True
    for reset in (None, some):
        results = []
        for run in (module, compiled):
            inputs = x.clone().requires_grad_()
            out, state = run(inputs, time_idx, reset)
            assert state is None
            loss = (out.square() * torch.arange(1.0, 9.0)).mean()
            results.append([out.detach(), *torch.autograd.grad(loss, [inputs, *module.parameters()])])
        for got, want in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"sink": 1}, {"logit_clip": 1.0}, {}])
def test_flash_is_never_a_silent_cast(options):
    """Without the package, a GPU or half precision the call is refused; nothing else is used in its place."""
    module = build(attention_backend="flash", **options)
    with pytest.raises(ValueError, match="backend='flash' cannot serve"):
        module(torch.zeros(1, 4, 3), torch.arange(4)[None])
    module.step(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), module.initial_state(1))


def window_and_step(module, dtype, state=None):
    """The same wrong call twice."""
    x, time_idx = torch.zeros(2, 4, 3, dtype=dtype), torch.arange(4).expand(2, 4)
    state = module.initial_state(2) if state is None else state
    return (
        lambda: module(x, time_idx, None, state),
        lambda: module.step(x[:, 0], time_idx[:, 0], state),
    )


@pytest.mark.parametrize(
    ("made", "given"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.int64),
    ],
)
@pytest.mark.parametrize("backbone", ["transformer", "gru", "ff"])
def test_a_wrong_dtype_is_refused(backbone, made, given):
    configs = {"transformer": config(), "gru": GRUConfig(d_hidden=4, d_output=4), "ff": FFConfig(d_model=8)}
    module = configs[backbone].build(3, 5).to(made)
    for call in window_and_step(module, given):
        with pytest.raises(ValueError, match=f"x is {given}; give {made}"):
            call()


def test_a_cache_of_another_dtype_is_refused():
    module = build()
    for dtype in (torch.float64, torch.bfloat16):
        state = module.initial_state(2, dtype=dtype)
        for call in window_and_step(module, torch.float32, state):
            with pytest.raises(ValueError, match=f"state is {dtype}; give torch.float32"):
                call()
        assert state["length"].tolist() == [0, 0]
        module.reset_state(state, torch.tensor([True, False]))


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast_casts(given, cache):
    module = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for call in window_and_step(module, given, module.initial_state(2, dtype=cache)):
            call()
        for call in window_and_step(module, torch.float64):
            with pytest.raises(ValueError, match=r"x is torch\.float64; give torch\.float32"):
                call()


def test_a_wrong_width_is_refused():
    module, state = build(), build().initial_state(2)
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 2\); give \[B, L, 3\]"):
        module(torch.zeros(2, 4, 2), torch.arange(4).expand(2, 4))
    with pytest.raises(ValueError, match=r"x \(2, 4\) .* give \(2, 3\) and \(2,\)"):
        module.step(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), state)


@pytest.mark.parametrize("wrong", [7, -1])
def test_times_outside_the_table_are_refused(wrong):
    module = build(positions="learnable", max_time_idx=7)
    assert isinstance(module.position_table, LearnablePositions)
    state = module.initial_state(2)
    time_idx = torch.tensor([[0, 1], [3, wrong]])
    message = rf"time_idx runs from {min(0, wrong)} to {max(3, wrong)}; .* 0 to max_time_idx-1=6"
    with pytest.raises(ValueError, match=message):
        module(torch.zeros(2, 2, 3), time_idx, None, state)
    with pytest.raises(ValueError, match="max_time_idx-1=6"):
        module.step(torch.zeros(2, 3), time_idx[:, 1], state)
    assert state["length"].tolist() == [0, 0]


def test_a_mask_of_other_lanes_is_refused():
    module = build()
    with pytest.raises(ValueError, match=r"lanes is torch.bool \(3,\); give torch.bool \(2,\)"):
        module.reset_state(module.initial_state(2), torch.ones(3, dtype=torch.bool))


OTHERS = {
    "state is a State; give what initial_state": FFConfig(d_model=8),
    r"\(1, 2, 5, 8, 0\), this backbone keeps \(2, 2, 5, 8, 0\)": config(n_layers=1),
    r"\(2, 4, 5, 4, 0\)": config(n_heads=4),
    r"\(2, 2, 4, 8, 0\)": config(window=3),
    r"\(2, 2, 5, 8, 1\)": config(window=3, sink=1),
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_state_of_another_backbone_is_refused(message):
    module, state = build(), OTHERS[message].build(3, 5).initial_state(2)
    calls = (*window_and_step(module, torch.float32, state), lambda: module.reset_state(state, torch.ones(2) > 0))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_snapshot_of_another_ring_is_refused():
    state = build(sink=1).initial_state(2)
    snapshot = build(6).initial_state(2).state_dict()
    assert snapshot["keys"].shape == state["keys"].shape
    with pytest.raises(ValueError, match=r"pins 0 slots \(sink\); give one that pins 1"):
        state.load_state_dict(snapshot)
    state.load_state_dict(state.state_dict())


def test_what_is_no_state_is_refused():
    module = build()
    for call in window_and_step(module, torch.float32, (torch.zeros(2), torch.zeros(2))):
        with pytest.raises(ValueError, match="state is a tuple; give what initial_state"):
            call()


def test_a_backbone_may_name_what_its_states_hold():
    class Strict(TformerTrajEncoder):
        state_entries = ("keys", "values")

    module = Strict(config(), 3, 5)
    module(torch.zeros(2, 4, 3), torch.arange(4).expand(2, 4), None, module.initial_state(2))
    for call in window_and_step(module, torch.float32, FFConfig(d_model=8).build(3, 5).initial_state(2)):
        with pytest.raises(ValueError, match=r"state holds \[\], this backbone keeps \['keys', 'values'\]"):
            call()
