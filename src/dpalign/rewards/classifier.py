"""Any Hugging Face text-classification model as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..data.text import Text, as_string
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
from .base import RewardFunction


def classifier(path: str, config: RewardConfig, device: str | torch.device = "cpu") -> RewardFunction:
    """Probability (or logit) of one label; text is re-tokenised, so any tokenizer will do."""
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

    @torch.no_grad()
    def score(prompts: Sequence[Text], completions: list[str], **columns: list[Any]) -> list[float]:
        texts = completions
        if config.text not in (None, "completion"):
            texts = [as_string(p) + c for p, c in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for chunk, count in chunks(len(texts), 32):
            batch = tokenizer(
                [texts[i] for i in chunk],
                return_tensors="pt",
                truncation=True,
                max_length=length,
                padding="max_length",
            )
            logits = model(**batch.to(device)).logits
            scores += (logits if config.use_logit else logits.softmax(-1))[:count, index].tolist()
        return scores

    return score


def _load(path: str) -> tuple[Any, Any, Any]:
    """Model, what no file held of it, and tokenizer."""
    check_configuration(path, trust_remote_code=False)
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    return model, loading, AutoTokenizer.from_pretrained(path)
