"""Measuring models on public prompts."""

from .metrics import Evaluation, evaluate_policy, evaluate_stages, logprobs_under, public_prompts

__all__ = ["Evaluation", "evaluate_policy", "evaluate_stages", "logprobs_under", "public_prompts"]
