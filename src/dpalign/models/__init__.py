"""The policy and the reward model: language models with stacked LoRA adapters; generation."""

from ..settings.models import AdapterConfig, ModelConfig, TextFormat
from .policy import Policy
from .reward_model import Normalization, RewardModel
from .sharded import checksums
from .stack import AdapterStack

__all__ = [
    "AdapterConfig",
    "AdapterStack",
    "ModelConfig",
    "Normalization",
    "Policy",
    "RewardModel",
    "TextFormat",
    "checksums",
]
