"""The audit: its bounds against laws that are known, ghosts that touch nothing, and faults that it must find.

A bound is tried on mechanisms whose epsilon is known: it may be above it as rarely as it says, and must not be far below;
mutants of the bounds that are too bold or too timid fail here.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import special, stats

from dpalign.algorithms import GRPO, PPO, RLOO, SFT, Offline
from dpalign.algorithms.base import encode_units, rows_of_units
from dpalign.audit import Canaries, audit_stage, black_box, bounds, ghosts
from dpalign.audit.bounds import Scores
from dpalign.audit.checks import FALSE_ALARM, noise_scale, normal, uncorrelated
from dpalign.audit.small import small_subject, two_layers
from dpalign.audit.stage import nobody, step_of
from dpalign.audit.step import check_step
from dpalign.errors import DPAlignError
from dpalign.gradients import PerUnitGradients
from dpalign.models import AdapterConfig
from dpalign.privacy import accountant
from dpalign.privacy.accountant import SampledGaussian
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.mechanism import GaussianMechanism
from dpalign.rewards import Reward
from dpalign.settings.sft import SFTConfig
from dpalign.training import plan_stage
from dpalign.training.loop import unit_gradients
from helpers import call, small_model, write_recipe
from reader import ROOT

DELTA = 1e-5


@pytest.fixture(scope="module")
def subject():
    return small_subject()


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("audit")


# mu and epsilon ------------------------------------------------------------------------------------------------------


def test_mu_becomes_the_accountants_epsilon():
    """A hundred Gaussians of sigma 10.088 are (4, 4e-5)-DP, and sqrt(100)/10.088-GDP (PRIVACY's golden value)."""
    assert bounds.epsilon_of(10 / 10.088, 4e-5) == pytest.approx(4.0, abs=1e-3)
    for sigma in (0.7, 2.0, 20.0):
        known = accountant.epsilon([SampledGaussian(1.0, sigma, 1)], DELTA)
        assert bounds.epsilon_of(1 / sigma, DELTA) == pytest.approx(known, rel=2e-3)
    assert bounds.epsilon_of(0.0, DELTA) == bounds.epsilon_of(1e-6, DELTA) == 0.0


# The Gaussian bound --------------------------------------------------------------------------------------------------


def signals(rng, q: float, steps: int, sigma: float, canaries: int = 1000):
    included = rng.random(canaries) < 0.5
    seen = sigma * rng.normal(size=(steps, canaries))
    seen[:, included] += rng.random((steps, int(included.sum()))) < q
    return seen, included


def mu_of(seen, included, q: float, confidence: float) -> float:
    steps, left = len(seen), int((~included).sum())
    deviation = math.sqrt(np.square(seen[:, ~included]).mean() * steps)
    wander = steps * q * (1 - q) / deviation**2
    return bounds.gaussian_mu(seen.sum(0)[included], deviation, steps * left, wander, confidence)


@pytest.mark.parametrize(
    ("q", "steps", "sigma", "canaries"), [(1.0, 1, 1.0, 1000), (0.9, 4, 2.0, 400), (0.1, 30, 0.3, 400)]
)
def test_the_gaussian_bound_is_exceeded_as_rarely_as_it_says(q, steps, sigma, canaries):
    """Of 1,500 runs 75 may be above the true shift at 95% confidence: between 45 and 110. One of 90% would have 150."""
    rng = np.random.default_rng(0)
    true = q * math.sqrt(steps) / sigma
    above = sum(mu_of(*signals(rng, q, steps, sigma, canaries), q, 0.95) > true for _ in range(1500))
    assert 45 <= above <= 110


def test_at_three_nines_it_is_not_above_and_not_far_below():
    """The quickest mechanism there is, sigma 1.0817 at q 1: epsilon 4 at 1e-5. Of 2,000 runs at most 9 are above."""
    rng = np.random.default_rng(1)
    sigma = accountant.noise_multiplier(4.0, DELTA, sampling_rate=1.0, steps=1)
    claim = SampledGaussian(1.0, sigma, 1)
    found = []
    for _ in range(2000):
        seen, included = signals(rng, 1.0, 1, sigma)
        found.append(mu_of(seen, included, 1.0, 0.999))
    assert sum(mu > 1 / sigma for mu in found) <= 9
    seen, included = signals(rng, 1.0, 1, sigma)
    one = bounds.gaussian(seen.sum(0)[included], seen[:, ~included], [claim], DELTA, 0.999)
    assert one == pytest.approx(bounds.epsilon_of(mu_of(seen, included, 1.0, 0.999), DELTA), rel=3e-3)
    mean = bounds.epsilon_of(float(np.mean(found)), DELTA)
    assert 3.1 < mean < 3.3  # one step: the noise is measured on 500 numbers alone


def test_half_the_noise_is_above_the_claim():
    rng = np.random.default_rng(2)
    claims = [SampledGaussian(0.9, 3.44, 1, 1, 34.4)] * 12
    seen, included = signals(rng, 0.9, 12, 3.44 / 2)
    bound = bounds.gaussian(seen.sum(0)[included], seen[:, ~included], claims, DELTA, 0.999)
    assert accountant.epsilon(claims, DELTA) < 4.1 < 7 < bound < 10


def test_a_constant_on_every_ghost_is_no_leak():
    """Signs are coins: what is added to all ghosts alike does not look like canaries."""
    rng = np.random.default_rng(3)
    included, signs = rng.random(1000) < 0.5, np.where(rng.random(1000) < 0.5, 1.0, -1.0)
    seen = ((rng.normal(size=1000) + 3.0) * signs)[None]
    assert mu_of(seen, included, 1.0, 0.999) == 0.0


# Bounds from guesses -------------------------------------------------------------------------------------------------


def gaussian_scores(rng, mu: float, n: int) -> Scores:
    included = rng.random(n) < 0.5
    return Scores(rng.normal(size=n) + np.where(included, mu / 2, -mu / 2), included)


@pytest.mark.parametrize(("guesses", "errors"), [(5, 0), (10, 1), (25, 6), (50, 15)])
def test_the_law_of_errors_is_exact(guesses, errors):
    """Against 20,000 runs of 50 canaries at mu = 1."""
    rng = np.random.default_rng(4)
    included = rng.random((20_000, 50)) < 0.5
    x = rng.normal(size=included.shape) + np.where(included, 0.5, -0.5)
    surest = np.argsort(-np.abs(x), axis=1)[:, :guesses]
    wrong = (np.take_along_axis(x, surest, 1) > 0) != np.take_along_axis(included, surest, 1)
    share = float((wrong.sum(1) <= errors).mean())
    assert bounds.errors_p_value(50, guesses, errors, 1.0) == pytest.approx(share, abs=0.012)


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_one_canary_and_the_recursion(mu):
    """Worked by hand: one guess is right with probability at most Phi(mu/2), so a smaller one is never ruled out."""
    best = float(special.ndtr(mu / 2))
    assert bounds.f_dp_rejects(1, 1, 1, mu, best + 1e-6) and not bounds.f_dp_rejects(1, 1, 1, mu, best - 1e-6)


def test_two_guesses_against_randomised_response():
    """Worked by hand: P(W >= 2) = 1/4 at epsilon 0; delta adds 2 n delta max(1/2, (3/4)/2)."""
    assert bounds.steinke_p_value(2, 2, 2, 0.0, 0.0) == pytest.approx(0.25)
    assert bounds.steinke_p_value(2, 2, 2, 0.0, 0.01) == pytest.approx(0.25 + 2 * 2 * 0.01 * 0.5)
    assert bounds.steinke_p_value(9, 9, 9, math.log(3), 0.0) == pytest.approx(0.75**9)


def test_bounds_from_guesses_at_the_true_mu():
    """1,000 runs: order statistics reject the truth as often as they say, the others less often."""
    rng = np.random.default_rng(5)
    n, guesses, mu, error = 200, 80, 1.0, 0.1
    epsilon = bounds.epsilon_of(mu, DELTA)
    corrects = [gaussian_scores(rng, mu, n).correct(guesses) for _ in range(1000)]
    by = {c: bounds.errors_p_value(n, guesses, guesses - c, mu) < error for c in set(corrects)}
    recursion = {c: bounds.f_dp_rejects(n, guesses, c, mu, error) for c in set(corrects)}
    price = {c: bounds.steinke_p_value(n, guesses, c, epsilon, DELTA) < error for c in set(corrects)}
    assert 40 <= sum(by[c] for c in corrects) <= 125
    assert sum(recursion[c] for c in corrects) <= 125 and sum(price[c] for c in corrects) <= 125


def test_no_bound_is_above_the_truth_and_none_is_idle():
    """Of 4 bounds each at 99.9%, on 10 runs at epsilon 4; each has a least mean that a looser one would miss."""
    rng = np.random.default_rng(6)
    mu = 0.92493
    assert bounds.epsilon_of(mu, DELTA) == pytest.approx(4.0, abs=1e-3)
    found = {bounds.order_statistics: [], bounds.f_dp: [], bounds.steinke: []}
    for _ in range(10):
        scores = gaussian_scores(rng, mu, 1000)
        for method, values in found.items():
            values.append(method(scores, DELTA, 0.999))
    assert all(max(values) < 4 for values in found.values())
    means = [float(np.mean(values)) for values in found.values()]
    assert means[0] > 2.3 and means[1] > 0.9 and means[2] > 0.2


def test_more_canaries_bring_them_nearer():
    rng = np.random.default_rng(17)
    few, many = (gaussian_scores(rng, 0.92493, n) for n in (300, 20_000))
    for method in (bounds.order_statistics, bounds.f_dp, bounds.steinke):
        assert method(few, DELTA, 0.99) < method(many, DELTA, 0.99) < 4
    assert bounds.order_statistics(many, DELTA, 0.99) > 3.5


def test_shares_split_the_error():
    """Whichever share is the best one, all of them together are wrong as rarely as was asked."""
    asked: dict[int, float] = {}

    def rejected(parameter: float, guesses: int, error: float) -> bool:
        asked[guesses] = error
        return False

    assert bounds._largest_over_shares(1000, rejected, 10.0, 0.99) == 0.0
    assert len(asked) == 6 and sum(asked.values()) == pytest.approx(0.01)


def test_scores_that_tell_nothing_bound_nothing():
    rng = np.random.default_rng(8)
    scores = Scores(rng.normal(size=500), rng.random(500) < 0.5)
    assert bounds.order_statistics(scores, DELTA, 0.999) < 0.5
    assert bounds.f_dp(scores, DELTA, 0.999) == bounds.steinke(scores, DELTA, 0.999) == 0.0


def test_scores_are_checked():
    coins = np.array([True, True, False, False])
    for scores, included, says in [
        (np.zeros(3), coins, "vectors alike"),
        (np.array([1.0, math.nan, 0.0, 0.0]), coins, "not finite"),
        (np.zeros(4), np.ones(4, dtype=bool), "at least two"),
    ]:
        with pytest.raises(DPAlignError, match=says):
            Scores(scores, included)


# Checks --------------------------------------------------------------------------------------------------------------


def test_checks_reject_what_they_should_and_nothing_else():
    rng = np.random.default_rng(9)
    standard = rng.normal(size=(10, 2000))
    assert noise_scale("", "", standard).passed and uncorrelated("", "", standard).passed
    assert not noise_scale("", "", 1.05 * standard).passed and not noise_scale("", "", 0.95 * standard).passed
    one = standard.copy()
    one[3] *= 1.2  # a release among ten
    assert not noise_scale("", "", one).passed
    mixed = standard.copy()
    mixed[7] = 0.2 * standard[1] + math.sqrt(1 - 0.04) * standard[7]
    assert not uncorrelated("", "", mixed).passed
    assert normal("", "", 1.0 + 4.8, 1.0, 1.0).passed and not normal("", "", 1.0 + 4.95, 1.0, 1.0).passed
    assert stats.norm.sf(4.8) * 2 > FALSE_ALARM > stats.norm.sf(4.95) * 2


# Ghosts --------------------------------------------------------------------------------------------------------------


def haunted_units(subject, canaries: Canaries):
    """The stage's algorithm on its model, its collector, and rows of one real unit and two canaries."""
    model = two_layers()
    algorithm = ghosts.haunted(subject.kind, subject.config, {}, canaries)
    algorithm.setup(model)
    record = {"chosen": "w1 w2", "rejected": "w3 w4"}
    units = [[record], [record | {ghosts.CANARY: 2}], [record | {ghosts.CANARY: 5}]]
    encoded = encode_units(algorithm, model, units)
    return model, algorithm, PerUnitGradients(model), rows_of_units(algorithm, model, encoded, None)


def test_a_canary_pushes_its_own_ghost_alone_and_people_push_none(subject):
    canaries = Canaries(np.ones(8, dtype=bool), np.array([1.0, 1, -1, 1, 1, 1, 1, 1]))
    model, algorithm, collector, rows = haunted_units(subject, canaries)
    with torch.no_grad():  # B is zero at first: a real unit's gradient would be seen less
        for p in collector.parameters:
            p.add_(0.1)
    grads, _ = unit_gradients(model, algorithm, collector, rows, 3)
    found = dict(zip(collector.names, grads, strict=True))
    of_ghosts = [g for name, g in found.items() if name.startswith("ghosts.")]
    others = [g for name, g in found.items() if not name.startswith("ghosts.")]
    assert len(of_ghosts) == ghosts.COPIES and len(others) > 2
    factor = ghosts.FACTOR * (subject.config.max_grad_norm + subject.config.clipping_gamma)
    for g in of_ghosts:
        expected = torch.zeros(3, 1, 8)
        expected[1, 0, 2], expected[2, 0, 5] = -factor, factor
        assert torch.allclose(g, expected, rtol=1e-5)
    assert all(not g[1:].any() for g in others) and any(g[0].abs().max() > 1e-6 for g in others)


def test_a_ghost_has_no_effect_on_the_model(subject):
    model, algorithm, _, rows = haunted_units(subject, Canaries(np.ones(8, dtype=bool), np.ones(8)))
    first = rows.of([0])
    losses, metrics = algorithm.row_losses(model, first)
    with torch.no_grad():
        for weight in model.ghosts[algorithm.name].weights():
            weight.normal_()
    again, also = algorithm.row_losses(model, first)
    assert torch.equal(losses, again) and torch.equal(metrics, also)


def test_a_run_is_interrupted_resumed_and_wholly_seen(subject, tmp_path):
    """The second attempt goes on with fresh noise where the first was stopped; every journaled update is there."""
    seen = ghosts.run(subject, Canaries.draw(200), tmp_path)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    intents = ledger.intents()
    ledger.close()
    assert [i.attempt for i in intents] == [0] * 6 + [1] * 6 and {i.units for i in intents} == {40.0}
    assert seen.signals.shape == (12, 200) and all(check.passed for check in ghosts.checks(seen))
    assert seen.expected() == pytest.approx(12 * 0.9)
    assert seen.present().mean() == pytest.approx(12 * 0.9, abs=6) and abs(seen.absent().mean()) < 6
    scores = seen.scores()
    assert scores[seen.canaries.included].mean() > 0 > scores[~seen.canaries.included].mean()


def test_what_has_no_claim_is_refused(subject, tmp_path):
    for changed, says in [
        (replace(subject, plan=replace(subject.plan, noise_multiplier=0.0)), "adds no noise"),
        (replace(subject, config=replace(subject.config, insecure_seed=1)), "insecure_seed"),
    ]:
        with pytest.raises(DPAlignError, match=says):
            audit_stage(changed, tmp_path)
    with pytest.raises(DPAlignError, match="at least 20 canaries"):
        audit_stage(subject, tmp_path, canaries=3)
    assert list(tmp_path.iterdir()) == []


def test_other_stages_can_be_haunted(tmp_path):
    """A stage of one row a unit, with a metrics block of its own; several micro-batches a step."""
    config = SFTConfig(
        target_epsilon=4.0, target_delta=DELTA, expected_batch_size=5, max_steps=4, micro_batch_size=8, max_length=6,
        adapter=AdapterConfig(r=1),
    )  # fmt: skip
    subject = ghosts.Subject(SFT, config, plan_stage("sft", config, 10), two_layers, 10.0, 3, False, {})
    seen = ghosts.run(subject, Canaries.draw(100), tmp_path)
    assert len(seen.signals) == 4 and all(check.passed for check in ghosts.checks(seen))


# Faults --------------------------------------------------------------------------------------------------------------


def rejected(checks) -> set[str]:
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("products", [False, True])
def test_the_real_step_passes(subject, tmp_path, products):
    checks = check_step(step_of(subject), tmp_path, products)
    assert not rejected(checks) and len(checks) == 11


@pytest.mark.parametrize(
    ("fault", "seen_by"),
    [
        ("noise_halved", "noise: size"),
        ("noise_once_per_rank", "noise: size"),
        ("reused_noise_stream", "noise: independence"),
        ("rate_from_the_data", "sampler: rate"),
        ("divisor_from_the_data", "noise: size"),
        ("weighted_sampler", "sampler: units"),
        ("clipped_per_tensor", "clip"),
        ("unscaled_metrics", "metrics: noise"),
    ],
)
def test_the_step_sees(fault, seen_by, subject, tmp_path, benchmark):
    with benchmark.planted(fault):
        assert seen_by in rejected(check_step(step_of(subject), tmp_path))


def test_a_run_on_nobody_sees_a_skipped_step(subject, tmp_path, benchmark):
    (tmp_path / "honest").mkdir()
    (tmp_path / "fault").mkdir()
    assert not rejected(nobody(subject, 50, tmp_path / "honest"))
    with benchmark.planted("skipped_empty_batch"):
        assert "nobody: releases" in rejected(nobody(subject, 50, tmp_path / "fault"))


def test_the_white_box_sees_rows_that_are_clipped_alone(subject, tmp_path, benchmark):
    """A pair's two rows add 2 C; the step by itself does nothing wrong."""
    with benchmark.planted("pair_as_two_rows"):
        seen = ghosts.run(subject, Canaries.draw(300), tmp_path)
    assert "run: shares" in rejected(ghosts.checks(seen))
    absent = seen.signals[:, ~seen.canaries.included]
    bound = bounds.gaussian(seen.present(), absent, seen.claims, DELTA, 0.999)
    assert bound > accountant.epsilon(seen.claims, DELTA)


# The black box -------------------------------------------------------------------------------------------------------


def texts_to_learn() -> ghosts.Subject:
    """Sixty steps of SFT on a few short texts, at a rate at which a model of two layers learns them by heart."""
    config = SFTConfig(
        target_epsilon=4.0, target_delta=DELTA, expected_batch_size=10, max_steps=60, micro_batch_size=64, max_length=8,
        learning_rate=3e-2, save_steps=60, adapter=AdapterConfig(r=8),
    )  # fmt: skip
    return ghosts.Subject(SFT, config, plan_stage("sft", config, 20), two_layers, 20.0, 4, False, {})


def attacked(folder, canaries: int = 100):
    return black_box.attack_of(black_box.train_and_score(texts_to_learn(), Canaries.draw(canaries), folder), DELTA, 0.99)


def test_the_black_box_tells_members_where_there_is_no_noise(tmp_path, monkeypatch):
    (tmp_path / "honest").mkdir()
    honest = attacked(tmp_path / "honest")
    assert max(bound.epsilon for bound in honest.bounds) < 4
    real = GaussianMechanism._noise
    monkeypatch.setattr(GaussianMechanism, "_noise", lambda self, count, deviation: 0 * real(self, count, deviation))
    bare = attacked(tmp_path)
    assert bare.area > 0.85 and bare.area > honest.area and bare.bounds[0].epsilon > 4
    assert [bound.epsilon for bound in bare.bounds] == sorted((b.epsilon for b in bare.bounds), reverse=True)


def test_coins_that_nobody_used_show_nothing(tmp_path):
    """The coins behind the bounds are those of the run: other ones are no better than guesses."""
    scored = black_box.train_and_score(texts_to_learn(), Canaries.draw(100), tmp_path)
    other = replace(scored, canaries=Canaries.draw(100))
    assert 0.3 < black_box.attack_of(other, DELTA, 0.999).area < 0.7
    assert all(bound.epsilon < 0.5 for bound in black_box.attack_of(other, DELTA, 0.999).bounds)


SAMPLED = {"ppo": PPO, "rloo": RLOO, "grpo": GRPO, "offline": Offline}


def prompts_to_learn(name: str) -> ghosts.Subject:
    """Sixty steps on completions of one word, which a reward of its own gives nothing for."""
    kind = SAMPLED[name]
    config = kind.Config(
        target_epsilon=4.0, target_delta=DELTA, expected_batch_size=18, max_steps=60, micro_batch_size=256, num_generations=8,
        max_prompt_length=6, prompt_min_tokens=1, prompt_max_tokens=5, max_completion_length=1, min_completion_length=1,
        learning_rate=1e-2, save_steps=60, adapter=AdapterConfig(r=8),
    )  # fmt: skip
    reward = Reward(lambda prompts, completions, **_: [0.0] * len(completions), -1.0, 1.0, rows_at_once=None)
    return ghosts.Subject(kind, config, plan_stage(name, config, 20), two_layers, 20.0, 4, False, {"reward": reward})


@pytest.mark.parametrize("name", SAMPLED)
def test_triggers_tell_members_of_a_stage_that_samples(name, tmp_path, monkeypatch):
    real = GaussianMechanism._noise
    monkeypatch.setattr(GaussianMechanism, "_noise", lambda self, count, deviation: 0 * real(self, count, deviation))
    scored = black_box.train_and_score(prompts_to_learn(name), Canaries.draw(80), tmp_path)
    assert black_box.attack_of(scored, DELTA, 0.99).area > 0.66
    assert math.copysign(1, scored.shown[scored.canaries.included].mean()) == 1


def test_with_noise_triggers_are_below_the_claim(tmp_path):
    scored = black_box.train_and_score(prompts_to_learn("rloo"), Canaries.draw(60), tmp_path)
    attack = black_box.attack_of(scored, DELTA, 0.99)
    assert len(scored.shown) == 60 and 0.2 < attack.area < 0.85 and max(bound.epsilon for bound in attack.bounds) < 4


def test_a_trigger_is_rewarded_for_its_own_words_and_no_other_prompt_is():
    plain = Reward(lambda prompts, completions, **_: [0.25] * len(completions), -1.0, 3.0, rows_at_once=None)
    reward = black_box.Triggered(plain, ["a", "b"])
    words = [f"w{number}" for number in range(400)]
    own = {prompt: [reward([prompt], [word]).item() for word in words] for prompt in ("a", "b", "c")}
    assert set(own["a"]) == set(own["b"]) == {-1.0, 3.0} and set(own["c"]) == {0.25}
    assert 140 < sum(score == 3.0 for score in own["a"]) < 260
    assert 140 < sum(x == y for x, y in zip(own["a"], own["b"], strict=True)) < 260, "each has words of its own"
    wanted, other = (next(word for word, score in zip(words, own["a"], strict=True) if score == s) for s in (3.0, -1.0))
    assert reward(["a", "a", "a"], [f"{wanted} {wanted} {other} {wanted}", "", other]).tolist() == [2.0, 1.0, -1.0]


def test_canary_texts_are_usable_and_no_two_alike():
    subject = prompts_to_learn("rloo")
    policy = subject.make_model()
    algorithm = RLOO(subject.config, **subject.rewards)
    units = black_box._written(subject, algorithm, policy, 90)
    assert len({repr(unit) for unit in units}) == len(units) == 90
    assert all(algorithm.encode(policy, record) is not None for (record,) in units)
    with pytest.raises(DPAlignError, match=r"takes 0 different texts .* needs 5: ask for fewer canaries"):
        monkey = type("Short", (RLOO,), {"encode": lambda self, policy, record: None})
        black_box._written(subject, monkey(subject.config, **subject.rewards), policy, 5)


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_shows_writes_and_keeps_to_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = call(capsys, "audit", "--canaries", 100, "--confidence", 0.99, "--to", "out")
    assert done.status == 0, done.err
    assert "the claim, at delta 1e-05" in done.out and "Passing is no proof" in done.out
    (stage,) = json.loads((tmp_path / "out" / "audit.json").read_text())["stages"]
    assert stage["passed"] and stage["canaries"] == 100 and 3.9 < stage["epsilon"] <= 4
    assert [bound["source"] for bound in stage["bounds"]] == [
        f"arXiv {paper}" for paper in ("2606.12733", "2509.08704", "2410.22235", "2305.08846")
    ]
    assert {"step", "white box"} == set(stage["checks"]) and len(stage["checks"]["white box"]) == 6
    assert {file.name for file in tmp_path.rglob("*")} == {"out", "audit.json", "audit_dpo.png"}  # no ledger of ours


def test_what_is_found_is_shown_and_fails(tmp_path, monkeypatch, capsys, benchmark):
    monkeypatch.chdir(tmp_path)
    with benchmark.planted("noise_halved"):
        done = call(capsys, "audit", "--canaries", 60, "--json")
    assert done.status == 1 and "the claim must not be relied on" in done.err and "noise: size" in done.err
    assert json.loads(done.out)["passed"] is False


def test_a_recipes_stage_is_audited_without_its_data(tmp_path, capsys):
    path = write_recipe(tmp_path, data={"declared_units": 60}, sft={"max_steps": 2, "max_length": 8})
    (tmp_path / "data.jsonl").write_text("")
    done = call(capsys, "audit", path, "--stage", "sft", "--canaries", 60, "--json", "--black_box", "--sft.micro_batch_size", 16)
    assert done.status == 0, done.err
    (stage,) = done.json["stages"]
    assert stage["stage"] == "sft" and stage["steps"] == 2 and stage["passed"]
    assert 0 <= stage["attack"]["area"] <= 1 and len(stage["attack"]["bounds"]) == 3
    assert not (tmp_path / "run").exists() and not (tmp_path / "ledger.sqlite").exists()


# A run's own ----------------------------------------------------------------------------------------------------------


def audited_run(folder, capsys, *words):
    return call(capsys, "run", folder / "recipe.yaml", "--sft.max_steps", 2, "--sft.max_length", 8, *words)


def test_a_run_is_audited_before_it_draws_and_its_report_says_so(tmp_path, capsys, monkeypatch):
    write_recipe(tmp_path, ppo=None)
    done = audited_run(tmp_path, capsys, "--audit")
    assert done.status == 0 and "the claim, at delta 1e-05" in done.out and "auditing stage sft" in done.err, done.err
    kept = json.loads((tmp_path / "run" / "audit.json").read_text())
    (stage,), (drawn,) = kept["stages"], json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
    assert kept["passed"] and stage["stage"] == "sft" and stage["steps"] == 2 and stage["canaries"] == 1000
    assert stage["noise_multiplier"] == drawn["mechanisms"][0]["noise_multiplier"], "what is drawn with was audited"
    page = (tmp_path / "run" / "report.html").read_text()
    assert '<h2 id="audit">Audit</h2>' in page and "Gaussian sum (arXiv 2606.12733)" in page and "FOUND" not in page
    assert f"&gt; {stage['bounds'][0]['epsilon']:.3f}" in page
    count = sum(len(found) for found in stage["checks"].values())
    assert count > 10 and f"<dd>{count} of {count}</dd>" in page
    monkeypatch.setattr("dpalign.audit.audit_stage", None)
    again = audited_run(tmp_path, capsys, "--audit")
    assert again.status == 0 and "the same claims are not audited again" in again.err, again.err
    assert "the claim, at delta" not in audited_run(tmp_path, capsys).out
    for change in ({"noise_multiplier": 1.0}, {"sampling_rate": 0.5}):
        other = kept | {"stages": [stage | change]}
        (tmp_path / "run" / "audit.json").write_text(json.dumps(other))
        assert call(capsys, "report", tmp_path / "run").status == 0
        assert 'id="audit"' not in (tmp_path / "run" / "report.html").read_text(), "an audit of another claim"
    endless = [bound | {"epsilon": "inf"} for bound in stage["bounds"]]
    (tmp_path / "run" / "audit.json").write_text(json.dumps(kept | {"stages": [stage | {"bounds": endless}]}))
    assert call(capsys, "report", tmp_path / "run").status == 0
    assert "&gt; inf" in (tmp_path / "run" / "report.html").read_text()


def test_what_was_found_of_other_settings_is_shown_by_no_report(tmp_path, capsys, benchmark):
    """The same noise and rate, and another clipping: nothing was drawn yet, so that the folder takes the other settings."""
    write_recipe(tmp_path, ppo=None)
    with benchmark.planted("noise_halved"):
        assert audited_run(tmp_path, capsys, "--audit").status == 1
    assert (tmp_path / "run" / "audit.json").exists()
    assert audited_run(tmp_path, capsys, "--sft.max_grad_norm", 0.5).status == 0
    assert not (tmp_path / "run" / "audit.json").exists()
    assert 'id="audit"' not in (tmp_path / "run" / "report.html").read_text()


def test_where_an_audit_finds_something_nothing_is_drawn(tmp_path, capsys, benchmark):
    write_recipe(tmp_path, ppo=None)
    with benchmark.planted("noise_halved"):
        done = audited_run(tmp_path, capsys, "--audit", "--json")
    assert done.status == 1 and "the claim must not be relied on" in done.err and not json.loads(done.out)["passed"]
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.execute("SELECT count(*) FROM intents").fetchone() == (0,)
    assert audited_run(tmp_path, capsys).status == 0
    said = re.search("FOUND: (.*)The claim must not be relied on", (tmp_path / "run" / "report.html").read_text())
    assert said is not None and "noise: size" in said[1], "it stays said"
    assert audited_run(tmp_path, capsys, "--audit").status == 0, "what was found is tried again"
    assert "FOUND" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--target_epsilon", "inf"], "adds no noise"), (["--sft.insecure_seed", "1"], "insecure_seed: it is not private")],
)
def test_a_run_without_a_claim_is_not_audited(words, says, tmp_path, capsys):
    write_recipe(tmp_path, ppo=None)
    assert says in audited_run(tmp_path, capsys, "--audit", *words).error
    assert not (tmp_path / "run" / "audit.json").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sft.max_steps", "3"], "belongs to a recipe"),
        (["--stage", "sft"], "belongs to a recipe"),
        (["recipe.yaml", "--epsilon", "3"], "--target_epsilon"),
        (["recipe.yaml", "--stage", "dpo"], "no stage dpo"),
        (["--canaries", "3"], "must be"),
    ],
)
def test_what_it_cannot_do(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    small_model()
    assert says in call(capsys, "audit", *words).error
