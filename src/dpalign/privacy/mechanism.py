"""Clip, sum, add Gaussian noise: the only door that private data goes through.

What is bounded: adding or removing one unit moves the sum of all trainable gradients together by at
most C in L2 norm, and the sum of the metrics block by at most 1. What is not bounded here: anything
that reaches the model by another way than `release`.

Sums are of integers. A unit's clipped gradient is rounded towards zero to multiples of a grid that public constants
fix (C and sigma), and refused if the integers' norm is above C; the noise is rounded to the same grid. Rounding noise
and adding an integer commute, so the release is a post-processing of the Gaussian mechanism on an integer query of
sensitivity at most C: the low bits of a float sum, which would tell D from D + x, are not there. And the sum does not
depend on order, micro-batches or the number of processes. What remains is the noise's own arithmetic (float64).

Of a whole weight matrix no unit's gradient is made (`products.py`): there the norm of a unit's integers is bounded
before they are, on a grid that is 2^20 times finer, and the finer bits are cut off once the noise is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..errors import DPAlignError
from .context import own_context
from .entropy import AT_ONCE, SystemEntropy
from .products import EXACT, ExactSum, Products, check_arithmetic, measure

Clipping = Literal["automatic", "flat", "none"]
UnitGradients: TypeAlias = Tensor | Products  # of some units in one parameter
GRID = 2.0**-20  # of the noise: what rounding moves a release by is far below what the noise does
FINE_GRID = 2.0**-40  # of C, where there is no noise to be compared with
MARGIN = 1 - 2.0**-16  # a norm is computed in float32: without it half of all clipped gradients would be above C
FINER = 20  # bits by which sums of products are finer than what is released,
FINEST = 42  # and those of C, at most: a million units of it are less than int64 holds


@dataclass(frozen=True)
class MetricRange:
    """A metric's public, declared range; values outside are clipped to it."""

    name: str
    low: float
    high: float


