"""How well a reward model, or a policy as its own reward model, agrees with people on public pairs.

Accuracy, calibration and margins; exact, so for public pairs only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..algorithms.pairs import preference_of
from ..algorithms.reward import score_differences
from ..data.load import Record
from ..errors import DPAlignError
from ..models import RewardModel
from .apart import Apart

BINS = 10


@dataclass(frozen=True)
class PairEvaluation:
    """Agreement on the pairs that have a better text.

    accuracy: share of pairs whose better text scores higher (equal scores count half); accuracy_ci95: half-width of its
    95% interval. calibration_error: expected difference between the stated probability that a text is the better one
    and how often it is, over 10 bins (Guo et al. 2017). nll: nats per pair. margin, margin_std: score of the better
    text minus that of the other. free_accuracy: that of the scores which need nobody's data and the reward starts from,
    if it has any: what people's data bought is above it. shift, outside, own_texts: how far the pairs' texts are from
    those that the policy writes (`Apart`).
    """

    accuracy: float
    accuracy_ci95: float
    calibration_error: float
    nll: float
    margin: float
    margin_std: float
    pairs: int
    free_accuracy: float | None = None
    free_accuracy_ci95: float | None = None
    shift: float | None = None
    outside: float | None = None
    own_texts: int | None = None

    def with_distance(self, found: Apart | None) -> PairEvaluation:
        """The same, and how far the pairs' texts are from the policy's."""
        return self if found is None else replace(self, **asdict(found))

    def as_dict(self) -> dict[str, Any]:
        """Without what was not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate_pairs(model: RewardModel, records: list[Record]) -> PairEvaluation:
    """Scores both texts of every public pair and compares them with the given preference.

    Raises:
        DPAlignError: all pairs are ties.
    """
    return agreement_on(score_differences(model, records), records)


def agreement_on(differences: Tensor, records: list[Record], free: Tensor | None = None) -> PairEvaluation:
    """`agreement` of score differences `(pairs,)` with what people preferred in public pairs.

    free: differences of the scores that the reward starts from, if it has any.
    """
    preferred = torch.tensor([preference_of(record) for record in records])
    found = agreement(differences, preferred)
    if free is None:
        return found
    alone = agreement(free, preferred)
    return replace(found, free_accuracy=alone.accuracy, free_accuracy_ci95=alone.accuracy_ci95)


def agreement(difference: Tensor, preference: Tensor) -> PairEvaluation:
    """Agreement of score differences `(pairs,)` with preferences `(pairs,)` in [0, 1]; ties (1/2) are left out.

    Raises:
        DPAlignError: all pairs are ties.
    """
    decided = preference != 0.5
    if not decided.any():
        raise DPAlignError("all pairs are ties: there is nothing to agree with.")
    margin = torch.where(preference[decided] > 0.5, difference[decided], -difference[decided]).double()
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    accuracy, count = float(right.mean()), len(margin)
    confidence = torch.sigmoid(margin.abs())  # what the model says of the text that it prefers
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = [
        float((confidence[place == b].mean() - right[place == b].mean()).abs() * (place == b).sum())
        for b in place.unique()  # type: ignore[no-untyped-call]
    ]
    return PairEvaluation(
        accuracy=accuracy,
        accuracy_ci95=1.96 * (accuracy * (1 - accuracy) / count) ** 0.5,
        calibration_error=sum(gaps) / count,
        nll=float(-torch.nn.functional.logsigmoid(margin).mean()),
        margin=float(margin.mean()),
        margin_std=float(margin.std()) if count > 1 else 0.0,
        pairs=count,
    )
