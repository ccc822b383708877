"""Recomputes epsilon from a privacy.json, without dpalign: `python tools/recompute.py RELEASE/privacy.json [--slow]`.

By dp-accounting; with --slow by numpy and scipy alone, from losses rounded to a grid (so an estimate, no bound). The
adjacency is add or remove one unit. A unit pays for the stages whose part of the hash range contains it; the exit
status is 0 if the unit that pays most pays what is stated.
"""

import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
from scipy.stats import norm

GRID, POINTS = 1e-3, 2**18  # of --slow: losses from -131 to 131 nats


def spendings(statement):
    """(dataset, split, low, high, sampling rate, noise of all that was released on one sample, steps)."""
    for stage in statement["stages"]:
        for m in stage["mechanisms"]:
            noises = m["noise_multiplier"] / m["passes"] ** 0.5, float(m["metrics_noise_multiplier"])
            sigma = sum(noise**-2 for noise in noises) ** -0.5 if min(noises) > 0 else 0.0
            yield stage["dataset"], stage["split"], *stage["part"], m["sampling_rate"], sigma, m["steps"]


def met(rows):
    """For each place where a part begins: the steps, by rate and noise, that a unit there may meet."""
    for dataset in {row[0] for row in rows}:
        own = [row for row in rows if row[0] == dataset]
        if len({row[1] for row in own}) > 1:  # hashes under different keys cannot be compared: all may meet
            own = [(*row[:2], 0.0, 1.0, *row[4:]) for row in own]
        for start in {row[2] for row in own}:
            steps = {}
            for *_, rate, sigma, count in (row for row in own if row[2] <= start < row[3]):
                steps[rate, sigma] = steps.get((rate, sigma), 0) + count
            yield steps


def by_dp_accounting(steps, delta):
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    grid = min(5e-3, max(1e-5, math.sqrt(5e-3 / sum(steps.values())))) / 10
    grid = max(grid, 1e-5 / min(sigma for _, sigma in steps) ** 2)
    options = {"value_discretization_interval": grid, "pessimistic_estimate": True}
    parts = [from_gaussian_mechanism(s, sampling_prob=q, **options).self_compose(n) for (q, s), n in steps.items()]
    return functools.reduce(lambda one, other: one.compose(other), parts).get_epsilon_for_delta(delta)


def by_numpy(steps, delta):
    losses, found = (np.arange(POINTS) - POINTS // 2) * GRID, []
    edges, falling = losses + GRID / 2, losses[::-1]  # between a point and the next; the largest loss first
    for removed in (True, False):
        spectrum = np.ones(POINTS // 2 + 1, dtype=complex)
        for (q, sigma), count in steps.items():
            with np.errstate(all="ignore"):  # the output at which the loss is an edge; none where it never gets there
                ratio = (np.expm1(edges if removed else -edges) + q) / q
                place = np.where(ratio > 0, sigma**2 * np.log(np.maximum(ratio, 1e-300)) + 0.5, -np.inf)
            plain = norm.cdf(place / sigma)
            below = (1 - q) * plain + q * norm.cdf((place - 1) / sigma) if removed else 1 - plain
            spectrum *= np.fft.rfft(np.fft.ifftshift(np.diff(below, prepend=0.0))) ** count
        mass = np.fft.fftshift(np.fft.irfft(spectrum, POINTS)).clip(0)[::-1]
        lighter = np.cumsum(mass * np.exp(-falling.clip(min=-50)))
        deltas = np.cumsum(mass) - np.exp(falling.clip(max=50)) * lighter  # that each loss would be an epsilon for
        found.append(np.interp(delta, deltas[falling >= 0], falling[falling >= 0]))
    return float(max(found))


if __name__ == "__main__":
    compose = by_numpy if "--slow" in sys.argv else by_dp_accounting
    try:
        stated = json.loads(Path(next(word for word in sys.argv[1:] if word != "--slow")).read_text(encoding="utf-8"))
        delta, epsilon, ways = float(stated["delta"]), float(stated["epsilon"]), met([*spendings(stated)])
        found = max([0.0, *(compose(m, delta) if all(sigma for _, sigma in m) else math.inf for m in ways)])
    except Exception as error:  # whoever may have written it
        sys.exit(f"this is no privacy statement that can be added up ({type(error).__name__}).")
    print(f"stated {epsilon:.4f}, recomputed {found:.4f} at delta {delta:g}")
    sys.exit(not math.isclose(found, epsilon, rel_tol=1e-3, abs_tol=2e-3))
