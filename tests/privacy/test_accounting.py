"""epsilon and sigma against golden values, another accountant, and wrong counts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
from dp_accounting.pld import privacy_loss_distribution
from harness import everyone, ppo, prompts, run_stage, through
from opacus.accountants.gdp import GaussianAccountant
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

from dpalign.errors import DPAlignError
from dpalign.privacy.accountant import SampledGaussian, epsilon, least_where_none, noise_multiplier, true_positives
from dpalign.privacy.gate import Gate
from dpalign.privacy.parts import Part, Spending, epsilon_of
from dpalign.training import Stage
from tiny import dataset

DELTA = 4e-5
GOLDEN_SIGMA = [(0.02048, 4883, 1.6164), (0.32768, 305, 5.860), (0.04096, 977, 1.498), (1.0, 100, 10.088)]


# 8 ---------------------------------------------------------------------------------------------------------


def excess_of_sigma(calibrate: Callable[..., float], rate: float, steps: int, golden: float) -> float:
    """Relative difference of the calibrated sigma for epsilon 4 from the golden one."""
    return calibrate(4.0, DELTA, sampling_rate=rate, steps=steps) / golden - 1


def one_step_short(target: float, delta: float, *, sampling_rate: float, steps: int) -> float:
    return noise_multiplier(target, delta, sampling_rate=sampling_rate, steps=int(steps * 0.99))


def without_amplification(target: float, delta: float, *, sampling_rate: float, steps: int) -> float:
    return noise_multiplier(target, delta, sampling_rate=1.0, steps=steps)


@pytest.mark.parametrize(("rate", "steps", "golden"), GOLDEN_SIGMA)
def test_golden_sigmas(rate, steps, golden):
    """PRIVACY test 8: never below the golden sigma, and within 0.2% above it."""
    assert 0 <= excess_of_sigma(noise_multiplier, rate, steps, golden) <= 2e-3
    assert (
        epsilon([SampledGaussian(rate, noise_multiplier(4.0, DELTA, sampling_rate=rate, steps=steps), steps)], DELTA)
        <= 4
    )


@pytest.mark.parametrize("mutant", [one_step_short, without_amplification])
def test_golden_sigmas_kill(mutant):
    """PRIVACY test 8, mutants: fewer steps than are taken; no amplification by sampling."""
    assert not 0 <= excess_of_sigma(mutant, 0.32768, 305, 5.860) <= 2e-3


def gdp(rate: float, sigma: float, steps: int) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accountant = GaussianAccountant()
    accountant.history = [(sigma, rate, steps)]
    return accountant.get_epsilon(DELTA)


def one_direction(rate: float, sigma: float, steps: int) -> float:
    """Adding a unit without removing one: the smaller half of the truth."""
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=1e-3
    ).self_compose(steps)
    return min(loss._pmf_add.get_epsilon_for_delta(DELTA), loss._pmf_remove.get_epsilon_for_delta(DELTA))


def ours(rate: float, sigma: float, steps: int) -> float:
    return epsilon([SampledGaussian(rate, sigma, steps)], DELTA)


def test_agrees_with_the_prv_accountant_and_kills_gdp():
    """PRIVACY test 8: PLD and PRV agree to 1e-4; Opacus's GDP accountant and one direction alone say too little."""
    rate, sigma, steps = 0.04096, 1.498, 977
    mechanism = PoissonSubsampledGaussianMechanism(sampling_probability=rate, noise_multiplier=sigma)
    prv = PRVAccountant(prvs=[mechanism], max_self_compositions=[steps], eps_error=0.01, delta_error=1e-10)
    low, estimate, high = prv.compute_epsilon(DELTA, [steps])
    assert low <= ours(rate, sigma, steps) <= high
    assert ours(rate, sigma, steps) == pytest.approx(estimate, rel=1e-4)
    assert gdp(rate, sigma, steps) < low
    assert one_direction(rate, sigma, steps) < low


def composition(ppo_part: tuple[float, float], scale: float = 1.0) -> float:
    """Epsilon of an SFT stage on [0, 1/2) and a PPO stage on `ppo_part`, each with epsilon 4 at `scale` 1."""
    stages = [
        Spending(Part("d", "split", 0.0, 0.5), SampledGaussian(0.04096, 1.498 * scale, 977)),
        Spending(Part("d", "split", *ppo_part), SampledGaussian(0.02048, 1.6164 * scale, 4883)),
    ]
    return epsilon_of(stages, DELTA)


def test_disjoint_stages_cost_the_larger_and_overlapping_ones_compose():
    """PRIVACY test 8, composition: 4 on disjoint parts; 5.97 on the same units, and 4 again at 1.333 sigma."""
    assert composition((0.5, 1.0)) == pytest.approx(4.0, abs=0.005)
    assert composition((0.0, 0.5)) == pytest.approx(5.97, abs=0.005)
    assert composition((0.25, 0.75)) == composition((0.0, 0.5))  # a unit in both pays for both
    assert composition((0.0, 0.5), 1.333) == pytest.approx(4.0, abs=0.01)


# 9 ---------------------------------------------------------------------------------------------------------


def passes_on_one_sample(sigma: float, rate: float, samples: int, passes: int) -> SampledGaussian:
    return SampledGaussian(rate, sigma, samples, passes)


def passes_as_fresh_samples(sigma: float, rate: float, samples: int, passes: int) -> SampledGaussian:
    return SampledGaussian(rate, sigma, samples * passes)


def passes_for_free(sigma: float, rate: float, samples: int, passes: int) -> SampledGaussian:
    return SampledGaussian(rate, sigma, samples)


