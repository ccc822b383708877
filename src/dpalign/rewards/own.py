"""Rewards of dpalign's own that read with a model: every row by itself, and nothing is remembered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.text import TEMPLATE_COLUMNS, Text, template_options


class OwnReward(ABC):
    """A model's scores; a completion of a chat may be given as text or as its message.

    writes_with: the tokenizer whose chat template writes the chats that the model reads; None if none does.
    """

    writes_with: PreTrainedTokenizerBase | None

    @abstractmethod
    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: list[Any]) -> list[float]: ...


def options_of(columns: dict[str, list[Any]], rows: int) -> list[dict[str, Any]]:
    """What each of the rows hands to a chat template."""
    given = [name for name in TEMPLATE_COLUMNS if name in columns]
    return [template_options({name: columns[name][row] for name in given}) for row in range(rows)]


def words(completion: Text) -> str:
    """What a completion says."""
    return completion if isinstance(completion, str) else str(completion[0]["content"])
