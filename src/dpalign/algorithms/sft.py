"""Private supervised fine-tuning: language modelling on texts, or on the completions of prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data.load import Record
from ..data.text import render, tokens
from ..errors import DPAlignError
from ..models import Policy
from ..privacy.entropy import SystemEntropy
from ..privacy.mechanism import MetricRange
from .base import Algorithm, Entering, Rows, Tokenizer, Tokens, TrainingConfig

Example = tuple[list[int], int]  # token ids, and the index of the first one that is learned


@dataclass(kw_only=True)
class SFTConfig(TrainingConfig):
    """Settings of DP-SFT. Records have `text`, or `prompt` and `completion` (loss on the completion).

    Args:
        prepend_bos: put the tokenizer's BOS in front of every text.
        append_eos: end every text that is not cut with EOS.
        loss_range: declared upper end of the noised loss metric, in nats per token.
    """

    learning_rate: float = 3e-4
    prepend_bos: bool = False
    append_eos: bool = True
    loss_range: float = 10.0

    def validate(self) -> None:
        super().validate()
        if self.max_length < 2:
            raise DPAlignError(f"max_length {self.max_length} must be at least 2: one token predicts nothing.")


class SFT(Algorithm[SFTConfig, Policy, Example]):
    """Mean negative log-likelihood per token, the mean taken inside the record."""

    name = "sft"
    Config = SFTConfig
    model_kind = Policy
    columns = (("text",), ("prompt", "completion"))

    @classmethod
    def entering(cls, config: SFTConfig) -> Entering:
        return {}

    @classmethod
    def longest(cls, config: SFTConfig) -> int:
        return config.max_length

    @classmethod
    def tokens(cls, config: SFTConfig) -> Tokens:
        return Tokens(trained=config.max_length)

    @classmethod
    def check(cls, config: SFTConfig, tokenizer: Tokenizer, record: Record) -> None:
        """Any text will do (what is too long is cut); chat messages need a template."""
        for column in ("text", "prompt"):
            if isinstance(record.get(column), list):
                render(tokenizer, record[column])

    def __init__(self, config: SFTConfig) -> None:
        super().__init__(config)
        self.metrics = (MetricRange("loss", 0.0, config.loss_range),)

    def setup(self, policy: Policy) -> None:
        policy.add_adapter(self.name, self.config.adapter)

    def encode(self, policy: Policy, record: Record) -> Example:
        """Token ids, and the index of the first one that is learned."""
        tokenizer, config = policy.tokenizer, self.config
        learn_from = 1
        if "text" in record:
            ids = tokens(tokenizer, render(tokenizer, record["text"]), prepend_bos=config.prepend_bos)
        else:
            ids = tokens(tokenizer, render(tokenizer, record["prompt"], is_prompt=True), prepend_bos=config.prepend_bos)
            learn_from = max(1, len(ids))
            completion = record["completion"]
            if isinstance(completion, list):
                completion = "".join(str(message.get("content", "")) for message in completion)
            ids = ids + tokenizer(completion, add_special_tokens=False).input_ids
        if config.append_eos and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        return ids[: config.max_length], learn_from

    def rows(self, policy: Policy, units: list[list[Example]], coins: SystemEntropy | None) -> Rows:
        rows = [(unit, *example) for unit, examples in enumerate(units) for example in examples]
        ids = torch.full((len(rows), self.config.max_length), policy.tokenizer.pad_token_id)
        attention = torch.zeros_like(ids)
        learned = torch.zeros(ids.shape)
        for i, (_, row, learn_from) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            attention[i, : len(row)] = 1
            learned[i, learn_from : len(row)] = 1
        unit = torch.tensor([unit for unit, _, _ in rows], dtype=torch.int64)
        tensors = {"ids": ids, "attention": attention, "learned": learned}
        return Rows(unit.to(policy.device), {name: t.to(policy.device) for name, t in tensors.items()})

    def row_losses(self, policy: Policy, rows: Rows) -> tuple[Tensor, Tensor]:
        ids, attention, learned = (rows.tensors[name] for name in ("ids", "attention", "learned"))
        # The first token has no prediction, and the last one predicts nothing.
        logits, _ = policy(ids[:, :-1], attention[:, :-1], ids.shape[1] - 1)  # (rows, length - 1, vocabulary)
        nll = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(ids[:, 1:])
        nll = nll * learned[:, 1:]
        loss = nll.sum(1) / learned[:, 1:].sum(1).clamp(min=1)  # the mean stays inside the record
        return loss, loss.detach().unsqueeze(1)
