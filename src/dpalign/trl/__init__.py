"""TRL's PPO under TRL's names, for scripts of TRL 0.11 to 1.9: without privacy by default, one argument for privacy.

    from dpalign.trl import PPOConfig, PPOTrainer

See docs/coming_from_trl.md for what changes.
"""

from ..settings.privacy import Privacy
from .config import PPOConfig
from .models import AutoModelForCausalLMWithValueHead, LengthSampler, create_reference_model, set_seed
from .trainer import PPOTrainer

PPOv2Config, PPOv2Trainer = PPOConfig, PPOTrainer  # their names in TRL 0.11

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "PPOv2Config",
    "PPOv2Trainer",
    "Privacy",
    "create_reference_model",
    "set_seed",
]
