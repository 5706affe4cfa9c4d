"""One optimizer step at a time.

The order inside an update is fixed: spectral norms, forward, backward, clip, optimizer step, target networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from amago_core.agents.base import BaseAgent
from amago_core.errors import ConfigError
from amago_nets.sigma_reparam import update_spectral_norms
from amago_offline.batch import Batch


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Settings of `Learner`.

    Attributes:
        lr: AdamW learning rate after the warm-up.
        warmup_updates: updates over which the learning rate rises linearly; the first one uses `lr / warmup_updates`.
        lr_schedule: after the warm-up, keep the rate or let it fall along a half cosine to `lr * lr_final` at the last
            update of the run.
        lr_final: see `lr_schedule`.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW, on all trained parameters but those marked `_no_weight_decay`, such as decay rates of
            Mamba.
        grad_clip: largest global L2 norm of the gradient; 0 turns clipping off.
        precision: "no" for float32, "bf16" for autocast of the forward pass.
        compile: "off" runs eagerly; "default" and "max" compile the loss with `torch.compile` (the first update then
            takes a minute or more, and `AgentConfig.skip_padding` must be False).
    """

    lr: float = 1e-4
    warmup_updates: int = 500
    lr_schedule: Literal["constant", "cosine"] = "constant"
    lr_final: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-3
    grad_clip: float = 1.0
    precision: Literal["no", "bf16"] = "no"
    compile: Literal["off", "default", "max"] = "off"

    def __post_init__(self) -> None:
        """Refuse settings that could only fail later."""
        if not self.lr > 0:
            raise ConfigError(f"lr must be > 0; got {self.lr}")
        if self.warmup_updates < 0:
            raise ConfigError(f"warmup_updates must be >= 0; got {self.warmup_updates}")
        if self.grad_clip < 0 or self.weight_decay < 0:
            raise ConfigError(f"grad_clip and weight_decay must be >= 0; got {self.grad_clip} and {self.weight_decay}")
        allowed = {
            "lr_schedule": ("constant", "cosine"),
            "precision": ("no", "bf16"),
            "compile": ("off", "default", "max"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}")

    def lr_at(self, update: int, total_updates: int | None) -> float:
        """Learning rate of the 1-based `update` of a run of `total_updates`."""
        if update < self.warmup_updates:
            return self.lr * update / self.warmup_updates
        if self.lr_schedule == "constant" or not total_updates:
            return self.lr
        done = min(1.0, (update - self.warmup_updates) / max(1, total_updates - self.warmup_updates))
        return self.lr * (self.lr_final + (1 - self.lr_final) * 0.5 * (1 + math.cos(math.pi * done)))


class MetricMeans:
    """Means of metrics over many updates, each over those that reported it; only `compute` waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Take in the metrics of one update, `[]` tensors by name."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def compute(self) -> dict[str, float]:
        """The means by name."""
        return {name: float(value) / self._counts[name] for name, value in self._sums.items()}


class Learner:
    """Updates an agent from batches.

    Args:
        agent: the agent, on the device it is trained on.
        config: settings.
        total_updates: length of the run, for the learning-rate schedule; None if it is open-ended.
    """

    def __init__(self, agent: BaseAgent, config: LearnerConfig, total_updates: int | None = None) -> None:
        self.agent = agent
        self.config = config
        self.total_updates = total_updates
        self.updates = 0
        modules = agent.trained_modules()
        self._parameters = {
            name: [p for p in module.parameters() if p.requires_grad] for name, module in modules.items()
        }
        flat = [p for group in self._parameters.values() for p in group]
        exempt = [p for p in flat if getattr(p, "_no_weight_decay", False)]
        groups: list[dict[str, Any]] = [{"params": [p for p in flat if not getattr(p, "_no_weight_decay", False)]}]
        if exempt:
            groups.append({"params": exempt, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
        self._loss = agent.loss
        if config.compile != "off":
            if getattr(getattr(agent, "config", None), "skip_padding", False):
                raise ConfigError(f"compile={config.compile!r} needs static shapes: set the agent's skip_padding=False")
            mode = "max-autotune" if config.compile == "max" else "default"
            self._loss = torch.compile(agent.loss, mode=mode)

    def update(self, batch: Batch, *, detailed: bool = False) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            batch: windows on the agent's device.
            detailed: also return the metrics that cost something.

        Returns:
            Metrics by name, `[]` tensors still on the device.
        """
        self.agent.train()
        update_spectral_norms(self.agent)
        device_type = self.agent.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = self._loss(batch, detailed=detailed)
        output.total.backward()
        metrics = dict(output.metrics)
        if detailed:
            metrics.update(self._grad_norms())
        flat = [p for group in self._parameters.values() for p in group]
        if self.config.grad_clip > 0:
            metrics["grad_norm/all"] = torch.nn.utils.clip_grad_norm_(flat, self.config.grad_clip).detach()
        self.updates += 1
        lr = self.config.lr_at(self.updates, self.total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.agent.update_targets()
        metrics["lr"] = torch.tensor(lr)
        return metrics

    def _grad_norms(self) -> dict[str, Tensor]:
        norms = {}
        for name, parameters in self._parameters.items():
            grads = [p.grad for p in parameters if p.grad is not None]
            if grads:
                norms[f"grad_norm/{name}"] = torch.stack(torch._foreach_norm(grads)).norm()
        return norms

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state and counters; the agent's own tensors are `agent.state_dict()`."""
        return {"optimizer": self.optimizer.state_dict()["state"], "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for the same agent."""
        full = self.optimizer.state_dict()
        full["state"] = state["optimizer"]
        self.optimizer.load_state_dict(full)
        self.updates = state["updates"]
