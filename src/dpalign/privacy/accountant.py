"""epsilon <-> noise multiplier, on the privacy loss distributions (PLD) of dp-accounting.

Adjacency is add-or-remove one privacy unit. Both directions are composed and the larger epsilon is
reported; the discretisation is pessimistic, so a reported epsilon is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, TypeAlias

from ..errors import DPAlignError

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

ACCOUNTANT = "dp-accounting PLD, add-or-remove-one, pessimistic"
# A calibrated sigma is this much larger than the root that was found, so that the reported epsilon
# stays below its target under another discretisation or another accountant (they differ by about 1e-4).
HEADROOM = 1.0003
LARGEST_NOISE_MULTIPLIER = 1e5
LARGEST_STEPS, LARGEST_DRAWS = 200_000, 10_000  # of one mechanism, and of a unit in it: composed within seconds
SMALLEST_NOISE, LARGEST_NOISE = 1e-12, 1e12  # whose squares, and what is divided by them, are numbers
LEAST_NOISE = 2e-4  # of a sample: epsilon above 1e7 is beyond the grid, and counts as infinite
NOISE_SAID = f"from {SMALLEST_NOISE:g} to {LARGEST_NOISE:g}"
FALSE_POSITIVES = (0.001, 0.01, 0.05)  # at which a statement bounds the true positives
ROUNDING = 1e-9  # of them: more than sums of floats lose
Steps: TypeAlias = tuple[tuple[tuple[float, float], int], ...]  # by sampling rate and effective noise multiplier


@dataclass(frozen=True)
class SampledGaussian:
    """`steps` Poisson samples at `sampling_rate`, each answered by Gaussian releases of sensitivity 1.

    On every sample there are `passes` releases at `noise_multiplier` (T_PPO passes over one sample)
    and, if `metrics_noise_multiplier` is finite, one further release of the metrics block. Gaussian
    releases on the same sample are one Gaussian release whose inverse variances add up.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    passes: int = 1
    metrics_noise_multiplier: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise DPAlignError(
                f"sampling rate {self.sampling_rate:g} is not in (0, 1]: the expected batch size must be "
                "positive and at most the number of units."
            )
        if not _is_noise(self.noise_multiplier):
            raise DPAlignError(f"noise multiplier {self.noise_multiplier} must be 0 or {NOISE_SAID}.")
        if not _is_noise(self.metrics_noise_multiplier) and self.metrics_noise_multiplier != math.inf:
            raise DPAlignError(
                f"metrics noise multiplier {self.metrics_noise_multiplier} must be 0, inf or {NOISE_SAID}."
            )
        if self.steps < 0 or self.passes < 1:
            raise DPAlignError(f"steps={self.steps} and passes={self.passes} must be at least 0 and 1.")
        if self.steps > LARGEST_STEPS or self.steps * self.sampling_rate > LARGEST_DRAWS:
            raise DPAlignError(
                f"{self.steps} steps at sampling rate {self.sampling_rate:g} are more than {LARGEST_STEPS}, or draw a "
                f"unit more than {LARGEST_DRAWS} times: that is beyond what is accounted for here; ask for fewer steps."
            )

    def rounded(self) -> dict[str, float]:
        """Its numbers to 6 digits, for comparing settings across versions of the accountant."""
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items()}

    @property
    def effective_noise_multiplier(self) -> float:
        """sigma of the single Gaussian that equals all releases on one sample."""
        if self.noise_multiplier == 0 or self.metrics_noise_multiplier == 0:
            return 0.0
        return float((self.passes / self.noise_multiplier**2 + 1 / self.metrics_noise_multiplier**2) ** -0.5)


def epsilon(mechanisms: Iterable[SampledGaussian], delta: float, *, quick: bool = False) -> float:
    """Upper bound on the epsilon of all `mechanisms` together, run one after the other on the same units.

    Infinite when any of them adds no noise. Adaptivity is allowed (a later mechanism may use earlier outputs).
    `quick` uses a grid ten times coarser: still an upper bound, up to about 0.1% larger.
    """
    check_delta(delta)
    steps_of = _steps_of(mechanisms)
    if any(sigma == 0 for (_, sigma), _ in steps_of):
        return math.inf
    return _epsilon(steps_of, delta, _interval(_count(steps_of)) / (1 if quick else 10)) if steps_of else 0.0


