"""Each algorithm: a config and a loss per row, readable alone."""

from ..settings.base import TrainingConfig
from ..settings.dpo import DPOConfig
from ..settings.grpo import GRPOConfig
from ..settings.offline import OfflineConfig
from ..settings.ppo import PPOConfig
from ..settings.reward_model import RewardModelConfig
from ..settings.reward_query import RewardQueryConfig
from ..settings.rloo import RLOOConfig
from ..settings.rollouts import RolloutConfig, SamplingConfig
from ..settings.sft import SFTConfig
from .base import Algorithm
from .dpo import DPO
from .grpo import GRPO
from .offline import Offline
from .ppo import PPO
from .reward import RewardModelling
from .reward_query import RewardQuery
from .rloo import RLOO
from .sft import SFT

__all__ = [
    "DPO",
    "GRPO",
    "PPO",
    "RLOO",
    "SFT",
    "Algorithm",
    "DPOConfig",
    "GRPOConfig",
    "Offline",
    "OfflineConfig",
    "PPOConfig",
    "RLOOConfig",
    "RewardModelConfig",
    "RewardModelling",
    "RewardQuery",
    "RewardQueryConfig",
    "RolloutConfig",
    "SFTConfig",
    "SamplingConfig",
    "TrainingConfig",
]
