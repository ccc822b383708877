"""Poisson sampling: every unit by itself, every draw by itself."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from dpalign.privacy.entropy import SystemEntropy
from dpalign.privacy.sampling import poisson_sample

UNITS, RATE, DRAWS = 50, 0.1, 4000
coins = np.random.default_rng()


def poisson() -> np.ndarray:
    """`(draws, units)` bool: who took part in which draw."""
    entropy = SystemEntropy()
    taken = np.zeros((DRAWS, UNITS), dtype=bool)
    for draw in taken:
        draw[poisson_sample(UNITS, RATE, entropy)] = True
    return taken


def fixed_size() -> np.ndarray:
    return coins.permuted(np.arange(UNITS) < UNITS * RATE + np.zeros((DRAWS, 1)), axis=1)


def shuffled_epochs() -> np.ndarray:
    """Batches of a fixed size cut from a shuffled epoch: everyone exactly once per epoch."""
    orders = coins.permuted(np.tile(np.arange(UNITS), (int(DRAWS * RATE), 1)), axis=1)
    batch_of = orders // int(UNITS * RATE)
    return (batch_of[:, None, :] == np.arange(int(1 / RATE))[:, None]).reshape(DRAWS, UNITS)


def neighbours_together() -> np.ndarray:
    return np.repeat(coins.random((DRAWS, UNITS // 2)) < RATE, 2, axis=1)


def wrong_rate() -> np.ndarray:
    return coins.random((DRAWS, UNITS)) < RATE * 1.15


def last_unit_never() -> np.ndarray:
    return (coins.random((DRAWS, UNITS)) < RATE) & (np.arange(UNITS) < UNITS - 1)


def every_sample_twice() -> np.ndarray:
    return np.repeat(coins.random((DRAWS // 2, UNITS)) < RATE, 2, axis=0)


def subsample_of_a_pool() -> np.ndarray:
    """Four samples at twice the rate from a pool that was itself drawn."""
    pools = np.repeat(coins.random((DRAWS // 4, UNITS)) < 0.5, 4, axis=0)
    return pools & (coins.random((DRAWS, UNITS)) < 2 * RATE)


def poisson_p_values(taken: np.ndarray) -> dict[str, float]:
    """p-values of what Poisson sampling promises."""
    draws, units = taken.shape
    variance = RATE * (1 - RATE)
    centred = taken - RATE
    pairs = (centred.T @ centred)[np.triu_indices(units, 1)]  # joint inclusions of two units
    lag = (centred[1:] * centred[:-1]).sum() / variance / ((draws - 1) * units) ** 0.5
    inclusions = (centred.sum(0) ** 2).sum() / (draws * variance)
    sizes = ((taken.sum(1) - units * RATE) ** 2).sum() / (units * variance)
    return {
        "inclusion": _two_sided(stats.chi2(units), inclusions),
        "smallest inclusion": units * 2 * stats.norm.sf(abs(centred.sum(0)).max() / (draws * variance) ** 0.5),
        "size variance": _two_sided(stats.norm(draws, (2 * draws * (1 + 0.5 / (units * variance))) ** 0.5), sizes),
        "pairs": _two_sided(stats.chi2(len(pairs)), (pairs**2).sum() / (draws * variance**2)),
        "next draw": 2 * stats.norm.sf(abs(lag)),
    }


def _two_sided(law, value: float) -> float:
    return 2 * min(law.cdf(value), law.sf(value))


def test_sampling_is_poisson():
    """PRIVACY test 7: inclusion Bin(T, q), size variance N q (1 - q), independent pairs and draws."""
    assert min(poisson_p_values(poisson()).values()) > 1e-7


@pytest.mark.parametrize(
    ("mutant", "found_by"),
    [
        (fixed_size, "size variance"),
        (shuffled_epochs, "inclusion"),
        (neighbours_together, "pairs"),
        (wrong_rate, "inclusion"),
        (last_unit_never, "smallest inclusion"),
        (every_sample_twice, "next draw"),
        (subsample_of_a_pool, "next draw"),
    ],
)
def test_the_sampling_test_kills(mutant: Callable[[], np.ndarray], found_by: str):
    """PRIVACY test 7, mutants: whatever is not a fresh Poisson sample per draw."""
    assert poisson_p_values(mutant())[found_by] < 1e-7


# Of a hundred million ------------------------------------------------------------------------------------------------

MANY, SAMPLE = 10**8, 512


def positions(draw: Callable[[], np.ndarray], count: int = 60) -> dict[str, float]:
    """p-values of what a rare Poisson sample promises: how many, where, and how far apart."""
    found = [draw() for _ in range(count)]
    assert all((np.diff(sample) > 0).all() and sample[0] >= 0 and sample[-1] < MANY for sample in found)
    sizes = np.array([len(sample) for sample in found])
    gaps = np.concatenate([np.diff(sample, prepend=-1) for sample in found])
    return {
        "size": 2 * stats.norm.sf(abs(sizes.sum() - count * SAMPLE) / (count * SAMPLE) ** 0.5),
        "spread": _two_sided(stats.chi2(count), ((sizes - SAMPLE) ** 2).sum() / SAMPLE),
        "places": stats.kstest(np.concatenate(found) / MANY, "uniform").pvalue,
        "gaps": stats.kstest(gaps * SAMPLE / MANY, "expon").pvalue,
    }


def test_a_rare_sample_is_poisson_too():
    p_values = positions(lambda: poisson_sample(MANY, SAMPLE / MANY, SystemEntropy()))
    assert min(p_values.values()) > 1e-7


@pytest.mark.parametrize(
    ("mutant", "found_by"),
    [
        (lambda: np.sort(coins.choice(MANY, SAMPLE, replace=False, shuffle=False)), "spread"),  # always as many
        (lambda: poisson_sample(MANY // 50 * 49, SAMPLE / MANY * 50 / 49, SystemEntropy()), "places"),  # the last never
        (lambda: (np.arange(SAMPLE) + coins.random()) * (MANY // SAMPLE), "gaps"),  # evenly spread
        (lambda: poisson_sample(MANY, 1.1 * SAMPLE / MANY, SystemEntropy()), "size"),
    ],
)  # fmt: skip
def test_the_test_of_rare_samples_kills(mutant: Callable[[], np.ndarray], found_by: str):
    assert positions(mutant)[found_by] < 1e-7


def test_a_sample_of_many_units_costs_what_the_sample_does():
    entropy = SystemEntropy()
    tracemalloc.start()
    try:
        poisson_sample(MANY, 4096 / MANY, entropy)
        assert tracemalloc.get_traced_memory()[1] < 64 * 4096 * 8  # not a bit for each unit, which would be 12 MB
    finally:
        tracemalloc.stop()


class Crowded(SystemEntropy):
    """Every gap is 1: all units are drawn, many more than were expected."""

    def uniforms(self, count: int) -> np.ndarray:
        return np.full(count, np.nextafter(1.0, 0.0))


@pytest.mark.parametrize("units", [1, 15, 4000])
def test_however_many_are_drawn_none_is_left_out(units):
    """The gaps are drawn for about as many as are expected, and more for as long as there are units left."""
    assert poisson_sample(units, 0.01, Crowded()).tolist() == list(range(units))
