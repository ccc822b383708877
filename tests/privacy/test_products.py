"""Sums of products for whole weights: integers, of which one unit moves the sum by at most C, whatever it holds."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpalign.errors import DPAlignError
from dpalign.privacy import products
from dpalign.privacy.entropy import SeededEntropy, SystemEntropy
from dpalign.privacy.mechanism import FINER, GRID, GaussianMechanism, MetricRange
from dpalign.privacy.products import EXACT, ExactSum, Factors, Products, measure, rounded_inputs

SHAPES = [torch.Size((5, 7)), torch.Size((3,)), torch.Size((4, 64))]  # the last one is cheaper by positions


def mechanism(C: float = 1.0, sigma: float = 0.0, clipping: str = "flat", gamma: float = 0.0) -> GaussianMechanism:
    return GaussianMechanism(
        SHAPES,
        max_grad_norm=C,
        noise_multiplier=sigma,
        divisor=1.0,
        entropy=SystemEntropy(),
        clipping=clipping,
        gamma=gamma,
        products=True,
    )


def some_units(units: int, seed: int = 0, scale: float = 1.0, uses: int = 2, positions: int = 6) -> list:
    """Gradients of some units in all of SHAPES, the second dense."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def weight(shape: torch.Size) -> Products:
        each = lambda: Factors(normal(positions, shape[1]), scale * normal(positions, shape[0]))  # noqa: E731
        return Products(shape, [[each() for _ in range(uses)] for _ in range(units)])

    return [weight(SHAPES[0]), scale * normal(units, 3), weight(SHAPES[2])]


def dense(grads: list) -> Tensor:
    """`(units, all numbers)` float64."""
    return torch.cat([(g.dense() if isinstance(g, Products) else g.double()).flatten(1) for g in grads], 1)


def some(grads: list, units: slice) -> list:
    return [g[units] for g in grads]


def sums(held: GaussianMechanism) -> list[int]:
    """Python's own integers."""
    held._settle()
    return [value for total in held._sums for value in total.flatten().tolist()]


def steps_of(held: GaussianMechanism) -> int:
    """C in steps of the sums."""
    return int(held.max_grad_norm / held.grid * 2**held._finer)


def test_the_sum_is_that_of_clipped_gradients():
    grads = some_units(9)
    for clipping, gamma in (("flat", 0.0), ("automatic", 0.01)):
        held = mechanism(2.0, clipping=clipping, gamma=gamma)
        held.add(grads)
        found = torch.cat([g.flatten() for g in held.release()[0]]).double()
        flat = dense(grads)
        norms = flat.norm(dim=1, keepdim=True)
        expected = (flat * (2 / (norms + gamma))).sum(0)  # all of them are longer than 2
        assert float((found - expected).norm()) < 2e-3 * float(expected.norm())


def test_small_gradients_are_summed_as_they_are():
    grads = some_units(4, scale=1e-3)
    held = mechanism(50.0)
    held.add(grads)
    found, expected = torch.cat([g.flatten() for g in held.release()[0]]).double(), dense(grads).sum(0)
    assert float((found - expected).norm()) < 2e-3 * float(expected.norm())


# One unit's integers ------------------------------------------------------------------------------------------------


@st.composite
def strange_units(draw: st.DrawFn) -> list:
    """One unit: positions that cancel, outliers, very different lengths, zeros, nearly nothing, nearly everything."""
    seed, positions = draw(st.integers(0, 2**31)), draw(st.sampled_from([1, 2, 3, 40]))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in SHAPES:
        if len(shape) == 1:
            found.append(torch.randn(1, 3, generator=generator) * 10.0 ** draw(st.integers(-20, 20)))
            continue
        inputs = torch.randn(positions, shape[1], generator=generator) * 10.0 ** draw(st.integers(-15, 15))
        slopes = torch.randn(positions, shape[0], generator=generator) * 10.0 ** draw(st.integers(-15, 15))
        kind = draw(st.sampled_from(["plain", "cancels", "nearly cancels", "outlier", "spread", "sparse", "ones"]))
        if kind in ("cancels", "nearly cancels") and positions > 1:
            inputs[1] = inputs[0]
            slopes[1:] = 0
            slopes[1] = -slopes[0] * (1 if kind == "cancels" else 1 + 1e-6)
        elif kind == "outlier":
            inputs[:, 0] *= 1e6
        elif kind == "spread":
            slopes *= 10.0 ** torch.randint(-18, 18, (positions, 1), generator=generator)
        elif kind == "sparse":
            inputs *= torch.rand(inputs.shape, generator=generator) < 0.05
            slopes *= torch.rand(slopes.shape, generator=generator) < 0.2
        elif kind == "ones":
            inputs, slopes = torch.sign(inputs), torch.sign(slopes).abs() * 10.0 ** draw(st.integers(-10, 10))
        found.append(Products(shape, [[Factors(inputs, slopes)]]))
    return found


