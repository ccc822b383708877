"""Each algorithm: a config and a loss per row, readable alone."""

from .base import Algorithm, TrainingConfig
from .ppo import PPO, PPOConfig
from .reward import RewardModelConfig, RewardModelling
from .rloo import RLOO, RLOOConfig
from .rollouts import RolloutConfig
from .sft import SFT, SFTConfig

__all__ = [
    "PPO",
    "RLOO",
    "SFT",
    "Algorithm",
    "PPOConfig",
    "RLOOConfig",
    "RewardModelConfig",
    "RewardModelling",
    "RolloutConfig",
    "SFTConfig",
    "TrainingConfig",
]
