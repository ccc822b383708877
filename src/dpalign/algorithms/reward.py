"""Private reward model on pairwise preferences (Wu et al. 2024, section 3.2; Bradley and Terry 1952)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..data.load import Record
from ..data.text import Text, joined, template_options
from ..models import RewardModel
from ..models.reward_model import encode_as
from ..settings.reward_model import RewardModelConfig
from .base import Coins, Entering, Reading, Rows, Tokenizer, Tokens
from .pairs import PairAlgorithm, check_pair, measured, number_in, pair_metrics, preference_loss, preference_of

UNCUT = 2**31  # tokens


@dataclass(frozen=True)
class Pair:
    """Token ids of two texts, the margin between them, and the probability that the first is the better one."""

    chosen: list[int]
    rejected: list[int]
    margin: float
    preference: float


R = TypeVar("R", bound=RewardModelConfig)


class ScoredPairs(PairAlgorithm[R, RewardModel, Pair], Generic[R], is_base=True):
    """A reward model reads both texts of a pair."""

    model_kind = RewardModel

    @classmethod
    def entering(cls, config: R) -> Entering:
        return {} if config.model is None else {"model": config.model}

    @classmethod
    def longest(cls, config: R) -> int:
        return config.max_length

    @classmethod
    def check(cls, config: R, tokenizer: Tokenizer, record: Record) -> Reading:
        check_pair(record)
        whole = replace(config.text, max_length=UNCUT)
        chosen, rejected = (encode_as(whole, tokenizer, text, template_options(record)) for text in pair_texts(record))
        differ = chosen[-config.max_length :] != rejected[-config.max_length :]
        learned = min(len(chosen), len(rejected), config.max_length) if differ else 0
        largest = max([*chosen, *rejected], default=0)
        return Reading(max(len(chosen), len(rejected)), config.max_length, learned, largest)

    def encode(self, model: RewardModel, record: Record) -> Pair | None:
        """None for a tie that is skipped."""
        pair = encode_pair(model, record)
        return None if self.config.ties == "skip" and pair.preference == 0.5 else pair

    def rows(self, model: RewardModel, units: list[list[Pair]], coins: Coins | None) -> Rows:
        pairs = [(unit, pair) for unit, examples in enumerate(units) for pair in examples for _ in range(2)]
        ids, mask = model.pad([row for _, pair in pairs[::2] for row in (pair.chosen, pair.rejected)])
        tensors = {
            "ids": ids,
            "mask": mask,
            "margin": torch.tensor([pair.margin for _, pair in pairs]),
            "preference": torch.tensor([pair.preference for _, pair in pairs]),
        }
        unit = torch.tensor([unit for unit, _ in pairs], dtype=torch.int64)
        return Rows(unit.to(ids.device), {name: t.to(ids.device) for name, t in tensors.items()})

    def differences(self, model: RewardModel, records: list[Record]) -> Tensor:
        return score_differences(model, records)


class RewardModelling(ScoredPairs[RewardModelConfig]):
    """-log sigmoid(r(chosen) - r(rejected) - margin), its two rows in one unit."""

    name = "reward_model"
    Config = RewardModelConfig

    @classmethod
    def tokens(cls, config: RewardModelConfig) -> Tokens:
        return Tokens(trained=2 * config.max_length)

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__(config)
        self.metrics = pair_metrics(config.margin_range)

    def setup(self, model: RewardModel) -> None:
        model.add_adapter(self.name, self.config.adapter)
        model.train_head()

    def row_losses(self, model: RewardModel, rows: Rows) -> tuple[Tensor, Tensor]:
        """The loss of a pair stands in both of its rows, whose mean the loop takes."""
        ids, mask = rows.tensors["ids"], rows.tensors["mask"]
        margin, preference = rows.tensors["margin"][0::2], rows.tensors["preference"][0::2]
        scores = model(ids, mask)  # (2 pairs,): chosen, rejected, chosen, rejected, ...
        chosen, rejected = scores[0::2], scores[1::2]
        loss = preference_loss(chosen, rejected, margin, preference, self.config.label_smoothing)
        loss = loss + self.config.center_rewards_coefficient * ((chosen + rejected) / 2) ** 2
        metrics = measured(loss, chosen - rejected, preference)
        return loss.repeat_interleave(2), metrics.repeat_interleave(2, 0)


def pair_texts(record: Record) -> tuple[Text, Text]:
    """The two texts of a pair: prompt and answer, as strings or chat messages.

    Raises:
        DPAlignError: a string prompt beside chat messages.
    """
    return joined(record.get("prompt"), record["chosen"]), joined(record.get("prompt"), record["rejected"])


def encode_pair(model: RewardModel, record: Record) -> Pair:
    """Tokens of a pair; a missing margin is 0 and a missing preference 1."""
    chosen, rejected = (model.encode(text, template_options(record)) for text in pair_texts(record))
    return Pair(chosen, rejected, number_in(record, "margin", 0.0), preference_of(record))


def score_differences(model: RewardModel, records: list[Record]) -> Tensor:
    """`(pairs,)` score of `chosen` minus that of `rejected`."""
    return differences_and_free(model, records)[0]


def differences_and_free(model: RewardModel, records: list[Record]) -> tuple[Tensor, Tensor | None]:
    """`score_differences`, and `(pairs,)` those of the mean of the model's free scores; None if it has none."""
    texts, options = both_texts(records)
    free = model.free_scores(texts)
    scores = model.score(texts, options, free=free)
    mean = None if free is None else free.sum(1)
    return scores[0::2] - scores[1::2], None if mean is None else mean[0::2] - mean[1::2]


def both_texts(records: list[Record]) -> tuple[list[Text], list[dict[str, Any]]]:
    """The texts of pairs, chosen, rejected, chosen, ..., and their `template_options`."""
    options = [template_options(record) for record in records for _ in range(2)]
    return [text for record in records for text in pair_texts(record)], options
