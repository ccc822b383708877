"""Prompts that are cut from records, and the completions that a policy samples for them; every row by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..data.load import Record
from ..data.text import Text, cut_length, encode_prompt_text, encode_text, joined, kept, read_text, template_options
from ..engines import Local
from ..errors import DPAlignError, TooLongError
from ..models import Policy
from ..models.generation import Prompt
from ..models.policy import Rollouts
from ..rewards.load import given_columns
from ..settings.rollouts import SamplingConfig
from .base import Coins, Reading, Tokenizer, check_records

CHATS = ("messages", "conversations", "text")  # columns whose chat is asked for its last answer
PROMPT_COLUMNS = (("prompt",), *((name,) for name in CHATS))


def sample(policy: Policy, ids: Tensor, mask: Tensor, config: SamplingConfig, coins: Coins | None = None) -> Rollouts:
    """Completions of `(rows, prompt)` ids with the config's lengths, sampled here; `coins` as in `Policy.sample`."""
    return Local().sample(policy, ids, mask, config, coins)


def encode_prompt(tokenizer: Tokenizer, record: Record, config: SamplingConfig) -> list[int] | None:
    """Token ids of a record's prompt; None for a text with too few tokens (the unit then adds nothing)."""
    prompt = prompt_of(record)
    if prompt is not None:
        ids = encode_prompt_text(tokenizer, prompt, prepend_bos=config.prepend_bos, options=template_options(record))
        return _cut_left(ids, config.max_prompt_length, tokenizer) if config.truncate_prompts else ids
    text = str(record["text"])
    low, high = config.prompt_min_tokens, config.prompt_max_tokens
    length = cut_length(text, low or high or 8, high or low or 8)
    own: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    if len(own) < length:
        return None
    front = [tokenizer.bos_token_id] if config.prepend_bos and tokenizer.bos_token_id is not None else []
    return front + own[:length]


def _cut_left(ids: list[int], length: int, tokenizer: Tokenizer) -> list[int]:
    """The last `length` ids, of which the first is BOS if it was."""
    if len(ids) <= length:
        return ids
    front = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return front + ids[len(ids) - length + len(front) :]


def read_prompt(tokenizer: Tokenizer, record: Record, config: SamplingConfig) -> Prompt | None:
    """A record's prompt with what it says and the columns of its reward; None as in `encode_prompt`."""
    ids = encode_prompt(tokenizer, record, config)
    if ids is None:
        return None
    text = prompt_of(record)
    said: Text = str(tokenizer.decode(ids, skip_special_tokens=True)) if text is None else text
    # The declared columns and no others: a key that only one record has must not change the call of the reward.
    columns = {name: record.get(name) for name in given_columns(config.reward)}
    return Prompt(kept(ids), said, columns or None, None if text is None else template_options(record) or None)


def columns_of(prompts: Sequence[Prompt], config: SamplingConfig) -> dict[str, list[Any]]:
    """The columns that the reward of these prompts is given, by name."""
    return {name: [(prompt.columns or {}).get(name) for prompt in prompts] for name in given_columns(config.reward)}


def check_asked(tokenizer: Tokenizer, record: Record) -> None:
    """Raises DPAlignError for a prompt that another model than the policy cannot read with an answer behind it."""
    prompt = prompt_of(record)
    if prompt is not None:
        encode_text(tokenizer, joined(prompt, "Yes."), options=template_options(record))


def prompt_of(record: Record) -> Text | None:
    """What is asked: a record's `prompt`, or its chat without the answer that ends it; None for a text to be cut.

    Raises:
        DPAlignError: not a text, or a chat in which nothing is asked.
    """
    if "prompt" in record:
        return read_text(record["prompt"])
    chat = read_text(record[next(name for name in CHATS if name in record)])
    if isinstance(chat, str):
        return None
    asked = chat[:-1] if chat and chat[-1]["role"] == "assistant" else chat
    if not asked:
        raise DPAlignError("the chat has no message before its answer: there is no prompt")
    return asked


def check_prompts(tokenizer: Tokenizer, records: list[Record], config: SamplingConfig, path: str) -> None:
    """Raises DPAlignError for a missing column or a prompt longer than the limit."""
    check_records(records, path, PROMPT_COLUMNS, lambda record: check_prompt(tokenizer, record, config))


def check_prompt(tokenizer: Tokenizer, record: Record, config: SamplingConfig) -> Reading:
    """What is read of a prompt; nothing of a text that is too short for one.

    Raises:
        DPAlignError: a prompt longer than the limit, never quoted.
    """
    ids = encode_prompt(tokenizer, record, replace(config, truncate_prompts=False)) or []
    length = len(ids)
    if not config.truncate_prompts and length > config.max_prompt_length:
        raise TooLongError(
            f"the prompt has {length} tokens, more than max_prompt_length {config.max_prompt_length}: raise the limit "
            "or set truncate_prompts",
            length,
        )
    return Reading(length, config.max_prompt_length, min(length, config.max_prompt_length), max(ids, default=0))
