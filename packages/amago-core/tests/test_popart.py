import math

import pytest
import torch
from torch import nn

from amago_core.losses import PopArtLayer, squared_error

FIRST = torch.tensor([[10.0, 20.0, 30.0]])[..., None]  # [B=1, T=3, G=1]
ALL = torch.ones(1, 3, dtype=torch.bool)


def values(layer):
    return {name: getattr(layer, name).item() for name in ("mu", "nu", "sigma", "w", "b")}


def approx(**expected):
    return pytest.approx(expected, rel=1e-6)


def test_counting_from_one():
    layer = PopArtLayer(1)
    assert layer.denormalize(torch.tensor([2.0])).item() == pytest.approx(20.0)
    layer.update(FIRST, ALL)
    assert values(layer) == approx(mu=10.0025006, nu=283.379178, sigma=13.5399099, w=0.73855735, b=-0.73874204)
    assert layer.denormalize(torch.tensor([2.0])).item() == pytest.approx(20.0, rel=1e-6)
    layer.update(FIRST, ALL)
    assert values(layer) == approx(mu=13.3366672, nu=344.505566, sigma=12.9088680, w=0.77466126, b=-1.03313995)
    assert layer.denormalize(torch.tensor([2.0])).item() == pytest.approx(20.0, rel=1e-6)
    assert layer.count.tolist() == [3]


def test_counting_from_zero():
    layer = PopArtLayer(1, initial_count=0)
    layer.update(FIRST, ALL)
    assert values(layer) == approx(mu=20.0, nu=466.666667, sigma=8.16496581, w=1.22474487, b=-2.44948974)

    # The loss example: raw output 2, target 30.
    prediction = layer.head(torch.tensor([[[[2.0]]]]))
    target = layer.normalize(torch.tensor([[[30.0]]]))
    assert prediction.item() == pytest.approx(0.0, abs=1e-6)
    assert target.item() == pytest.approx(1.2247449, rel=1e-6)
    assert squared_error(prediction, target).item() == pytest.approx(1.5, rel=1e-6)

    spread = math.sqrt(1800.0 - 40.0**2)  # mean 40, mean square 1800
    layer.update(torch.tensor([[40.0 - spread, 40.0 + spread]], dtype=torch.float64)[..., None], ALL[:, :2])
    assert values(layer) == approx(mu=30.0025006, nu=1133.50004, sigma=15.2757978, w=0.65463029, b=-1.96405458)


