"""What remains of a stage after an interruption, so that its target holds: a pure function of what was spent.

Steps that were journaled and lost stay spent. The remaining ones get more noise, or, where that would drown them, some
of them are dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import DPAlignError
from . import accountant
from .accountant import SampledGaussian

# Steps whose noise would be more than this many times the planned one are dropped.
BEARABLE_NOISE = 4.0

Sets = tuple[tuple[SampledGaussian, ...], ...]


@dataclass(frozen=True)
class Budget:
    """What a stage was planned to spend, and what it must keep to.

    planned: all of its steps. metrics_noise_ratio: noise of the metrics block as a multiple of the gradients'.
    alone: epsilon that the stage keeps by itself. target, delta: what it keeps together with each of the sets of
    `beside`, the spendings of other stages that one of its units may meet.
    """

    planned: SampledGaussian
    metrics_noise_ratio: float
    alone: float
    target: float
    delta: float
    beside: Sets = ((),)

    def at(self, noise_multiplier: float, steps: int) -> SampledGaussian:
        """`steps` of it at another noise."""
        ran = replace(self.planned, noise_multiplier=noise_multiplier, steps=steps)
        return accountant.with_metrics(ran, self.metrics_noise_ratio)

    def fits(self, spent: list[SampledGaussian], rest: SampledGaussian) -> bool:
        """Whether what was spent and the rest keep the target beside every set of others."""
        others = [accountant.epsilon([*spent, rest, *met], self.delta) for met in self.beside if met]
        return max(others, default=0.0) <= self.target

    def noise_multiplier(self, spent: list[SampledGaussian], steps: int) -> float:
        """Smallest one for `steps` more, at least the planned one; infinite where nothing is left."""
        limits = [(self.alone, spent), *((self.target, [*spent, *met]) for met in self.beside if met)]
        try:
            needed = [
                accountant.noise_multiplier(
                    target,
                    self.delta,
                    sampling_rate=self.planned.sampling_rate,
                    steps=steps,
                    passes=self.planned.passes,
                    metrics_noise_ratio=self.metrics_noise_ratio,
                    spent=releases,
                )
                for target, releases in limits
            ]
        except DPAlignError:
            return math.inf
        return max(self.planned.noise_multiplier, *needed)


def refit(budget: Budget, spent: list[SampledGaussian], remaining: int, steps_at_once: int = 1) -> tuple[int, float]:
    """How many of the `remaining` steps run, and their noise multiplier; (0, inf) if nothing is left.

    Args:
        spent: what the stage has journaled, lost steps included.
        steps_at_once: the number that runs is a multiple of this.
    """
    # A few steps of bearable noise are worth more than all of them drowned in it.
    bearable = BEARABLE_NOISE * budget.planned.noise_multiplier
    kept = steps_at_once * accountant.largest_where(
        lambda count: budget.noise_multiplier(spent, count * steps_at_once) <= bearable, 1, remaining // steps_at_once
    )
    return kept, budget.noise_multiplier(spent, kept) if kept else math.inf
