from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from amago_nets.heads import NCriticsTwoHot, NCriticsTwoHotConfig
from amago_nets.registry import lookup
from amago_nets.specs import ActionSpec

GAMMAS = (0.1, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999)
LABELS = ("two_hot", "hl_gauss", "two_hot_raw")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def build(kind: str = "continuous", in_dim: int = 6, gammas: tuple[float, ...] = (0.5, 0.9), **options: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"num_critics": 3, "d_hidden": 16, "num_bins": 9, "min_return": -10.0, "max_return": 10.0}
    config = NCriticsTwoHotConfig(**{**defaults, **options})
    return config.build(in_dim, ActionSpec(kind, 3), gammas).double()  # type: ignore[arg-type]


def inputs(*samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    return state, 1.5 * torch.randn(*samples, 4, 5, 2, 3, generator=generator, dtype=torch.float64)


def loop_reference(critics: NCriticsTwoHot, c: int, row: torch.Tensor) -> torch.Tensor:
    """One critic, rows with everything in them, no batching over critics."""
    layers: list[Any] = [critics.first, *critics.rest]
    for i, layer in enumerate(layers):
        row = row @ layer.weight[c] + layer.bias[c]
        if i < len(layers) - 1:
            row = F.leaky_relu(row, 0.01)
    return row


def loop_logits(critics: NCriticsTwoHot, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    lead = action.shape[:-2]
    states = state.expand(*lead, 6).unsqueeze(-2).expand(*lead, 2, 6)
    phi = critics.phi.double().view(2, 1).expand(*lead, 2, 1)
    rows = torch.cat([states, phi, action.clamp(-0.999, 0.999)], -1)
    return torch.stack([loop_reference(critics, c, rows) for c in range(3)], -3)


@pytest.mark.parametrize(
    ("kind", "size", "in_dim", "expected"),
    [("discrete", 5, 256, 664_064), ("continuous", 4, 256, 663_040), ("continuous", 4, 320, 728_576)],
)
def test_parameter_count(kind: str, size: int, in_dim: int, expected: int) -> None:
    critics = NCriticsTwoHotConfig().build(in_dim, ActionSpec(kind, size), GAMMAS)  # type: ignore[arg-type]
    assert sum(p.numel() for p in critics.parameters()) == expected


@pytest.mark.parametrize("kind", ["discrete", "continuous", "multi_binary"])
@pytest.mark.parametrize("samples", [(), (3,), (2, 1)])
def test_logits_match_a_loop(kind: str, samples: tuple[int, ...]) -> None:
    critics = build(kind)
    state, action = inputs(*samples)
    logits = critics(state, action)
    assert logits.shape == (*samples, 4, 5, 3, 2, 9)
    torch.testing.assert_close(logits, loop_logits(critics, state, action))
    # Losses work on this view; a copy would cost as much as the network.
    assert logits.movedim(-3, 0).is_contiguous()


def test_one_hot_actions() -> None:
    critics = build("discrete")
    state, _ = inputs()
    action = critics.action_spec.encode(torch.tensor([2, 0]).expand(4, 5, 2))
    torch.testing.assert_close(critics(state, action), loop_logits(critics, state, action.double()))


@pytest.mark.parametrize("label_type", LABELS)
def test_every_gradient_matches_a_loop(label_type: str) -> None:
    grads = []
    for fast in (True, False):
        critics = build(label_type=label_type)
        state, action = (x.requires_grad_() for x in inputs())
        target = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 6
        if fast:
            loss = critics.loss(critics(state, action), target)
        else:
            log_probs = loop_logits(critics, state, action).log_softmax(-1)
            loss = -(critics.labels(target).unsqueeze(-3) * log_probs).sum(-1)
        assert loss.shape == (4, 5, 3, 2)
        weights = torch.rand(4, 5, 3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        grads.append(torch.autograd.grad((loss * weights).sum(), [state, action, *critics.parameters()]))
    for fast_grad, loop_grad in zip(*grads, strict=True):
        torch.testing.assert_close(fast_grad, loop_grad)


def test_default_bins() -> None:
    critics = NCriticsTwoHotConfig().build(8, ActionSpec("continuous", 2), GAMMAS)
    assert critics.bins.dtype == torch.float32
    assert critics.bins[-1].item() == pytest.approx(11.5129355)
    assert (critics.bins[1] - critics.bins[0]).item() == pytest.approx(0.18130591, rel=1e-5)
    assert not {"bins", "phi"} & critics.state_dict().keys()
    label = critics.double().labels(f64(1.0))[0]
    assert label[67].item() == pytest.approx(0.6769224, abs=1e-7)
    assert label[68].item() == pytest.approx(0.3230776, abs=1e-7)


@pytest.mark.parametrize("use_symlog", [True, False])
@pytest.mark.parametrize("label_type", ["two_hot", "two_hot_raw"])
def test_labels_mean_their_returns(label_type: str, use_symlog: bool) -> None:
    critics = build(label_type=label_type, use_symlog=use_symlog)
    target = f64(-10, -3.3, 0, 0.01, 1, 5, 9.99, 10)
    label = critics.labels(target)
    torch.testing.assert_close(critics.value(label.clamp_min(1e-300).log()), target, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(critics.labels(f64(11.0, -1e6)), critics.labels(f64(10.0, -10.0)))


def test_hl_gauss_labels() -> None:
    critics = build(label_type="hl_gauss", use_symlog=False, num_bins=5, min_return=-2.0, max_return=2.0)
    expected = f64(0.009707, 0.149059, 0.472599, 0.322125, 0.046509)
    torch.testing.assert_close(critics.labels(f64(0.25))[0], expected, rtol=0, atol=6e-7)
    narrow = build(label_type="hl_gauss", use_symlog=False, sigma_ratio=0.01, num_bins=5)
    assert narrow.labels(f64(0.0))[0, 2].item() == pytest.approx(1.0)


def test_value_of_half_and_half() -> None:
    bins = {"num_bins": 2, "min_return": 0.0, "max_return": 100.0}
    logits = torch.zeros(2, dtype=torch.float64)
    assert build(**bins).value(logits).item() == pytest.approx(9.05, abs=1e-2)
    assert build(**bins, label_type="two_hot_raw").value(logits).item() == pytest.approx(50.0)
    assert build(**bins, use_symlog=False).value(logits).item() == pytest.approx(50.0)


@pytest.mark.parametrize("backend", ["auto", "reference", "fused"])
def test_loss_by_hand(backend: str) -> None:
    critics = build(use_symlog=False, num_bins=5, min_return=-2.0, max_return=2.0)
    logits = f64(0.1, 0.2, 0.3, 0.25, 0.15).log().expand(3, 2, 5)
    loss = critics.loss(logits, f64(0.25, 0.25), backend=backend)
    torch.testing.assert_close(loss, torch.full((3, 2), 1.2495532, dtype=torch.float64), rtol=1e-6, atol=0)


def test_init_value() -> None:
    critics = build(num_bins=41, min_return=-2.0, max_return=2.0, use_symlog=False, init_value=0.5)
    bias = critics.rest[-1].bias
    assert bias.shape == (3, 41)
    torch.testing.assert_close(critics.value(bias), torch.full((3,), 0.4999156, dtype=torch.float64))
    torch.testing.assert_close(bias[0, [25, 21]], f64(0.0, -0.5), rtol=0, atol=1e-6)
    for p in (critics.first, *critics.rest):
        p.weight.data.zero_()
    values = critics.value(critics(*inputs()))
    torch.testing.assert_close(values, torch.full_like(values, 0.4999156))


@pytest.mark.parametrize("label_type", LABELS)
def test_init_value_through_symlog(label_type: str) -> None:
    critics = NCriticsTwoHotConfig(init_value=0.0, label_type=label_type, num_bins=129)  # type: ignore[arg-type]
    bias = critics.build(8, ActionSpec("continuous", 2), GAMMAS).rest[-1].bias
    assert bias.argmax(-1).eq(64).all()
    torch.testing.assert_close(bias, bias.flip(-1), rtol=1e-4, atol=1e-4)


def test_init_value_near_an_end_warns_once() -> None:
    spec = ActionSpec("continuous", 2)
    options = {"num_bins": 41, "min_return": -2.0, "max_return": 2.0, "use_symlog": False}
    with pytest.warns(UserWarning, match=r"init_value=0.85 is within 12 bins.*\[-2.0, 2.0\]"):
        critics = NCriticsTwoHotConfig(**options, init_value=0.85).build(4, spec, GAMMAS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(critics)
        NCriticsTwoHotConfig(**options, init_value=0.75).build(4, spec, GAMMAS)
        NCriticsTwoHotConfig().build(4, spec, GAMMAS)
    with pytest.warns(UserWarning, match="init_value=-1.0"):
        NCriticsTwoHotConfig(**options, init_value=-1.0).build(4, spec, GAMMAS)


@pytest.mark.parametrize("label_type", LABELS)
def test_precision(label_type: str) -> None:
    torch.manual_seed(0)
    config = NCriticsTwoHotConfig(label_type=label_type, num_critics=2, d_hidden=32)  # type: ignore[arg-type]
    critics = config.build(6, ActionSpec("continuous", 3), (0.5, 0.9))
    state, action = (x.float() for x in inputs())
    target = torch.linspace(-200, 300, 40).view(4, 5, 2)
    half = copy.deepcopy(critics).to(torch.bfloat16)
    assert half.bins.dtype == torch.float32 and torch.equal(half.bins, critics.bins)
    wide = copy.deepcopy(critics).double()
    step = wide.bins.diff()
    if label_type != "two_hot_raw":
        torch.testing.assert_close(step, step[0].expand(127), rtol=1e-12, atol=0)
    logits = half(state.bfloat16(), action.bfloat16())
    assert logits.dtype == torch.bfloat16
    losses = half.loss(logits, target)
    assert losses.dtype == half.value(logits).dtype == torch.float32
    exact = wide.loss(wide(state.double(), action.double()), target.double())
    torch.testing.assert_close(losses.double(), exact, rtol=0.02, atol=0.02)
    single = critics.loss(critics(state, action), target)
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


def test_critics_are_independent() -> None:
    critics = build()
    logits = critics(*inputs())
    critics.loss(logits, torch.zeros(4, 5, 2))[..., 1, :].sum().backward()
    for p in critics.parameters():
        assert p.grad is not None
        assert p.grad[1].ne(0).any()
        assert p.grad[[0, 2]].eq(0).all()


def test_wrong_actions_are_refused() -> None:
    critics = build()
    state, action = inputs()
    with pytest.raises(ValueError, match=r"shape \(4, 5, 3\).*\[\.\.\., 4, 5, 2, 3\]"):
        critics(state, action[..., 0, :])


def test_wrong_shapes_are_refused() -> None:
    critics = build(num_bins=5, num_critics=3)
    logits = torch.zeros(3, 3, 2, 5)
    with pytest.raises(ValueError, match=r"target\.shape=\(3, 3, 2\) .*\(3, 2\): all critics share"):
        critics.loss(logits, torch.zeros(3, 3, 2))
    for wrong in (logits[..., :4], logits.transpose(-3, -2), logits[..., :1]):
        with pytest.raises(ValueError, match=r"logits\.shape=.*\[\.\.\., 3, 2, 5\]"):
            critics.loss(wrong, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"logits\.shape=\(3, 3, 2, 1\) .*\[\.\.\., 5\]"):
        critics.value(logits[..., :1])


@pytest.mark.filterwarnings("ignore")
def test_compiled() -> None:
    critics = build().float()
    state, action = (x.float() for x in inputs())
    target = torch.randn(4, 5, 2)

    def total(state: torch.Tensor) -> torch.Tensor:
        logits = critics(state, action)
        return critics.loss(logits, target).mean() + critics.value(logits).mean()

    results = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        leaf = state.clone().requires_grad_()
        loss = function(leaf)
        results.append((loss, *torch.autograd.grad(loss, [leaf, *critics.parameters()])))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_bins": 1}, "num_bins=1"),
        ({"min_return": 3.0, "max_return": 3.0}, "min_return=3.0.*less than max_return=3.0"),
        ({"max_return": math.inf}, "max_return=inf"),
        ({"use_symlog": 1}, "use_symlog=1"),
        ({"label_type": "one_hot"}, "label_type='one_hot'.*'hl_gauss'"),
        ({"sigma_ratio": 0.0}, "sigma_ratio=0.0"),
        ({"sigma_ratio": -1.0}, "sigma_ratio=-1.0"),
        ({"init_value": 2e5}, "init_value=200000.0"),
        ({"init_value": -1.0, "min_return": 0.0}, "init_value=-1.0"),
        ({"num_critics": 0}, "num_critics=0"),
    ],
)
def test_config_refuses(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NCriticsTwoHotConfig(**options)


def test_registered() -> None:
    assert lookup("critic", "two_hot") is NCriticsTwoHotConfig
