"""One noisy measurement on held-out units: bounded, journaled first, made once, with the stated noise."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from harness import TOLERANCE, completions_of_prompts, neighbours, prompts
from scipy import stats
from torch import Tensor

from dpalign.algorithms import SamplingConfig
from dpalign.data import UnitDataset
from dpalign.errors import DPAlignError
from dpalign.evaluation.private import MeasurementConfig, measure_privately
from dpalign.models import AdapterConfig, Policy
from dpalign.privacy.accountant import epsilon
from dpalign.privacy.entropy import SystemEntropy
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.mechanism import GaussianMechanism
from dpalign.rewards import Reward, RewardConfig
from dpalign.training import plan_stage
from tiny import dataset, tiny_policy, words

HELD_OUT = prompts()
LOW, HIGH = -1.0, 3.0


class NeverInRange(Reward):
    """Declares a range and does not keep to it."""

    def __call__(self, prompts, completions, columns=None):
        return torch.tensor([float(s) for s in columns["score"]])


def config(**changes) -> SamplingConfig:
    settings = {"max_prompt_length": 8, "max_completion_length": 6, "micro_batch_size": 5}
    return SamplingConfig(**settings | {"reward": RewardConfig(columns=["score"])} | changes)


@cache
def policy() -> Policy:
    """With an adapter that does something."""
    model = tiny_policy("gpt2")
    model.add_adapter("ppo", AdapterConfig(r=2))
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model


def measure(
    data: UnitDataset, folder: Path, *, ledger: Ledger | None = None, sigma: float = 2.0, reward: Reward | None = None,
    mechanism: type[GaussianMechanism] = GaussianMechanism, settings: SamplingConfig | None = None,
) -> tuple[dict[str, Any] | None, Tensor]:  # fmt: skip
    """The result, and the metrics block's sum before the noise."""
    sums = []

    class Recorder(mechanism):  # type: ignore[misc, valid-type]
        def release(self):
            sums.append(self._metrics_sum.double() * self.metrics_grid)
            return super().release()

    plan = plan_stage("measurement", MeasurementConfig(noise_multiplier=sigma), data.declared_units)
    reward = reward or Reward(lambda prompts, completions, score: score, LOW, HIGH)
    with (
        patch("dpalign.privacy.gate.GaussianMechanism", Recorder),
        patch("dpalign.evaluation.private.sample", completions_of_prompts),
    ):
        result = measure_privately(
            policy(), data, plan, reward, settings or config(), folder=folder, run="run",
            ledger=ledger or Ledger(":memory:"),
        )  # fmt: skip
    return result, sums[-1] if sums else torch.zeros(3)


class MetricsNotClipped(GaussianMechanism):
    def _scaled(self, values: Tensor) -> Tensor:
        half = torch.tensor([(m.high - m.low) / 2 for m in self.metrics], dtype=torch.float64)
        return values.double() / half / len(self.metrics) ** 0.5


class RangesNotJoined(GaussianMechanism):
    """Every metric within 1 by itself: a unit moves three of them by the square root of 3."""

    def _scaled(self, values: Tensor) -> Tensor:
        return super()._scaled(values) * len(self.metrics) ** 0.5


def sensitivity(outlier: list, folder: Path, **settings) -> float:
    """What one unit moves the block by."""
    one, other = (measure(d, folder / str(i), **settings)[1] for i, d in enumerate(neighbours(HELD_OUT, outlier)))
    return float((one - other).norm())


def person(*scores: Any) -> list:
    return [{"id": "x", "prompt": f"w7 w8 w{i}", "score": s} for i, s in enumerate(scores)]


@pytest.mark.parametrize(
    ("outlier", "reward"),
    [
        (person(1e6), NeverInRange(lambda *_: [], LOW, HIGH)),
        (person(-1e6), None),
        (person(3.0, 3.0, 3.0, 1e9), None),
        (person(float("inf")), None),
        (person("many", 3.0), None),
    ],
)
def test_one_unit_moves_the_measurement_by_at_most_one(outlier, reward, tmp_path):
    """PRIVACY test 1 for the held-out measurement, with a reward that keeps to its range and one that does not."""
    assert sensitivity(outlier, tmp_path, reward=reward) <= TOLERANCE


