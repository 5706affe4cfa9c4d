"""Backbones in tensordicts: what a rollout computed step by step, a loss computes over windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from amago_nets.registry import lookup, names
from amago_nets.traj_encoders import GRUConfig, TrajEncoder, TransformerConfig

pytest.importorskip("tensordict")
pytest.importorskip("torchrl")

from tensordict import TensorDict  # noqa: E402
from tensordict.nn import TensorDictModule, TensorDictSequential  # noqa: E402
from torchrl.data import Binary, Categorical, Composite, Unbounded  # noqa: E402
from torchrl.envs import EnvBase, InitTracker, TransformedEnv  # noqa: E402
from torchrl.envs.utils import step_mdp  # noqa: E402
from torchrl.modules import ProbabilisticActor, ValueOperator, set_recurrent_mode  # noqa: E402
from torchrl.modules.utils import get_primers_from_module  # noqa: E402
from torchrl.objectives import ClipPPOLoss  # noqa: E402
from torchrl.objectives.value import GAE  # noqa: E402

from amago_nets.torchrl import TrajEncoderModule  # noqa: E402

LANES, LENGTH, IN_DIM, CONTEXT = 3, 9, 4, 5


def build(config, seed: int = 0) -> TrajEncoder:
    torch.manual_seed(seed)
    return config.build(IN_DIM, CONTEXT).eval()


def gru() -> TrajEncoder:
    return build(GRUConfig(d_hidden=8, d_output=6))


def transformer() -> TrajEncoder:
    return build(TransformerConfig(d_model=8, n_heads=2, n_layers=2))


def episodes(lead: tuple[int, ...] = (LANES,)) -> TensorDict:
    """Windows with resets at different moments; the first lane never resets."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*lead, LENGTH, IN_DIM, generator=generator)
    is_init = torch.rand(*lead, LENGTH, 1, generator=generator) < 0.2
    is_init.view(-1, LENGTH)[0] = False
    return TensorDict({"x": x, "is_init": is_init}, batch_size=[*lead, LENGTH])


def step_through(module: nn.Module, data: TensorDict) -> TensorDict:
    """What a collector stores: every timestep with the memory before it, and below "next" that after it."""
    memory = TensorDict({}, batch_size=data.batch_size[:-1])
    rows = []
    for t in range(data.batch_size[-1]):
        row = module(data[..., t].clone().update(memory))
        rows.append(row)
        memory = step_mdp(row, exclude_action=False).select("recurrent_state", "other_state", strict=False)
    rows[0] = rows[0].update(memory.apply(torch.zeros_like))  # As a primer fills it at the first reset.
    return torch.stack(rows, dim=-1)


@pytest.mark.parametrize("lead", [(), (LANES,), (2, LANES)])
@pytest.mark.parametrize("name", names("traj_encoder"))
def test_windows_equal_steps(name: str, lead: tuple[int, ...]) -> None:
    module = TrajEncoderModule(build(lookup("traj_encoder", name)()), "x", "y")
    stored = step_through(module, episodes(lead))
    for start in (0, 4):
        window = stored[..., start:].clone()
        kept = window["recurrent_state"].clone()
        with set_recurrent_mode(True):
            out = module(window)["y"]
        torch.testing.assert_close(out, stored["y"][..., start:, :], rtol=1e-4, atol=1e-4)
        assert (window["recurrent_state"] == kept).all(), "a window changes the memory that was stored"


@pytest.mark.parametrize("make", [gru, transformer])
def test_steps_equal_the_backbone(make) -> None:
    backbone, data = make(), episodes()
    stored = step_through(TrajEncoderModule(backbone, "x", "y"), data)
    state, time_idx = backbone.initial_state(LANES), torch.zeros(LANES, dtype=torch.int64)
    for t in range(LENGTH):
        first = data["is_init"][:, t, 0]
        time_idx.masked_fill_(first, 0)
        backbone.reset_state(state, first)
        expected = backbone.step(data["x"][:, t], time_idx, state)
        time_idx += 1
        torch.testing.assert_close(stored["y"][:, t], expected)
        assert torch.equal(stored["next", "recurrent_state", "time_idx"][:, t], time_idx)
    if make is gru:
        torch.testing.assert_close(stored["next", "recurrent_state", "hidden"][:, -1], state["hidden"].transpose(0, 1))