def norm_in_steps(held: GaussianMechanism) -> tuple[int, int]:
    """The square of the norm of the sum, and that of C; Python's own integers."""
    return sum(value * value for value in sums(held)), steps_of(held) ** 2


@settings(max_examples=300, deadline=None)
@given(
    strange_units(),
    st.sampled_from([1e-3, 1.0, 123.4]),
    st.sampled_from([0.0, 0.3, 1.0, 20.0]),
    st.sampled_from([("flat", 0.0), ("automatic", 0.0), ("automatic", 0.01)]),
)
def test_the_integers_of_one_unit_have_a_norm_of_at_most_C(grads, C, sigma, clipping):
    held = mechanism(C, sigma, *clipping)
    held.add(grads)
    squared, most = norm_in_steps(held)
    assert squared <= most


@settings(max_examples=200, deadline=None)
@given(strange_units())
def test_the_bounds_hold_for_every_unit_and_multiplier(grads):
    """The norm of the integers, entry by entry as Python sums them, against what `measure` says of them."""
    for grad in grads:
        if not isinstance(grad, Products):
            continue
        factors = grad.units[0][0]
        m = measure(factors)
        for times in (1.0, 100.0, 2.0**20, 2.0**30):
            c = times * (0.5 + 0.5 / 3)
            inputs, slopes = (
                [[int(value) for value in row] for row in rounded.tolist()]
                for rounded in (rounded_inputs(factors.inputs, m.scale), (factors.slopes.double() * c).round())
            )
            total = 0
            for column in range(grad.shape[1]):
                for row in range(grad.shape[0]):
                    terms = [s[row] * a[column] for s, a in zip(slopes, inputs, strict=True)]
                    total += sum(terms) ** 2
                    assert sum(map(abs, terms)) <= (c * float(m.terms) + float(m.rounding)) * (1 + 1e-9)
            assert math.sqrt(total) <= (c * float(m.norm) + float(m.rounding)) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("width", "positions"),
    [*product([(8, 4000), (300, 300)], [2, 30, 600]), ((3000, 3000), 500)],  # the last one needs float64
)
def test_a_bound_is_near_what_it_bounds(width, positions):
    """By products of positions in float32 and float64, and by the matrix itself: no unit loses more than 1.5%."""
    generator = torch.Generator().manual_seed(3)
    out, inputs = width
    a = (300 * torch.randn(positions, inputs, generator=generator)).round()
    g = torch.randn(positions, out, generator=generator)
    bound = products.norm_bound(a, g)[0]
    exact = (g.double().T @ a.double()).norm()
    assert 1 <= float(bound / exact) < 1.015


@pytest.mark.parametrize("positions", [20, 600])
def test_the_bound_of_float32s_own_rounding_is_needed(monkeypatch, positions):
    """Positions that nearly cancel: without it the norm would be taken for a smaller one."""

    def short() -> int:
        found = 0
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            a = (300 * torch.randn(positions // 2, 64, generator=generator)).round().repeat_interleave(2, 0)
            g = torch.randn(positions, 64, generator=generator)
            g[1::2] = -g[::2] * (1 + 1e-5)
            bound = products.norm_bound(a, g)[0]
            found += bool(bound < (g.double().T @ a.double()).norm())
        return found

    assert not short()
    monkeypatch.setattr(products, "_error", lambda terms: 0.0)
    assert short()


def test_what_rounding_the_slopes_adds_is_needed():
    """Many positions whose inputs agree: their roundings add up, and a multiplier that ignores them is above C."""
    factors = Factors(torch.ones(400, 64), torch.ones(400, 4))
    m, c = measure(factors), 0.6  # of a step, which is rounded to 1
    slopes = (factors.slopes.double() * c).round()
    norm = float((slopes.T @ rounded_inputs(factors.inputs, m.scale).double()).norm())
    assert 1.5 * c * float(m.norm) < norm <= c * float(m.norm) + float(m.rounding)


# Who else is there --------------------------------------------------------------------------------------------------


def test_the_sum_does_not_depend_on_company_or_order():
    grads, whole = some_units(7), mechanism(sigma=1.0)
    whole.add(grads)
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 4, 0, 1, 5, 3]):
        one_by_one = mechanism(sigma=1.0)
        for unit in order:
            one_by_one.add(some(grads, slice(unit, unit + 1)))
        assert sums(one_by_one) == sums(whole)
    parts = mechanism(sigma=1.0)
    for start, end in pairwise([0, 1, 4, 7]):
        parts.add(some(grads, slice(start, end)))
    assert sums(parts) == sums(whole)


