"""Text that a model writes by itself: post-processing of the model, whatever it is used for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.text import Text, encode_prompt_text, opening_of_a_turn, turn_lead, worded
from ..errors import DPAlignError
from .policy import Policy, Rollouts


@dataclass(frozen=True, slots=True)  # of every unit that was drawn one is kept
class Prompt:
    """Token ids of a prompt and what they say.

    columns: of its record, that a reward is given. options: of its record, that a chat template takes.
    """

    ids: list[int]
    text: Text
    columns: Mapping[str, Any] | None = None
    options: Mapping[str, Any] | None = None


def asked(policy: Policy, prompt: Prompt) -> list[int]:
    """Token ids of a prompt as the policy is asked, as it is switched now."""
    return with_words(policy.tokenizer, prompt, policy.asked_with)


def with_words(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, words: str) -> list[int]:
    """Token ids of a prompt with words in front, behind its BOS; of a chat as its template writes them."""
    if not words:
        return prompt.ids
    if not isinstance(prompt.text, str):
        return encode_prompt_text(tokenizer, worded(tokenizer, prompt.text, words), options=prompt.options)
    bos = prompt.ids[:1] if prompt.ids[:1] == [tokenizer.bos_token_id] else []
    return bos + list(tokenizer(words, add_special_tokens=False).input_ids) + prompt.ids[len(bos) :]


def words_room(policy: Policy) -> int:
    """Tokens by which the words that the policy is asked with may lengthen a prompt: none without any."""
    return 8 + 2 * len(policy.tokenizer(policy.asked_with).input_ids) if policy.asked_with else 0


def padded(policy: Policy, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """`(prompts, longest)` ids and mask of prompts that are no one's, or public, as the policy is asked."""
    ids = [asked(policy, prompt) for prompt in prompts]
    return policy.encode_prompts(ids, max(map(len, ids)))


def asked_again(policy: Policy, prompts: list[Prompt], rollouts: Rollouts) -> Rollouts:
    """The same completions, behind the prompts as the policy is asked as it is switched now."""
    width = rollouts.completion_mask.shape[1]
    ids, mask = padded(policy, prompts)
    return Rollouts(
        torch.cat([ids, rollouts.completion_ids], 1),
        torch.cat([mask, rollouts.attention_mask[:, -width:]], 1),
        rollouts.completion_mask,
    )


def answers(policy: Policy, prompts: list[Prompt], rollouts: Rollouts) -> list[str]:
    """What the completions say, without special tokens; to a chat without what its template writes before an answer."""
    lead = turn_lead(policy.tokenizer)
    texts = zip(prompts, policy.decode(rollouts), strict=True)
    return [text if isinstance(prompt.text, str) else text.removeprefix(lead) for prompt, text in texts]


def longest_written(policy: Policy, prompt_tokens: int) -> int:
    """Tokens of a prompt that the policy writes itself, with the BOS or the chat template's words around them.

    Raises:
        DPAlignError: the tokenizer has neither BOS nor EOS.
    """
    if not policy.asks_in_chats:
        return len(_front(policy)) + prompt_tokens
    return len(encode_prompt_text(policy.tokenizer, [{"role": "user", "content": "Hello"}])) + prompt_tokens


def _front(policy: Policy) -> list[int]:
    """What stands before a self-written prompt."""
    tokenizer = policy.tokenizer
    if policy.asks_in_chats:
        return opening_of_a_turn(tokenizer)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise DPAlignError("self-written prompts need a tokenizer with a BOS or EOS token to start from.")
    return [start]


def write_prompts(policy: Policy, count: int, prompt_tokens: int, rows_at_once: int) -> list[Prompt]:
    """Prompts of `prompt_tokens` tokens that the policy writes itself after BOS (EOS where there is none).

    Where the run's prompts are chats, the policy writes what a user would ask behind the beginning of a user's turn,
    and its chat template makes a prompt of it (as Magpie does: Xu et al. 2024, arXiv 2406.08464). Reads no record.

    Raises:
        DPAlignError: the tokenizer has neither BOS nor EOS.
    """
    tokenizer = policy.tokenizer
    ids = torch.tensor([_front(policy)], device=policy.device).expand(count, -1)
    least = 1 if policy.asks_in_chats else prompt_tokens
    written = policy.sample(ids, torch.ones_like(ids), prompt_tokens, min_new_tokens=least, rows_at_once=rows_at_once)
    if not policy.asks_in_chats:
        texts = tokenizer.batch_decode(written.input_ids, skip_special_tokens=True)
        return [Prompt(row, text) for row, text in zip(written.input_ids.tolist(), texts, strict=True)]
    chats = [[{"role": "user", "content": question.strip()}] for question in policy.decode(written)]
    return [Prompt(encode_prompt_text(tokenizer, chat), chat) for chat in chats]


def write_texts(
    policy: Policy,
    count: int,
    prompt_tokens: int,
    completion_tokens: int,
    positions: int,
    temperature: float,
    rows_at_once: int,
) -> Rollouts:
    """Texts that the policy writes itself, with at most so many `positions`: from BOS on, or answers to questions of
    its own where the run's prompts are chats (at most `count`: those that leave an answer its room). Reads no record.

    Raises:
        DPAlignError: the tokenizer has neither BOS nor EOS.
    """
    if policy.asks_in_chats:
        written = write_prompts(policy, count, prompt_tokens, rows_at_once)
        asked = [prompt for prompt in written if len(prompt.ids) + completion_tokens <= positions]
        ids, mask = padded(policy, asked or written[:1])
    else:
        ids = torch.tensor([_front(policy)], device=policy.device).expand(count, -1)
        mask = torch.ones_like(ids)
        completion_tokens = min(prompt_tokens + completion_tokens, positions - ids.shape[1])
    return policy.sample(ids, mask, completion_tokens, temperature=temperature, rows_at_once=rows_at_once)


def write_rows(policy: Policy, count: int, prompt_tokens: int, max_new_tokens: int) -> tuple[list[Text], list[str]]:
    """Prompts and completions that the policy writes itself: what a reward is given. Reads no record.

    Raises:
        DPAlignError: the tokenizer has neither BOS nor EOS.
    """
    prompts = write_prompts(policy, count, prompt_tokens, 256)
    completions = answers(policy, prompts, policy.sample(*padded(policy, prompts), max_new_tokens))
    return [prompt.text for prompt in prompts], completions
