"""What a stage will spend, fixed before anything is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..domains import check_settings
from ..errors import DPAlignError
from ..privacy import accountant
from ..privacy.accountant import SampledGaussian, with_metrics
from ..settings.base import StageConfig


@dataclass(frozen=True)
class StagePlan:
    """Steps and noise of a stage.

    target_epsilon: what must not be exceeded by this stage together with `beside`.
    epsilon: of this stage alone.
    beside: what other stages spend on the same units, for each of the sets of stages that a unit may meet
        (sequential composition); nothing, where units are in one stage only.
    """

    steps: int
    sampling_rate: float
    passes: int
    minibatches: int
    noise_multiplier: float
    metrics_noise_ratio: float
    target_epsilon: float
    target_delta: float
    epsilon: float
    beside: tuple[tuple[SampledGaussian, ...], ...] = ((),)

    @staticmethod
    def of(
        mechanism: SampledGaussian,
        delta: float,
        target_epsilon: float | None = None,
        *,
        minibatches: int = 1,
        metrics_noise_ratio: float = 0.0,
    ) -> StagePlan:
        """All steps of `mechanism`; without a target, what it spends is the target.

        Args:
            metrics_noise_ratio: noise of the metrics block as a multiple of the mechanism's; 0 for no such block.
        """
        epsilon = accountant.epsilon([with_metrics(mechanism, metrics_noise_ratio)], delta)
        return StagePlan(
            steps=mechanism.steps,
            sampling_rate=mechanism.sampling_rate,
            passes=mechanism.passes,
            minibatches=minibatches,
            noise_multiplier=mechanism.noise_multiplier,
            metrics_noise_ratio=metrics_noise_ratio,
            target_epsilon=epsilon if target_epsilon is None else target_epsilon,
            target_delta=delta,
            epsilon=epsilon,
        )

    def mechanism(self, steps: int | None = None) -> SampledGaussian:
        """What `steps` of it are, to the accountant; default: all."""
        count = self.steps if steps is None else steps
        plain = SampledGaussian(self.sampling_rate, self.noise_multiplier, count, self.passes)
        return with_metrics(plain, self.metrics_noise_ratio)

    def at(
        self, noise_multiplier: float, target_epsilon: float, beside: tuple[tuple[SampledGaussian, ...], ...] = ((),)
    ) -> StagePlan:
        """The same steps at another noise multiplier, beside other stages."""
        plan = replace(self, noise_multiplier=noise_multiplier, target_epsilon=target_epsilon, beside=beside)
        return replace(plan, epsilon=accountant.epsilon([plan.mechanism()], self.target_delta))


@dataclass(frozen=True)
class Signal:
    """How far all updates of a stage together can stand out of their noise, in one direction in which all units agree.

    sqrt(updates) x expected sample / noise multiplier: the updates' signals add up, and their noise as a random walk.

    planned: of the plan. ceiling: of one query over all units at the stage's epsilon, which no plan exceeds.
    doubled: of samples twice as large at that epsilon; None where they would be more than all units.
    """

    planned: float
    ceiling: float
    doubled: float | None


def signal_of(plan: StagePlan, units: float) -> Signal | None:
    """Of a stage on `units` units; None without noise."""
    if plan.noise_multiplier == 0:
        return None

    def noise_at(rate: float, steps: int, passes: int, ratio: float) -> float:
        return accountant.noise_multiplier(
            plan.epsilon,
            plan.target_delta,
            sampling_rate=rate,
            steps=steps,
            passes=passes,
            metrics_noise_ratio=ratio,
        )

    def signal(rate: float, sigma: float) -> float:
        return math.sqrt(plan.steps * plan.passes) * rate * units / sigma

    doubled, rate = None, 2 * plan.sampling_rate
    if rate <= 1:
        doubled = signal(rate, noise_at(rate, plan.steps, plan.passes, plan.metrics_noise_ratio))
    planned = signal(plan.sampling_rate, plan.noise_multiplier)
    return Signal(planned, max(planned, units / noise_at(1.0, 1, 1, 0.0)), doubled)


def plan_stage(name: str, config: StageConfig, units: float) -> StagePlan:
    """Steps, rate and noise of a stage by itself, on `units` declared units.

    Raises:
        DPAlignError: settings that cannot be, or a target that cannot be reached.
    """
    check_settings(config, name)
    schedule = config.schedule(name, units)
    delta = config.target_delta if config.target_delta is not None else accountant.default_delta(math.ceil(units))
    if (config.target_epsilon is None) == (config.noise_multiplier is None):
        raise DPAlignError(
            f"stage {name} needs exactly one of target_epsilon (inf for no privacy) and noise_multiplier."
        )
    accountant.check_delta(delta)
    sigma = config.noise_multiplier or 0.0
    if config.target_epsilon is not None:
        sigma = accountant.noise_multiplier(
            config.target_epsilon,
            delta,
            sampling_rate=schedule.sampling_rate,
            steps=schedule.steps,
            passes=schedule.passes,
            metrics_noise_ratio=schedule.metrics_noise_ratio,
        )
    if sigma > 0 and not config.has_bounded_sensitivity:
        raise DPAlignError("clipping none has unbounded sensitivity: it is only for target_epsilon inf.")
    return StagePlan.of(
        SampledGaussian(schedule.sampling_rate, sigma, schedule.steps, schedule.passes),
        delta,
        config.target_epsilon,
        minibatches=schedule.minibatches,
        metrics_noise_ratio=schedule.metrics_noise_ratio,
    )
