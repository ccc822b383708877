"""Each algorithm: a config and a loss per row, readable alone."""

from .base import Algorithm, TrainingConfig
from .completions import SamplingConfig
from .dpo import DPO, DPOConfig
from .ppo import PPO, PPOConfig
from .reward import RewardModelConfig, RewardModelling
from .rloo import RLOO, RLOOConfig
from .rollouts import RolloutConfig
from .sft import SFT, SFTConfig

__all__ = [
    "DPO",
    "PPO",
    "RLOO",
    "SFT",
    "Algorithm",
    "DPOConfig",
    "PPOConfig",
    "RLOOConfig",
    "RewardModelConfig",
    "RewardModelling",
    "RolloutConfig",
    "SFTConfig",
    "SamplingConfig",
    "TrainingConfig",
]
