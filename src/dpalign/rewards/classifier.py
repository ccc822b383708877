"""Any Hugging Face text-classification model as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..data.text import Text, as_string, joined, written
from ..errors import DPAlignError
from ..models.kernels import chunks, constant_kernels
from ..models.loading import (
    check_configuration,
    check_ids,
    check_tokenizer,
    check_weights,
    embedding_rows,
    loaded,
    refuse_missing,
)
from ..settings.rewards import RewardConfig
from .own import OwnReward, options_of, words


class Classifier(OwnReward):
    """Probability (or logit) of one label; text is re-tokenised, so any tokenizer will do.

    A prompt that is a chat is written with its completion by the classifier's own chat template, or without one as a
    line `role: content` for each message, with the completion behind them. A completion alone is read as it is.
    """

    def __init__(self, model: Any, tokenizer: Any, config: RewardConfig, index: int, length: int) -> None:
        self.model, self.tokenizer, self.config, self.index, self.length = model, tokenizer, config, index, length
        self.is_alone = config.text in (None, "completion")
        self.writes_with = tokenizer if tokenizer.chat_template and not self.is_alone else None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: list[Any]) -> list[float]:
        options = options_of(columns, len(completions))
        texts = [self._text(*row) for row in zip(prompts, completions, options, strict=True)]
        scores = [0.0] * len(texts)
        for is_whole in (False, True):
            rows = [row for row, text in enumerate(texts) if text[1] == is_whole]
            for chunk, count in chunks(len(rows), 32):
                batch = self.tokenizer(
                    [texts[rows[i]][0] for i in chunk],
                    add_special_tokens=not is_whole,
                    return_tensors="pt",
                    truncation=True,
                    max_length=self.length,
                    padding="max_length",
                )
                logits = self.model(**batch.to(self.model.device)).logits
                found = (logits if self.config.use_logit else logits.softmax(-1))[:count, self.index].tolist()
                for i, score in zip(chunk, found, strict=False):  # a full batch repeats its last row
                    scores[rows[i]] = score
        return scores

    def _text(self, prompt: Text, completion: Text, options: dict[str, Any]) -> tuple[str, bool]:
        """What is read, and whether a template wrote it, special tokens included."""
        if self.is_alone:
            return words(completion), False
        if self.writes_with is None or isinstance(prompt, str):
            return as_string(prompt) + words(completion), False
        return written(self.tokenizer, joined(prompt, completion), options), True


def classifier(path: str, config: RewardConfig, device: str | torch.device = "cpu") -> Classifier:
    """The classifier in a folder, or of a name.

    Raises:
        DPAlignError: it cannot be loaded, or has no such label.
    """
    model, loading, tokenizer = loaded("a text classifier", path, lambda: _load(path))
    refuse_missing(path, loading["missing_keys"])
    check_weights(model, f"the classifier {path}")
    check_tokenizer(model, tokenizer)
    check_ids(tokenizer.get_vocab().values(), embedding_rows(model))  # what a policy writes may hold any of them
    model.to(device).eval()
    constant_kernels(model)
    labels = {str(name): index for index, name in model.config.id2label.items()}
    if config.label is not None and config.label not in labels:
        raise DPAlignError(f"classifier {path!r} has no label {config.label!r}; it has {', '.join(labels)}.")
    index = labels[config.label] if config.label is not None else model.config.num_labels - 1
    positions = getattr(model.config, "max_position_embeddings", None) or config.max_length
    if "roberta" in model.config.model_type:
        positions -= model.config.pad_token_id + 1  # its positions are counted from behind the padding token's
    length = min(tokenizer.model_max_length, positions, config.max_length)

    return Classifier(model, tokenizer, config, index, length)


def _load(path: str) -> tuple[Any, Any, Any]:
    """Model, what no file held of it, and tokenizer."""
    check_configuration(path, trust_remote_code=False)
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    return model, loading, AutoTokenizer.from_pretrained(path)
