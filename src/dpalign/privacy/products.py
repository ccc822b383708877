"""Gradients of whole weight matrices, clipped and summed without any one of them being made.

A unit's gradient in a weight is the sum over its positions of slope x input, and that of many units is one matrix
product. For a sum whose low bits tell nothing it has to be one of integers, and a unit's integers have to have a norm
of at most C. So the factors are rounded instead of the products: inputs to integers of some 10 bits, slopes, once they
are clipped, to integers on the grid that this leaves. Integers below 2^53 are exact in float64, and so is their matrix
product. How large the norm can be is bounded before: that of slopes x rounded inputs from the products of positions
with each other (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679), with a bound of its own rounding,
and what rounding the slopes can add. Everything that is done to a unit here is done to it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DPAlignError

PRECISION = 2.0**9  # root mean square of a unit's rounded inputs
EXACT = 2.0**52  # sums of float64 integers stay below: half of what it holds
ROUNDS = 2.0**-24  # relative error of one float32 operation
ROOM = 0.03  # of a squared norm: by more than that float32's error bound may not raise it
SMALLEST = 2.0**-40  # of a position's slopes: beside it the products that float32 has no numbers for are nothing


class Factors(NamedTuple):
    """Of one unit in one weight: inputs `(positions, in)` and slopes of the loss `(positions, out)`."""

    inputs: Tensor
    slopes: Tensor


class Products:
    """Gradients of some units in one weight matrix, in the place of a `(units, out, in)` tensor.

    Args:
        shape: `(out, in)`.
        units: of each its factors, one pair for every use of the weight.
    """

    def __init__(self, shape: torch.Size, units: Sequence[list[Factors]]) -> None:
        self.shape, self.units = shape, list(units)

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, some: slice) -> Products:
        return Products(self.shape, self.units[some])

    def factors(self, unit: int) -> Factors | None:
        """All uses of one unit, one below the other; None if it has none."""
        uses = self.units[unit]
        if len(uses) < 2:
            return uses[0] if uses else None
        return Factors(torch.cat([use.inputs for use in uses]), torch.cat([use.slopes for use in uses]))

    def dense(self) -> Tensor:
        """`(units, out, in)`, float64: for tests, and where nothing is private."""
        total = torch.zeros(len(self.units), *self.shape, dtype=torch.float64)
        for row, uses in zip(total, self.units, strict=True):
            for use in uses:
                row += (use.slopes.double().T @ use.inputs.double()).cpu()
        return total

    def along(self, direction: Tensor) -> Tensor:
        """`(units, out)`: the gradients times a direction `(in,)`, float64."""
        zero = torch.zeros(self.shape[0], dtype=torch.float64, device=direction.device)
        return torch.stack(
            [sum(((f.inputs.double() @ direction) @ f.slopes.double() for f in uses), zero) for uses in self.units]
        )


def added(total: Tensor | Products, more: Tensor | Products) -> Tensor | Products:
    """The gradients of the same units from other rows too; a tensor is changed in place."""
    if isinstance(total, Tensor):
        assert isinstance(more, Tensor)
        return total.add_(more)
    assert isinstance(more, Products)
    return Products(total.shape, [ours + theirs for ours, theirs in zip(total.units, more.units, strict=True)])


@dataclass(frozen=True)
class Measured:
    """What one unit's rounded products in one weight can be at most; all are float64 scalars.

    With slopes multiplied by c and rounded, the integers have a norm of at most c * norm + rounding, and the absolute
    values of the terms of any one of them add up to at most c * terms + rounding.

    scale: what inputs are multiplied by before they are rounded.
    """

    scale: Tensor
    norm: Tensor
    rounding: Tensor
    terms: Tensor


def rounded_inputs(inputs: Tensor, scale: Tensor) -> Tensor:
    """Integers, in float32."""
    return (inputs.float() * scale.float()).round_()


def check_arithmetic(device: torch.device | str) -> None:
    """Raises DPAlignError where products of matrices have fewer bits than their numbers: the bounds would not hold."""
    for dtype, most in ((torch.float32, 2**12), (torch.float64, 2**26)):
        odd = torch.arange(most - 127, most, 2, device=device)
        numbers = torch.zeros(64, 64, dtype=dtype, device=device)
        numbers[:, 0] = odd  # one product each: exact in the dtype's own precision, and not with a bit less
        if not torch.equal((numbers @ numbers.T).long(), odd.unsqueeze(1) * odd):
            raise DPAlignError(
                f"products of {str(dtype)[6:]} matrices are computed with fewer bits here (NVIDIA_TF32_OVERRIDE, say), "
                "and the bound on whole weights' gradients would not hold: switch that off, or train LoRA."
            )


def measure(factors: Factors) -> Measured:
    """Bounds of one unit's products; NaN or infinite if a factor is."""
    # Copies: what a kernel makes of a row may depend on where it lies in memory, and so on who shares the micro-batch.
    inputs, slopes = (part.to(torch.float32, copy=True) for part in factors)
    scale = (PRECISION * inputs.numel() ** 0.5 / torch.linalg.vector_norm(inputs).clamp(min=1e-30)).double()
    norm, lengths, steps = norm_bound(rounded_inputs(inputs, scale), slopes)
    # A slope moves by half a step at most; the rest is float64's own rounding.
    rounding = 0.5001 * slopes.shape[1] ** 0.5 * lengths.sum()
    return Measured(scale, norm, rounding, (lengths * steps).sum())


