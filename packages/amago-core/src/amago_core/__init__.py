"""AMAGO: off-policy reinforcement learning on long sequences.

Source: Grigsby et al., "AMAGO: Scalable In-Context Reinforcement Learning for Adaptive Agents", ICLR 2024, and
"AMAGO-2: Breaking the Multi-Task Barrier in Meta-Reinforcement Learning with Transformers", NeurIPS 2024.
"""

from amago_core.config import ExperimentConfig
from amago_core.evaluation import evaluate
from amago_core.experiment import Experiment
from amago_core.policy import Policy

__version__ = "0.1.0"
__all__ = ["Experiment", "ExperimentConfig", "Policy", "__version__", "evaluate"]