def test_the_measurement_test_kills(tmp_path):
    """Mutants: an unclipped reward; three metrics that are each bounded by 1."""
    liar = NeverInRange(lambda *_: [], LOW, HIGH)
    assert sensitivity(person(1e6), tmp_path / "a", reward=liar) > 0.5
    assert sensitivity(person(1e6), tmp_path / "b", reward=liar, mechanism=MetricsNotClipped) > TOLERANCE
    assert sensitivity(person(1e6), tmp_path / "c", mechanism=RangesNotJoined) > TOLERANCE


def test_a_batch_mate_or_the_micro_batch_changes_nobody(tmp_path):
    """PRIVACY tests 2 and 3: every unit is measured by itself."""
    sums = [measure(dataset(HELD_OUT), tmp_path / str(m), settings=config(micro_batch_size=m))[1] for m in (1, 3, 20)]
    assert max(float((s - sums[0]).norm()) for s in sums) < 1e-6 < float(sums[0].norm())


class Watching(list):
    """Units that note how many intents there are whenever one is read."""

    def __init__(self, units: list, ledger: Ledger) -> None:
        super().__init__(units)
        self.ledger, self.seen = ledger, []

    def __getitem__(self, place):
        self.seen.append(len(self.ledger.intents()))
        return super().__getitem__(place)

    def __iter__(self):
        self.seen.append(len(self.ledger.intents()))
        return super().__iter__()


class JournalsLate(Ledger):
    """Keeps what it is given for later."""

    def write(self, intents):
        pass


@pytest.mark.parametrize(("ledger_class", "in_order"), [(Ledger, True), (JournalsLate, False)])
def test_the_intent_is_on_disk_before_a_record_is_read(ledger_class, in_order, tmp_path):
    ledger = ledger_class(":memory:")
    units = Watching(HELD_OUT, ledger)
    measure(replace(dataset(HELD_OUT), units=units), tmp_path, ledger=ledger)
    assert len(units.seen) >= len(HELD_OUT) and (min(units.seen) == 1) == in_order


def test_the_intent_says_what_is_spent(tmp_path):
    ledger = Ledger(":memory:")
    result, _ = measure(dataset(HELD_OUT, declared=20), tmp_path, ledger=ledger)
    (intent,) = ledger.intents()
    assert intent.stage == "measurement" and intent.private and intent.units == result["units"] == 20
    assert intent.sampling_rate == 1 and intent.noise_multiplier == 2.0 and math.isinf(intent.metrics_noise_multiplier)
    assert result["epsilon"] == pytest.approx(epsilon([intent.mechanism], 1e-5))
    # A Gaussian of deviation 2 on sensitivity 1, by its exact formula (Balle and Wang 2018, theorem 8).
    eps, a = result["epsilon"], 1 / 4
    delta = stats.norm.cdf(a - eps * 2) - math.exp(eps) * stats.norm.cdf(-a - eps * 2)
    assert delta == pytest.approx(1e-5, rel=0.02)


