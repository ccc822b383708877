"""dpalign: align language models with private data under one (epsilon, delta) guarantee.

What needs torch is imported on first use, so that `import dpalign` and `dpalign plan` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import DPAlignError
from .version import __version__

if TYPE_CHECKING:
    from .evaluation import compare
    from .recipe import Recipe
    from .run import run_recipe
    from .settings.engine import EngineConfig
    from .settings.models import AdapterConfig, ModelConfig
    from .settings.privacy import Privacy
    from .settings.trainers import (
        DPOConfig,
        GRPOConfig,
        OfflineConfig,
        PPOConfig,
        RewardModelConfig,
        RLOOConfig,
        SFTConfig,
    )
    from .sweep import run_sweep
    from .trainers import (
        DPDPOTrainer,
        DPGRPOTrainer,
        DPOfflineTrainer,
        DPPPOTrainer,
        DPRewardTrainer,
        DPRLOOTrainer,
        DPSFTTrainer,
    )

_HOMES = {
    "AdapterConfig": "settings.models",
    "DPDPOTrainer": "trainers",
    "DPOConfig": "settings.trainers",
    "DPGRPOTrainer": "trainers",
    "DPOfflineTrainer": "trainers",
    "DPPPOTrainer": "trainers",
    "DPRLOOTrainer": "trainers",
    "DPRewardTrainer": "trainers",
    "DPSFTTrainer": "trainers",
    "EngineConfig": "settings.engine",
    "GRPOConfig": "settings.trainers",
    "ModelConfig": "settings.models",
    "OfflineConfig": "settings.trainers",
    "PPOConfig": "settings.trainers",
    "Privacy": "settings.privacy",
    "RLOOConfig": "settings.trainers",
    "Recipe": "recipe",
    "RewardModelConfig": "settings.trainers",
    "SFTConfig": "settings.trainers",
    "compare": "evaluation",
    "run_recipe": "run",
    "run_sweep": "sweep",
}

__all__ = [
    "AdapterConfig",
    "DPAlignError",
    "DPDPOTrainer",
    "DPGRPOTrainer",
    "DPOConfig",
    "DPOfflineTrainer",
    "DPPPOTrainer",
    "DPRLOOTrainer",
    "DPRewardTrainer",
    "DPSFTTrainer",
    "EngineConfig",
    "GRPOConfig",
    "ModelConfig",
    "OfflineConfig",
    "PPOConfig",
    "Privacy",
    "RLOOConfig",
    "Recipe",
    "RewardModelConfig",
    "SFTConfig",
    "__version__",
    "compare",
    "run_recipe",
    "run_sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
