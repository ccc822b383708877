"""Trainers in TRL's shape; the same pipeline as the command, from Python objects."""

from .stages import DPDPOTrainer, DPPPOTrainer, DPRewardTrainer, DPRLOOTrainer, DPSFTTrainer

__all__ = ["DPDPOTrainer", "DPPPOTrainer", "DPRLOOTrainer", "DPRewardTrainer", "DPSFTTrainer"]
