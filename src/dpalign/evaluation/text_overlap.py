"""ROUGE of completions against reference texts (Lin 2004), by the package rouge-score; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.load import Record
from ..errors import DPAlignError

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(completions: list[str], references: list[str]) -> dict[str, Tensor]:
    """F1 in [0, 1] of each completion against its reference, `(rows,)` float64 by `ROUGE`'s names.

    Words are runs of a-z and 0-9 after lower-casing, stemmed by Porter's rules: this is for English.
    """
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes seconds

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(target, text) for target, text in zip(references, completions, strict=True)]
    return {name: torch.tensor([s[name].fmeasure for s in scores], dtype=torch.float64) for name in ROUGE}


def reference_texts(records: list[Record], column: str, path: str) -> list[str]:
    """The reference of each record: a string, or the contents of chat messages.

    Raises:
        DPAlignError: a record without a text in that column; or no text has a word that ROUGE reads.
    """
    if not any(column in record for record in records):
        found = ", ".join(repr(c) for c in records[0])
        raise DPAlignError(f"{path} has the columns {found}, and no column {column!r} of reference texts.")
    texts = []
    for number, record in enumerate(records, 1):
        text = _text(record.get(column))
        if text is None:
            raise DPAlignError(
                f"record {number} of {path} has no reference text in column {column!r}: give every record one."
            )
        texts.append(text)
    if not any(c.isascii() and c.isalnum() for text in texts for c in text):
        raise DPAlignError(f"no text in column {column!r} of {path} has a word that ROUGE reads (a-z, 0-9).")
    return texts


def lacking_references(records: list[Record], column: str) -> int:
    """How many records have no reference text in this column."""
    return sum(_text(record.get(column)) is None for record in records)


def _text(value: Any) -> str | None:
    if isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value):
        value = "\n".join(m["content"] for m in value)
    return value if isinstance(value, str) and value.strip() else None
