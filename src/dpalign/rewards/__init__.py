"""Reward functions with TRL's signature: `f(prompts, completions, **columns) -> list[float]`."""

from ..settings.rewards import RewardConfig
from .base import Reward, RewardFunction, check_reward
from .learned import normalize
from .load import is_reward_model, load_reward

__all__ = ["Reward", "RewardConfig", "RewardFunction", "check_reward", "is_reward_model", "load_reward", "normalize"]
