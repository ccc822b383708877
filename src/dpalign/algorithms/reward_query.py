"""A reward from one private query: each unit casts one vote for a direction, and the votes are added up once.

The base model and its adapters stay as they are. A text's features are what several layers say of it, in the leading
directions of text that the policy writes itself, each over its (shrunk) deviation there; and beside them public scores
that need nobody's data. A pair votes for the difference of the better text's features from the other's, a unit for the
mean of its pairs, scaled to norm 1. The sum of all votes plus Gaussian noise, at sampling rate 1, is the weight of a
linear reward: Fisher's discriminant, with the covariance of public text instead of people's.

Everything that the votes are cast in is fixed by public constants, the number of units and the noise: how many
directions there are, and how long the step towards the mean of the public scores is, with which the reward starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.load import Record
from ..data.text import Text
from ..errors import DPAlignError
from ..models import RewardModel
from ..rewards import Reward
from ..rewards.mean import Mean
from ..settings.models import AdapterConfig
from ..settings.reward_query import RewardQueryConfig
from .base import Coins, Entering, Reading, Rows, Tokenizer, Tokens
from .pairs import measured
from .reward import Pair, ScoredPairs, differences_and_free, pair_texts

SMALLEST = 1e-6  # of the largest variance: a direction with less is rounding
OF_A_LAYER = 64  # directions that are looked at
# Chosen on three sets of people's judgements, and tried on a fourth: docs/results/free_and_private_reward.md.
PER_UNIT, FEWEST = 0.5, 8  # directions, over the noise multiplier
PRIOR = 0.3  # of the expected length of the noise, towards the mean of the public scores


@dataclass(frozen=True)
class ReadPair(Pair):
    """A pair, and its two texts for the public scores."""

    texts: tuple[Text, Text]


class RewardQuery(ScoredPairs[RewardQueryConfig]):
    """-(2p - 1)(r(chosen) - r(rejected)), which is linear in what is learned: its gradient is the vote."""

    name = "reward_query"
    Config = RewardQueryConfig
    metrics = ()

    @classmethod
    def entering(cls, config: RewardQueryConfig) -> Entering:
        free = config.free_mean
        return {**super().entering(config), **({} if free is None else {"free": free})}

    @classmethod
    def tokens(cls, config: RewardQueryConfig) -> Tokens:
        return Tokens(read=2 * config.max_length * (1 + len(config.free)))

    @classmethod
    def check(cls, config: RewardQueryConfig, tokenizer: Tokenizer, record: Record) -> Reading:
        if record.get("margin") is not None:
            raise DPAlignError("a margin, which a vote does not have: leave that column out")
        return super().check(config, tokenizer, record)

    def __init__(self, config: RewardQueryConfig, free: Reward | None = None) -> None:
        super().__init__(config)
        self.free: Any = None if free is None else free.function

    def setup(self, model: RewardModel) -> None:
        if not model.adapters:  # a release is an adapter: one that does nothing
            model.add_adapter(self.name, AdapterConfig(r=1))
            model.requires_grad_(False)
        width, count = model.features_width, self.directions(model)
        if count > width:
            raise DPAlignError(f"directions {count} are more than the model's {width} features: ask for fewer.")
        directions = torch.randn(count, width) / math.sqrt(width)  # until own text is there
        model.vote_in(directions, self.free, free_share(self.declared_units, self.noise_multiplier))

    def directions(self, model: RewardModel) -> int:
        """How many: as set, or as many as the noise leaves readable; all, where there is none."""
        if self.config.directions is not None:
            return self.config.directions
        most = min(model.maps * min(OF_A_LAYER, model.features_width // model.maps), self.config.own_texts - 1)
        if self.noise_multiplier == 0:
            return most
        return min(most, max(FEWEST, int(PER_UNIT * self.declared_units / self.noise_multiplier)))

    def warm_up(self, model: RewardModel) -> int:
        """Finds the directions."""
        if self.own_texts is None:
            raise DPAlignError(
                "a reward from one query takes its directions from text that the run's policy writes itself, and this "
                "run has no policy: give the recipe a causal language model."
            )
        texts = self.own_texts(self.config.own_texts)
        if isinstance(self.free, Mean):
            texts = texts + as_answers(self.free.written(), texts)
        features = model.features(texts).reshape(len(texts), model.maps, -1)
        count, fewest = self.directions(model), self.config.directions or 1
        model.set_directions(whitening(features, count, self.config.shrinkage, fewest))
        return 1

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    def encode(self, model: RewardModel, record: Record) -> Pair | None:
        pair = super().encode(model, record)
        if pair is None or self.free is None:
            return pair
        return ReadPair(pair.chosen, pair.rejected, pair.margin, pair.preference, pair_texts(record))

    def rows(self, model: RewardModel, units: list[list[Pair]], coins: Coins | None) -> Rows:
        """With the public scores of each text; a pair that they cannot score casts no vote."""
        if self.free is None:
            return super().rows(model, units, coins)
        texts = [text for unit in units for pair in unit if isinstance(pair, ReadPair) for text in pair.texts]
        scores = model.free_scores(texts)
        assert scores is not None
        pairs = scores.reshape(len(texts) // 2, 2, scores.shape[1])
        usable = pairs.isfinite().all(2).all(1)
        marks = iter(usable.tolist())
        kept = [[pair for pair in unit if next(marks)] for unit in units]
        rows = super().rows(model, kept, coins)
        free = pairs[usable].flatten(0, 1).to(rows.unit.device)
        return Rows(rows.unit, rows.tensors | {"free": free})

    def compared(self, model: RewardModel, records: list[Record]) -> tuple[Tensor, Tensor | None]:
        return differences_and_free(model, records)

    def row_losses(self, model: RewardModel, rows: Rows) -> tuple[Tensor, Tensor]:
        scores = model(rows.tensors["ids"], rows.tensors["mask"], rows.tensors.get("free"))
        preference = rows.tensors["preference"][0::2]
        difference = scores[0::2] - scores[1::2]
        loss = -(2 * preference - 1) * difference
        return loss.repeat_interleave(2), measured(loss, difference, preference)[:, :0].repeat_interleave(2, 0)

    def add_gradient(self, model: RewardModel, step: int) -> None:
        """The step towards the mean of the public scores, once: a share of how long the noise is expected to be."""
        if model.free_head is None or model.free_head.weight.grad is None:
            return
        count = model.free_head.in_features
        noise = self.noise_multiplier * self.config.max_grad_norm * math.sqrt(self.directions(model) + count)
        model.free_head.weight.grad -= PRIOR * noise / math.sqrt(count)  # which is subtracted


def free_share(units: float, noise_multiplier: float) -> float:
    """What the public scores count for in a vote, beside directions of about 1: the less, the more people are heard.

    The sum of all votes is as good as their number over their own noise (1) and the one that is added. A score that
    needs nobody is a place to start from, as a prior is: it weighs as that quality's inverse square root.
    """
    return math.sqrt(min(1.0, math.hypot(1.0, noise_multiplier) / max(1.0, units)))


def as_answers(written: Sequence[str], own: Sequence[Text]) -> list[Text]:
    """Texts of the form of the policy's own: chats end in them, behind what the policy asks itself."""
    if own and isinstance(own[0], str):
        return list(written)
    asked = [text[:-1] for text in own if not isinstance(text, str)]
    return [[*asked[n % len(asked)], {"role": "assistant", "content": text}] for n, text in enumerate(written)]