class GaussianMechanism:
    """Accumulates clipped per-unit gradients over micro-batches and releases their noisy mean once.

    Args:
        shapes: shape of every trainable parameter, in a fixed order.
        max_grad_norm: C, the bound on one unit's joint gradient.
        noise_multiplier: sigma; the noise on the sum has standard deviation sigma * C.
        divisor: what the noisy sum is divided by, a constant (the expected batch size).
        clipping: "flat" scales by min(1, C/|g|); "automatic" by C/(|g| + gamma) (Bu et al. 2022,
            arXiv 2206.07136); "none" only without noise, for a non-private baseline.
        gamma: the stability constant of automatic clipping, in units of the gradient norm.
        metrics: declared ranges of the metrics block, possibly none.
        metrics_noise_multiplier: sigma_m of the metrics block.
        dtype: what norms are computed and gradients released in, float32 or float64.
        products: whether gradients of some parameters come as `Products`.

    Raises:
        DPAlignError: a constant for which the bound would not hold.
    """

    def __init__(
        self,
        shapes: list[torch.Size],
        *,
        max_grad_norm: float,
        noise_multiplier: float,
        divisor: float,
        entropy: SystemEntropy,
        clipping: Clipping = "automatic",
        gamma: float = 0.01,
        metrics: tuple[MetricRange, ...] = (),
        metrics_noise_multiplier: float = math.inf,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        products: bool = False,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise DPAlignError(f"gradients are clipped in float32 or float64, not in {dtype}.")
        _check_constants(max_grad_norm, noise_multiplier, divisor, clipping, gamma, metrics_noise_multiplier)
        self.max_grad_norm = max_grad_norm
        self.noise_multiplier = noise_multiplier
        self.divisor = divisor
        self.clipping = clipping
        self.gamma = gamma
        self.metrics = metrics
        self.metrics_noise_multiplier = metrics_noise_multiplier
        self.dtype = dtype
        self._entropy = entropy
        self.grid = 0.0 if clipping == "none" else grid_of(max_grad_norm, noise_multiplier)
        kind = dtype if clipping == "none" else torch.int64
        self._finer = 0
        if products and noise_multiplier > 0:
            self._finer = max(0, min(FINER, FINEST - math.ceil(math.log2(max_grad_norm / self.grid))))
        self._flat = torch.zeros(sum(shape.numel() for shape in shapes), dtype=kind, device=device)
        self._sums = _views(self._flat, shapes)
        self._exact = {place: ExactSum(total) for place, total in enumerate(self._sums)} if products else {}
        if products and clipping != "none":
            with own_context():
                check_arithmetic(device)
        self.metrics_grid = grid_of(1.0, 0.0 if math.isinf(metrics_noise_multiplier) else metrics_noise_multiplier)
        self._metrics_sum = torch.zeros(len(metrics), dtype=torch.int64)

    def sensitivity(self) -> float:
        """L2 bound on what one unit moves the gradient sum by."""
        return math.inf if self.clipping == "none" else self.max_grad_norm

    def clip_factors(self, norms: Tensor) -> Tensor:
        """`(units,)` scale of each unit's gradient; 0 for a unit whose gradient is not finite."""
        if self.clipping == "none":
            factors = torch.ones_like(norms)
        elif self.clipping == "flat":
            factors = (self.max_grad_norm / norms.clamp(min=1e-30)).clamp(max=1.0)
        else:
            factors = self.max_grad_norm / (norms + self.gamma)
        return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))

    @torch.no_grad()
    def add(self, grads: Sequence[UnitGradients], metrics: Tensor | None = None) -> None:
        """Clips and adds the gradients of some units; no unit may come twice between two releases.

        Args:
            grads: one `(units, *shape)` tensor per parameter, any floating dtype, or `Products` that stand for one.
            metrics: `(units, len(self.metrics))` raw values, or None where none are released.
        """
        if self.clipping == "none":
            self._add_unclipped(grads)
        elif self._exact:
            with own_context():  # bounds before sums rest on what a product of matrices is
                self._add_products(grads)
        else:
            self._add_integers([g for g in grads if isinstance(g, Tensor)])
        if metrics is not None:
            self.add_metrics(metrics)

    def _add_unclipped(self, grads: Sequence[UnitGradients]) -> None:
        finite = torch.stack([_finite(g, self.dtype) for g in grads]).all(0)
        for g, total in zip(grads, self._sums, strict=True):
            if isinstance(g, Tensor):
                total += torch.where(_along(finite, g), g.to(self.dtype), 0.0).sum(0)
                continue
            for unit in torch.nonzero(finite).flatten().tolist():
                for use in g.units[unit]:
                    total.addmm_(use.slopes.to(self.dtype).T, use.inputs.to(self.dtype))

    def _add_integers(self, grads: list[Tensor]) -> None:
        most = self.max_grad_norm / self.grid  # the bound, counted in steps of the grid
        exact = torch.float64 if most > 2.0**22 else self.dtype  # see `towards_zero`
        wide = [g.to(exact) for g in grads]
        norms = torch.stack([g.flatten(1).square().sum(1) for g in wide]).sum(0).sqrt()  # (units,)
        factors = self.clip_factors(norms) * (MARGIN / self.grid)
        steps = [towards_zero(g * _along(factors, g)) for g in wide]
        kept = self.are_bounded(steps)
        every = bool(kept.all())
        for s, total in zip(steps, self._sums, strict=True):
            bounded = s if every else torch.where(_along(kept, s), s, 0.0)
            total += bounded.sum(0, dtype=torch.float64).to(torch.int64)  # float64 adds integers exactly up to 2^53

    def are_bounded(self, steps: list[Tensor]) -> Tensor:
        """`(units,)` whether a unit's integers, which are exact, have a norm of at most C: not so if one is NaN."""
        squares = torch.stack([s.flatten(1).double().square().sum(1) for s in steps]).sum(0)
        return squares <= (self.max_grad_norm / self.grid) ** 2

    def _add_products(self, grads: Sequence[UnitGradients]) -> None:
        """As `_add_integers`, where the integers' norms are bounded before there are any: see `products.py`."""
        whole = {place: g for place, g in enumerate(grads) if isinstance(g, Products)}
        dense = {place: g.double() for place, g in enumerate(grads) if isinstance(g, Tensor)}
        step, units, device = self.grid / 2**self._finer, len(grads[0]), self._sums[0].device
        squares = torch.zeros(units, dtype=torch.float64, device=device)
        for g in dense.values():
            squares += g.flatten(1).square().sum(1)
        found = {(place, unit): f for place, g in whole.items() for unit in range(units) if (f := g.factors(unit))}
        measured = {key: measure(factors) for key, factors in found.items()}
        rounding = torch.zeros_like(squares)
        for (_, unit), m in measured.items():
            squares[unit] += (m.norm / m.scale).square()
            rounding[unit] += m.rounding.square()
        norms, rounding = squares.sqrt(), rounding.sqrt()
        most = self.max_grad_norm / step * (1 - 2.0**-20)  # in steps; what float64 makes of all of this is far less
        factors = torch.minimum(self.clip_factors(norms) * (MARGIN / step), (most - rounding) / norms.clamp(min=1e-300))
        bounded = torch.isfinite(norms) & torch.isfinite(rounding) & torch.isfinite(factors)  # none is, of a norm of 0
        factors = torch.where(bounded, factors, 0.0).clamp(min=0.0)
        bounds = {
            (place, unit): factors[unit] / m.scale * m.terms + m.rounding for (place, unit), m in measured.items()
        }
        for (_, unit), bound in bounds.items():
            factors[unit] = torch.where(bound <= EXACT, factors[unit], 0.0)
        for place, g in dense.items():
            steps = towards_zero(torch.where(_along(factors > 0, g), g * _along(factors, g), 0.0))
            self._sums[place] += steps.to(torch.int64).sum(0)
        taken = set(torch.nonzero(factors > 0).flatten().tolist())
        for place in whole:
            here = [key for key in found if key[0] == place and key[1] in taken]
            self._exact[place].add_all(
                [(found[key], measured[key], factors[key[1]]) for key in here], [float(bounds[key]) for key in here]
            )

    def add_metrics(self, metrics: Tensor) -> None:
        """Adds the `(units, len(self.metrics))` raw metrics of some units, where metrics are released."""
        if self.metrics:
            self._metrics_sum += torch.trunc(self._scaled(metrics) / self.metrics_grid).to(torch.int64).sum(0)

    def combine(self, add_up: Callable[[list[Tensor]], None]) -> None:
        """Before a release, where several processes have added units: `add_up` makes the first one's sums those of all.

        Integers, so that they are the same whoever added which unit. The noise is still to come, and comes once.
        """
        self._settle()
        add_up(self._sums)
        add_up([self._metrics_sum])

    def _settle(self) -> None:
        for exact in self._exact.values():
            exact.settle()

    def release(self) -> tuple[list[Tensor], dict[str, float] | None]:
        """The noisy mean gradient, one tensor per parameter, and the noised metrics; then forgets the sums."""
        self._settle()
        unit, released = self.grid or 1.0, torch.empty_like(self._flat, dtype=self.dtype)
        for sums, out in zip(torch.split(self._flat, AT_ONCE), torch.split(released, AT_ONCE), strict=True):
            if self.noise_multiplier > 0:
                noise = self._noise(len(sums), self.noise_multiplier * self.max_grad_norm)
                sums += torch.round(noise / (unit / 2**self._finer)).to(sums)
                sums >>= self._finer
            out.copy_(sums.double() * (unit / self.divisor))
        self._flat.zero_()
        return _views(released, [total.shape for total in self._sums]), self._release_metrics()

    def _release_metrics(self) -> dict[str, float] | None:
        total = self._metrics_sum.clone()
        self._metrics_sum.zero_()
        if not self.metrics or math.isinf(self.metrics_noise_multiplier):
            return None
        if self.metrics_noise_multiplier > 0:
            noise = self._noise(len(self.metrics), self.metrics_noise_multiplier)
            total += torch.round(noise / self.metrics_grid).to(torch.int64)
        noisy = total.double() * (self.metrics_grid / self.divisor * math.sqrt(len(self.metrics)))
        return {
            m.name: float((m.low + m.high) / 2 + value * (m.high - m.low) / 2)
            for m, value in zip(self.metrics, noisy.tolist(), strict=True)
        }

    def _scaled(self, values: Tensor) -> Tensor:
        # Every metric to [-1, 1], then 1/sqrt(k): the row's norm is at most 1 whatever the values are.
        low = torch.tensor([m.low for m in self.metrics], dtype=torch.float64)
        high = torch.tensor([m.high for m in self.metrics], dtype=torch.float64)
        middle, half = (low + high) / 2, (high - low) / 2
        clipped = values.detach().to("cpu", torch.float64).clamp(low, high)
        scaled = torch.nan_to_num((clipped - middle) / half, nan=0.0)
        return scaled / math.sqrt(len(self.metrics))

    def _noise(self, count: int, standard_deviation: float) -> Tensor:
        return torch.from_numpy(self._entropy.normals(count)) * standard_deviation


