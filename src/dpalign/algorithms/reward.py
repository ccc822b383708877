"""Private reward model on pairwise preferences (Wu et al. 2024, section 3.2; Bradley and Terry 1952).

A pair is two rows of one unit: its gradient is that of the pair's loss, clipped once. A judge with many pairs is one
unit too, if the data names judges as units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from ..data.load import Record, require_columns
from ..data.text import render
from ..errors import DPAlignError
from ..models import ModelConfig, RewardModel, TextFormat
from ..privacy.entropy import SystemEntropy
from ..privacy.mechanism import MetricRange
from .base import Algorithm, Rows, TrainingConfig


@dataclass(kw_only=True)
class RewardModelConfig(TrainingConfig):
    """Settings of the DP reward model. Records have `chosen` and `rejected`, and perhaps `prompt`.

    Optional columns: `margin`, by how much the chosen text should score higher; `preference`, the probability that
    `chosen` is the better one (1 if missing, 0.5 for a tie).

    Args:
        model: another model than the one that is aligned, public or a release; its tokenizer may differ. Default:
            the run's SFT model with a new head.
        prepend_bos: put the tokenizer's BOS in front of every text.
        append_eos: put EOS behind every text, where the score is then read (unless EOS is also the padding token). A
            causal LM says little at EOS before it is trained to: measure before you use it.
        pooling: `last`: a text's score is its last token's; `mean`: the mean of its tokens' scores, for causal LMs.
        label_smoothing: probability that a judge meant the other text.
        ties: `half` learns that tied texts score alike; `skip` gives their units no gradient.
        center_rewards_coefficient: weight of the squared mean score of a pair, which keeps scores near 0 (Eisenstein
            et al. 2023).
        margin_range: declared upper end of the noised margin metric; it is clipped to +- this.
    """

    learning_rate: float = 2e-4
    model: ModelConfig | None = None
    prepend_bos: bool = False
    append_eos: bool = False
    pooling: Literal["last", "mean"] = "last"
    label_smoothing: float = 0.0
    ties: Literal["half", "skip"] = "half"
    center_rewards_coefficient: float = 0.0
    margin_range: float = 5.0

    @property
    def text(self) -> TextFormat:
        """How the model reads a text."""
        return TextFormat(self.max_length, self.prepend_bos, self.append_eos, self.pooling)

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.label_smoothing < 0.5:
            raise DPAlignError(f"label_smoothing {self.label_smoothing} is not in [0, 0.5).")
        if self.adapter.init_a != "random":
            raise DPAlignError("init_a synthetic_gradient is for ppo and rloo: preferences have no synthetic gradient.")


@dataclass(frozen=True)
class Pair:
    """Token ids of two texts, the margin between them, and the probability that the first is the better one."""

    chosen: list[int]
    rejected: list[int]
    margin: float
    preference: float


class RewardModelling(Algorithm[RewardModel, Pair]):
    """-log sigmoid(r(chosen) - r(rejected) - margin), its two rows in one unit."""

    name = "reward"
    config: RewardModelConfig

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__(config)
        wide = config.margin_range
        self.metrics = (
            MetricRange("loss", 0.0, wide),
            MetricRange("accuracy", 0.0, 1.0),
            MetricRange("margin", -wide, wide),
        )

    def setup(self, model: RewardModel) -> None:
        model.add_adapter(self.name, self.config.adapter)
        model.train_head()

    def encode(self, model: RewardModel, record: Record) -> Pair | None:
        """None for a tie that is skipped."""
        pair = encode_pair(model, record)
        return None if self.config.ties == "skip" and pair.preference == 0.5 else pair

    def rows(self, model: RewardModel, units: list[list[Pair]], coins: SystemEntropy | None) -> Rows:
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

    def row_losses(self, model: RewardModel, rows: Rows) -> tuple[Tensor, Tensor]:
        """The loss of a pair stands in both of its rows, whose mean the loop takes."""
        ids, mask = rows.tensors["ids"], rows.tensors["mask"]
        margin, preference = rows.tensors["margin"][0::2], rows.tensors["preference"][0::2]
        scores = model(ids, mask)  # (2 pairs,): chosen, rejected, chosen, rejected, ...
        chosen, rejected = scores[0::2], scores[1::2]
        loss = preference_loss(chosen, rejected, margin, preference, self.config.label_smoothing)
        loss = loss + self.config.center_rewards_coefficient * ((chosen + rejected) / 2) ** 2
        difference = (chosen - rejected).detach()
        towards = difference * torch.sign(preference - 0.5)  # > 0 where the better text scores higher
        right = (torch.sign(towards) + 1) / 2  # equal scores count half, as in evaluation; a tie is neither
        right = torch.where(preference == 0.5, torch.nan, right)
        metrics = torch.stack([loss.detach(), right, towards], 1)
        return loss.repeat_interleave(2), metrics.repeat_interleave(2, 0)


def preference_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor, preference: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy `(pairs,)` of the Bradley-Terry model, P(chosen is better) = sigmoid(chosen - rejected - margin).

    Args:
        chosen, rejected: scores. margin: asked of the better text over the other. preference: in [0, 1], the
            probability that `chosen` is the better one; smoothing moves it towards 1/2.
    """
    wanted = preference * (1 - 2 * label_smoothing) + label_smoothing
    difference = chosen - rejected
    return -wanted * logsigmoid(difference - margin) - (1 - wanted) * logsigmoid(-difference - margin)


