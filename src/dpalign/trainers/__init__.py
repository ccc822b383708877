"""Trainers in TRL's shape; the same pipeline as the command, from Python objects."""

from .stages import DPDPOTrainer, DPGRPOTrainer, DPPPOTrainer, DPRewardTrainer, DPRLOOTrainer, DPSFTTrainer

__all__ = ["DPDPOTrainer", "DPGRPOTrainer", "DPPPOTrainer", "DPRLOOTrainer", "DPRewardTrainer", "DPSFTTrainer"]
