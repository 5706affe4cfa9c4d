"""Triton kernels of the returns against the reference in float64: in the interpreter, or for real."""

from __future__ import annotations

import pytest
import torch
from reset_patterns import PATTERNS, make_reset
from triton_devices import DEVICES

from amago_kernels import discounted_returns, dispatch, lambda_returns, n_step_targets
from amago_kernels.testing import assert_close_ratio

pytest.importorskip("triton")
NAN = float("nan")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def make_inputs(length, discounts=3, terminated="some", truncated=None, batch=2, seed=0):
    """Two lanes, one of them shorter, with NaN wherever nothing may be read."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.linspace(length, (length + 1) // 2, batch).unsqueeze(-1)
    flags = torch.zeros(batch, length, dtype=torch.bool)
    ends = make_reset(terminated, batch, length)
    inputs = {
        "rewards": torch.randn(batch, length, generator=generator).masked_fill(~mask, NAN),
        "terminated": flags if ends is None else ends,
        "next_values": torch.randn(batch, length, discounts, generator=generator),
        "gammas": torch.linspace(1.0, 0.0, discounts) if discounts > 1 else torch.tensor([0.99]),
        "mask": mask,
        "truncated": None if truncated is None else make_reset(truncated, batch, length).roll(3, 1),
    }
    inputs["next_values"][inputs["terminated"] | ~mask] = NAN
    return inputs


def check(function, inputs, device, tolerance=1e-5, **options):
    """Compares with the reference in float64, where the mask is set."""
    wide = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in inputs.items()}
    expected = function(**wide, **options, backend="reference")
    moved = {name: None if x is None else x.to(device) for name, x in inputs.items()}
    out = function(**moved, **options, backend="triton").cpu()
    values = inputs.get("next_values")
    assert out.dtype == (inputs["rewards"] if values is None else values).dtype
    assert out.is_contiguous()
    assert_close_ratio(out[inputs["mask"]], expected[inputs["mask"]], tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("terminated", PATTERNS)
@pytest.mark.parametrize("lambda_", [0.0, 0.9, 1.0])
def test_lambda_returns(device, terminated, lambda_):
    for length in (1, 63):
        for truncated in (None, "some"):
            check(lambda_returns, make_inputs(length, 3, terminated, truncated), device, lambda_=lambda_)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("terminated", PATTERNS)
@pytest.mark.parametrize("given", [False, True])
def test_discounted_returns(device, terminated, given):
    for length in (1, 63):
        for truncated in (None, "some"):
            inputs = make_inputs(length, 3, terminated, truncated)
            if given and terminated == "none":
                # Values inside an episode are never looked at.
                inputs["next_values"][:, : length // 2 - 1][inputs["mask"][:, 1 : length // 2]] = 1e30
            if not given:
                del inputs["next_values"]
            check(discounted_returns, inputs, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("terminated", PATTERNS)
@pytest.mark.parametrize("n", [1, 2, 5, 20, 500])
def test_n_step_targets(device, terminated, n):
    for length in (1, 63, 130) if (terminated, n) == ("some", 5) else (1, 63):
        for truncated in (None, "some"):
            check(n_step_targets, make_inputs(length, 3, terminated, truncated), device, n=n)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_dtypes_and_many_discounts(device, dtype):
    for length, discounts in ((130, 7), (20, 11), (20, 1)):
        inputs = make_inputs(length, discounts, truncated="some")
        inputs["next_values"] = inputs["next_values"].to(dtype)
        check(lambda_returns, inputs, device, TOLERANCE[dtype], lambda_=0.95)
        check(n_step_targets, inputs, device, TOLERANCE[dtype], n=4)


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides(device):
    inputs = make_inputs(40, 3, truncated="some")
    inputs["rewards"] = inputs["rewards"].t().contiguous().t()
    inputs["terminated"] = inputs["terminated"].repeat_interleave(2, 1)[:, ::2]
    inputs["next_values"] = inputs["next_values"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    inputs["mask"] = torch.ones(1, 1, dtype=torch.bool).expand(2, 40)
    inputs["rewards"].nan_to_num_()
    inputs["next_values"][~inputs["terminated"]] = 1.0
    inputs["gammas"] = torch.linspace(0.5, 0.9, 6)[::2]
    check(lambda_returns, inputs, device, lambda_=0.9)
    check(n_step_targets, inputs, device, n=3)


@pytest.mark.parametrize("device", DEVICES)
def test_every_configuration_and_small_tiles(device, monkeypatch):
    from amago_kernels.returns import triton_returns
    from amago_kernels.tuning import config

    inputs = make_inputs(63, 5, truncated="some")
    kernel = triton_returns.lambda_kernel
    # Tiles shorter than the window: what comes later is carried from tile to tile.
    for chosen in [config(2, TILE=64, BLOCK_G=4), config(1, TILE=16, BLOCK_G=1), *kernel.configs]:
        monkeypatch.setattr(kernel, "configs", [chosen])
        check(lambda_returns, inputs, device, lambda_=0.9)
    kernel = triton_returns.n_step_kernel
    for chosen in [config(1, BLOCK_T=16), *kernel.configs]:
        monkeypatch.setattr(kernel, "configs", [chosen])
        check(n_step_targets, inputs, device, n=20)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_broken_stays_in_its_episode(device, bad):
    inputs = make_inputs(40, 2, "none")
    inputs["rewards"], inputs["next_values"] = torch.ones(2, 40), torch.ones(2, 40, 2)
    inputs["gammas"] = torch.tensor([0.5, 0.9])
    inputs["terminated"][0, [9, 30]] = True
    inputs["rewards"][0, 25] = bad
    moved = {name: None if x is None else x.to(device) for name, x in inputs.items()}
    out = lambda_returns(**moved, lambda_=0.9, backend="triton")[0]
    assert out[:10].isfinite().all() and out[26:].isfinite().all() and not out[10:26].isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    inputs = {name: None if x is None else x.to(device) for name, x in make_inputs(9, truncated="some").items()}
    flat = [inputs[k] for k in ("rewards", "terminated", "truncated", "next_values", "gammas", "mask")]
    flat = [x.nan_to_num() if x.is_floating_point() else x for x in flat]
    torch.library.opcheck(torch.ops.amago_kernels.lambda_returns_triton.default, (*flat, 0.9))
    torch.library.opcheck(torch.ops.amago_kernels.n_step_targets_triton.default, (*flat, 3))
    flat[2:4] = None, None
    torch.library.opcheck(torch.ops.amago_kernels.lambda_returns_triton.default, (*flat, 1.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore")
def test_compiled(device):
    inputs = {name: None if x is None else x.to(device) for name, x in make_inputs(9).items()}

    def both(rewards):
        given = {**inputs, "rewards": rewards}
        return lambda_returns(**given, lambda_=0.9, backend="triton") + n_step_targets(**given, n=2, backend="triton")

    rewards = inputs["rewards"]
    compiled = torch.compile(both, fullgraph=True)(rewards)
    torch.testing.assert_close(compiled[inputs["mask"]], both(rewards)[inputs["mask"]])


def test_refusals(monkeypatch):
    inputs = make_inputs(5)
    with pytest.raises(ValueError, match="backend='triton' cannot serve.*not torch.float64.*'blocked', 'reference'"):
        lambda_returns(**{**inputs, "gammas": inputs["gammas"].double()}, lambda_=0.9, backend="triton")
    leaf = inputs["next_values"].requires_grad_()
    with pytest.raises(ValueError, match="it carries no gradient.*'reference'"):
        n_step_targets(**{**inputs, "next_values": leaf}, backend="triton")
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    with pytest.raises(ValueError, match="run on CUDA devices, and the input is on cpu"):
        lambda_returns(**inputs, lambda_=0.9, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("function", [lambda_returns, discounted_returns, n_step_targets])
def test_large_and_in_a_graph(function):
    options = {lambda_returns: {"lambda_": 0.95}, n_step_targets: {"n": 5}}.get(function, {})
    inputs = make_inputs(1500, 7, truncated="some", batch=64)
    if function is discounted_returns:
        del inputs["next_values"]
    check(function, inputs, "cuda", **options)
    moved = {name: x.cuda() for name, x in inputs.items()}
    function(**moved, **options, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(**moved, **options, backend="auto")
    moved["rewards"].mul_(2.0)
    graph.replay()
    expected = function(**moved, **options, backend="triton")
    assert torch.equal(out[moved["mask"]], expected[moved["mask"]])
