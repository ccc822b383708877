"""Private supervised fine-tuning: language modelling on texts, or on the completions of prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.load import Record
from ..data.text import (
    Encoded,
    Text,
    assistant_tokens,
    encode_completion,
    encode_text,
    joined,
    read_text,
    template_options,
)
from ..errors import DPAlignError
from ..models import Policy
from ..models.kernels import chunks
from ..privacy.mechanism import MetricRange
from ..settings.sft import SFTConfig
from .base import Coins, Entering, Reading, Rows, Tokenizer, Tokens
from .basis import add_adapter
from .texts import TextAlgorithm

WHOLE = ("messages", "conversations", "text")  # columns that hold a whole text


class SFT(TextAlgorithm[SFTConfig, Encoded]):
    """Mean negative log-likelihood per token, the mean taken inside the record."""

    name = "sft"
    Config = SFTConfig
    columns = (*((name,) for name in WHOLE), ("prompt", "completion"))

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
    def check(cls, config: SFTConfig, tokenizer: Tokenizer, record: Record) -> Reading:
        """Any text will do (what is too long is cut); a chat must please its template."""
        text = encode_record(tokenizer, record, config)
        return Reading(
            len(text.ids), config.max_length, sum(text.learned[1 : config.max_length]), max(text.ids, default=0)
        )

    def __init__(self, config: SFTConfig) -> None:
        super().__init__(config)
        self.metrics = (MetricRange("loss", 0.0, config.loss_range),)

    def setup(self, policy: Policy) -> None:
        add_adapter(policy, self.name, self.config, self.longest(self.config))

    def encode(self, policy: Policy, record: Record) -> Encoded:
        return encode_record(policy.tokenizer, record, self.config).cut(self.config.max_length)

    def rows(self, policy: Policy, units: list[list[Encoded]], coins: Coins | None) -> Rows:
        rows = [(unit, text) for unit, texts in enumerate(units) for text in texts]
        ids = torch.full((len(rows), self.config.max_length), policy.tokenizer.pad_token_id)
        attention = torch.zeros_like(ids)
        learned = torch.zeros(ids.shape)
        for i, (_, text) in enumerate(rows):
            length = len(text.ids)
            ids[i, :length] = torch.tensor(text.ids)
            attention[i, :length] = 1
            learned[i, :length] = torch.tensor(text.learned, dtype=torch.float32)
        learned[:, 0] = 0  # nothing comes before it that could predict it
        unit = torch.tensor([unit for unit, _ in rows], dtype=torch.int64)
        tensors = {"ids": ids, "attention": attention, "learned": learned}
        return Rows(unit.to(policy.device), {name: t.to(policy.device) for name, t in tensors.items()})

    def row_losses(self, policy: Policy, rows: Rows) -> tuple[Tensor, Tensor]:
        nats, tokens = self._read(policy, rows)
        loss = nats / tokens.clamp(min=1)  # the mean stays inside the record
        return loss, loss.detach().unsqueeze(1)

    @torch.no_grad()
    def nats(self, policy: Policy, records: list[Record]) -> tuple[Tensor, Tensor]:
        examples = [self.encode(policy, record) for record in records]
        found = []
        for chunk, count in chunks(len(examples), self.config.micro_batch_size):
            nats, tokens = self._read(policy, self.rows(policy, [[examples[place]] for place in chunk], None))
            found.append(torch.stack([nats[:count].double(), tokens[:count].double()]).cpu())
        both = torch.cat(found, 1)
        return both[0], both[1]

    def _read(self, policy: Policy, rows: Rows) -> tuple[Tensor, Tensor]:
        """`(rows,)` each: negative log-likelihood of a row's learned tokens, and how many these are."""
        ids, attention, learned = (rows.tensors[name] for name in ("ids", "attention", "learned"))
        # The first token has no prediction, and the last one predicts nothing.
        logprobs, _ = policy.logprobs(ids[:, :-1], attention[:, :-1], ids[:, 1:])  # (rows, length - 1)
        return -(logprobs * learned[:, 1:]).sum(1), learned[:, 1:].sum(1)


def encode_record(tokenizer: Tokenizer, record: Record, config: SFTConfig) -> Encoded:
    """A record's token ids, not yet cut, and which of them are learned.

    Raises:
        DPAlignError: what the chat template refuses, or a setting that does not fit the record.
    """
    ends = {"prepend_bos": config.prepend_bos, "append_eos": config.append_eos}
    options = template_options(record)
    whole: Text
    column = next((name for name in WHOLE if name in record), None)
    if column is None:
        whole = joined(record["prompt"], record["completion"])
        text = encode_completion(tokenizer, record["prompt"], record["completion"], **ends, options=options)
        learned = [True] * len(text.ids) if config.completion_only_loss is False else text.learned
    elif config.completion_only_loss:
        raise DPAlignError(f"completion_only_loss needs the columns prompt and completion, and the text is {column!r}")
    else:
        whole = read_text(record[column])
        text = Encoded(ids := encode_text(tokenizer, whole, **ends, options=options), [True] * len(ids))
        learned = text.learned
    if config.assistant_only_loss:
        said = assistant_tokens(tokenizer, whole, options)
        learned = [a and b for a, b in zip(learned, said, strict=True)]
    return text if learned is text.learned else Encoded(text.ids, learned)
