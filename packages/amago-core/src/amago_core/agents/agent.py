"""The AMAGO actor-critic: many discounts, an ensemble of critics, value normalisation, filtered behaviour cloning.

Dimensions: B batch, L timesteps, T = L-1 transitions, D width, C critics, G discounts, A action.

Source: Grigsby et al., "AMAGO: Scalable In-Context Reinforcement Learning for Adaptive Agents", ICLR 2024, sections 3
and appendix A; ensembles with random-subset minimum after Chen et al., "Randomized Ensembled Double Q-Learning" (2021).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amago_core.agents.base import BaseAgent, LossOutput
from amago_core.agents.metrics import AgentTerms, detailed_metrics
from amago_core.agents.rows import TransitionRows
from amago_core.agents.values import ListedActionValues, SampledActionValues
from amago_core.errors import ConfigError
from amago_core.losses import actor as actor_losses
from amago_core.losses import critic as critic_losses
from amago_core.losses import td
from amago_core.losses.filters import BinaryFilterConfig, ExpFilterConfig, FilterConfig, LeakyFilterConfig
from amago_core.losses.masking import masked_mean
from amago_core.losses.popart import PopArtLayer
from amago_nets.distributions import (
    BetaConfig,
    DiscreteConfig,
    DistributionConfig,
    GMMConfig,
    MultiBinaryConfig,
    PolicyDistribution,
    TanhGaussianConfig,
)
from amago_nets.heads import ActorConfig, NCriticsConfig, ResidualActorConfig
from amago_nets.specs import ActionSpec, ArraySpec
from amago_nets.traj_encoders import TrajEncoder, TrajEncoderConfig
from amago_nets.tstep_encoders import TstepEncoder, TstepEncoderConfig, default_config
from amago_offline.batch import Batch


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Settings of `Agent`.

    Attributes:
        gamma: the discount the policy acts with; always the last of the trained discounts.
        gammas: further discounts trained beside it when `use_multigamma`.
        use_multigamma: train all discounts, or only `gamma`.
        online_coeff: weight of the policy-gradient term; 0 trains by behaviour cloning alone.
        offline_coeff: weight of filtered behaviour cloning.
        critic_loss_weight: weight of the TD loss in the total.
        reward_multiplier: rewards are multiplied by this before any value is learned.
        tau: step of the target networks towards the online ones after every update.
        n_step: horizon of the TD targets, in transitions.
        num_critics_td: size of the random subset of critics a TD target is reduced over.
        num_actions_critic: action samples in TD targets (critics that take actions only).
        num_actions_actor: action samples in the actor's values (critics that take actions only).
        popart: normalise values per discount.
        use_target_actor: TD targets take actions from the target actor.
        fake_filter: behaviour cloning without a filter; with `online_coeff=0` no critic is trained.
        filter: weights of the behaviour-cloning term as a function of the advantage.
        policy: the action distribution; None chooses one that fits the action space.
        actor: the actor head.
        critics: the critic ensemble.
        skip_padding: leave padding out of the heads (`TransitionRows`); turn off for static shapes.
    """

    gamma: float = 0.999
    gammas: tuple[float, ...] = (0.1, 0.9, 0.95, 0.97, 0.99, 0.995)
    use_multigamma: bool = True
    online_coeff: float = 1.0
    offline_coeff: float = 0.1
    critic_loss_weight: float = 10.0
    reward_multiplier: float = 10.0
    tau: float = 0.003
    n_step: int = 1
    num_critics_td: int = 2
    num_actions_critic: int = 1
    num_actions_actor: int = 1
    popart: bool = True
    use_target_actor: bool = True
    fake_filter: bool = False
    filter: BinaryFilterConfig | ExpFilterConfig | LeakyFilterConfig = BinaryFilterConfig()
    policy: DiscreteConfig | TanhGaussianConfig | BetaConfig | GMMConfig | MultiBinaryConfig | None = None
    actor: ActorConfig | ResidualActorConfig = ActorConfig()
    critics: NCriticsConfig = NCriticsConfig()
    skip_padding: bool = True

    def __post_init__(self) -> None:
        """Refuse settings that could only fail later."""
        if not isinstance(self.gammas, tuple | list):
            raise ConfigError(f"gammas must be a tuple of numbers in [0, 1); got {self.gammas!r}")
        for gamma in (*self.gammas, self.gamma):
            if not isinstance(gamma, int | float) or not 0.0 <= gamma < 1.0:
                raise ConfigError(f"gamma and gammas must lie in [0, 1); got {gamma!r}")
        if not 0.0 < self.tau <= 1.0:
            raise ConfigError(f"tau must lie in (0, 1]; got {self.tau}")
        for name in ("n_step", "num_actions_critic", "num_actions_actor"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be an integer >= 1; got {getattr(self, name)!r}")
        self._check_parts()
        if not 1 <= self.num_critics_td <= self.critics.num_critics:
            raise ConfigError(
                f"num_critics_td must lie in [1, num_critics={self.critics.num_critics}]; got {self.num_critics_td}"
            )
        if self.online_coeff < 0 or self.offline_coeff < 0 or self.online_coeff + self.offline_coeff == 0:
            raise ConfigError(
                "online_coeff and offline_coeff must be >= 0 and not both 0; "
                f"got {self.online_coeff} and {self.offline_coeff}"
            )

    def _check_parts(self) -> None:
        allowed: dict[str, tuple[type | tuple[type, ...], str]] = {
            "filter": (FilterConfig, "BinaryFilterConfig(), ExpFilterConfig() or LeakyFilterConfig()"),
            "policy": ((DistributionConfig, type(None)), "DiscreteConfig() or TanhGaussianConfig(), or None"),
            "critics": (NCriticsConfig, "NCriticsConfig()"),
        }
        for name, (kind, examples) in allowed.items():
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} must be a configuration such as {examples}; got {getattr(self, name)!r}")
        if getattr(self.actor, "registry_kind", "actor") != "actor" or not _builds(self.actor):
            raise ConfigError(
                f"actor must be a configuration such as ActorConfig() or ResidualActorConfig(); got {self.actor!r}"
            )

    @property
    def trained_gammas(self) -> tuple[float, ...]:
        """All G discounts, the acting one last."""
        return (*self.gammas, self.gamma) if self.use_multigamma else (self.gamma,)

    def build(
        self,
        *,
        obs_specs: dict[str, ArraySpec],
        action_spec: ActionSpec,
        tstep_encoder: TstepEncoderConfig | None,
        traj_encoder: TrajEncoderConfig,
        max_seq_len: int,
    ) -> Agent:
        """Build the agent's networks for the given observations and actions.

        Args:
            obs_specs: one spec for each observation key.
            action_spec: the actions of the environment.
            tstep_encoder: embeds one timestep; None chooses one that suits the observations.
            traj_encoder: the sequence model.
            max_seq_len: timesteps the policy can see.

        Returns:
            An agent with fresh weights.
        """
        encoder = (tstep_encoder or default_config(obs_specs)).build(obs_specs, action_spec)
        backbone = traj_encoder.build(encoder.out_dim, max_seq_len)
        return Agent(self, action_spec, encoder, backbone)