def true_positives(
    mechanisms: Iterable[SampledGaussian], false_positives: tuple[float, ...] = FALSE_POSITIVES
) -> tuple[float, ...]:
    """Most true positives that any test of whether a unit took part has, at each of these rates of false positives.

    Whichever of the two, taking part or not, the test calls positive, and whatever else is known to it. The bound is
    that of all (epsilon, delta) which `mechanisms` together keep (the trade-off function of Dong, Roth and Su, Gaussian
    Differential Privacy, 2022), not of one of them. 1 if any of them adds no noise. From the coarse grid of `epsilon`:
    an upper bound.
    """
    steps_of = _steps_of(mechanisms)
    if not steps_of:
        return false_positives
    if any(sigma == 0 for (_, sigma), _ in steps_of):
        return (1.0,) * len(false_positives)
    return _true_positives(steps_of, _interval(_count(steps_of)), false_positives)


def noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    *,
    sampling_rate: float,
    steps: int,
    passes: int = 1,
    metrics_noise_ratio: float = 0.0,
    spent: Iterable[SampledGaussian] = (),
) -> float:
    """Smallest noise multiplier (per pass) that keeps `spent` and the new releases within the target.

    `metrics_noise_ratio` r adds a metrics block at r times the noise multiplier; 0 means no metrics.
    The epsilon of the result is never above the target. `inf` gives 0 (non-private).

    Raises:
        DPAlignError: the target is not positive, or what is spent already leaves nothing.
    """
    check_epsilon(target_epsilon)
    check_delta(target_delta)
    if math.isinf(target_epsilon):
        return 0.0
    spent = tuple(spent)
    if spent and epsilon(spent, target_delta) >= target_epsilon:
        raise DPAlignError(
            f"the releases already made have spent epsilon {epsilon(spent, target_delta):.3f} of "
            f"{target_epsilon:g}: nothing is left for the remaining {steps} steps."
        )
    interval = _interval(steps + sum(m.steps for m in spent))

    def excess(log_sigma: float) -> float:
        sigma = math.exp(log_sigma)
        new = with_metrics(SampledGaussian(sampling_rate, sigma, steps, passes), metrics_noise_ratio)
        return _epsilon(_steps_of((*spent, new)), target_delta, interval) - target_epsilon

    low, high = math.log(0.5 * math.sqrt(passes)), math.log(2.0 * math.sqrt(passes))
    while excess(high) > 0:
        low, high = high, high + math.log(2)
        if high > math.log(LARGEST_NOISE_MULTIPLIER):
            raise DPAlignError(
                f"epsilon {target_epsilon:g} at delta {target_delta:g} cannot be reached with {steps} steps at "
                f"sampling rate {sampling_rate:g}: ask for a larger epsilon, fewer steps or a smaller batch."
            )
    while excess(low) < 0:
        low, high = low - math.log(1.5), low
        if low < math.log(0.05):
            break
    return math.exp(least_where_none(excess, low, high, 5e-5)) * HEADROOM


def least_where_none(excess: Callable[[float], float], low: float, high: float, precision: float) -> float:
    """Where the falling `excess` ends: the first of equal steps of at most `precision` from `low` at which it is not
    above 0. That is what halving the range finds, so a run planned by it (0.1.0) goes on with the same number; Brent's
    method comes there with fewer evaluations.

    Args:
        excess: of epsilon over its target, by the logarithm of the noise; may be infinite.
        low, high: excess(high) <= 0.
    """
    from scipy.optimize import brentq

    step = (high - low) / 2.0 ** max(0, math.ceil(math.log2((high - low) / precision)))
    place = 1
    if excess(low) > 0:
        root = brentq(excess, low, high, xtol=step / 8)
        place = max(1, math.ceil((root - low) / step))
    while place > 1 and excess(low + (place - 1) * step) <= 0:
        place -= 1
    while excess(low + place * step) > 0:
        place += 1
    return low + place * step


