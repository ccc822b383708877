"""Private direct preference optimisation (DPO: Rafailov et al. 2023, arXiv 2305.18290), one gradient per pair's unit.

The policy is its own reward model: r(x, y) = beta log(pi(y|x) / pi_ref(y|x)), where the reference is the model that the
stage started from. A pair is two rows of one unit; its loss is that of the Bradley-Terry model on the two rewards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data.load import Record
from ..data.text import Encoded, encode_completion, read_text, shared_prompt, template_options
from ..errors import DPAlignError
from ..models import Policy
from ..models.kernels import chunks
from ..settings.dpo import DPOConfig
from .base import Coins, Entering, Reading, Rows, StageKind, Tokenizer, Tokens
from .basis import add_adapter
from .own_pairs import OwnPairs
from .pairs import LOSSES, PairAlgorithm, check_pair, measured, number_in, pair_metrics, preference_of


@dataclass(frozen=True)
class Answers:
    """Two answers behind their prompt, the answers' own tokens learned."""

    chosen: Encoded
    rejected: Encoded
    margin: float
    preference: float


class DPO(PairAlgorithm[DPOConfig, Policy, Answers]):
    """-log sigmoid(beta (log-ratio of chosen - log-ratio of rejected) - margin), its two rows in one unit."""

    name = "dpo"
    Config = DPOConfig
    model_kind = Policy

    @classmethod
    def of(cls, config: DPOConfig) -> type[StageKind[DPOConfig]]:
        return cls if config.draws else OwnPairs

    @classmethod
    def entering(cls, config: DPOConfig) -> Entering:
        return {}

    @classmethod
    def longest(cls, config: DPOConfig) -> int:
        return config.max_length

    @classmethod
    def tokens(cls, config: DPOConfig) -> Tokens:
        return Tokens(trained=2 * config.max_length, read=2 * config.max_length)  # the reference reads them too

    @classmethod
    def check(cls, config: DPOConfig, tokenizer: Tokenizer, record: Record) -> Reading:
        check_pair(record)
        answers = encode_answers(tokenizer, record, config)
        length = max(answers.chosen.prompt_tokens, answers.rejected.prompt_tokens)
        if length >= config.max_length:
            raise DPAlignError(f"the prompt alone has {length} tokens, and max_length is {config.max_length}: raise it")
        both = (answers.chosen, answers.rejected)
        learned = min(sum(answer.learned[: config.max_length]) for answer in both)
        largest = max((token for answer in both for token in answer.ids), default=0)
        return Reading(max(len(answer.ids) for answer in both), config.max_length, learned, largest)

    def __init__(self, config: DPOConfig) -> None:
        super().__init__(config)
        self.metrics = pair_metrics(config.margin_range)

    def setup(self, policy: Policy) -> None:
        add_adapter(policy, self.name, self.config, self.longest(self.config))

    def encode(self, policy: Policy, record: Record) -> Answers:
        answers, length = encode_answers(policy.tokenizer, record, self.config), self.config.max_length
        return replace(answers, chosen=answers.chosen.cut(length), rejected=answers.rejected.cut(length))

    def rows(self, policy: Policy, units: list[list[Answers]], coins: Coins | None) -> Rows:
        """Both answers of every pair, and their log-probability under the reference."""
        pairs = [(unit, pair) for unit, examples in enumerate(units) for pair in examples for _ in range(2)]
        texts = [row for _, pair in pairs[::2] for row in (pair.chosen, pair.rejected)]
        ids = torch.full((len(texts), self.config.max_length), policy.tokenizer.pad_token_id)
        attention, answer = torch.zeros_like(ids), torch.zeros(ids.shape)
        for i, text in enumerate(texts):
            length = len(text.ids)
            ids[i, :length] = torch.tensor(text.ids)
            attention[i, :length] = 1
            answer[i, :length] = torch.tensor(text.learned, dtype=torch.float32)
        tensors = {
            "ids": ids,
            "attention": attention,
            "answer": answer,
            "margin": torch.tensor([pair.margin for _, pair in pairs]),
            "preference": torch.tensor([pair.preference for _, pair in pairs]),
        }
        unit = torch.tensor([unit for unit, _ in pairs], dtype=torch.int64)
        rows = Rows(unit.to(policy.device), {name: t.to(policy.device) for name, t in tensors.items()})
        with torch.no_grad(), policy.reference():
            return Rows(rows.unit, rows.tensors | {"reference": self._read(policy, rows)})

    def row_losses(self, policy: Policy, rows: Rows) -> tuple[Tensor, Tensor]:
        """The loss of a pair stands in both of its rows, whose mean the loop takes."""
        margin, preference = rows.tensors["margin"][0::2], rows.tensors["preference"][0::2]
        rewards = self.config.beta * (answer_logprobs(policy, rows) - rows.tensors["reference"])
        chosen, rejected = rewards[0::2], rewards[1::2]  # chosen, rejected, chosen, rejected, ...
        loss = LOSSES[self.config.loss](chosen, rejected, margin, preference, self.config.label_smoothing)
        metrics = measured(loss, chosen - rejected, preference)
        return loss.repeat_interleave(2), metrics.repeat_interleave(2, 0)

    @torch.no_grad()
    def differences(self, policy: Policy, records: list[Record]) -> Tensor:
        """Of the implicit rewards, under the newest adapter against the model that its stage started from."""
        rows = self.rows(policy, [[self.encode(policy, record)] for record in records], None)
        rewards = self.config.beta * (self._read(policy, rows) - rows.tensors["reference"])
        return (rewards[0::2] - rewards[1::2]).cpu()

    def _read(self, policy: Policy, rows: Rows) -> Tensor:
        """`(rows,)` log-probabilities of the answers, a micro-batch of pairs at a time."""
        parts = []
        for chunk, count in chunks(len(rows.unit) // 2, self.examples_at_once):
            places = [place for pair in chunk for place in (2 * pair, 2 * pair + 1)]
            here = Rows(rows.unit[places], {name: tensor[places] for name, tensor in rows.tensors.items()})
            parts.append(answer_logprobs(policy, here)[: 2 * count])
        return torch.cat(parts) if parts else rows.tensors["answer"].new_zeros(0)


def answer_logprobs(policy: Policy, rows: Rows) -> Tensor:
    """`(rows,)` log-probability of each answer given its prompt: the sum over its tokens, in nats."""
    ids, attention, answer = (rows.tensors[name] for name in ("ids", "attention", "answer"))
    logprobs, _ = policy.logprobs(ids[:, :-1], attention[:, :-1], ids[:, 1:])  # (rows, length - 1)
    return (logprobs * answer[:, 1:]).sum(1)


def encode_answers(tokenizer: Tokenizer, record: Record, config: DPOConfig) -> Answers:
    """Both answers behind the prompt, not yet cut; a missing margin is 0 and a missing preference 1.

    Two conversations without a `prompt` have the messages that they share as theirs.
    """
    chosen, rejected = read_text(record["chosen"]), read_text(record["rejected"])
    prompt = record.get("prompt")
    prompt = shared_prompt(chosen, rejected) if prompt is None else prompt
    ends = {"prepend_bos": config.prepend_bos, "append_eos": config.append_eos}
    options = template_options(record)
    first, second = (
        encode_completion(tokenizer, prompt, answer, **ends, options=options) for answer in (chosen, rejected)
    )
    return Answers(first, second, number_in(record, "margin", 0.0), preference_of(record))
