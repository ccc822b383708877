"""What stages on preference pairs share: `chosen` and `rejected`, and the columns that may stand beside them.

A pair is two rows of one unit: its gradient is that of the pair's loss, clipped once. A judge with many pairs is one
unit too, if the data names judges as units.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Generic

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..data.load import Record
from ..data.text import TEMPLATE_COLUMNS
from ..errors import DPAlignError
from ..privacy.mechanism import MetricRange
from .base import Algorithm, Example, Model, T


class PairAlgorithm(Algorithm[T, Model, Example], Generic[T, Model, Example], is_base=True):
    """Learns which of two texts is better; what it has learned can be compared with public pairs."""

    columns = (("chosen", "rejected"),)
    optional = (*TEMPLATE_COLUMNS, "prompt", "margin", "preference")
    rows_per_example = 2

    @abstractmethod
    def differences(self, model: Model, records: list[Record]) -> Tensor:
        """`(pairs,)` float32: by how much the model prefers `chosen` of public pairs, as a difference of scores."""

    def compared(self, model: Model, records: list[Record]) -> tuple[Tensor, Tensor | None]:
        """`differences`, and those of the scores that need nobody's data; None without any."""
        return self.differences(model, records), None


def check_pair(record: Record) -> None:
    """Raises DPAlignError unless a pair is two texts of one kind, with a valid margin and preference if there are."""
    for name, high in (("margin", math.inf), ("preference", 1.0)):
        try:
            value = number_in(record, name, 0.0)
        except (TypeError, ValueError):
            value = math.nan
        if not (0 <= value <= high and math.isfinite(value)):
            expected = "a number in [0, 1]" if high == 1 else "a number of at least 0"
            raise DPAlignError(f"no valid {name}: expected {expected}")
    if type(record["chosen"]) is not type(record["rejected"]):
        raise DPAlignError("one text and one list of chat messages: give two of a kind")


def number_in(record: Record, name: str, default: float) -> float:
    """A column's number; the default where a record has none."""
    value = record.get(name)
    return default if value is None else float(value)


def preference_of(record: Record) -> float:
    """Probability that `chosen` is the better text; 1 where nobody says."""
    return number_in(record, "preference", 1.0)


def pair_metrics(wide: float) -> tuple[MetricRange, ...]:
    """Declared ranges of the metrics block; loss and margin are clipped to `wide`."""
    return (MetricRange("loss", 0.0, wide), MetricRange("accuracy", 0.0, 1.0), MetricRange("margin", -wide, wide))


def measured(loss: Tensor, difference: Tensor, preference: Tensor) -> Tensor:
    """`(pairs, 3)` of `pair_metrics`, from `(pairs,)` each."""
    towards = difference.detach() * torch.sign(preference - 0.5)  # > 0 where the better text scores higher
    right = (torch.sign(towards) + 1) / 2  # equal scores count half, as in evaluation; a tie is neither
    right = torch.where(preference == 0.5, torch.nan, right)
    return torch.stack([loss.detach(), right, towards], 1)


def square_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor, preference: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Squared error `(pairs,)` of the probability that `chosen` is better. Arguments as for `preference_loss`."""
    wanted = preference * (1 - 2 * label_smoothing) + label_smoothing
    ahead = margin * torch.sign(preference - 0.5)  # asked of the better text, whichever that is
    return (wanted - torch.sigmoid(chosen - rejected - ahead)) ** 2


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


LOSSES = {"sigmoid": preference_loss, "square": square_loss}  # by their names in DPO's settings