def test_discounts_are_independent_and_match_single_ones():
    gen = torch.Generator().manual_seed(0)
    targets = torch.randn(4, 5, 3, generator=gen) * torch.tensor([1.0, 100.0, 0.01]) + torch.tensor([0.0, 5.0, -3.0])
    mask = torch.rand(4, 5, generator=gen) < 0.7
    joint, singles = PopArtLayer(3), [PopArtLayer(1) for _ in range(3)]
    for _ in range(3):
        joint.update(targets, mask)
        for g, single in enumerate(singles):
            single.update(targets[..., g : g + 1], mask)
    for name in ("mu", "nu", "w", "b"):
        assert getattr(joint, name).tolist() == pytest.approx([getattr(s, name).item() for s in singles], rel=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
def test_updates_never_move_the_predictions(scale):
    gen = torch.Generator().manual_seed(0)
    layer = PopArtLayer(2, beta=0.05)
    x = torch.randn(64, 2, generator=gen)
    before = layer.denormalize(x)
    for step in range(200):
        layer.update(scale * (torch.randn(3, 4, 2, generator=gen) + step / 20), torch.ones(3, 4, dtype=torch.bool))
    torch.testing.assert_close(layer.denormalize(x), before, rtol=1e-5, atol=1e-5)
    mu, sigma = layer.mu, layer.sigma
    expected = (sigma * (layer.w * x.double() + layer.b) + mu).float()
    torch.testing.assert_close(layer.denormalize(x), expected, rtol=1e-5, atol=1e-5)


def test_denormalize_inverts_normalize_of_the_head():
    layer = PopArtLayer(1)
    layer.update(FIRST, ALL)
    x = torch.linspace(-3, 3, 7)[:, None]
    torch.testing.assert_close(layer.normalize(layer.denormalize(x)), layer.head(x), rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing():
    clean, dirty = PopArtLayer(1), PopArtLayer(1)
    clean.update(FIRST, ALL)
    padded = torch.cat([FIRST, torch.tensor([math.nan, math.inf, 1e30]).view(1, 3, 1)], dim=1)
    dirty.update(padded, torch.tensor([[True, True, True, False, False, False]]))
    assert values(clean) == values(dirty)


@pytest.mark.parametrize("initial_count", [0, 1])
def test_an_empty_mask_changes_nothing(initial_count):
    layer = PopArtLayer(2, initial_count=initial_count)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.update(torch.full((1, 3, 2), math.nan), torch.zeros(1, 3, dtype=torch.bool))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_mask_per_discount_skips_only_the_empty_one():
    layer, single = PopArtLayer(2), PopArtLayer(1)
    mask = torch.tensor([True, False]).expand(1, 3, 2)
    layer.update(FIRST.expand(1, 3, 2), mask)
    single.update(FIRST, ALL)
    assert layer.mu.tolist() == [single.mu.item(), 0.0]
    assert layer.nu.tolist() == [single.nu.item(), 100.0]
    assert layer.count.tolist() == [2, 1]


def test_rows_without_a_time_dimension_count_alike():
    windows, rows = PopArtLayer(1), PopArtLayer(1)
    windows.update(FIRST, ALL)
    rows.update(FIRST[0], ALL[0])
    assert values(windows) == values(rows)


def test_sums_of_two_parts_equal_one_batch():
    whole, parts = PopArtLayer(1), PopArtLayer(1)
    whole.update(FIRST, ALL)
    parts.apply_moments(parts.moment_sums(FIRST[:, :1], ALL[:, :1]) + parts.moment_sums(FIRST[:, 1:], ALL[:, 1:]))
    assert values(whole) == approx(**values(parts))


def test_sigma_is_clamped():
    layer = PopArtLayer(1, initial_count=0)
    layer.update(torch.full((1, 3, 1), 7.0), ALL)
    assert layer.sigma.item() == pytest.approx(1e-2)
    layer = PopArtLayer(1, initial_count=0)
    layer.update(FIRST * 1e9, ALL)
    assert layer.sigma.item() == pytest.approx(1e4)
    assert layer.denormalize(torch.tensor([2.0])).item() == pytest.approx(20.0, rel=1e-5)


def test_disabled_is_the_identity():
    layer = PopArtLayer(2, enabled=False)
    layer.update(torch.randn(3, 4, 2), torch.ones(3, 4, dtype=torch.bool))
    x = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(0))
    for method in (layer.normalize, layer.head, layer.denormalize):
        assert torch.equal(method(x), x)
    assert layer.count.tolist() == [1, 1]
    assert layer.nu.tolist() == [100.0, 100.0]


def test_gradients_flow_through_but_never_into_the_statistics():
    layer = PopArtLayer(1)
    targets = FIRST.clone().requires_grad_()
    layer.update(targets, ALL)
    assert not list(layer.parameters())
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    for method, slope in ((layer.head, layer.w), (layer.normalize, 1 / layer.sigma), (layer.denormalize, 10.0)):
        x = torch.tensor([0.3], requires_grad=True)
        out = method(x)
        out.sum().backward()
        assert out.dtype == torch.float32
        assert x.grad.item() == pytest.approx(float(slope), rel=1e-6)


def test_updates_happen_in_place():
    layer = PopArtLayer(1)
    addresses = [buffer.data_ptr() for buffer in layer.buffers()]
    layer.update(FIRST, ALL)
    assert [buffer.data_ptr() for buffer in layer.buffers()] == addresses


def test_a_checkpoint_restores_every_bit():
    layer, restored = PopArtLayer(1), PopArtLayer(1)
    layer.update(FIRST, ALL)
    restored.load_state_dict(layer.state_dict())
    layer.update(FIRST * 3, ALL)
    restored.update(FIRST * 3, ALL)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, restored.get_buffer(name)), name


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.float, lambda m: m.to("cpu", torch.float16)])
def test_casting_a_model_leaves_the_statistics_in_float64(cast):
    model = nn.Sequential(nn.Linear(1, 1), PopArtLayer(1))
    model[1].update(FIRST, ALL)
    before = values(model[1])
    cast(model)
    assert model[1].mu.dtype == torch.float64
    assert model[1].count.dtype == torch.int64
    assert values(model[1]) == before


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"num_gammas": 0}, "num_gammas"),
        ({"num_gammas": 1, "beta": 0.0}, "beta"),
        ({"num_gammas": 1, "beta": 1.0}, "beta"),
        ({"num_gammas": 1, "init_nu": 0.0}, "init_nu"),
        ({"num_gammas": 1, "initial_count": -1}, "initial_count"),
    ],
)
def test_bad_arguments_are_refused(kwargs, name):
    with pytest.raises(ValueError, match=name):
        PopArtLayer(**kwargs)


def test_another_number_of_discounts_is_refused():
    layer = PopArtLayer(2)
    for method in (layer.normalize, layer.head, layer.denormalize):
        with pytest.raises(ValueError, match="last dimension must be 2"):
            method(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="mask"):
        layer.update(torch.zeros(3, 4, 2), torch.ones(4, 3, dtype=torch.bool))