def test_a_step_leaves_the_memory_it_read() -> None:
    module = TrajEncoderModule(transformer(), "x", "y")
    stored = step_through(module, episodes())
    row = stored[:, 4].clone()
    before = row["recurrent_state"].clone()
    module(row)
    assert (row["recurrent_state"] == before).all()
    assert not (row["next", "recurrent_state"] == before).all()


def test_window_without_memory_starts_empty() -> None:
    backbone, data = gru(), episodes()
    module = TrajEncoderModule(backbone, "x", "y", recurrent=True)
    time_idx = torch.arange(LENGTH).expand(LANES, LENGTH)
    expected = backbone(data["x"], time_idx, data["is_init"].squeeze(-1))[0]
    torch.testing.assert_close(module(data)["y"], expected)
    with set_recurrent_mode(False):
        assert module(data[:, 0])["y"].shape == (LANES, backbone.out_dim)


@pytest.mark.parametrize("make", [gru, transformer])
def test_gradients_stop_at_resets(make) -> None:
    module = TrajEncoderModule(make(), "x", "y", recurrent=True)
    data = episodes()
    data["is_init"][:] = False
    data["is_init"][1, 3] = True
    x = data["x"].clone().requires_grad_()
    out = module(data.set("x", x))["y"]
    weights = torch.arange(1.0, out.shape[-1] + 1)
    (grad,) = torch.autograd.grad((out[:, 4].square() * weights).sum(), x)
    reached = grad.abs().sum(dim=-1) > 0
    assert reached.tolist() == [
        [True] * 5 + [False] * 4,
        [False] * 3 + [True] * 2 + [False] * 4,
        [True] * 5 + [False] * 4,
    ]


def test_two_memories_side_by_side() -> None:
    one, two = gru(), build(GRUConfig(d_hidden=4, d_output=3), seed=1)
    both = TensorDictSequential(
        TrajEncoderModule(one, "x", "y"), TrajEncoderModule(two, "x", "z", state_key="other_state")
    )
    stored = step_through(both, episodes())
    alone = step_through(TrajEncoderModule(one, "x", "y"), episodes())
    assert torch.equal(stored["y"], alone["y"])
    assert stored["next", "other_state", "hidden"].shape == (LANES, LENGTH, 2, 4)
    assert stored["next", "recurrent_state", "hidden"].shape == (LANES, LENGTH, 2, 8)


def test_mistakes_are_named() -> None:
    module = TrajEncoderModule(gru(), "x", "y")
    with pytest.raises(ValueError, match=r"'is_init' is missing; append torchrl.envs.InitTracker"):
        module(TensorDict({"x": torch.zeros(LANES, IN_DIM)}, batch_size=[LANES]))


