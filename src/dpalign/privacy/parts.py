"""Whose units a spending reaches, and what all spendings cost the unit that pays most: the composition rule, once.

A dataset's units are spread over [0, 1) by a secret keyed hash. A stage may sample those in its part [low, high), so a
unit pays for the stages whose part contains its hash: parallel composition where parts are disjoint, sequential where
they overlap, mixed where some do. Hashes are comparable under one identity only (the unit column, or the whole file
without one): parts of different identities are taken to meet. Datasets of different names share no unit, by check or
by declaration.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .accountant import FALSE_POSITIVES, SampledGaussian, epsilon, true_positives


@dataclass(frozen=True)
class Part:
    """The units of one dataset whose hash of `identity` lies in [low, high).

    dataset: its declared name, the ledger's key. identity: keyed name of what was hashed.
    """

    dataset: str
    identity: str = ""
    low: float = 0.0
    high: float = 1.0

    def overlaps(self, other: Part) -> bool:
        """Whether a unit may be in both; yes where that cannot be known."""
        if self.dataset != other.dataset:
            return False
        return self.identity != other.identity or max(self.low, other.low) < min(self.high, other.high)


@dataclass(frozen=True)
class Spending:
    """What ran on a part: equal steps of one stage, counted. `run` and `stage` say whose; no cost depends on them."""

    part: Part
    mechanism: SampledGaussian
    run: str = ""
    stage: str = ""


def met(spendings: Iterable[Spending], within: Part) -> set[tuple[SampledGaussian, ...]]:
    """The mechanisms that a unit of `within` may meet: a tuple for each set of spendings where a new one begins.

    Whatever some unit meets is one of these sets or part of one, and a part costs no more. Spendings under another
    identity than that of `within` may reach any of its units.
    """
    near = [s for s in spendings if s.part.dataset == within.dataset]
    parts = [s.part if s.part.identity == within.identity else replace(s.part, low=0.0, high=1.0) for s in near]
    starts = {within.low, *(p.low for p in parts if within.low <= p.low < within.high)}
    pairs = list(zip(parts, near, strict=True))
    return {tuple(s.mechanism for p, s in pairs if p.low <= start < p.high) for start in starts}


def epsilon_of(spendings: Iterable[Spending], delta: float, *, quick: bool = False) -> float:
    """Epsilon of all spendings together: that of the unit that pays most, over all datasets; 0 for none.

    `quick` uses the accountant's coarse grid: still an upper bound.
    """
    return max((epsilon(mechanisms, delta, quick=quick) for mechanisms in _met_anywhere(spendings)), default=0.0)


def attack_success(spendings: Iterable[Spending]) -> list[dict[str, float]]:
    """How well anybody can tell who took part in all spendings together, as a statement has it.

    For each rate of `false_positives` the most `true_positives`, of the unit that is easiest to tell at that rate.
    """
    found = [FALSE_POSITIVES, *map(true_positives, _met_anywhere(spendings))]
    return [
        {"false_positives": rate, "true_positives": max(ones)}
        for rate, *ones in zip(FALSE_POSITIVES, *found, strict=True)
    ]


def _met_anywhere(spendings: Iterable[Spending]) -> set[tuple[SampledGaussian, ...]]:
    """What units of all datasets may meet, as `met` has it."""
    spendings = list(spendings)
    wholes = set()
    for dataset in {s.part.dataset for s in spendings}:
        identities = {s.part.identity for s in spendings if s.part.dataset == dataset}
        # Under several identities no part can be told from another: a frame that none of them has widens them all.
        frame = identities.pop() if len(identities) == 1 else "\0"
        wholes.add(Part(dataset, frame))
    return {mechanisms for whole in wholes for mechanisms in met(spendings, whole)}