def _builds(part: Any) -> bool:
    return not isinstance(part, type) and callable(getattr(part, "build", None))


def default_policy(action_spec: ActionSpec) -> DiscreteConfig | TanhGaussianConfig | MultiBinaryConfig:
    """The action distribution that fits an action space.

    Raises:
        ConfigError: for a kind of action that no built-in distribution serves.
    """
    match action_spec.kind:
        case "discrete":
            return DiscreteConfig()
        case "continuous":
            return TanhGaussianConfig()
        case "multi_binary":
            return MultiBinaryConfig()
        case kind:
            raise ConfigError(
                f"action kind {kind!r} has no distribution here; allowed: 'discrete', 'continuous', 'multi_binary'"
            )


class Agent(BaseAgent):
    """Actor-critic on sequences, off-policy.

    One pass of the sequence model serves every term. The TD loss trains critics and sequence model, the online term
    trains the actor and, through the action alone, the sequence model; filtered behaviour cloning trains both too.

    Args:
        config: settings.
        action_spec: the actions of the environment.
        tstep_encoder: embeds one timestep.
        traj_encoder: the sequence model.
    """

    gammas: Tensor

    def __init__(
        self, config: AgentConfig, action_spec: ActionSpec, tstep_encoder: TstepEncoder, traj_encoder: TrajEncoder
    ) -> None:
        super().__init__()
        self.config = config
        self.action_spec = action_spec
        self.policy_config: DistributionConfig = config.policy or default_policy(action_spec)
        if self.policy_config.action_kind != action_spec.kind:
            raise ConfigError(
                f"policy {type(self.policy_config).__name__} is for {self.policy_config.action_kind} actions, "
                f"the environment has {action_spec.kind} ones"
            )
        if config.online_coeff > 0 and not self.policy_config.differentiable:
            raise ConfigError(
                f"online_coeff={config.online_coeff} needs a distribution that can be differentiated through; "
                f"{type(self.policy_config).__name__} cannot: set online_coeff=0"
            )
        gammas = config.trained_gammas
        self.tstep_encoder = tstep_encoder
        self.traj_encoder = traj_encoder
        width = traj_encoder.out_dim
        param_size = self.policy_config.param_size(action_spec.size)
        self.actor = config.actor.build(width, param_size, len(gammas))
        self.critics = config.critics.build(width, action_spec, gammas)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.popart = PopArtLayer(len(gammas), enabled=config.popart)
        self.register_buffer("gammas", torch.tensor(gammas, dtype=torch.float32), persistent=False)
        self._filter = config.filter.build()
        self._values: ListedActionValues | SampledActionValues = (
            ListedActionValues()
            if action_spec.kind == "discrete"
            else SampledActionValues(differentiable=self.policy_config.differentiable)
        )

    @property
    def trains_critics(self) -> bool:
        """False for pure behaviour cloning, which needs no values."""
        return not (self.config.fake_filter and self.config.online_coeff == 0)

    def trained_modules(self) -> dict[str, nn.Module]:
        """Timestep encoder, trajectory encoder, actor and critics."""
        modules = {"tstep_encoder": self.tstep_encoder, "traj_encoder": self.traj_encoder, "actor": self.actor}
        return {**modules, "critics": self.critics} if self.trains_critics else modules

    def loss(self, batch: Batch, *, detailed: bool = False) -> LossOutput:
        """Actor and critic loss of one batch of windows; see `BaseAgent.loss`."""
        states = self.encode(batch)
        rows = TransitionRows(batch.mask, compact=self.config.skip_padding)
        state = rows.take(states[:, :-1])
        action = rows.take(batch.actions)
        policy = self.policy_config.build(self.actor(state))
        terms = self._terms(batch, rows, states, state, action, policy)

        actor_weights = self.edit_actor_mask(batch, terms.actor_loss, self._expand_mask(batch.mask, terms.actor_loss))
        actor_loss = masked_mean(terms.actor_loss, actor_weights)
        total = actor_loss
        metrics = {"loss/actor": actor_loss.detach()}
        if terms.critic_loss is not None:
            critic_weights = self.edit_critic_mask(
                batch, terms.critic_loss, self._expand_mask(batch.mask, terms.critic_loss)
            )
            critic_loss = masked_mean(terms.critic_loss, critic_weights)
            total = total + self.config.critic_loss_weight * critic_loss
            metrics["loss/critic"] = critic_loss.detach()
        metrics["loss/total"] = total.detach()
        if detailed:
            with torch.no_grad():
                metrics.update(
                    detailed_metrics(
                        batch,
                        rows,
                        terms,
                        popart=self.popart,
                        gammas=self.config.trained_gammas,
                        reward_multiplier=self.config.reward_multiplier,
                    )
                )
        return LossOutput(total, metrics)

    def _terms(
        self,
        batch: Batch,
        rows: TransitionRows,
        states: Tensor,
        state: Tensor,
        action: Tensor,
        policy: PolicyDistribution,
    ) -> AgentTerms:
        """Per-transition losses, and what the metrics want to see of them."""
        config = self.config
        log_prob = policy.log_prob(self._per_gamma(action))
        if not self.trains_critics:
            actor_loss = config.offline_coeff * actor_losses.offline_loss(log_prob, torch.ones_like(log_prob))
            return AgentTerms(policy=policy, log_prob=log_prob, actor_loss=rows.put(actor_loss))

        targets = self.td_targets(batch, rows, states)
        if self.training:
            self.popart.update(targets, rows.mask)
        values = self._values.evaluate(self.critics, state, action, policy, config.num_actions_actor)
        q_taken, v_policy = self.popart.head(values.q_taken), self.popart.head(values.v_policy)
        critic_loss = critic_losses.squared_error(q_taken, self.popart.normalize(targets))

        advantage = actor_losses.advantages(q_taken, v_policy)
        weights = torch.ones_like(advantage) if config.fake_filter else self._filter(advantage)
        actor_loss = torch.zeros_like(log_prob)
        if config.online_coeff > 0:
            actor_loss = actor_loss + config.online_coeff * actor_losses.online_loss(v_policy)
        if config.offline_coeff > 0:
            actor_loss = actor_loss + config.offline_coeff * actor_losses.offline_loss(log_prob, weights)
        return AgentTerms(
            policy=policy,
            log_prob=log_prob,
            actor_loss=rows.put(actor_loss),
            critic_loss=rows.put(critic_loss),
            targets=targets,
            q_taken=values.q_taken.detach(),
            v_policy=values.v_policy.detach(),
            advantage=advantage,
            weights=weights,
        )

    @torch.no_grad()
    def td_targets(self, batch: Batch, rows: TransitionRows, states: Tensor) -> Tensor:
        """TD targets in multiplied reward units, `[..., G]` in the layout of `rows`.

        Bootstraps from the state after each transition, also where the episode was truncated; only `terminated`
        stops it.
        """
        config = self.config
        next_state = rows.take(states[:, 1:])
        actor = self.target_actor if config.use_target_actor else self.actor
        policy = self.policy_config.build(actor(next_state))
        next_values = self._values.target(self.target_critics, next_state, policy, config.num_actions_critic)
        reduced = td.reduce_ensemble(
            self.popart.denormalize(next_values),
            num_subset=config.num_critics_td,
            mode="min" if config.online_coeff > 0 else "mean",
        )
        targets = td.td_targets(
            batch.rewards,
            batch.terminations,
            rows.put(reduced),
            self.gammas,
            batch.mask,
            reward_multiplier=config.reward_multiplier,
            n=config.n_step,
        )
        return rows.take(targets)

    def edit_actor_mask(self, batch: Batch, actor_loss: Tensor, mask: Tensor) -> Tensor:
        """Hook: weights `[B, T, G]` of the actor loss; override to train on fewer transitions."""
        return mask

    def edit_critic_mask(self, batch: Batch, critic_loss: Tensor, mask: Tensor) -> Tensor:
        """Hook: weights `[B, T, C, G]` of the critic loss; override to train on fewer transitions."""
        return mask

    @torch.no_grad()
    def update_targets(self) -> None:
        """`target <- (1 - tau) * target + tau * online`, parameters and buffers of both heads."""
        for target, online in ((self.target_actor, self.actor), (self.target_critics, self.critics)):
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), self.config.tau)
            for ours, theirs in zip(target.buffers(), online.buffers(), strict=True):
                ours.copy_(theirs)

    def _per_gamma(self, action: Tensor) -> Tensor:
        """The taken action, once per discount: `[..., G]` or `[..., G, A]`."""
        if self.action_spec.kind == "discrete":
            return action.unsqueeze(-1).expand(*action.shape, len(self.gammas))
        return action.unsqueeze(-2).expand(*action.shape[:-1], len(self.gammas), action.shape[-1])

    @staticmethod
    def _expand_mask(mask: Tensor, like: Tensor) -> Tensor:
        return mask.reshape(*mask.shape, *(1,) * (like.ndim - 2)).expand_as(like)
