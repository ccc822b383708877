"""Several reward functions as one: a weighted sum, row by row."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from .foreign import call_rows, signature_of

PLUS = " + "
TERM = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)? (.+)")


def sum_of(weights: Sequence[float], names: Sequence[str]) -> str:
    """The source that stands for a weighted sum; a name that holds ` + ` must be kept out of it."""
    return PLUS.join(f"{weight:g} {name}" for weight, name in zip(weights, names, strict=True))


def terms_of(source: str) -> list[str]:
    """The names in what `sum_of` wrote; none of a source that it did not write."""
    terms = [TERM.fullmatch(term) for term in source.split(PLUS)]
    return [term[1] for term in terms if term] if all(terms) else []


class Weighted:
    """Sum of weight x (score - centre) over functions; one that returns None for a row has nothing to say of it.

    That is as in TRL. A row of which none has anything to say, or that one of them cannot score, cannot be scored.

    Args:
        centres: of the functions' scores; default: 0.
    """

    def __init__(
        self, functions: Sequence[Callable[..., Any]], weights: Sequence[float], centres: Sequence[float] | None = None
    ) -> None:
        self.functions, self.weights = list(functions), list(weights)
        self.centres = list(centres or [0.0] * len(self.functions))

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float | None]:
        totals: list[float | None] = [None] * len(completions)
        for function, weight, centre in zip(self.functions, self.weights, self.centres, strict=True):
            takes = signature_of(function).takes
            given = {name: values for name, values in columns.items() if takes is None or name in takes}
            scores = list(call_rows(function, prompts, completions, given))
            for row, (score, total) in enumerate(zip(scores, totals, strict=True)):
                if score is not None:
                    totals[row] = (total or 0.0) + weight * (float(score) - centre)
        return totals
