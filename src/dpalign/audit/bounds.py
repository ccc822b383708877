"""Lower bounds on epsilon from the scores of canaries that were in a run, or left out, by fair coins.

Each takes the same two vectors and one confidence, and says the largest epsilon that the scores rule out: with at least
that confidence the true epsilon is larger. A bound far below a claim proves nothing: a better attack may exist.

- `gaussian`: the sum of the signals of canaries that were in is Gaussian (arXiv 2606.12733); here its shift is inverted
  exactly and turned into epsilon by the accountant, for the run's own rates and steps.
- `order_statistics`: the errors among the most confident guesses (arXiv 2509.08704), their law computed exactly here.
- `f_dp`: the recursion over numbers of correct guesses (arXiv 2410.22235).
- `steinke`: binomial tail with a price for delta (arXiv 2305.08846); assumes (epsilon, delta)-DP alone.

The next two test mu-GDP (Dong, Roth and Su, arXiv 1905.02383) and turn the largest mu that is ruled out into epsilon at
delta. A score is positive for a guess "was in", negative for "was left out", and larger where the guess is surer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, special, stats

from ..errors import DPAlignError
from ..privacy import accountant
from ..privacy.accountant import SampledGaussian

LARGEST_MU, LARGEST_EPSILON = 40.0, 100.0  # beyond these nothing is told apart any more
SHARES = (
    0.02,
    0.05,
    0.1,
    0.2,
    0.4,
    1.0,
)  # of canaries that are guessed, the surest ones; each at its part of the error


@dataclass(frozen=True)
class Scores:
    """What an attacker made of each canary.

    scores: `(canaries,)` float64. included: `(canaries,)` bool, its fair coin.

    Raises:
        DPAlignError: other shapes, a score that is not finite, or fewer than two canaries on a side.
    """

    scores: np.ndarray
    included: np.ndarray

    def __post_init__(self) -> None:
        if self.scores.ndim != 1 or self.scores.shape != self.included.shape:
            raise DPAlignError(f"scores {self.scores.shape} and coins {self.included.shape} must be vectors alike.")
        if not np.isfinite(self.scores).all():
            raise DPAlignError("a canary's score is not finite.")
        if min(self.included.sum(), (~self.included).sum()) < 2:
            raise DPAlignError("a bound needs at least two canaries that were in and two that were left out.")

    def correct(self, guesses: int) -> int:
        """How many of the `guesses` surest guesses are right."""
        surest = np.argsort(-np.abs(self.scores), kind="stable")[:guesses]
        return int(((self.scores[surest] > 0) == self.included[surest]).sum())


# The Gaussian bound --------------------------------------------------------------------------------------------------


def gaussian(
    present: np.ndarray, noise: np.ndarray, claims: Sequence[SampledGaussian], delta: float, confidence: float
) -> float:
    """Epsilon of the least noise that the signals of all canaries together leave possible, in the steps of `claims`.

    Args:
        present: `(in,)` signal of each canary that was in, summed over the run, along its own direction.
        noise: `(releases, left out)` signals of those that were left out: the noise is measured here, never taken from
            a claim. Each direction's sign is a coin of its own, so that their mean is 0.
        claims: the sampled Gaussians whose noise is asked for; rates, steps and passes are theirs. What is ruled out is
            that all of them had more noise than that; the metrics block is left out, which only lowers the bound.
    """
    releases, left = noise.shape
    deviation = math.sqrt(float(np.square(noise).mean()) * releases)  # of the noise on a sum over all releases
    if deviation == 0:
        return LARGEST_EPSILON
    drawn = [(c.steps * c.passes, c) for c in claims]
    wander = sum(n * c.passes * c.sampling_rate * (1 - c.sampling_rate) for n, c in drawn)  # of how often one is drawn
    mu = gaussian_mu(present, deviation, releases * left, wander / deviation**2, confidence)
    declared = math.sqrt(sum(n * c.noise_multiplier**2 for n, c in drawn))
    claimed = sum(n * c.sampling_rate for n, c in drawn) / declared
    if mu < claimed / 100:
        return 0.0
    factor = max(claimed / mu, 0.1)
    least = [
        replace(c, noise_multiplier=factor * c.noise_multiplier, metrics_noise_multiplier=math.inf) for c in claims
    ]
    return accountant.epsilon(least, delta)


def gaussian_mu(present: np.ndarray, deviation: float, freedom: int, wander: float, confidence: float) -> float:
    """Largest shift, over the noise's deviation, that is ruled out.

    Model: a sum is N(0, s^2) for a canary that was left out; for one that was in, a shift of mean mu s and variance
    wander s^2 is added. So the mean of `present` over an estimate of s with `freedom` degrees is a noncentral t, but
    for a mean of many binomials being called normal.
    """
    root, widened = math.sqrt(len(present)), math.sqrt(1 + wander)
    t = root * float(present.mean()) / (deviation * widened)
    quantile = float(special.ndtri(confidence))
    # What is left of a noncentral t by its normal approximation, a little below the exact one (Johnson and Welch 1940).
    shift = t * (1 - 1 / (4 * freedom)) - quantile * math.sqrt(1 + t**2 / (2 * freedom))
    return max(0.0, shift * widened / root)


# Bounds from guesses -------------------------------------------------------------------------------------------------


def order_statistics(scores: Scores, delta: float, confidence: float) -> float:
    """Errors among the r surest of n guesses, under mu-GDP at its tightest: n independent N(+-mu/2, 1)."""
    n = len(scores.scores)

    def rejected(mu: float, guesses: int, error: float) -> bool:
        return errors_p_value(n, guesses, guesses - scores.correct(guesses), mu) < error

    return epsilon_of(_largest_over_shares(n, rejected, LARGEST_MU, confidence), delta)


def errors_p_value(n: int, guesses: int, errors: int, mu: float) -> float:
    """P(at most `errors` errors among the surest `guesses` of `n`) where canaries are N(+-mu/2, 1) by a fair coin.

    Given the largest |x| = t among those not guessed, the guessed ones are independent draws from |x| > t, each wrong
    with probability Phi(-t - mu/2) / P(|x| > t); P(|x| > t) is a beta variable.
    """
    if guesses == n:
        return float(stats.binom.cdf(errors, n, special.ndtr(-mu / 2)))
    levels = (np.arange(512) + 0.5) / 512
    beyond = stats.beta.ppf(levels, guesses + 1, n - guesses)  # P(|x| > t) of the first that is not guessed
    t = np.linspace(0.0, 12.0 + mu, 4096)
    t = np.interp(-beyond, -(special.ndtr(-t - mu / 2) + special.ndtr(-t + mu / 2)), t)
    wrong = special.ndtr(-t - mu / 2)
    wrong = wrong / (wrong + special.ndtr(-t + mu / 2))
    return float(stats.binom.cdf(errors, guesses, wrong).mean())


def f_dp(scores: Scores, delta: float, confidence: float) -> float:
    """Numbers of correct guesses that no mu-GDP mechanism reaches, whatever it does to all canaries together."""
    n = len(scores.scores)

    def rejected(mu: float, guesses: int, error: float) -> bool:
        return f_dp_rejects(n, guesses, scores.correct(guesses), mu, error)

    return epsilon_of(_largest_over_shares(n, rejected, LARGEST_MU, confidence), delta)


def f_dp_rejects(n: int, guesses: int, correct: int, mu: float, error: float) -> bool:
    """Whether P(at least `correct` of `guesses` guesses are right) < `error` under mu-GDP, for `n` fair coins.

    With p_i the probability of i right guesses, A_c = sum_{i>=c} i p_i / n and B_c = sum_{i>=c} (guesses - i) p_i / n:
    flipping one canary's coin turns a right guess into a wrong one, so A_c <= 1 - f(B_{c-1}). Going down from
    P(at least `correct`) = `error` gives the least that A_0 + B_0 can be, which is guesses / n.
    """
    right, wrong = error * correct / n, error * (guesses - correct) / n
    for i in range(correct - 1, -1, -1):
        least = float(special.ndtr(special.ndtri(right) - mu)) if right < 1 else 1.0
        if least > wrong:
            right, wrong = min(1.0, right + i / (guesses - i) * (least - wrong)), least
        if right + wrong > guesses / n:
            return True
    return False


def steinke(scores: Scores, delta: float, confidence: float) -> float:
    """Right guesses against randomised response, and what delta may add to them."""
    n = len(scores.scores)

    def rejected(epsilon: float, guesses: int, error: float) -> bool:
        return steinke_p_value(n, guesses, scores.correct(guesses), epsilon, delta) < error

    return _largest_over_shares(n, rejected, LARGEST_EPSILON, confidence)


def steinke_p_value(n: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Upper bound on P(at least `correct` of `guesses` are right) under (epsilon, delta)-DP (their theorem 5.2)."""
    law = stats.binom(guesses, special.expit(epsilon))
    tail = float(law.sf(correct - 1))
    if correct == 0 or delta == 0:
        return tail
    fewer = np.arange(1, correct + 1)
    near = law.sf(correct - fewer - 1) - tail  # P(correct > W >= correct - i)
    return min(1.0, tail + 2 * n * delta * float((near / fewer).max()))