def test_one_more_unit_moves_the_sum_by_its_own_integers():
    grads, without, alone, all_of_them = some_units(5), mechanism(sigma=1.0), mechanism(sigma=1.0), mechanism(sigma=1.0)
    without.add(some(grads, slice(0, 4)))
    alone.add(some(grads, slice(4, 5)))
    all_of_them.add(grads)
    moved = [a - b for a, b in zip(sums(all_of_them), sums(without), strict=True)]
    assert moved == sums(alone) and any(moved)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["inputs", "slopes", "dense"])
def test_a_unit_that_is_not_finite_adds_zero_and_changes_nobody(broken, where):
    grads, expected = some_units(3), mechanism()
    expected.add([g[slice(0, 3, 2)] for g in grads])
    if where == "dense":
        grads[1][1, 0] = broken
    else:
        getattr(grads[0].units[1][0], where)[0, 0] = broken
    held = mechanism()
    held.add(grads)
    assert sums(held) == sums(expected)
    for clipping in ("none",):
        unclipped = mechanism(clipping=clipping)
        unclipped.add(grads)
        found = torch.cat([g.flatten() for g in unclipped.release()[0]])
        assert torch.allclose(found.double(), dense([g[slice(0, 3, 2)] for g in grads]).sum(0), atol=1e-4)


def test_units_without_a_use_add_what_else_they_have():
    grads = some_units(2)
    grads[0].units[0], grads[2].units[0] = [], []
    held = mechanism()
    held.add(some(grads, slice(0, 1)))
    found = held.release()[0]
    assert not found[0].any() and not found[2].any() and 0.99 < float(found[1].norm()) <= 1


# Sums and releases --------------------------------------------------------------------------------------------------


def test_a_sum_beyond_what_float64_holds_goes_on_in_integers():
    exact = ExactSum(torch.zeros(1, 1, dtype=torch.int64))
    large = 2.0**51 - 1
    one = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(9):
        exact.add(large * one, one, large)
    exact.settle()
    assert int(exact.whole) == 9 * (2**51 - 1) and 9 * large > EXACT


def test_units_that_are_too_much_together_are_added_one_by_one(monkeypatch):
    grads, expected = some_units(5), mechanism()
    expected.add(grads)
    monkeypatch.setattr(products, "EXACT", 2.0**42)  # about what one of them may be
    held, calls = mechanism(), []
    add = ExactSum.add
    monkeypatch.setattr(ExactSum, "add", lambda self, *given: (calls.append(1), add(self, *given))[1])
    held.add(grads)
    assert sums(held) == sums(expected) and len(calls) == 10


def test_a_unit_that_float64_could_not_hold_adds_zero(monkeypatch):
    monkeypatch.setattr("dpalign.privacy.mechanism.EXACT", 1.0)
    held = mechanism()
    held.add(some_units(2))
    assert not any(sums(held))


def test_releases_lie_on_the_coarse_grid_and_carry_the_noise_once():
    held = GaussianMechanism(
        [torch.Size((200, 200))],
        max_grad_norm=2.0,
        noise_multiplier=3.0,
        divisor=1.0,
        entropy=SeededEntropy(5, "products"),
        metrics=(MetricRange("loss", 0, 1),),
        metrics_noise_multiplier=1.0,
        products=True,
        dtype=torch.float64,
    )
    assert held._finer == FINER and held.grid == 4 * GRID
    (found,), _ = held.release()
    steps = found / held.grid
    assert torch.equal(steps, steps.round())
    assert abs(float(found.std()) / 6 - 1) < 0.02 and abs(float(found.mean())) < 6 * 4 / 200
    (again,), _ = held.release()
    assert not torch.equal(found, again)


def test_the_fine_bits_of_a_sum_are_not_released():
    """Two sums that differ by less than a step of the grid are the same to whoever sees a release, or one step apart."""
    found = []
    for extra in (0, 1, 2**FINER - 1):
        held = mechanism(sigma=1.0)
        held._entropy = SeededEntropy(7, "fine")
        held._sums[0][0, 0] = 1000 * 2**FINER + extra
        found.append(float(held.release()[0][0][0, 0] / held.grid))
    assert found == [round(v) for v in found] and found[2] - found[0] in (0, 1) and found[1] - found[0] in (0, 1)


def test_without_noise_all_bits_are_kept():
    held = mechanism(sigma=0.0)
    assert held._finer == 0
    held.add(some_units(1))
    assert sums(held)[0] % 2**10 or sums(held)[1] % 2**10


