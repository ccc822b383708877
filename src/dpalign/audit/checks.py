"""A check compares what came out with the law that was declared; its p-value is how often honest code looks so bad.

A check is rejected below `FALSE_ALARM`, so that of a million checks of honest code one is rejected by chance. Not
being rejected is no proof: a fault that these numbers do not show is not seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

FALSE_ALARM = 1e-6


@dataclass(frozen=True)
class Check:
    """One comparison: `what` in words, the number that was found, what it should be, and the p-value."""

    name: str
    what: str
    found: float
    expected: float
    p_value: float

    @property
    def passed(self) -> bool:
        return self.p_value >= FALSE_ALARM


def noise_scale(name: str, what: str, standard: np.ndarray) -> Check:
    """Whether standardised noise `(releases, coordinates)` has variance 1: all together, and each release by itself."""
    releases, coordinates = standard.shape
    squares = np.square(standard).sum(1)
    together = _two_sided(stats.chi2(releases * coordinates), float(squares.sum()))
    each = min(_two_sided(stats.chi2(coordinates), float(s)) for s in squares)
    p_value = min(1.0, 2 * min(together, each * releases))
    return Check(name, what, math.sqrt(float(squares.mean()) / coordinates), 1.0, p_value)


def noise_shape(name: str, what: str, standard: np.ndarray) -> Check:
    """Kolmogorov-Smirnov distance of standardised noise from a normal law."""
    found = stats.kstest(standard.flatten(), "norm")
    return Check(name, what, float(found.statistic), 0.0, float(found.pvalue))


def uncorrelated(name: str, what: str, noises: np.ndarray) -> Check:
    """The largest correlation between any two of `(vectors, coordinates)`, among independent ones."""
    vectors, coordinates = noises.shape
    unit = noises / np.maximum(np.linalg.norm(noises, axis=1, keepdims=True), 1e-300)
    correlations = np.abs(unit @ unit.T)[np.triu_indices(vectors, 1)]
    largest = float(correlations.max(initial=0.0))
    once = 2 * special.ndtr(-largest * math.sqrt(coordinates))
    return Check(name, what, largest, 0.0, float(min(1.0, once * max(1, len(correlations)))))


def normal(name: str, what: str, found: float, expected: float, deviation: float) -> Check:
    """A number that is normal around what is expected."""
    return Check(name, what, found, expected, float(2 * special.ndtr(-abs(found - expected) / deviation)))


def count(name: str, what: str, found: int, expected: int) -> Check:
    """Two numbers that must be the same."""
    return Check(name, what, found, expected, 1.0 if found == expected else 0.0)


def _two_sided(law: stats.rv_continuous, value: float) -> float:
    return float(min(1.0, 2 * min(law.cdf(value), law.sf(value))))
