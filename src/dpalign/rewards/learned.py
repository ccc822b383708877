"""A trained reward model as a reward, on a scale that no private text has touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..data.text import Text, joined
from ..errors import DPAlignError
from ..models import Normalization, Policy, RewardModel
from ..models.generation import write_rows
from .own import OwnReward, options_of, words


class Learned(OwnReward):
    """Scores of prompt and completion (or of the completion alone), each text by itself, on the scale of `constants`.

    The model reads exactly the tokens of a pair with that prompt and answer: a chat by its own tokenizer's template.
    """

    def __init__(self, model: RewardModel, text: str | None = None, constants: Normalization | None = None) -> None:
        self.model, self.text, self.constants = model, text, constants or Normalization()
        self.writes_with = None if text == "completion" else model.tokenizer

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: list[Any]) -> list[float]:
        if self.text == "completion":
            scores = self.model.score([words(completion) for completion in completions])
        else:
            texts = [joined(p, c) for p, c in zip(prompts, completions, strict=True)]
            scores = self.model.score(texts, options_of(columns, len(texts)))
        return (scores * self.constants.scale + self.constants.shift).tolist()


def own_texts(
    policy: Policy, rows: int, *, prompt_tokens: int, max_new_tokens: int, seed: int, text: str | None = None
) -> list[Text]:
    """What the policy writes itself, as a reward model reads it: prompt and completion, or the completion alone.

    The policy writes prompts and completions: it is public or a DP release, and no record is read.
    """
    torch.manual_seed(seed)
    prompts, completions = write_rows(policy, rows, prompt_tokens, max_new_tokens)
    if text == "completion":
        return list(completions)
    return [joined(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def normalize(model: RewardModel, texts: Sequence[Text]) -> Normalization:
    """Constants that give `texts`, the policy's own, mean reward 0 and standard deviation 1.

    Raises:
        DPAlignError: every text scores alike.
    """
    scores = model.score(texts)
    scores = scores[~scores.isnan()]  # a text without a token has no mean
    deviation = float(scores.std())
    if not deviation > 0:
        raise DPAlignError("the reward model gives all texts the same score: train it longer, or with less noise.")
    return Normalization(1 / deviation, -float(scores.mean()) / deviation)
