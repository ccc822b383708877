"""Sentiment from a public lexicon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from ..data.text import Text, as_string
from .base import RewardFunction


def vader(text: str | None = None) -> RewardFunction:
    """VADER's compound score, -1 (negative) to 1 (positive) (Hutto and Gilbert, ICWSM 2014)."""
    analyzer = SentimentIntensityAnalyzer()

    def score(prompts: Sequence[Text], completions: list[str], **columns: list[Any]) -> list[float]:
        texts = (
            completions
            if text in (None, "completion")
            else [as_string(p) + c for p, c in zip(prompts, completions, strict=True)]
        )
        return [analyzer.polarity_scores(t)["compound"] for t in texts]

    return score