def with_metrics(mechanism: SampledGaussian, ratio: float) -> SampledGaussian:
    """`mechanism` with a metrics block at `ratio` times its noise multiplier (0: no metrics)."""
    sigma_m = ratio * mechanism.noise_multiplier if ratio > 0 else math.inf
    return replace(mechanism, metrics_noise_multiplier=sigma_m)


def largest_where(feasible: Callable[[int], bool], low: int, high: int) -> int:
    """Largest integer in [low, high] for which the monotone `feasible` holds; `low - 1` if none."""
    low -= 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if feasible(middle) else (low, middle - 1)
    return low


def default_delta(units: int) -> float:
    """min(1e-5, 1 / (10 n)): well below 1/n, which publishing one random record would satisfy."""
    return min(1e-5, 1 / (10 * units))


def check_epsilon(target_epsilon: float) -> None:
    if not target_epsilon > 0:
        raise DPAlignError(
            f"epsilon {target_epsilon} is impossible: it must be positive (typical values are 1 to 8), "
            "or inf for a run without privacy."
        )


def check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise DPAlignError(f"delta {delta} is impossible: it must lie strictly between 0 and 1, well below 1/units.")


def _is_noise(multiplier: float) -> bool:
    return multiplier == 0 or SMALLEST_NOISE <= multiplier <= LARGEST_NOISE


def _steps_of(mechanisms: Iterable[SampledGaussian]) -> Steps:
    """Steps by sampling rate and noise of all that is released on a sample; less than `LEAST_NOISE` is none."""
    steps_of: dict[tuple[float, float], int] = {}
    for m in mechanisms:
        if m.steps > 0:
            sigma = m.effective_noise_multiplier
            key = (m.sampling_rate, sigma if sigma >= LEAST_NOISE else 0.0)
            steps_of[key] = steps_of.get(key, 0) + m.steps
    return tuple(sorted(steps_of.items()))


def _count(steps_of: Steps) -> int:
    return sum(steps for _, steps in steps_of)


def _interval(steps: int) -> float:
    # The pessimistic rounding costs about steps * interval^2 / 2 in epsilon; hold that below 0.0025.
    return min(5e-3, max(1e-5, math.sqrt(5e-3 / max(1, steps))))


@lru_cache(maxsize=4096)
def _single(sampling_rate: float, sigma: float, interval: float) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=sigma,
        sampling_prob=sampling_rate,
        value_discretization_interval=interval,
        pessimistic_estimate=True,
    )


@lru_cache(maxsize=4096)
def _epsilon(steps_of: Steps, delta: float, interval: float) -> float:
    return float(_composed(steps_of, interval).get_epsilon_for_delta(delta))


@lru_cache(maxsize=4096)
def _true_positives(steps_of: Steps, interval: float, false_positives: tuple[float, ...]) -> tuple[float, ...]:
    import numpy as np

    epsilons = np.linspace(0.0, 40.0, 4001)  # every one gives a bound, the best of them the tightest
    deltas = np.maximum(_composed(steps_of, interval).get_delta_for_epsilon(epsilons), 0.0)  # of both directions
    found = []
    for rate in false_positives:
        named_wrongly = np.exp(epsilons) * rate + deltas  # P(positive) <= e^epsilon Q(positive) + delta
        missed = 1 - np.exp(-epsilons) * (1 - rate - deltas)  # Q(negative) <= e^epsilon P(negative) + delta
        found.append(min(1.0, float(named_wrongly.min()) + ROUNDING, float(missed.min()) + ROUNDING))
    return tuple(found)


def _composed(steps_of: Steps, interval: float) -> PrivacyLossDistribution:
    # Below sigma 0.1 the loss distribution is so wide that a fine grid does not fit in memory.
    interval = max(interval, 1e-5 / min(sigma for (_, sigma), _ in steps_of) ** 2)
    parts = [_single(rate, sigma, interval).self_compose(steps) for (rate, sigma), steps in steps_of]
    return reduce(lambda one, other: one.compose(other), parts)
