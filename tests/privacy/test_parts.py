"""The composition rule is written once, and agrees with the four spellings that it replaced."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpalign.privacy.accountant import SampledGaussian, epsilon
from dpalign.privacy.parts import Part, Spending, epsilon_of, met

DELTA = 1e-5
EDGES = [0.0, 0.25, 0.4, 0.5, 0.75, 1.0]
ranges = st.lists(st.sampled_from(EDGES), min_size=2, max_size=2, unique=True).map(sorted)
parts = st.builds(lambda d, i, r: Part(d, i, *r), st.sampled_from("de"), st.sampled_from(["s", "s", "t"]), ranges)
mechanisms = st.builds(
    SampledGaussian, st.sampled_from([0.1, 1.0]), st.sampled_from([1.0, 2.0]), st.sampled_from([1, 3])
)
spendings = st.lists(st.builds(Spending, parts, mechanisms), max_size=6)


# As they stood in ledger.py, budget.py, planning.py and statement.py before there was one rule -------------------


def composed_epsilon_of_before(found: list[Spending]) -> float:
    if len({s.part.identity for s in found}) > 1:
        found = [replace(s, part=replace(s.part, low=0.0, high=1.0)) for s in found]
    starts = sorted({s.part.low for s in found})
    sets = [[s.mechanism for s in found if s.part.low <= start < s.part.high] for start in starts]
    return max((epsilon(m, DELTA, quick=True) for m in sets), default=0.0)


def worst_over_datasets_of_before(found: list[Spending]) -> float:
    names = {s.part.dataset for s in found}
    return max((composed_epsilon_of_before([s for s in found if s.part.dataset == n]) for n in names), default=0.0)


def beside_of_before(part: Part, others: list[Spending]) -> set[tuple[SampledGaussian, ...]]:
    others = [s for s in others if s.part.dataset == part.dataset]
    whole = [replace(s, part=replace(s.part, low=0.0, high=1.0)) for s in others]
    others = [w if s.part.identity != part.identity else s for s, w in zip(others, whole, strict=True)]
    starts = sorted({part.low, *(s.part.low for s in others if part.low <= s.part.low < part.high)})
    return {tuple(s.mechanism for s in others if s.part.low <= start < s.part.high) for start in starts}


def overlap_of_before(a: Part, b: Part) -> bool:
    return a.dataset == b.dataset and (a.identity != b.identity or max(a.low, b.low) < min(a.high, b.high))


@settings(max_examples=150, deadline=None)
@given(spendings)
def test_epsilon_is_that_of_before(found):
    assert epsilon_of(found, DELTA, quick=True) == pytest.approx(worst_over_datasets_of_before(found), rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(parts, spendings)
def test_what_a_unit_meets_is_what_it_met_before(part, found):
    assert met(found, part) == beside_of_before(part, found)


@settings(max_examples=200, deadline=None)
@given(parts, parts)
def test_parts_overlap_as_before(a, b):
    assert a.overlaps(b) == overlap_of_before(a, b) == b.overlaps(a)


# The rule against units that are looked at one by one ------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(spendings)
def test_no_unit_pays_more_than_is_said(found):
    """A unit has one hash under each identity; wherever they lie, what contains it is within the bound."""
    said = epsilon_of(found, DELTA, quick=True)
    places = [0.1, 0.3, 0.45, 0.6, 0.9]
    for dataset in "de":
        for s in places:
            for t in places:
                hashes = {"s": s, "t": t}
                paid = [
                    x.mechanism
                    for x in found
                    if x.part.dataset == dataset and x.part.low <= hashes[x.part.identity] < x.part.high
                ]
                assert epsilon(paid, DELTA, quick=True) <= said * (1 + 1e-9)


def believed_apart(found: list[Spending]) -> float:
    """Mutant: ranges are compared across identities."""
    return epsilon_of([replace(s, part=replace(s.part, identity="")) for s in found], DELTA)


def test_worked_by_hand():
    one = SampledGaussian(1.0, 2.0, 1)
    left, right = Spending(Part("d", "s", 0.0, 0.5), one), Spending(Part("d", "s", 0.5, 1.0), one)
    once, twice = epsilon([one], DELTA), epsilon([one, one], DELTA)
    assert epsilon_of([left, right], DELTA) == once < twice  # nobody is in both
    other = replace(right, part=replace(right.part, identity="t"))
    assert epsilon_of([left, other], DELTA) == twice > believed_apart([left, other])  # who knows
    assert epsilon_of([left, replace(right, part=replace(right.part, dataset="e"))], DELTA) == once
    assert epsilon_of([], DELTA) == 0
    assert met([left, right], Part("d", "s", 0.25, 0.75)) == {(one,)}
    assert met([left], Part("d", "s")) == {(one,)}  # who is not in it pays less
    assert met([right], Part("d", "s")) == {(), (one,)} and met([left], Part("e")) == {()}
