"""What stages on texts share: how well what they have learned predicts a text that nobody trained on."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic

from torch import Tensor

from ..data.load import Record
from ..models import Policy
from .base import Algorithm, Example, T


class TextAlgorithm(Algorithm[T, Policy, Example], Generic[T, Example], is_base=True):
    """Learns to continue texts; any model of the run can be measured on public ones, read as training reads them."""

    model_kind = Policy

    @abstractmethod
    def nats(self, policy: Policy, records: list[Record]) -> tuple[Tensor, Tensor]:
        """`(records,)` float64 each: negative log-likelihood of a record's learned tokens, and how many these are."""
