"""What an attacker can find out at most, against closed forms, and where it is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from dpalign.privacy import accountant
from dpalign.privacy.accountant import FALSE_POSITIVES, SampledGaussian, true_positives
from dpalign.privacy.parts import Part, Spending, attack_success
from dpalign.privacy.statement import StageStatement, attack_success_of
from dpalign.reporting.numbers import attacks
from helpers import call, write_recipe

RATES = (*FALSE_POSITIVES, 0.5, 0.9)
UNSAMPLED = [(1.0, 2.0, 1), (1.0, 1.0, 1), (1.0, 6.0, 4), (1.0, 10.0, 900)]  # rate, sigma, steps
SAMPLED = [(0.25, 1.0, 1), (0.5, 0.4, 1)]


def of_a_gaussian(sigma: float, steps: int, rate: float) -> float:
    """Of N(sqrt(steps) / sigma, 1) against N(0, 1), by Neyman and Pearson."""
    return float(norm.cdf(norm.ppf(rate) + steps**0.5 / sigma))


def of_a_sample(q: float, sigma: float, rate: float) -> float:
    """One sampled release, whichever hypothesis is called positive: the larger of the two, by Neyman and Pearson."""
    in_found = (1 - q) * rate + q * norm.cdf(norm.ppf(rate) + 1 / sigma)  # large outputs say that it took part

    def below(x: float) -> float:
        return float((1 - q) * norm.cdf(x / sigma) + q * norm.cdf((x - 1) / sigma))

    out_found = norm.cdf(brentq(lambda x: below(x) - rate, -50, 50) / sigma)  # small ones that it did not
    return float(max(in_found, out_found))


def excess(found: Callable[..., tuple[float, ...]]) -> list[float]:
    """By how much the bounds are above what the best test reaches, over all cases and rates."""
    above = []
    for q, sigma, steps in UNSAMPLED:
        reached = [of_a_gaussian(sigma, steps, rate) for rate in RATES]
        above += np.subtract(found([SampledGaussian(q, sigma, steps)], RATES), reached).tolist()
    for q, sigma, _ in SAMPLED:
        reached = [of_a_sample(q, sigma, rate) for rate in RATES]
        above += np.subtract(found([SampledGaussian(q, sigma, 1)], RATES), reached).tolist()
    return above


def test_it_is_what_the_best_test_reaches_and_never_less():
    """Unsampled releases are as tight as the grid; a sampled one is bounded for both hypotheses at once."""
    above = excess(true_positives)
    assert min(above) >= 0
    assert max(above[: len(UNSAMPLED) * len(RATES)]) < 2e-3
    for q, sigma, _ in SAMPLED:
        assert true_positives([SampledGaussian(q, sigma, 1)])[0] == pytest.approx(of_a_sample(q, sigma, 0.001), rel=5e-3)


def without_delta(loss: Any) -> Any:
    return SimpleNamespace(get_delta_for_epsilon=np.zeros_like)


def added_only(loss: Any) -> Any:
    return SimpleNamespace(get_delta_for_epsilon=loss._pmf_add.get_delta_for_epsilon)


def half_of_delta(loss: Any) -> Any:
    return SimpleNamespace(get_delta_for_epsilon=lambda epsilons: loss.get_delta_for_epsilon(epsilons) / 2)


@pytest.mark.parametrize("mutant", [without_delta, added_only, half_of_delta])
def test_it_kills(mutant, monkeypatch):
    """Removing alone would be no mutant: of a sampled Gaussian it is the larger direction at every epsilon."""
    composed = accountant._composed
    monkeypatch.setattr(accountant, "_composed", lambda *given: mutant(composed(*given)))
    monkeypatch.setattr(accountant, "_true_positives", accountant._true_positives.__wrapped__)
    assert min(excess(true_positives)) < -1e-4


def test_nothing_drawn_tells_nothing_and_no_noise_tells_all():
    assert true_positives([]) == true_positives([SampledGaussian(0.5, 1.0, 0)]) == FALSE_POSITIVES
    assert true_positives([SampledGaussian(0.5, 1.0, 3), SampledGaussian(0.5, 0.0, 1)]) == (1.0, 1.0, 1.0)
    assert all(attacks(none) == "" for none in ([], [{"false_positives": 0.01, "true_positives": 1.0}]))


def shares(*spendings: Spending) -> list[float]:
    return [at["true_positives"] for at in attack_success(spendings)]


def test_the_unit_that_is_easiest_to_tell_counts_at_each_rate():
    """Disjoint parts: the larger at every rate, from whichever stage; shared units: both together."""
    often, once = SampledGaussian(0.02, 0.7, 300), SampledGaussian(1.0, 1.35, 1)
    low, high, both = Part("d", "key", 0.0, 0.5), Part("d", "key", 0.5, 1.0), Part("d", "key")
    alone = [true_positives([often]), true_positives([once])]
    assert shares(Spending(low, often), Spending(high, once)) == [max(pair) for pair in zip(*alone, strict=True)]
    together = list(true_positives([often, once]))
    assert shares(Spending(both, often), Spending(high, once)) == together
    assert shares(Spending(low, often), Spending(Part("d", "other", 0.5, 1.0), once)) == together
    assert all(t > max(pair) for t, *pair in zip(together, *alone, strict=True))
    assert {at["false_positives"] for at in attack_success([])} == set(FALSE_POSITIVES)


def test_a_known_seed_bounds_nothing():
    stage = StageStatement("s", "d", (0.0, 1.0), "key", "record", 100, 1.0, 1.0, [SampledGaussian(1.0, 2.0, 1)], True)
    known = StageStatement(**stage.__dict__ | {"private": False})
    assert [at["true_positives"] for at in attack_success_of([stage])] == list(true_positives(stage.mechanisms))
    assert [at["true_positives"] for at in attack_success_of([stage, known])] == [1.0, 1.0, 1.0]


# Where it is said --------------------------------------------------------------------------------------------------


def test_it_is_rounded_up():
    said = attacks([{"false_positives": r, "true_positives": t} for r, t in ((0.001, 0.019301), (0.01, 0.1), (0.05, 0.3))])
    assert "wrong about 0.1% of" in said and "at most 1.94% of" in said and "(at 1% 10.00%, at 5% 30.00%)" in said


def test_statement_card_summary_report_terminal_and_plan_say_the_same(tmp_path, capsys):
    recipe = write_recipe(tmp_path, sft={"max_steps": 1}, ppo=None)
    planned = call(capsys, "plan", recipe, "--no_data", "--data.declared_units", 64, "--json").json
    ran = call(capsys, "run", recipe)
    release, run = tmp_path / "run" / "release", tmp_path / "run"
    stated = json.loads((release / "privacy.json").read_text())
    mechanisms = [SampledGaussian(**m | {"metrics_noise_multiplier": float(m["metrics_noise_multiplier"])})
                  for stage in stated["stages"] for m in stage["mechanisms"]]  # fmt: skip
    assert [at["true_positives"] for at in stated["attack_success"]] == list(true_positives(mechanisms))
    assert stated["ledger"][0]["attack_success_of_all_private_runs"] == stated["attack_success"]
    assert json.loads((run / "summary.json").read_text())["attack_success"] == stated["attack_success"]
    assert planned["attack_success"] == stated["attack_success"]
    sentence = attacks(stated["attack_success"])
    assert 0.001 < stated["attack_success"][0]["true_positives"] < 0.2 and sentence
    places = [ran.out, (release / "README.md").read_text(), (run / "report.html").read_text()]
    places.append(call(capsys, "ledger", "--ledger", tmp_path / "ledger.sqlite").out)
    places.append(call(capsys, "plan", recipe, "--no_data", "--data.declared_units", 64).out)
    assert [sentence in " ".join(place.split()) for place in places] == [True] * 5
