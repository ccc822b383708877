"""Each algorithm: a config and a loss per row, readable alone."""

from .base import Algorithm, TrainingConfig
from .ppo import PPO, PPOConfig
from .sft import SFT, SFTConfig

__all__ = ["PPO", "SFT", "Algorithm", "PPOConfig", "SFTConfig", "TrainingConfig"]
