"""How a release's prompts were made: prompts.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import DPAlignError

PROMPTS_FILE = "prompts.json"


@dataclass(frozen=True)
class PromptFormat:
    """How a release's prompts were made, so that whoever uses it need not know: prompts.json.

    prepend_bos: of strings. chats: whether they are chats, made by the tokenizer's template. asked_with: words in front
    of every prompt, which the policy has learned to be asked with.
    """

    prepend_bos: bool = False
    chats: bool = False
    asked_with: str = ""


def prompt_format_of(folder: str | Path) -> PromptFormat | None:
    """None of a base model, or of a release of version 0.1.0.

    Raises:
        DPAlignError: it is damaged.
    """
    path = Path(folder) / PROMPTS_FILE
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        found = PromptFormat(value["prepend_bos"], value["chats"], value.get("asked_with", ""))
        if not (isinstance(found.prepend_bos, bool) and isinstance(found.chats, bool)):
            raise ValueError
        if not isinstance(found.asked_with, str):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DPAlignError(f"{path} does not say how prompts are made: copy the release again.") from None
    return found
