"""Trainers in TRL's shape; the same pipeline as the command, from Python objects."""

from .stages import (
    DPDPOTrainer,
    DPGRPOTrainer,
    DPOfflineTrainer,
    DPPPOTrainer,
    DPRewardTrainer,
    DPRLOOTrainer,
    DPSFTTrainer,
)

__all__ = [
    "DPDPOTrainer",
    "DPGRPOTrainer",
    "DPOfflineTrainer",
    "DPPPOTrainer",
    "DPRLOOTrainer",
    "DPRewardTrainer",
    "DPSFTTrainer",
]