class Walk(EnvBase):
    """Noise for observations; every lane's episodes have their own length; some are truncated, some terminate."""

    def __init__(self) -> None:
        super().__init__(batch_size=[LANES])
        self.generator = torch.Generator().manual_seed(5)
        self.left = torch.zeros(LANES, dtype=torch.int64)
        self.observation_spec = Composite(x=Unbounded((LANES, IN_DIM)), shape=(LANES,))
        self.action_spec = Categorical(2, shape=(LANES,))
        self.reward_spec = Unbounded((LANES, 1))
        flag = Binary(1, shape=(LANES, 1), dtype=torch.bool)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(LANES,))

    def _noise(self, features: int) -> Tensor:
        return torch.randn(LANES, features, generator=self.generator)

    def _reset(self, tensordict: TensorDict | None, **kwargs) -> TensorDict:
        new = torch.ones(LANES, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict.keys():
            new = tensordict["_reset"].reshape(LANES)
        self.left = torch.where(new, torch.arange(2, 2 + LANES), self.left)
        return TensorDict({"x": self._noise(IN_DIM)}, batch_size=[LANES])

    def _step(self, tensordict: TensorDict) -> TensorDict:
        self.left = self.left - 1
        done = (self.left == 0)[:, None]
        truncated = done & (torch.arange(LANES) == 0)[:, None]
        step = {"x": self._noise(IN_DIM), "reward": self._noise(1)}
        step |= {"done": done, "terminated": done & ~truncated, "truncated": truncated}
        return TensorDict(step, batch_size=[LANES])

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(seed or 0)


def actor_critic(backbone: TrajEncoder) -> tuple[ProbabilisticActor, TensorDictSequential]:
    memory = TrajEncoderModule(backbone, "x", "y")
    logits = TensorDictModule(nn.Linear(backbone.out_dim, 2), in_keys=["y"], out_keys=["logits"])
    actor = ProbabilisticActor(
        TensorDictSequential(memory, logits),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    return actor, TensorDictSequential(memory, ValueOperator(nn.Linear(backbone.out_dim, 1), in_keys=["y"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [gru, transformer])
def test_environment_carries_the_memory(make) -> None:
    actor, critic = actor_critic(make())
    env = TransformedEnv(Walk(), InitTracker()).append_transform(get_primers_from_module(actor))
    with torch.no_grad():
        data = env.rollout(LENGTH, actor, break_when_any_done=False)
    assert data.batch_size == (LANES, LENGTH)
    assert data["is_init"].sum() > 2 * LANES
    late = data[:, 3:]
    assert not late["is_init"][:, 0].all(), "some window must begin inside an episode"
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.0)
    for window in (data, late):
        window = window.clone()
        window["advantage"] = torch.ones(*window.batch_size, 1)
        window["value_target"] = torch.zeros(*window.batch_size, 1)
        losses = loss(window)
        assert float(losses["kl_approx"].abs()) < 1e-5, "log-probabilities of the window differ from the rollout's"
        (losses["loss_objective"] + losses["loss_critic"]).backward()
    assert all(p.grad is not None for p in loss.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore")
def test_gae_sees_the_right_memory() -> None:
    gamma, lam = 0.9, 0.8
    actor, critic = actor_critic(gru())
    env = TransformedEnv(Walk(), InitTracker()).append_transform(get_primers_from_module(actor))
    with torch.no_grad():
        data = env.rollout(LENGTH, actor, break_when_any_done=False)
        # Lane 0 is truncated, for which TorchRL has other rules; the last timestep is the start of no episode.
        data = data[1:, :8]
        rows = [critic(data[:, t].clone())["state_value"] for t in range(8)]
        follow = step_mdp(data[:, -1], exclude_action=False)
        follow["is_init"] = torch.zeros_like(data["is_init"][:, -1])
        rows.append(critic(follow)["state_value"])
        estimate = GAE(gamma=gamma, lmbda=lam, value_network=critic, shifted=True)
        with set_recurrent_mode(True):
            lean = estimate(data.exclude(("next", "recurrent_state")))
            estimate(data)
    assert torch.equal(lean["advantage"], data["advantage"]), "the memory after a timestep may be dropped"
    value = torch.stack(rows, dim=1)
    running = torch.zeros(2, 1)
    for t in reversed(range(8)):
        alive = (~data["next", "done"][:, t]).float()
        running = (
            data["next", "reward"][:, t] + gamma * alive * value[:, t + 1] - value[:, t] + gamma * lam * alive * running
        )
        torch.testing.assert_close(data["advantage"][:, t], running, rtol=1e-4, atol=1e-5)