def test_a_finished_measurement_is_read_back_and_a_lost_one_stays_lost(tmp_path, monkeypatch):
    ledger = Ledger(":memory:")
    first, _ = measure(dataset(HELD_OUT), tmp_path / "a", ledger=ledger)
    again, _ = measure(dataset(HELD_OUT), tmp_path / "a", ledger=ledger)
    assert again == first and len(ledger.intents()) == 1
    for text in (
        "[]",
        "{",
        "{}",
        json.dumps(first | {"win_rate": "high"}),
        json.dumps(first | {"noise_standard_deviation": 1}),
    ):
        (tmp_path / "a" / "result.json").write_text(text)
        with pytest.raises(DPAlignError, match=r"result\.json is damaged"):
            measure(dataset(HELD_OUT), tmp_path / "a", ledger=ledger)

    def dies(*arguments):
        raise KeyboardInterrupt

    ledger, calls = Ledger(":memory:"), []
    with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
        dying.setattr("dpalign.evaluation.private._contained", dies)
        measure(dataset(HELD_OUT), tmp_path / "b", ledger=ledger)
    counting = Reward(lambda prompts, completions, score: calls.append(1) or score, LOW, HIGH)
    assert measure(dataset(HELD_OUT), tmp_path / "b", ledger=ledger, reward=counting)[0] is None
    assert len(ledger.intents()) == 1 and not calls


def test_other_held_out_data_is_refused(tmp_path):
    ledger = Ledger(":memory:")
    first, _ = measure(dataset(HELD_OUT), tmp_path, ledger=ledger)
    with pytest.raises(DPAlignError, match="held-out data, the model or the settings have changed"):
        measure(replace(dataset(HELD_OUT), fingerprint="other"), tmp_path, ledger=ledger)
    assert len(ledger.intents()) == 1 and measure(dataset(HELD_OUT), tmp_path, ledger=ledger)[0] == first


class TwoThirds(SystemEntropy):
    def normals(self, count: int) -> np.ndarray:
        return super().normals(count) * 2 / 3


def noise_p_value(entropy: type[SystemEntropy], folder: Path) -> float:
    """Chi-square of 60 measurements of units without rows, by the deviation that they state themselves."""
    empty = dataset([[{"id": str(i), "text": "w1"}] for i in range(4)], declared=10)
    settings = config(prompt_min_tokens=3, prompt_max_tokens=3)
    middle = {"reward": 1.0, "reward_reference": 1.0, "win_rate": 0.5}
    values = []
    with patch("dpalign.privacy.gate.SystemEntropy", entropy):
        for i in range(60):
            result, _ = measure(empty, folder / str(i), settings=settings)
            values += [(result[m] - middle[m]) / result["noise_standard_deviation"][m] for m in middle]
    chi = stats.chi2.cdf(sum(v**2 for v in values), len(values))
    return 2 * min(chi, 1 - chi)


def test_the_noise_is_what_the_result_states(tmp_path):
    """PRIVACY test 5 for the measurement; fails by chance once in a million runs."""
    assert noise_p_value(SystemEntropy, tmp_path / "right") > 1e-6
    assert noise_p_value(TwoThirds, tmp_path / "wrong") < 1e-6


def test_without_noise_it_is_the_exact_mean(tmp_path):
    """A unit is the mean of its records; the policy and its reference get the same fixed completions here."""
    units = [[{"id": "a", "prompt": "w1 w2", "score": 1.0}, {"id": "a", "prompt": "w3", "score": 2.0}],
             [{"id": "b", "prompt": "w4", "score": 9.0}]]  # fmt: skip
    result, _ = measure(dataset(units), tmp_path, sigma=0.0)
    assert result["reward"] == result["reward_reference"] == pytest.approx((1.5 + HIGH) / 2)
    assert result["win_rate"] == pytest.approx(0.5) and math.isinf(result["epsilon"])


def test_a_plan_needs_one_of_epsilon_and_noise():
    assert plan_stage("measurement", MeasurementConfig(target_epsilon=1.0), 100).epsilon <= 1
    for given in ({}, {"target_epsilon": 1.0, "noise_multiplier": 1.0}):
        with pytest.raises(DPAlignError, match="exactly one"):
            plan_stage("measurement", MeasurementConfig(**given), 100)


def test_the_texts_are_not_kept(tmp_path):
    measure(dataset([[{"id": "a", "prompt": f"w1 {words(3, 5)}", "score": 1.0}]]), tmp_path)
    kept = "".join(f.read_text() for f in tmp_path.rglob("*") if f.is_file())
    assert "reward" in kept and words(3, 5) not in kept
