"""One private step is one value: what is journaled is what is drawn and what is added."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from dpalign.errors import DPAlignError
from dpalign.privacy.accountant import SampledGaussian
from dpalign.privacy.gate import Gate, PrivateStep
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.mechanism import GaussianMechanism, MetricRange
from dpalign.privacy.parts import Part

SHAPES = [torch.Size([300, 20])]
METRICS = (MetricRange("reward", -1.0, 1.0),)
STEP = PrivateStep(SampledGaussian(0.3, 1.7, 1, 2, 5.0), max_grad_norm=0.4, divisor=3.0, metrics=METRICS)


def gate(ledger: Ledger, **changes) -> Gate:
    settings = {"count": 40, "unit": "record", "declared_units": 50.0, "fingerprint": "f", "config_hash": "c"}
    return Gate(ledger, Part("d", "s", 0.0, 0.5), run="run", stage="sft", **settings | changes)


def deviation(mechanism: GaussianMechanism) -> float:
    """Of the noise on the sum, measured."""
    (noise,), _ = mechanism.release()
    return float(noise.std()) * mechanism.divisor


@pytest.mark.parametrize("sigma", [0.9, 1.7, 3.1])
def test_the_row_and_the_noise_are_of_one_value(sigma):
    """A unit pays in the ledger for the noise that the released sum has, at the rate at which units were drawn."""
    ledger = Ledger(":memory:")
    step = replace(STEP, mechanism=replace(STEP.mechanism, noise_multiplier=sigma))
    samples = gate(ledger).draw([step] * 50, first=3, attempt=1)
    rows = ledger.intents()
    assert [r.mechanism for r in rows] == [step.mechanism] * 50 and {r.max_grad_norm for r in rows} == {0.4}
    assert [(r.step, r.attempt) for r in rows] == [(n, 1) for n in range(3, 53)]
    assert {(r.dataset, r.split, r.low, r.high, r.units) for r in rows} == {("d", "s", 0.0, 0.5, 50.0)}
    for _ in range(2):
        assert deviation(samples[0].mechanism(SHAPES)) == pytest.approx(rows[0].noise_multiplier * 0.4, rel=0.06)
    sizes = [len(s.units) for s in samples]
    assert np.mean(sizes) == pytest.approx(0.3 * 40, abs=6 * (40 * 0.3 * 0.7 / 50) ** 0.5)


def test_metrics_are_released_with_the_first_pass_alone_at_their_journaled_noise():
    ledger = Ledger(":memory:")
    (sample,) = gate(ledger).draw([STEP], first=0, attempt=0)
    first, second = sample.mechanism(SHAPES), sample.mechanism(SHAPES)
    assert first.metrics_noise_multiplier == ledger.intents()[0].metrics_noise_multiplier == 5.0
    assert first.metrics == METRICS and second.metrics == () and second.release()[1] is None


def test_one_release_more_than_was_journaled_is_refused():
    (sample,) = gate(Ledger(":memory:")).draw([STEP], first=0, attempt=0)
    sample.mechanism(SHAPES), sample.mechanism(SHAPES)
    with pytest.raises(DPAlignError, match=r"journaled for 2 release\(s\)"):
        sample.mechanism(SHAPES)
    with pytest.raises(DPAlignError, match="journaled for 2"):
        sample.measurement()


def test_a_measurement_has_the_noise_that_was_journaled_and_is_the_only_release():
    ledger = Ledger(":memory:")
    step = replace(STEP, mechanism=SampledGaussian(1.0, 2.5, 1))
    (sample,) = gate(ledger).draw([step], first=0, attempt=0)
    assert sample.units == list(range(40))
    assert sample.measurement().metrics_noise_multiplier == ledger.intents()[0].noise_multiplier == 2.5
    with pytest.raises(DPAlignError):
        sample.measurement()
    (sample,) = gate(ledger).draw([STEP], first=1, attempt=0)
    with pytest.raises(DPAlignError, match="only release"):
        sample.measurement()


def test_a_step_cannot_be_changed_after_it_was_journaled():
    """What a mutant "journals one sigma, adds another" would have to do."""
    (sample,) = gate(Ledger(":memory:")).draw([STEP], first=0, attempt=0)
    with pytest.raises(FrozenInstanceError):
        sample.step.max_grad_norm = 9.0
    with pytest.raises(FrozenInstanceError):
        sample.step.mechanism.noise_multiplier = 0.1
    with pytest.raises(DPAlignError, match="one sample, not 2"):
        replace(STEP, mechanism=replace(STEP.mechanism, steps=2))


def rows_at_draws(gate_class: type[Gate]) -> list[int]:
    """How many rows the ledger had at each of three draws of one call."""
    ledger, seen = Ledger(":memory:"), []

    def draw(units, rate, entropy):
        seen.append(len(ledger.intents()))
        return np.arange(0)

    made = gate(ledger)
    made.__class__ = gate_class
    with patch("dpalign.privacy.gate.poisson_sample", draw):
        made.draw([STEP] * 3, first=0, attempt=0)
    return seen


class OneByOne(Gate):
    """Journals each step right before its own draw: the others of a phase are still missing."""

    def draw(self, steps, first, attempt):
        return [s for i, step in enumerate(steps) for s in super(OneByOne, self).draw([step], first + i, attempt)]


def test_all_steps_are_on_disk_before_the_first_is_drawn():
    assert rows_at_draws(Gate) == [3, 3, 3]
    assert rows_at_draws(OneByOne) == [1, 2, 3]


def test_nothing_is_drawn_if_the_ledger_cannot_be_written(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    made, drawn = gate(ledger), []
    ledger._db.execute("PRAGMA query_only = 1")
    with (
        patch("dpalign.privacy.gate.poisson_sample", lambda *a: drawn.append(a)),
        pytest.raises(DPAlignError, match="the next step was not started"),
    ):
        made.draw([STEP], first=0, attempt=0)
    assert not drawn


def test_a_known_seed_is_journaled_as_not_private():
    ledger = Ledger(":memory:")
    draws = [gate(ledger, insecure_seed=5).draw([STEP], first=i, attempt=0)[0].units for i in (0, 1)]
    assert draws[0] != draws[1] and not any(row.private for row in ledger.intents())
    assert gate(Ledger(":memory:"), insecure_seed=5).draw([STEP], first=0, attempt=0)[0].units == draws[0]
