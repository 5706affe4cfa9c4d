"""Agents: networks composed into a policy with a loss."""

from amago_core.agents.agent import Agent, AgentConfig
from amago_core.agents.base import BaseAgent, LossOutput

__all__ = ["Agent", "AgentConfig", "BaseAgent", "LossOutput"]
