"""Text of one record to token ids; every record by itself."""

from __future__ import annotations

import hashlib
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import DPAlignError


def render(tokenizer: PreTrainedTokenizerBase, value: Any, *, is_prompt: bool = False) -> str:
    """A string as it is; a list of chat messages through the tokenizer's chat template."""
    if isinstance(value, str):
        return value
    if not getattr(tokenizer, "chat_template", None):
        raise DPAlignError("the data holds chat messages, but the tokenizer has no chat template: give plain strings.")
    return str(tokenizer.apply_chat_template(value, tokenize=False, add_generation_prompt=is_prompt))


def tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, prepend_bos: bool) -> list[int]:
    """Token ids, with BOS in front if asked for and not already there."""
    ids: list[int] = tokenizer(text, add_special_tokens=not prepend_bos).input_ids
    if prepend_bos and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return ids


def cut_length(text: str, low: int, high: int) -> int:
    """Length in [low, high] at which a record's text is cut into a prompt: a fixed function of that text."""
    if low == high:
        return low
    digest = hashlib.sha256(text.encode()).digest()
    return low + int.from_bytes(digest[:4], "big") % (high - low + 1)
