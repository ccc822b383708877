"""How well a model predicts held-out texts; exact, so for public texts only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TextEvaluation:
    """text_loss: nats per learned token of all texts together, with the half-width of its 95% interval over texts (NaN
    of a single one). text_records: texts that have a learned token. text_tokens: learned ones in all."""

    text_loss: float
    text_loss_ci95: float
    text_records: int
    text_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def text_loss(nats: Tensor, tokens: Tensor) -> TextEvaluation:
    """Of texts with `(records,)` negative log-likelihoods of so many tokens; those without a token say nothing."""
    known = tokens > 0
    loss, half = per_token(nats[known], tokens[known])
    return TextEvaluation(loss, half, int(known.sum()), int(tokens.sum()))


def per_token(nats: Tensor, lengths: Tensor) -> tuple[float, float]:
    """Mean nats per token, and the half-width of its 95% interval.

    The mean is a ratio of two sums over texts, whose error the delta method gives.

    Args:
        nats, lengths: `(rows,)` negative log-likelihood and tokens of each text.
    """
    nats, lengths = nats.double(), lengths.double()
    mean = float(nats.sum() / lengths.sum())
    residual = (nats - mean * lengths) / lengths.mean()
    half = 1.96 * float(residual.std()) / math.sqrt(len(lengths)) if len(lengths) > 1 else math.nan
    return mean, half