def epsilon_of_four_passes(count: Callable[..., SampledGaussian]) -> float:
    return epsilon([count(1.616, 0.02048, 4883, 4)], DELTA)


def test_passes_over_one_sample():
    """PRIVACY test 9: T_PPO passes are one release at sigma / sqrt(T_PPO): 14.13, where the wrong count says 9.13."""
    assert epsilon_of_four_passes(passes_on_one_sample) == pytest.approx(14.13, abs=0.01)
    assert epsilon_of_four_passes(passes_as_fresh_samples) == pytest.approx(9.13, abs=0.01)
    assert epsilon_of_four_passes(passes_for_free) < 4.01


class JournalsOnePass(Gate):
    def _intent(self, step, number, attempt):
        return replace(super()._intent(step, number, attempt), passes=1)


def epsilon_of_the_ledger(stage_class: type[Stage]) -> float:
    """What the ledger of a PPO stage with 4 passes replays to; three samples of everyone at sigma 8."""
    algorithm = ppo(num_ppo_epochs=4, max_steps=3, noise_multiplier=8.0, metrics_noise_ratio=0.0)
    trace = run_stage(algorithm, dataset(prompts()), sampler=everyone, stage_class=stage_class)
    assert len(trace.sums) == 12
    return epsilon([i.mechanism for i in trace.intents], DELTA)


def test_the_ledger_counts_the_passes():
    """PRIVACY test 9 in the loop: three samples, four passes each, are twelve unsampled releases at sigma 8."""
    truth = epsilon([SampledGaussian(1.0, 8.0, 12)], DELTA)
    assert epsilon_of_the_ledger(Stage) == pytest.approx(truth, rel=1e-3)
    assert epsilon_of_the_ledger(through(JournalsOnePass)) < 0.6 * truth


def test_metrics_and_rows_that_are_not_counted():
    """The metrics block at 10 sigma costs 0.5%, never nothing; clipping the two rows of a pair gives sigma / 2."""
    alone, both = SampledGaussian(0.04096, 1.498, 977), SampledGaussian(0.04096, 1.498, 977, 1, 14.98)
    assert both.effective_noise_multiplier == pytest.approx(1.498 / 1.01**0.5)
    assert 1.002 < epsilon([both], DELTA) / epsilon([alone], DELTA) < 1.015
    assert ours(0.04096, 1.498 / 2, 977) > 3 * ours(0.04096, 1.498, 977)


@pytest.mark.parametrize("sigma", [math.inf, math.nan, -1.0, 1e-200, 1e200])
def test_noise_that_no_arithmetic_holds_is_refused(sigma):
    with pytest.raises(DPAlignError, match="noise multiplier"):
        SampledGaussian(0.5, sigma, 3)
    if sigma != math.inf:  # there: nothing was measured
        with pytest.raises(DPAlignError, match="metrics noise multiplier"):
            SampledGaussian(0.5, 1.0, 3, 1, sigma)


def test_noise_too_small_for_the_grid_counts_as_none():
    assert epsilon([SampledGaussian(0.5, 1e12, 1)], DELTA) < 0.01
    assert 1e6 < epsilon([SampledGaussian(0.5, 2e-4, 1)], DELTA) < 1e9
    for least in (SampledGaussian(0.5, 1e-12, 1), SampledGaussian(0.5, 1.0, 1, passes=10**9), SampledGaussian(0.5, 1.0, 1, 1, 1e-4)):
        assert epsilon([least], DELTA) == math.inf and set(true_positives([least])) == {1.0}


def halved(excess: Callable[[float], float], low: float, high: float, precision: float) -> float:
    while high - low > precision:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


@pytest.mark.parametrize(("falls", "most"), [(lambda x: math.inf if x < -0.9 else math.exp(-x) - 1, 14), (lambda x: 1.0 if x < 0 else -1.0, 25)])
def test_a_root_is_the_one_that_halving_finds(falls, most):
    """From the side that keeps the target, smooth or not. Mutants: the root itself, which may lie just before; the step after it."""
    asked = []
    step = 3 / 2**15  # of halving below
    steps = [-2.0 + place * step + 1e-13 for place in range(1000, 32000, 500)]  # the root found may lie before, and it after
    for end in [number / 100 for number in range(-190, 100)] + steps:

        def excess(x: float, end: float = end) -> float:
            asked.append(x)
            return falls(x - end)

        found = least_where_none(excess, -2.0, 1.0, 1e-4)
        counted = len(asked)
        asked.clear()
        assert found == pytest.approx(halved(excess, -2.0, 1.0, 1e-4), abs=1e-12)
        assert excess(found) <= 0 and counted <= most
        asked.clear()
    everything = least_where_none(lambda x: -1.0, 0.5, 1.0, 1e-4)
    assert everything == pytest.approx(halved(lambda x: -1.0, 0.5, 1.0, 1e-4), abs=1e-12)


@pytest.mark.parametrize(
    ("target", "rate", "steps", "ratio", "sigma"),
    [(4, 512 / 4802, 34, 0, 1.08366), (4, 0.1066, 34, 10, 1.08894), (8, 0.5, 8, 5, 1.13336), (2, 0.25, 12, 10, 2.14915)],
)
def test_a_run_that_an_earlier_version_planned_goes_on(target, rate, steps, ratio, sigma):
    """Its settings are compared to 6 digits of these, which 0.1.0 found."""
    found = noise_multiplier(target, 1e-5, sampling_rate=rate, steps=steps, metrics_noise_ratio=ratio)
    assert SampledGaussian(rate, found, steps).rounded()["noise_multiplier"] == sigma
