import math
import pickle

import pytest
import torch

from amago_core.losses import BinaryFilterConfig, ExpFilterConfig, FilterConfig, LeakyFilterConfig

ADVANTAGES = [-3.0, -1.0, -0.01, 0.0, 0.01, 0.5, 2.0, 30.0]
TABLE = [
    (BinaryFilterConfig(), [0, 0, 0, 0, 1, 1, 1, 1]),
    (ExpFilterConfig(), [0.0497871, 0.3678794, 0.9900498, 1, 1.0100502, 1.6487213, 7.3890562, math.exp(30)]),
    (
        ExpFilterConfig(beta=0.5, clip_weights_high=5.0),
        [0.2231302, 0.6065307, 0.9950125, 1, 1.0050125, 1.2840254, 2.7182817, 5],
    ),
    (LeakyFilterConfig(), [1e-7, 1e-7, 0.00975, 0.01, 1.01025, 1.25525, 2.00525, 11]),
]


@pytest.mark.parametrize(("config", "expected"), TABLE)
def test_table(config, expected):
    weights = config.build()(torch.tensor(ADVANTAGES))
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", [config for config, _ in TABLE])
def test_weights_have_no_gradient_keep_the_shape_and_are_float32(config):
    adv = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    weights = config.build()(adv)
    assert not weights.requires_grad
    assert weights.shape == adv.shape
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("config", [config for config, _ in TABLE])
def test_filters_can_be_sent_to_another_process(config):
    built = pickle.loads(pickle.dumps(config.build()))
    adv = torch.tensor(ADVANTAGES)
    assert torch.equal(built(adv), config.build()(adv))


def test_binary_threshold_is_strict():
    weights = BinaryFilterConfig(threshold=0.5).build()(torch.tensor([0.4, 0.5, 0.6]))
    assert weights.tolist() == [0.0, 0.0, 1.0]


def test_exp_clips_the_advantage_before_the_exponential():
    weights = ExpFilterConfig(clip_adv_low=-1.0, clip_adv_high=1.0).build()(torch.tensor([-5.0, 0.0, 200.0]))
    assert weights.tolist() == pytest.approx([math.exp(-1), 1.0, math.e], rel=1e-6)


def test_a_high_limit_keeps_exp_finite():
    assert ExpFilterConfig(clip_weights_high=100.0).build()(torch.tensor([1e6])).item() == 100.0


def test_leaky_without_the_binary_term():
    weights = LeakyFilterConfig(add_binary=False).build()(torch.tensor([-0.01, 0.5, 30.0]))
    assert weights.tolist() == pytest.approx([0.00975, 0.25525, 10.0])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: BinaryFilterConfig(threshold=math.nan), "threshold"),
        (lambda: ExpFilterConfig(beta=0.0), "beta"),
        (lambda: ExpFilterConfig(clip_weights_low=-1.0), "clip_weights_low"),
        (lambda: ExpFilterConfig(clip_weights_low=2.0, clip_weights_high=1.0), "clip_weights_low"),
        (lambda: ExpFilterConfig(clip_weights_high=math.inf), "clip_weights_high"),
        (lambda: ExpFilterConfig(clip_adv_low=1.0, clip_adv_high=0.0), "clip_adv_low"),
        (lambda: LeakyFilterConfig(beta=-1.0), "beta"),
        (lambda: LeakyFilterConfig(clip_weights_high=0.0), "clip_weights_low"),
    ],
)
def test_bad_values_are_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_a_custom_filter_must_implement_build():
    with pytest.raises(NotImplementedError, match="FilterConfig"):
        FilterConfig().build()