def grid_of(bound: float, noise_multiplier: float) -> float:
    """The step that sums are counted in, a power of two: a function of public constants alone."""
    finest = 2.0 ** math.floor(math.log2(bound)) * FINE_GRID
    if noise_multiplier == 0:
        return finest
    return max(finest, 2.0 ** math.floor(math.log2(bound * noise_multiplier)) * GRID)


def towards_zero(values: Tensor) -> Tensor:
    """Integers that are no further from zero than `values`, and less than 1 nearer, but for integers: perhaps 1 nearer.

    Done by adding and subtracting the power of two above which a float holds integers only, in place: several times
    faster than `torch.trunc` on a CPU. For |values| up to half of that power (2^22 in float32).
    """
    whole = 2.0 ** (23 if values.dtype == torch.float32 else 52)
    below = (values.abs() - 0.5).clamp_(min=0)
    return below.add_(whole).sub_(whole).copysign_(values)


def _views(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Its parts, one behind the other, in these shapes."""
    parts = torch.split(flat, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _finite(grads: UnitGradients, dtype: torch.dtype) -> Tensor:
    """`(units,)` whether all of a unit's gradient in one parameter is finite."""
    if isinstance(grads, Tensor):
        return grads.to(dtype).flatten(1).isfinite().all(1)
    found = [all(bool(part.isfinite().all()) for use in uses for part in use) for uses in grads.units]
    device = next((use.slopes.device for uses in grads.units for use in uses), None)
    return torch.tensor(found, dtype=torch.bool, device=device)


def _along(values: Tensor, like: Tensor) -> Tensor:
    """`(units,)` values, ready to be multiplied with `(units, ...)`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _check_constants(
    max_grad_norm: float,
    noise_multiplier: float,
    divisor: float,
    clipping: Clipping,
    gamma: float,
    metrics_noise_multiplier: float,
) -> None:
    """Refuses every constant for which the sensitivity would not be what it says."""
    if clipping not in ("automatic", "flat", "none"):
        raise DPAlignError(f"clipping {clipping!r} is not automatic, flat or none.")
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise DPAlignError(f"noise_multiplier {noise_multiplier} must be finite and not negative.")
    if clipping == "none" and noise_multiplier > 0:
        raise DPAlignError("clipping 'none' has unbounded sensitivity: use 'automatic' or 'flat' with noise.")
    if clipping != "none" and not (0 < max_grad_norm < math.inf):
        raise DPAlignError(f"max_grad_norm {max_grad_norm} must be positive and finite.")
    if not (math.isfinite(gamma) and gamma >= 0):
        raise DPAlignError(f"clipping_gamma {gamma} must be finite and not negative.")
    if not (0 < divisor < math.inf):
        raise DPAlignError(f"the divisor {divisor} must be a positive constant.")
    if not metrics_noise_multiplier >= 0:
        raise DPAlignError(f"the metrics' noise multiplier {metrics_noise_multiplier} must not be negative.")
