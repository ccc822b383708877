"""The contrast between what a public model writes when it is asked for the one and for the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.text import Text
from ..errors import DPAlignError
from ..models.features import layers_of, pooled_layers
from ..models.kernels import chunks
from ..settings.rewards import RewardConfig
from .base import BATCH
from .judge import scales
from .written import PublicModel, PublicModels, texts_read

LAYERS = 6  # spread over the upper half
RIDGE = 3.0  # of the mean variance within the two kinds; 3 was best of five values on four sets of people's judgements


class Contrast:
    """Discriminants between the two kinds of text, each over its deviation on self-written text, averaged over layers.

    A text without a token scores 0, the mean.

    Raises:
        DPAlignError: a model that writes the same whatever it is asked.
    """

    def __init__(self, config: RewardConfig, public: PublicModels) -> None:
        self.config, self.model, self.how = config, public.base(config), config.text or "completion"
        self.reader = Reader(self.model, upper_layers(layers_of(self.model.policy)), config.max_length)
        self._sides: tuple[list[str], list[str]] | None = None

        def fit() -> dict[str, Tensor]:
            wanted, unwanted = (self.reader(texts)[0] for texts in self._written())
            own, is_read = self.reader(texts_read(self.how, *public.own_rows(config)))
            return discriminants(wanted, unwanted, own[is_read])

        self.fitted = public.constants(config, fit)

    def __call__(self, prompts: Sequence[Text], completions: list[str], **columns: list[Any]) -> list[float]:
        features, is_read = self.reader(texts_read(self.how, prompts, completions))
        found = (features * self.fitted["weights"]).sum((1, 2)) - self.fitted["shift"]
        return torch.where(is_read, found, 0.0).tolist()

    def written(self) -> list[str]:
        """What the model wrote when it was asked for the one, and for the other."""
        wanted, unwanted = self._written()
        return [*wanted, *unwanted]

    def _written(self) -> tuple[list[str], list[str]]:
        """Once: the same at every start."""
        if self._sides is None:
            config, first = self.config, self.config.written_seed
            how = config.written_texts, config.written_tokens
            self._sides = (
                self.model.answers_to(str(config.wanted), *how, first),
                self.model.answers_to(str(config.unwanted), *how, first + 1),
            )
        return self._sides


def upper_layers(count: int) -> list[int]:
    """Numbers of at most `LAYERS` hidden states between the middle of `count` layers and the last."""
    return sorted({max(1, round(count / 2 + count / 2 * step / (LAYERS - 1))) for step in range(LAYERS)})


class Reader:
    """Texts as features: means over their tokens in several layers, behind a BOS (or EOS) that does not count."""

    def __init__(self, model: PublicModel, layers: list[int], max_length: int) -> None:
        tokenizer = model.policy.tokenizer
        front = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if front is None:
            raise DPAlignError(f"the tokenizer of {model.name} has neither BOS nor EOS: no contrast can read by it.")
        model.check_length(max_length, "reward.max_length")
        self.model, self.layers, self.max_length, self.front = model, layers, max_length, front

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`(texts, layers, width)` float32 on the CPU, and `(texts,)` bool: whether it has a token."""
        rows = [self._encode(text) for text in texts]
        found = []
        with self.model.as_it_came() as policy:
            for chunk, count in chunks(len(rows), BATCH):
                ids = torch.full((len(chunk), self.max_length), policy.tokenizer.pad_token_id)
                mask = torch.zeros_like(ids)
                for row, number in enumerate(chunk):
                    ids[row, : len(rows[number])] = torch.tensor(rows[number])
                    mask[row, : len(rows[number])] = 1
                counted = mask.clone()
                counted[:, 0] = 0
                ids, mask, counted = (tensor.to(policy.device) for tensor in (ids, mask, counted))
                found.append(pooled_layers(policy, ids, mask, self.layers, counted)[:count].cpu())
        return torch.cat(found), torch.tensor([len(row) > 1 for row in rows])

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.policy.tokenizer(text, add_special_tokens=False).input_ids
        return [self.front, *ids][: self.max_length]


def discriminants(wanted: Tensor, unwanted: Tensor, own: Tensor) -> dict[str, Tensor]:
    """Weights `(layers, width)` and a shift, from `(texts, layers, width)` features of three kinds of text.

    In each layer Fisher's linear discriminant with the covariance within the two kinds, every direction's variance
    taken for `RIDGE` of their mean larger; scaled so that each layer's score has mean 0 and deviation 1 on `own` text.
    """
    weights = []
    for layer in range(own.shape[1]):
        sides = [texts[:, layer].double() for texts in (wanted, unwanted)]
        centred = torch.cat([texts - texts.mean(0) for texts in sides])
        covariance = centred.T @ centred / len(centred)
        if not covariance.diagonal().mean() > 0:
            raise DPAlignError("the model says the same of all texts that it writes: there is no contrast in them.")
        ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        apart = sides[0].mean(0) - sides[1].mean(0)
        weights.append(torch.linalg.solve(covariance + ridge, apart))
    directions = torch.stack(weights)
    scores = (own.double() * directions).sum(2)
    found = scales(scores, ["the contrast of wanted and unwanted texts"] * len(directions))
    share = 1 / (found["deviations"].double() * len(directions))
    return {"weights": directions * share.unsqueeze(1), "shift": (found["means"].double() * share).sum()}