def _largest_over_shares(
    n: int, rejected: Callable[[float, int, float], bool], most: float, confidence: float
) -> float:
    """The largest parameter that is rejected at some share of guesses; each share has its part of the error."""
    error = (1 - confidence) / len(SHARES)
    best = 0.0
    for guesses in sorted({max(1, round(share * n)) for share in SHARES}):
        if not rejected(best, guesses, error):
            continue  # no more than what another share says
        low, high = best, max(1.0, 2 * best)
        while high < most and rejected(high, guesses, error):
            low, high = high, 2 * high
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (middle, high) if rejected(middle, guesses, error) else (low, middle)
        best = low
    return best


# mu and epsilon ------------------------------------------------------------------------------------------------------


def delta_of(epsilon: float, mu: float) -> float:
    """delta of mu-GDP at epsilon (arXiv 1905.02383, corollary 2.13)."""
    first, second = special.log_ndtr(-epsilon / mu + mu / 2), epsilon + special.log_ndtr(-epsilon / mu - mu / 2)
    return float(math.exp(first) * -math.expm1(min(0.0, second - first)))


def epsilon_of(mu: float, delta: float) -> float:
    """epsilon of mu-GDP at delta; 0 where delta alone covers it."""
    if mu <= 0 or delta_of(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while delta_of(high, mu) > delta:
        high *= 2
    return float(optimize.brentq(lambda epsilon: delta_of(epsilon, mu) - delta, 0.0, high, xtol=1e-9))