def whitening(features: Tensor, count: int, shrinkage: float, fewest: int) -> Tensor:
    """`(count, maps * width)` float32: the leading directions of `(texts, maps, width)` features, over deviations.

    In each map the principal directions, each over its deviation; of these, together, the principal ones again. Scaled
    so that differences of the texts in all directions have a squared norm of at most about 1. What the texts do not
    show is zero.

    Raises:
        DPAlignError: the texts differ in fewer directions than `fewest`.
    """
    kept = features[features.isfinite().flatten(1).all(1)].double()  # a text without a token has no mean
    each = max(OF_A_LAYER, math.ceil(count / kept.shape[1]))  # else the scale would follow from the count
    maps = [_whitened(kept[:, number], each, shrinkage) for number in range(kept.shape[1])]
    read = torch.cat([kept[:, number] @ found.T for number, found in enumerate(maps)], 1)
    turn = _principal(read)[1][:, :count]
    if turn.shape[1] < fewest:
        raise DPAlignError(
            f"what the policy writes itself differs in {turn.shape[1]} directions and not in {fewest}: ask for fewer "
            "directions, or let it write more own_texts."
        )
    whole: Tensor = torch.block_diag(*maps)  # type: ignore[no-untyped-call]
    rows = turn.T @ whole / math.sqrt(2 * len(whole))
    return nn.functional.pad(rows, (0, 0, 0, count - len(rows))).float()


def _whitened(texts: Tensor, count: int, shrinkage: float) -> Tensor:
    """`(at most count, width)` directions of `(texts, width)`."""
    values, vectors, mean = _principal(texts)
    return (vectors[:, :count] / (values[:count] + shrinkage * mean).sqrt()).T


def _principal(texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variances of `(texts, width)`, the largest first, their directions as columns, and the mean of all variances."""
    values, vectors = torch.linalg.eigh(torch.cov(texts.T))
    values, vectors = values.flip(0), vectors.flip(1)
    found = int((values > SMALLEST * values[0]).sum())
    signs = torch.sign(vectors[vectors.abs().argmax(0), torch.arange(vectors.shape[1])])  # eigenvectors have none
    return values[:found], (vectors * signs)[:, :found], values.clamp(min=0).mean()
