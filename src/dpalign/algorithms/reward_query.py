"""A reward from one private query: each unit casts one vote for a direction, and the votes are added up once.

The base model and its adapters stay as they are. A text's features are what the head reads, in the leading directions
of text that the policy writes itself, each over its (shrunk) deviation there. A pair votes for the difference of the
better text's features from the other's, a unit for the mean of its pairs, scaled to norm 1. The sum of all votes plus
Gaussian noise, at sampling rate 1, is the weight of a linear reward: Fisher's discriminant, with the covariance of
public text instead of people's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..data.load import Record
from ..errors import DPAlignError
from ..models import RewardModel
from ..settings.models import AdapterConfig
from ..settings.reward_query import RewardQueryConfig
from .base import Reading, Rows, Tokenizer, Tokens
from .pairs import measured
from .reward import ScoredPairs

SMALLEST = 1e-6  # of the largest variance: a direction with less is rounding


class RewardQuery(ScoredPairs[RewardQueryConfig]):
    """-(2p - 1)(r(chosen) - r(rejected)), which is linear in what is learned: its gradient is the vote."""

    name = "reward_query"
    Config = RewardQueryConfig
    metrics = ()

    @classmethod
    def tokens(cls, config: RewardQueryConfig) -> Tokens:
        return Tokens(read=2 * config.max_length)

    @classmethod
    def check(cls, config: RewardQueryConfig, tokenizer: Tokenizer, record: Record) -> Reading:
        if record.get("margin") is not None:
            raise DPAlignError("a margin, which a vote does not have: leave that column out")
        return super().check(config, tokenizer, record)

    def setup(self, model: RewardModel) -> None:
        if not model.adapters:  # a release is an adapter: one that does nothing
            model.add_adapter(self.name, AdapterConfig(r=1))
            model.requires_grad_(False)
        width, count = model.features_width, self.config.directions
        if count > width:
            raise DPAlignError(f"directions {count} are more than the model's {width} features: ask for fewer.")
        model.vote_in(torch.randn(count, width) / math.sqrt(width))  # until the policy's own text is there

    def warm_up(self, model: RewardModel) -> int:
        """Finds the directions."""
        if self.own_texts is None:
            raise DPAlignError(
                "a reward from one query takes its directions from text that the run's policy writes itself, and this "
                "run has no policy: give the recipe a causal language model."
            )
        features = model.features(self.own_texts(self.config.own_texts))
        model.set_directions(whitening(features, self.config.directions, self.config.shrinkage))
        return 1

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    def row_losses(self, model: RewardModel, rows: Rows) -> tuple[Tensor, Tensor]:
        scores = model(rows.tensors["ids"], rows.tensors["mask"])
        preference = rows.tensors["preference"][0::2]
        difference = scores[0::2] - scores[1::2]
        loss = -(2 * preference - 1) * difference
        return loss.repeat_interleave(2), measured(loss, difference, preference)[:, :0].repeat_interleave(2, 0)


def whitening(features: Tensor, directions: int, shrinkage: float) -> Tensor:
    """`(directions, width)` float32: the leading principal directions of `(texts, width)` features, over deviations.

    Scaled so that differences of the texts themselves have a squared norm of about 1.

    Raises:
        DPAlignError: the texts differ in fewer directions.
    """
    kept = features[features.isfinite().all(1)].double()  # a text without a token has no mean
    values, vectors = torch.linalg.eigh(torch.cov(kept.T))
    values, vectors = values.flip(0)[:directions], vectors.flip(1)[:, :directions]
    found = int((values > SMALLEST * values[0]).sum())
    if found < directions:
        raise DPAlignError(
            f"what the policy writes itself differs in {found} directions and not in {directions}: ask for fewer "
            "directions, or let it write more own_texts."
        )
    signs = torch.sign(vectors[vectors.abs().argmax(0), range(directions)])  # eigenvectors have none of their own
    deviations = (values + shrinkage * values.mean()).sqrt()
    rows: Tensor = (vectors * signs / deviations / math.sqrt(2 * directions)).T
    return rows.float()