def pair_texts(model: RewardModel, record: Record) -> tuple[str, str]:
    """The two texts of a pair: prompt and answer, as strings or chat messages."""
    texts = []
    for name in ("chosen", "rejected"):
        prompt, answer = record.get("prompt") or "", record[name]
        if isinstance(answer, list):
            prompt = prompt if isinstance(prompt, list) else []
            texts.append(render(model.tokenizer, [*prompt, *answer]))
        else:
            texts.append(render(model.tokenizer, prompt, is_prompt=True) + answer if prompt else answer)
    return texts[0], texts[1]


def check_pair_texts(tokenizer: PreTrainedTokenizerBase, records: list[Record], path: str) -> None:
    """Raises DPAlignError where a prompt is not text, or texts are of two kinds, or chat has no template."""
    for number, record in enumerate(records, 1):
        prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
        if prompt is not None and not isinstance(prompt, str | list):
            raise DPAlignError(f"the prompt of record {number} in {path} is neither text nor a list of chat messages.")
        if type(chosen) is not type(rejected):
            raise DPAlignError(
                f"record {number} in {path} has one text and one list of chat messages: give two of a kind."
            )
        if isinstance(chosen, list) or isinstance(prompt, list):
            render(tokenizer, chosen if isinstance(chosen, list) else prompt)


def encode_pair(model: RewardModel, record: Record) -> Pair:
    """Tokens of a pair; a missing margin is 0 and a missing preference 1."""
    chosen, rejected = pair_texts(model, record)
    margin, preference = record.get("margin"), record.get("preference")
    return Pair(
        model.encode(chosen),
        model.encode(rejected),
        0.0 if margin is None else float(margin),
        1.0 if preference is None else float(preference),
    )


def check_pair_columns(records: list[Record], path: str) -> None:
    """Raises DPAlignError unless every record has two texts, a finite margin and a preference in [0, 1]."""
    require_columns(records, [("chosen", "rejected")], path)
    for number, record in enumerate(records, 1):
        for name, low, high in (("margin", 0.0, float("inf")), ("preference", 0.0, 1.0)):
            value = record.get(name)
            try:
                fits = value is None or (low <= float(value) <= high and float(value) != float("inf"))
            except (TypeError, ValueError):
                fits = False
            if not fits:
                expected = "a number in [0, 1]" if high == 1 else "a number of at least 0"
                raise DPAlignError(f"record {number} of {path} has no valid {name}: expected {expected}.")