def test_a_multiplier_leaves_room_for_what_rounding_adds(monkeypatch):
    """On a grid so coarse that slopes are half a step: without that room the unit would be above C."""
    monkeypatch.setattr("dpalign.privacy.mechanism.FINER", 0)
    unit = Factors(torch.ones(400, 64), torch.ones(400, 4))
    above = 0
    for sigma in (0.25, 0.5, 1.0):
        held = held_total(unit, torch.Size((4, 64)), noise_multiplier=sigma, clipping="flat")
        most = 1 / held.grid
        assert sum(int(v) ** 2 for v in held._sums[0].flatten().tolist()) <= most**2
        m = measure(unit)
        slopes = (unit.slopes.double() * (most / float(m.norm))).round()
        above += float((slopes.T @ rounded_inputs(unit.inputs, m.scale).double()).norm()) > most
    assert above


# What an independent reader found -----------------------------------------------------------------------------------


def held_total(factors: Factors | None, shape: torch.Size, **changes) -> GaussianMechanism:
    found = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "divisor": 1.0, "entropy": SystemEntropy(), "products": True}
    held = GaussianMechanism([shape, torch.Size((3,))], **found | changes)
    held.add([Products(shape, [[] if factors is None else [factors]]), torch.zeros(1, 3)])
    held._settle()
    return held


@pytest.mark.parametrize("factors", [None, Factors(torch.zeros(2, 7), torch.ones(2, 5)), Factors(torch.ones(2, 7), torch.zeros(2, 5))])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_a_gradient_of_zero_adds_zero_without_a_stability_constant(factors, clipping):
    """Places of a micro-batch without a unit, too: one times infinity would be the smallest integer there is."""
    held = held_total(factors, torch.Size((5, 7)), clipping=clipping, gamma=0.0)
    assert not any(total.any() for total in held._sums)


def test_two_rows_whose_product_is_beyond_float32_are_not_taken_for_nothing():
    """Opposite slopes, each just short enough to be squared; tiny inputs keep everything else small."""
    largest, generator = torch.finfo(torch.float32).max, torch.Generator().manual_seed(0)
    inputs = torch.zeros(2, 64)
    inputs[:, 0], inputs[1, 1] = 6e-19, 6e-19
    overflown = 0
    for _ in range(2000):
        v = torch.randn(64, generator=generator, dtype=torch.float64)
        w = -v * (1 + 1e-4 * torch.randn(64, generator=generator, dtype=torch.float64))
        room = 1 - 6e-7 * float(torch.rand((), generator=generator))
        slopes = torch.stack([x / x.norm() * largest**0.5 * room for x in (v, w)]).float()
        gram = slopes @ slopes.T
        if not gram.diagonal().isfinite().all() or gram.isfinite().all():
            continue
        overflown += 1
        held = held_total(Factors(inputs, slopes), torch.Size((64, 64)), clipping="automatic", gamma=0.01)
        assert not any(total.any() for total in held._sums)
    assert overflown


@pytest.mark.parametrize("shape", [(7, 64, 257), (9, 128, 33), (5, 64, 30), (3, 64, 50), (6, 31, 17)])
def test_where_a_unit_lies_in_memory_moves_no_integer(shape):
    """Rows of a micro-batch begin at addresses of all kinds."""
    positions, width, out = shape
    generator = torch.Generator().manual_seed(0)
    inputs, slopes = (torch.randn(1, positions, size, generator=generator).repeat(8, 1, 1) for size in (width, out))
    found = [held_total(Factors(inputs[row], slopes[row]), torch.Size((out, width)))._sums[0] for row in range(8)]
    assert all(torch.equal(total, found[0]) for total in found)


def test_the_smallest_noise_leaves_room_in_the_sum():
    """64 units that agree, at a noise multiplier of a millionth: the sum is theirs, and not what is left of it modulo 2^64."""
    unit = Factors(torch.ones(1, 7), torch.ones(1, 5) * 100)
    held = held_total(None, torch.Size((5, 7)), noise_multiplier=1e-6)
    for _ in range(64):
        held.add([Products(torch.Size((5, 7)), [[unit]]), torch.zeros(1, 3)])
    assert 0.99 * 64 < float(held.release()[0][0].norm()) < 1.01 * 64
    assert held_total(None, torch.Size((5, 7)), noise_multiplier=0.3)._finer == FINER


def test_autocast_around_it_changes_nothing():
    grads, plain, inside = some_units(3), mechanism(), mechanism()
    plain.add(grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside.add(grads)
    assert sums(plain) == sums(inside)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_products_of_fewer_bits_are_refused(kind, monkeypatch):
    """As a variable of the environment makes them on some GPUs."""
    real = Tensor.__matmul__

    def coarse(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype != kind:
            return real(a, b)
        bits = 11 if kind == torch.float32 else 25
        mantissa, exponent = torch.frexp(a)
        a = torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)
        return real(a, b)

    mechanism()
    monkeypatch.setattr(Tensor, "__matmul__", coarse)
    with pytest.raises(DPAlignError, match=rf"products of {str(kind)[6:]} matrices are computed with fewer bits"):
        mechanism()