def norm_bound(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At least the norm of `g.T @ a`, whatever float32 makes of the sums that it takes; and of each row of both.

    A sum of d products in float32, in any order, is off by at most d * 2^-24 / (1 - d * 2^-24) of the sum of their
    absolute values (Higham 2002, section 3.1), and those are at most the product of two lengths.

    Args:
        a: `(positions, in)` integers. g: `(positions, out)`.
    """
    positions, width = a.shape[0], a.shape[1] + g.shape[1]
    if positions * width > a.shape[1] * g.shape[1]:  # the matrix is smaller than products of positions with each other
        lengths, steps = _lengths(a.square().sum(1), g.square().sum(1), width)
        made = (g.T @ a).double().square().sum().sqrt()
        return made * (1 + 2.0**-30) + _error(positions) * (lengths * steps).sum(), lengths, steps
    if positions * _error(width) > ROOM:
        a, g = a.double(), g.double()
    of_inputs, of_slopes = a @ a.T, g @ g.T
    lengths, steps = _lengths(of_inputs.diagonal(), of_slopes.diagonal(), width)
    error = _error(width) if a.dtype == torch.float32 else 0.0
    squared = torch.mul(of_inputs.double(), of_slopes.double()).sum()
    above = (error + 2.0**-30) * (lengths * steps).sum().square()  # the second for sums in float64
    bound = torch.where(squared.isfinite(), squared, torch.inf) + above  # two rows' product may be beyond float32
    return bound.clamp(min=0).sqrt(), lengths, steps


def _error(terms: int) -> float:
    return terms * ROUNDS / (1 - terms * ROUNDS) * (1 + ROUNDS)


def _lengths(of_inputs: Tensor, of_slopes: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """`(positions,)`: at least the lengths of inputs and slopes whose squares are given, summed in float32."""
    lengths, steps = (squares.double().sqrt() * (1 + _error(terms)) for squares in (of_inputs, of_slopes))
    return lengths, steps + SMALLEST


class ExactSum:
    """A sum of integer matrix products: in float64 as long as that is exact, and else in `whole`, int64."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self._pending: Tensor | None = None
        self._bound = 0.0  # no entry of `_pending` is above

    def add_all(self, units: list[tuple[Factors, Measured, Tensor]], bounds: list[float]) -> None:
        """Adds the rounded products of some units, each with its measure, its multiplier in steps and its bound."""
        if sum(bounds) > EXACT and len(units) > 1:
            for unit, bound in zip(units, bounds, strict=True):
                self.add_all([unit], [bound])
            return
        if not units:
            return
        ends = list(accumulate(len(factors.inputs) for factors, _, _ in units))
        out, width = self.whole.shape
        slopes = torch.empty(ends[-1], out, dtype=torch.float64, device=self.whole.device)
        inputs = torch.empty(ends[-1], width, dtype=torch.float64, device=self.whole.device)
        for (factors, m, by), end in zip(units, ends, strict=True):
            rows = slice(end - len(factors.inputs), end)
            slopes[rows].copy_(factors.slopes).mul_(by / m.scale)
            inputs[rows] = rounded_inputs(factors.inputs, m.scale)
        self.add(slopes.round_(), inputs, sum(bounds))

    def add(self, slopes: Tensor, inputs: Tensor, bound: float) -> None:
        """Adds `slopes.T @ inputs`, float64 integers, the terms of which add up to at most `bound` (at most EXACT)."""
        if self._bound + bound > EXACT:
            self.settle()
        if self._pending is None:
            self._pending = torch.zeros(self.whole.shape, dtype=torch.float64, device=self.whole.device)
        self._pending.addmm_(slopes.T, inputs)
        self._bound += bound

    def settle(self) -> None:
        """Moves everything into `whole`."""
        if self._pending is not None:
            self.whole += self._pending.to(torch.int64)
        self._pending, self._bound = None, 0.0
