"""Public reward functions with TRL's signature: `f(prompts, completions, **columns) -> list[float]`."""

from .base import Reward, RewardConfig, RewardFunction, check_reward
from .load import load_reward

__all__ = ["Reward", "RewardConfig", "RewardFunction", "check_reward", "load_reward"]
