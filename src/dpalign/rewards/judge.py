"""A public language model as a judge: does it answer a question about a text with yes?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.text import Text, encode_prompt_text
from ..errors import DPAlignError
from ..models.kernels import chunks
from ..settings.rewards import RewardConfig
from .base import BATCH, RewardFunction
from .written import PublicModel, PublicModels, texts_read

YES, NO = ("Yes", " Yes", "yes", " yes", "YES", " YES"), ("No", " No", "no", " no", "NO", " NO")
FORM = "{text}\n\nQuestion: {question} Answer with Yes or No."
ROOM = 16  # tokens that a text must have at least beside its question


def judge(config: RewardConfig, public: PublicModels) -> RewardFunction:
    """log P(yes) - log P(no), each question's over its deviation on self-written text, averaged over the questions.

    Raises:
        DPAlignError: a tokenizer without a single token for yes or no, a question that leaves a text no room, or one
            that is answered alike whatever the text.
    """
    model, how = public.judge(config), config.text or "prompt+completion"
    model.check_length(config.max_length, "reward.max_length")
    asked = [Question(model, question, config.max_length) for question in config.questions]

    def answers(prompts: Sequence[Text], completions: list[str]) -> Tensor:
        texts = texts_read(how, prompts, completions)
        return torch.stack([question(texts) for question in asked], 1)

    def fit() -> dict[str, Tensor]:
        return scales(answers(*public.own_rows(config)), config.questions)

    fitted = public.constants(config, fit)

    def score(prompts: Sequence[Text], completions: list[str], **columns: list[Any]) -> list[float]:
        standardised = (answers(prompts, completions) - fitted["means"]) / fitted["deviations"]
        return standardised.mean(1).tolist()

    return score


class Question:
    """One question to one model about texts, each by itself: every row is as long, and every batch as large."""

    def __init__(self, model: PublicModel, question: str, max_length: int) -> None:
        self.model, self.question, self.max_length = model, question, max_length
        self.tokenizer = tokenizer = model.policy.tokenizer
        self.yes, self.no = single_tokens(tokenizer, YES), single_tokens(tokenizer, NO)
        taken = len(self._written(""))
        if taken + ROOM > max_length:
            raise DPAlignError(
                f"a judge's question takes {taken} tokens with what is around it, and a text needs {ROOM}: raise "
                f"reward.max_length (now {max_length})."
            )

    def __call__(self, texts: list[str]) -> Tensor:
        """`(texts,)` float32 on the CPU."""
        rows = [self.encode(text) for text in texts]
        found = []
        with self.model.as_it_came() as policy:
            for chunk, count in chunks(len(rows), BATCH):
                logits = policy(*policy.encode_prompts([rows[i] for i in chunk], self.max_length), 1)[0][:, 0]
                odds = logits[:, self.yes].logsumexp(1) - logits[:, self.no].logsumexp(1)
                found.append(odds[:count].float().cpu())
        return torch.cat(found) if found else torch.zeros(0)

    def encode(self, text: str) -> list[int]:
        """Token ids of the question about a text; of a text that is too long, about its beginning."""
        ids = self._written(text)
        own: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        room = len(own)
        while len(ids) > self.max_length:
            room = max(0, room - (len(ids) - self.max_length))
            ids = self._written(str(self.tokenizer.decode(own[:room])))
        return ids

    def _written(self, text: str) -> list[int]:
        said = FORM.format(text=text, question=self.question)
        if getattr(self.tokenizer, "chat_template", None):
            return encode_prompt_text(self.tokenizer, [{"role": "user", "content": said}])
        return encode_prompt_text(self.tokenizer, f"{said}\nAnswer:", prepend_bos=True)


def single_tokens(tokenizer: PreTrainedTokenizerBase, spellings: Sequence[str]) -> list[int]:
    """Ids of the spellings that are one token.

    Raises:
        DPAlignError: none is.
    """
    encoded = [tokenizer(spelling, add_special_tokens=False).input_ids for spelling in spellings]
    unknown = tokenizer.unk_token_id
    found = sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != unknown})
    if not found:
        raise DPAlignError(
            f"the tokenizer of a judge has no single token for {spellings[0]!r} in any spelling: use another model."
        )
    return found


def scales(scores: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Means and deviations `(scores,)` of `(texts, scores)`; a text that cannot be scored does not count.

    Raises:
        DPAlignError: one is the same for all texts, or has no two.
    """
    kept = scores[scores.isfinite().all(1)].double()
    means, deviations = kept.mean(0), kept.std(0)
    for name, mean, deviation in zip(names, means.tolist(), deviations.tolist(), strict=True):
        if not deviation > 1e-6 * max(1.0, abs(mean)):
            raise DPAlignError(f"{name!r} says the same of all texts that the model writes: it cannot be a reward.")
    return {"means": means.float(), "deviations": deviations.float()}
