"""A trained reward model as a reward, on a scale that no private text has touched."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import DPAlignError
from ..models import Normalization, Policy, RewardModel
from ..models.generation import write_prompts
from .base import RewardFunction


def learned(model: RewardModel, text: str | None = None) -> RewardFunction:
    """Scores of prompt and completion (or of the completion alone), each text by itself."""

    def score(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        texts = completions if text == "completion" else [p + c for p, c in zip(prompts, completions, strict=True)]
        return model.score(texts).tolist()

    return score


def normalize(
    model: RewardModel,
    policy: Policy,
    *,
    rows: int,
    prompt_tokens: int,
    max_new_tokens: int,
    seed: int,
    text: str | None = None,
) -> Normalization:
    """Constants that give the policy's own text mean reward 0 and standard deviation 1.

    The policy writes prompts and completions itself: it is public or a DP release, and no record is read.

    Raises:
        DPAlignError: every text scores alike.
    """
    torch.manual_seed(seed)
    prompts = write_prompts(policy, rows, prompt_tokens, 256)
    rollouts = policy.sample(prompts, torch.ones_like(prompts), max_new_tokens)
    fronts = policy.tokenizer.batch_decode(prompts, skip_special_tokens=True)
    scores = torch.tensor(learned(model, text)(fronts, policy.decode(rollouts)))
    scores = scores[~scores.isnan()]  # a text without a token has no mean
    deviation = float(scores.std())
    if not deviation > 0:
        raise DPAlignError("the reward model gives all texts the same score: train it longer, or with less noise.")
    return Normalization(1 / deviation, -float(scores.mean()) / deviation)
