"""The step by itself: the real gate and mechanism on inputs that are known, so that every output has a known law.

It sees the noise (size, shape, independence across releases and restarts, its grid), the clip, the metrics block and
the sampler, as a run would use them. It does not see what the training loop does with them: that is `ghosts`.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..privacy.gate import Gate, PrivateStep, Sample
from ..privacy.ledger import Ledger
from ..privacy.mechanism import grid_of
from ..privacy.parts import Part
from ..privacy.products import Factors, Products
from .checks import Check, noise_scale, noise_shape, normal, uncorrelated

SHAPES = [torch.Size([32, 64]), torch.Size([2048])]
POSITIONS = 4  # that a unit's gradient in the matrix is a sum over, where it comes as factors
RELEASES = 12  # of noise alone, before a restart and again behind it
UNITS, DRAWS = 1000, 200  # for the sampler: at least so many draws
LARGE = 1e6  # a gradient that has to be clipped, as a multiple of C
AT_ONCE = 256  # units that are added together


def check_step(step: PrivateStep, folder: Path, products: bool = False) -> list[Check]:
    """Everything that is checked of one private step; its ledger lies in `folder`.

    Args:
        products: whether gradients of whole weights come as their factors, as `adapter.kind: full` has them.

    Raises:
        DPAlignError: the ledger cannot be written.
    """
    noise = _noise(step, folder, products)
    sigma = step.mechanism.noise_multiplier
    standard = noise * step.divisor / (sigma * step.max_grad_norm)
    checks = [
        noise_scale("noise: size", "standard deviation of the noise over sigma C / divisor", standard),
        noise_shape("noise: shape", "distance of the noise from a normal law", standard),
        uncorrelated(
            "noise: independence",
            "largest correlation between tensors, releases and restarts",
            standard.reshape(2 * len(standard), -1),
        ),
        _grid(step, noise),
        _clip(step, folder, products),
        *_sampler(step, folder),
    ]
    return checks + (_metrics(step, folder) if math.isfinite(step.mechanism.metrics_noise_multiplier) else [])


def _samples(step: PrivateStep, folder: Path, stage: str, steps: int, attempt: int = 0) -> list[Sample]:
    """Samples of `UNITS` units through a gate of their own, which declares twice as many units as there are."""
    ledger = Ledger(folder / "step.sqlite")
    try:
        gate = Gate(
            ledger,
            Part("audit step"),
            count=UNITS,
            unit="record",
            declared_units=2 * UNITS,
            fingerprint="",
            run="audit",
            stage=stage,
            config_hash="",
        )
        return gate.draw([step] * steps, first=0, attempt=attempt)
    finally:
        ledger.close()


def _noise(step: PrivateStep, folder: Path, products: bool) -> np.ndarray:
    """`(releases, coordinates)` float64 of samples to which nothing was added, half of them after a restart."""
    found = []
    for attempt in (0, 1):
        for sample in _samples(step, folder, "noise", RELEASES, attempt):
            gradients, _ = sample.mechanism(SHAPES, dtype=torch.float64, products=products).release()
            found.append(torch.cat([g.flatten() for g in gradients]).numpy())
    return np.stack(found)


def _grid(step: PrivateStep, noise: np.ndarray) -> Check:
    """Outputs are multiples of a public step: the low bits of a float sum are not there."""
    steps = noise * step.divisor / grid_of(step.max_grad_norm, step.mechanism.noise_multiplier)
    furthest = float(np.abs(steps - np.round(steps)).max())
    return Check("grid", "furthest an output lies from the grid, in its steps", furthest, 0.0, float(furthest < 1e-3))


def _clip(step: PrivateStep, folder: Path, products: bool) -> Check:
    """Units whose gradients all point one way, across two tensors, and are far too large; some are not finite."""
    sigma, (sample,) = step.mechanism.noise_multiplier, _samples(step, folder, "clip", 1)
    mechanism = sample.mechanism(SHAPES, dtype=torch.float64, products=products)
    direction = [torch.ones(shape, dtype=torch.float64) for shape in SHAPES]
    length = math.sqrt(sum(d.numel() for d in direction))
    scale = LARGE * (step.max_grad_norm + step.clipping_gamma) / length
    times = min(256, max(2, math.ceil(40 * sigma / AT_ONCE)))
    for _ in range(times):
        mechanism.add(_gradients(scale, AT_ONCE, products))
    for broken in (math.inf, -math.inf, math.nan):
        mechanism.add(_gradients(broken, 1, products))
    gradients, _ = mechanism.release()
    along = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True)) / length
    units = AT_ONCE * times
    found = along * step.divisor / (step.max_grad_norm * units)
    beyond = max(0.0, abs(found - 1) - 1e-3)  # automatic clipping and the grid take off less than that
    what = "what a unit adds, over C, along a direction across tensors"
    return normal("clip", what, 1 + beyond if found > 1 else 1 - beyond, 1.0, sigma / units)


def _gradients(scale: float, units: int, products: bool) -> list[Tensor | Products]:
    """Of so many units that are the same: `scale` everywhere."""
    matrix, vector = (torch.full((units, *shape), scale, dtype=torch.float64) for shape in SHAPES)
    if not products:
        return [matrix, vector]
    slopes = torch.full((POSITIONS, SHAPES[0][0]), scale / POSITIONS, dtype=torch.float64)
    factors = Factors(torch.ones(POSITIONS, SHAPES[0][1], dtype=torch.float64), slopes)
    return [Products(SHAPES[0], [[factors]] * units), vector]


def _sampler(step: PrivateStep, folder: Path) -> list[Check]:
    """Inclusions of `UNITS` units in many samples: how many in all, of each unit, in each sample, in two in a row."""
    q = step.mechanism.sampling_rate
    if q == 1:
        return []
    draws = min(4000, max(DRAWS, math.ceil(8 / q)))
    drawn = np.zeros((draws, UNITS))
    for row, sample in zip(drawn, _samples(step, folder, "sampler", draws), strict=True):
        row[sample.units] = 1
    total, twice = float(drawn.sum()), int((drawn[1:] * drawn[:-1]).sum())
    return [
        normal(
            "sampler: rate",
            "units drawn over units times rate, where others are declared",
            total / (draws * UNITS * q),
            1.0,
            math.sqrt((1 - q) / (q * draws * UNITS)),
        ),
        _dispersion(
            "sampler: units", "variance of how often each unit is drawn, over binomial", drawn.sum(0), draws, q
        ),
        _dispersion("sampler: sizes", "variance of the samples' sizes, over binomial", drawn.sum(1), UNITS, q),
        _repeats(twice, draws, q),
    ]


def _repeats(twice: int, draws: int, q: float) -> Check:
    """Units that are drawn in a sample and again in the next one: about normal, or Poisson where they are rare."""
    pairs = UNITS * (draws - 1)
    expected, what = pairs * q**2, "units drawn twice in a row, over rate squared"
    if expected > 1000:
        spread = math.sqrt(pairs * q**2 * (1 - q**2) + 2 * UNITS * (draws - 2) * q**3 * (1 - q))
        return normal("sampler: twice", what, twice / expected, 1.0, spread / expected)
    tail = min(stats.poisson.sf(twice - 1, expected), stats.poisson.cdf(twice, expected))
    return Check("sampler: twice", what, twice / expected, 1.0, float(min(1.0, 2 * tail)))


def _dispersion(name: str, what: str, counts: np.ndarray, trials: int, q: float) -> Check:
    """Whether counts vary as binomial ones do; the statistic's own variance is that of a binomial's square."""
    variance = trials * q * (1 - q)
    fourth = variance * (1 + 3 * (trials - 2) * q * (1 - q))
    found = float(np.square(counts - trials * q).mean()) / variance
    return normal(name, what, found, 1.0, math.sqrt((fourth - variance**2) / len(counts)) / variance)


def _metrics(step: PrivateStep, folder: Path) -> list[Check]:
    """The metrics block: its noise beside what is declared, and what units far beyond the ranges add together."""
    deviation, sigma = step.metrics_deviation(), step.mechanism.metrics_noise_multiplier
    middles = np.array([(m.low + m.high) / 2 for m in step.metrics])
    halves = np.array([(m.high - m.low) / 2 for m in step.metrics])
    declared = np.array([deviation[m.name] for m in step.metrics])

    def released(sample: Sample, units: int) -> np.ndarray:
        mechanism = sample.mechanism([])
        if units:
            mechanism.add_metrics(torch.from_numpy(middles + LARGE * halves).expand(units, -1))
        _, metrics = mechanism.release()
        values: np.ndarray = np.array([(metrics or {})[m.name] for m in step.metrics]) - middles
        return values

    *empty, full = _samples(step, folder, "metrics", DRAWS + 1)
    standard = np.stack([released(sample, 0) for sample in empty]) / declared
    units = max(256, math.ceil(40 * sigma))
    shares = released(full, units) / halves * step.divisor / math.sqrt(len(step.metrics))
    along = float(shares.sum()) / math.sqrt(len(step.metrics)) / units
    return [
        noise_scale(
            "metrics: noise", "standard deviation of the metrics' noise over what is declared", standard.reshape(1, -1)
        ),
        normal("metrics: clip", "norm of what a unit adds to the metrics block, over 1", along, 1.0, sigma / units),
    ]
