"""One (epsilon, delta) over several stages.

Stages on disjoint units each get the whole budget (parallel composition). Stages that may meet the same unit share
it: their privacy loss distributions are composed, and their noise is raised until the composition fits. Mixed cases
need no rule of their own: a unit pays for the stages whose part of the data contains it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..errors import DPAlignError
from .accountant import HEADROOM, least_where_none
from .parts import Spending, epsilon_of

Allocation = Literal["equal", "minimal"] | Mapping[str, float]
LARGEST_INFLATION = 1e4


@dataclass(frozen=True)
class StageBudget:
    """A stage that is planned: what it would spend with the whole budget for itself.

    spending: its part of the data and its mechanism at that noise. expected_batch_size: what the noise is divided by.
    is_fixed: its noise was given and stays.
    """

    spending: Spending
    expected_batch_size: float
    is_fixed: bool = False

    @property
    def name(self) -> str:
        return self.spending.stage

    def at(self, factor: float) -> Spending:
        """Its spending with all noise multiplied."""
        m = self.spending.mechanism
        wide = replace(
            m,
            noise_multiplier=m.noise_multiplier * factor,
            metrics_noise_multiplier=m.metrics_noise_multiplier * factor,
        )
        return replace(self.spending, mechanism=wide)

    def total_noise(self, factor: float) -> float:
        """Variance of the noise of all its updates together, per coordinate in units of C^2."""
        m = self.spending.mechanism
        return m.steps * m.passes * (m.noise_multiplier * factor / self.expected_batch_size) ** 2


def allocate(
    stages: list[StageBudget],
    target_epsilon: float,
    delta: float,
    *,
    allocation: Allocation = "equal",
    spent: tuple[Spending, ...] = (),
) -> dict[str, float]:
    """Factor on each stage's noise so that no unit pays more than the target over all stages it may meet.

    Args:
        allocation: `equal` raises the noise of all stages that share units by one factor; `minimal` minimises the total
            noise variance of all updates, sum of steps (sigma / batch)^2; a mapping from stage to weight gives a stage
            of twice the weight half the noise factor.
        spent: what earlier releases have spent on the same data.

    Returns:
        1 for a stage that shares its units with no other.

    Raises:
        DPAlignError: stages whose noise is given, or earlier releases, leave nothing.
    """
    factors = {stage.name: 1.0 for stage in stages}
    for together in _sharing(stages):
        dataset = together[0].spending.part.dataset
        earlier = [s for s in spent if s.part.dataset == dataset]
        if math.isinf(target_epsilon) or _epsilon(together, factors, earlier, delta) <= target_epsilon:
            continue
        free = [s for s in together if not s.is_fixed and s.spending.mechanism.noise_multiplier > 0]
        unbounded = {s.name: LARGEST_INFLATION for s in free}
        if not free or _epsilon(together, factors | unbounded, earlier, delta) > target_epsilon:
            raise DPAlignError(
                f"stages {', '.join(s.name for s in together)} meet the same units, and what is given or spent already "
                f"leaves them nothing of epsilon {target_epsilon:g}: raise it, or give fewer stages a fixed noise."
            )
        ratios = _ratios(free, together, earlier, target_epsilon, delta, allocation)
        level = _level(together, ratios, earlier, target_epsilon, delta) * HEADROOM
        factors |= {name: ratio * level for name, ratio in ratios.items()}
    return factors


def _sharing(stages: list[StageBudget]) -> list[list[StageBudget]]:
    """Groups of stages that are connected by units they may share."""
    groups: list[list[StageBudget]] = []
    for stage in stages:
        touching = [g for g in groups if any(stage.spending.part.overlaps(other.spending.part) for other in g)]
        merged = [s for g in touching for s in g] + [stage]
        groups = [g for g in groups if g not in touching] + [merged]
    return groups


def _epsilon(stages: list[StageBudget], factors: Mapping[str, float], earlier: list[Spending], delta: float) -> float:
    return epsilon_of([*(s.at(factors.get(s.name, 1.0)) for s in stages), *earlier], delta, quick=True)


def _level(
    stages: list[StageBudget],
    ratios: dict[str, float],
    earlier: list[Spending],
    target: float,
    delta: float,
    precision: float = 1e-4,
) -> float:
    """Smallest common factor on `ratios` that fits; from above, to a relative precision."""

    def excess(log_level: float) -> float:
        scaled = {name: ratio * math.exp(log_level) for name, ratio in ratios.items()}
        return _epsilon(stages, scaled, earlier, delta) - target

    low, high = 0.0, 0.3
    while excess(high) > 0:
        low, high = high, high + 0.6
    while excess(low) < 0:
        low, high = low - 0.6, low
    return math.exp(least_where_none(excess, low, high, precision))


def _ratios(
    free: list[StageBudget],
    stages: list[StageBudget],
    earlier: list[Spending],
    target: float,
    delta: float,
    allocation: Allocation,
) -> dict[str, float]:
    if allocation == "equal" or len(free) == 1:
        return {s.name: 1.0 for s in free}
    if allocation != "minimal":
        weights = {s.name: float(allocation.get(s.name, 1.0)) for s in free}
        if not all(0 < w < math.inf for w in weights.values()):
            raise DPAlignError(f"the weights {weights} must be positive: a stage of weight 0 has no budget.")
        return {name: 1 / weight for name, weight in weights.items()}
    from scipy.optimize import minimize

    def ratios(logs: np.ndarray) -> dict[str, float]:
        return {s.name: math.exp(x) for s, x in zip(free, [0.0, *logs], strict=True)}

    def noise(logs: np.ndarray) -> float:
        level = _level(stages, ratios(logs), earlier, target, delta, precision=3e-3)
        return math.log(sum(s.total_noise(ratios(logs)[s.name] * level) for s in free))

    start = np.vstack([np.zeros(len(free) - 1), 0.4 * np.eye(len(free) - 1)])
    found = minimize(
        noise,
        start[0],
        method="Nelder-Mead",
        options={"initial_simplex": start, "xatol": 0.05, "fatol": 3e-3, "maxfev": 40},
    )
    return ratios(found.x)
