"""Measuring models: exactly on public prompts and pairs, or by one noisy release on private units."""

from .metrics import Evaluation, evaluate_policy, evaluate_stages, logprobs_under, public_prompts
from .preferences import PairEvaluation, evaluate_pairs

__all__ = [
    "Evaluation",
    "PairEvaluation",
    "evaluate_pairs",
    "evaluate_policy",
    "evaluate_stages",
    "logprobs_under",
    "public_prompts",
]
