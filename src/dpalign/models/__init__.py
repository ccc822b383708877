"""The policy and the reward model: language models with stacked LoRA adapters; generation."""

from .policy import Policy
from .reward_model import Normalization, RewardModel, TextFormat
from .stack import AdapterConfig, AdapterStack, ModelConfig

__all__ = [
    "AdapterConfig",
    "AdapterStack",
    "ModelConfig",
    "Normalization",
    "Policy",
    "RewardModel",
    "TextFormat",
]
