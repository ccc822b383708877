"""What the loop journals and does: the same for neighbouring datasets, and never nothing."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from harness import (
    HUGE_PAIR,
    HUGE_SCORE,
    LONG_TEXT,
    WORDS,
    Interrupted,
    Trace,
    everyone,
    grpo,
    neighbours,
    nobody,
    offline,
    own_coins,
    pairs,
    ppo,
    prompts,
    reward,
    rloo,
    run_stage,
    sft,
    texts,
)

from dpalign.algorithms import PPO
from dpalign.algorithms.base import encode_units
from dpalign.privacy import accountant
from dpalign.privacy.entropy import SeededEntropy
from dpalign.privacy.gate import Sample
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.mechanism import GaussianMechanism
from dpalign.training import Stage
from tiny import dataset, tiny_policy

# 4 ---------------------------------------------------------------------------------------------------------


class NoisePerMicroBatch(GaussianMechanism):
    def add(self, grads, metrics=None):
        super().add(grads, metrics)
        for total in self._sums:
            noise = self._noise(total.numel(), self.noise_multiplier * self.max_grad_norm)
            total += torch.round(noise / self.grid).to(torch.int64).view_as(total)


class NoNoiseAfterFirstPass(Stage):
    """The later passes use a mechanism of their own making instead of the sample's."""

    def _step(self, phase, positions, sample, step):
        plan, self.plan = self.plan, replace(self.plan, passes=1)
        super()._step(phase, positions, sample, step)
        silent = replace(sample.step, mechanism=replace(sample.step.mechanism, noise_multiplier=0.0))
        for _ in range(plan.passes - 1):
            super()._step(phase, positions, Sample(silent, sample.units, sample.coins), step)
        self.plan = plan


def noise_variances(algorithm, data, **settings) -> list[float]:
    """Variance of every release's noise in units of (sigma C)^2; steps take no gradient, so sums repeat."""
    quiet = run_stage(algorithm(noise_multiplier=0.0, learning_rate=0.0), data, answers_are_fixed=False)
    noisy = run_stage(algorithm(noise_multiplier=2.0, learning_rate=0.0), data, answers_are_fixed=False, **settings)
    divisor = algorithm().config.expected_batch_size
    return [
        float((g * divisor - clean).square().mean()) / 2.0**2
        for g, clean in zip(noisy.gradients, quiet.sums, strict=True)
    ]


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_noise_once_per_release_however_many_micro_batches(micro_batch_size):
    """PRIVACY test 4: the noise is drawn once per release, in every pass, whatever the micro-batch size."""
    algorithm = partial(ppo, num_ppo_epochs=2, micro_batch_size=micro_batch_size, metrics_noise_ratio=0.0)
    data = dataset(prompts())
    assert noise_variances(algorithm, data) == pytest.approx([1, 1], abs=0.45)  # 6 standard deviations
    per_micro_batch = noise_variances(algorithm, data, mechanism=NoisePerMicroBatch)
    assert min(per_micro_batch) > 1.45
    assert noise_variances(algorithm, data, stage_class=NoNoiseAfterFirstPass)[1] == 0


def intents_missing_at_draws(ledger_class: type[Ledger], **changes) -> list[int]:
    """For every draw of a run, how many intents the ledger lacked at that moment; then the final surplus."""
    ledger, missing = ledger_class(":memory:"), []

    def draw(data, call):
        missing.append(max(0, call - len(ledger.intents())))
        return everyone(data, call)

    trace = run_stage(ppo(max_steps=4, **changes), dataset(prompts()), sampler=draw, ledger=ledger)
    return [*missing, len(trace.intents) - len(missing)]


class JournalsLate(Ledger):
    """Writes the intents of a phase when the next one begins."""

    held: tuple = ()

    def write(self, intents):
        super().write(list(self.held))
        self.held = tuple(intents)


class JournalsThePhase(Ledger):
    """One intent per rollout phase instead of one per sample."""

    def write(self, intents):
        super().write(intents[:1])


@pytest.mark.parametrize(
    "changes", [{"micro_batch_size": 2}, {"num_ppo_epochs": 3}, {"num_mini_batches": 2, "num_ppo_epochs": 2}]
)
def test_one_intent_per_sample_before_its_draw(changes):
    """PRIVACY test 4: one intent per sample, on disk before the draw, whatever the micro-batches and passes."""
    assert intents_missing_at_draws(Ledger, **changes) == [0, 0, 0, 0, 0]
    assert any(intents_missing_at_draws(JournalsLate, **changes))


def test_one_intent_per_phase_is_found():
    """PRIVACY test 4, mutant: minibatches of one phase share an intent."""
    assert intents_missing_at_draws(JournalsThePhase, num_mini_batches=2) == [0, 1, 1, 2, -2]


# 10 --------------------------------------------------------------------------------------------------------


class SkipsEmpty(Stage):
    def _step(self, phase, positions, sample, step):
        return super()._step(phase, positions, sample, step) if positions else None


def noisy_steps(algorithm, data, **settings) -> tuple[int, int, int]:
    """Of three steps: optimizer steps with full noise, intents, log lines."""
    trace = run_stage(algorithm, data, answers_are_fixed=False, completions_are_fixed=False, **settings)
    divisor = algorithm.config.expected_batch_size
    noisy = [g for g in trace.gradients if abs((g * divisor).square().mean() - 1) < 0.5]
    return len(noisy), len(trace.intents), len(trace.log)


EMPTY = {"noise_multiplier": 1.0, "max_steps": 3}
TIES = [[{"id": str(i), "chosen": "w1", "rejected": "w2", "preference": 0.5}] for i in range(8)]
NO_PROMPT = [[{"id": str(i), "text": "w1"}] for i in range(8)]


@pytest.mark.parametrize(
    ("algorithm", "data", "sampler"),
    [
        (partial(sft, **EMPTY), texts(), nobody),
        (partial(ppo, max_prompt_length=4, **EMPTY), prompts(), nobody),
        (partial(ppo, num_mini_batches=3, num_ppo_epochs=1, **EMPTY), prompts(), nobody),
        (partial(ppo, prompt_min_tokens=3, prompt_max_tokens=3, max_prompt_length=4, **EMPTY), NO_PROMPT, everyone),
        (partial(rloo, max_prompt_length=4, **EMPTY), prompts(), nobody),
        (partial(rloo, prompt_min_tokens=3, prompt_max_tokens=3, max_prompt_length=4, **EMPTY), NO_PROMPT, everyone),
        (partial(grpo, max_prompt_length=4, num_mini_batches=3, **EMPTY), prompts(), nobody),
        (partial(offline, max_prompt_length=4, **EMPTY), prompts(), nobody),
        (partial(offline, **WORDS, **EMPTY), prompts(), nobody),
        (partial(offline, prompt_min_tokens=3, prompt_max_tokens=3, max_prompt_length=4, **EMPTY), NO_PROMPT, everyone),
        (partial(reward, **EMPTY), pairs(), nobody),
        (partial(reward, ties="skip", **EMPTY), TIES, everyone),
    ],
)
def test_an_empty_sample_takes_its_noisy_step(algorithm, data, sampler):
    """PRIVACY test 10: a step without units, or whose units have no rows, is noised, journaled and logged."""
    assert noisy_steps(algorithm(), dataset(data), sampler=sampler) == (3, 3, 3)


def test_the_empty_sample_test_kills():
    """PRIVACY test 10, mutant: an empty sample is skipped."""
    assert noisy_steps(sft(**EMPTY), dataset(texts()), sampler=nobody, stage_class=SkipsEmpty)[0] == 0


# 23 --------------------------------------------------------------------------------------------------------


class StopsEarly(Stage):
    """Drops the second pass where the raw mean score is extreme."""

    def _step(self, phase, positions, sample, step):
        self.plan = replace(self.plan, passes=1 if phase.tensors["scores"].abs().mean() > 1e3 else 2)
        return super()._step(phase, positions, sample, step)


class SkipsNotFinite(Stage):
    def _step(self, phase, positions, sample, step):
        return super()._step(phase, positions, sample, step) if phase.tensors["scores"].isfinite().all() else None


class StopsNotFinite(Stage):
    def _step(self, phase, positions, sample, step):
        if not phase.tensors["scores"].isfinite().all():
            raise Interrupted
        return super()._step(phase, positions, sample, step)


def control_flow(trace: Trace) -> tuple:
    """All that an observer sees of a run with fixed answers, but for its time: intents, steps, log, files."""
    intents = [asdict(i) | {"fingerprint": ""} for i in trace.intents]
    log = trace.log
    return intents, len(trace.gradients), log, trace.files


def flows_differ(algorithm, units: list, outlier: list, **settings) -> bool:
    one, other = (run_stage(algorithm(), data, **settings) for data in neighbours(units, outlier))
    assert len(one.log) == len(one.intents) == algorithm().config.max_steps or "stage_class" in settings
    return control_flow(one) != control_flow(other)


NOISED = {"noise_multiplier": 1.0, "max_steps": 2}
BAD_SCORE = [{"id": "x2", "prompt": "w7 w8", "score": float("nan")}]
ONLY_X = [{"id": "x", "prompt": "w1", "score": 1.0}]
NOT_A_SCORE = [{"id": "x2", "prompt": "w7 w8", "score": "many"}]
CUTS = {"prompt_min_tokens": 3, "prompt_max_tokens": 3}


@pytest.mark.parametrize(
    ("algorithm", "units", "outlier", "settings"),
    [
        (partial(sft, **NOISED), texts(), LONG_TEXT, {}),
        (partial(sft, max_length=5, **NOISED), texts(), LONG_TEXT, {"sampler": own_coins}),
        (partial(ppo, num_ppo_epochs=2, **NOISED), prompts(), HUGE_SCORE, {}),
        (partial(ppo, num_mini_batches=2, **NOISED), prompts(), HUGE_SCORE, {"sampler": own_coins}),
        (partial(ppo, num_ppo_epochs=2, **NOISED), prompts(), BAD_SCORE, {}),
        (partial(ppo, noised_baseline=True, adaptive_kl_target=1.0, **NOISED), prompts(), NOT_A_SCORE, {}),
        (partial(rloo, **NOISED), prompts(), BAD_SCORE, {}),
        (partial(offline, **NOISED), prompts(), BAD_SCORE, {}),
        (partial(offline, method="weighted", **NOISED), prompts(), HUGE_SCORE, {"sampler": own_coins}),
        (partial(rloo, adaptive_kl_target=1.0, **NOISED), prompts(), NOT_A_SCORE, {"sampler": own_coins}),
        (partial(grpo, num_iterations=2, **NOISED), prompts(), BAD_SCORE, {}),
        (partial(reward, **NOISED), pairs(), HUGE_PAIR, {"sampler": own_coins}),
        (partial(reward, ties="skip", **NOISED), pairs(), [TIES[0][0] | {"id": "x"}], {}),
        (partial(ppo, **CUTS, **NOISED), NO_PROMPT, [{"id": "x", "text": "w1 w2 w3 w4", "score": 1.0}], {}),
    ],
)
def test_control_flow_is_equal_on_neighbours(algorithm, units, outlier, settings):
    """PRIVACY test 23: same ledger rows, optimizer steps, log lines and files with and without x."""
    assert not flows_differ(algorithm, units, outlier, **settings)


def only_x(data, call):
    return [i for i, unit in enumerate(data.ids) if unit == b"x"]


@pytest.mark.parametrize(
    ("units", "outlier", "settings"),
    [
        (prompts(), HUGE_SCORE, {"stage_class": StopsEarly}),
        (prompts(), BAD_SCORE, {"stage_class": SkipsNotFinite}),
        (prompts(), BAD_SCORE, {"stage_class": StopsNotFinite}),
        (prompts(), ONLY_X, {"stage_class": SkipsEmpty, "sampler": only_x}),
    ],
)
def test_the_control_flow_test_kills(units, outlier, settings):
    """PRIVACY test 23, mutants: early stop on raw metrics, a skipped or failed step, a skipped empty batch."""
    assert flows_differ(partial(ppo, num_ppo_epochs=2, **NOISED), units, outlier, **settings)


def test_a_float64_run_is_float64():
    """The sensitivity tests measure what they claim to: sums in float64, of every trainable weight."""
    trace = run_stage(ppo(), dataset(prompts()))
    assert trace.sums[0].dtype == torch.float64
    assert len(trace.sums[0]) == 2 * (2 * 32 + 96 * 2) + 33  # A and B of two c_attn layers, and the value head


# Rollout coins ---------------------------------------------------------------------------------------------


class ForgetsItsCoins(PPO):
    """Samples with torch's generator, whose seed anyone may know."""

    def rows(self, policy, units, coins):
        return super().rows(policy, units, None)


def draws_follow_a_known_seed(algorithm: type[PPO]) -> bool:
    """Whether two runs with equal seeds of torch's generator sample equal completions."""
    seen = []

    class Watched(algorithm):
        def rows(self, policy, units, coins):
            torch.manual_seed(0)
            seen.append(super().rows(policy, units, coins).tensors["input_ids"])
            raise Interrupted

    for _ in range(2):
        run_stage(ppo(Watched), dataset(prompts()), dtype=torch.float32, completions_are_fixed=False)
    return torch.equal(*seen)


def test_rollouts_are_drawn_with_the_secret_coins_of_the_sample():
    """A known rollout seed would let the batch tell who is in it; the coins come with the sample, as an argument."""
    assert not draws_follow_a_known_seed(PPO)
    assert draws_follow_a_known_seed(ForgetsItsCoins)


class OneStream(PPO):
    """Rows take turns at the coins of one unit."""

    def rows(self, policy, units, coins):
        return super().rows(policy, units, coins[:1] * len(coins))


def completions_depend_on_company(algorithm: type[PPO]) -> bool:
    """Whether unit 5's completion, under a known seed, is another one when another unit comes before it."""
    policy, stage = tiny_policy("gpt2"), ppo(algorithm, micro_batch_size=8)
    stage.setup(policy)
    units = encode_units(stage, policy, prompts(8))
    seen = []
    for drawn in ([5], [2, 5]):
        coins = [SeededEntropy(0, "step").of_unit(unit) for unit in drawn]
        seen.append(stage.rows(policy, [units[unit] for unit in drawn], coins).tensors["input_ids"][-1])
    return not torch.equal(*seen)


def test_a_unit_has_its_own_coins():
    """So what it does is the same whoever else is drawn, and in whichever process it is."""
    assert not completions_depend_on_company(PPO)
    assert completions_depend_on_company(OneStream)


def test_what_was_learned_without_data_is_learned_once(tmp_path):
    """A run that ends in its first step, with nothing released yet, has kept what it found before."""
    found = []

    class Warmed(type(sft())):  # type: ignore[misc]
        name = "sft"

        def warm_up(self, model):
            found.append(1)
            return 1

    def crashing(data, call):
        raise Interrupted

    ledger = Ledger(":memory:")
    for sampler in (crashing, everyone):
        algorithm = Warmed(sft().config)
        with suppress(Interrupted):
            run_stage(algorithm, dataset(texts()), sampler=sampler, folder=tmp_path, ledger=ledger)
    assert found == [1]


def test_epsilon_is_told_of_every_step_of_a_short_stage(tmp_path):
    """Each report has what was drawn until then, never less; of more than a hundred steps some say what is ahead."""
    told, ledger = [], Ledger(":memory:")
    algorithm = sft(max_steps=4, noise_multiplier=2.0)
    data = dataset(texts())
    Stage(tiny_policy("gpt2"), algorithm, data, folder=tmp_path, run="run", ledger=ledger, report=told.append).train()
    drawn = [intent.mechanism for intent in ledger.intents(run="run")]
    expected = [accountant.epsilon(drawn[: step + 1], 1e-5, quick=True) for step in range(4)]
    assert [report.epsilon for report in told] == pytest.approx(expected, rel=1e-3) and len(set(expected)) == 4


def test_one_lost_draw_is_paid_for_by_the_steps_that_are_left(tmp_path):
    """A crash after the second draw, whose step no checkpoint has: with it the stage draws five times, and stays below."""
    ledger, told = Ledger(":memory:"), []

    def crash(report):
        if report.step == 2:
            raise Interrupted

    for report in (crash, told.append):
        algorithm = sft(noise_multiplier=None, target_epsilon=2.0, target_delta=1e-5, max_steps=4, save_steps=1)
        with suppress(Interrupted):
            Stage(
                tiny_policy("gpt2"), algorithm, dataset(texts()), folder=tmp_path, run="run", ledger=ledger, report=report
            ).train()
    drawn = ledger.intents(run="run")
    assert [intent.step for intent in drawn] == [0, 1, 1, 2, 3] and [report.step for report in told] == [2, 3, 4]
    assert drawn[-1].noise_multiplier > drawn[0].noise_multiplier
    assert 1.9 < accountant.epsilon([intent.mechanism for intent in drawn], 1e-5) <= 2.0


def test_a_steps_metrics_are_those_of_its_first_pass(tmp_path):
    """Later passes release gradients alone: what is told of the step is what the first one has released."""
    told, algorithm = [], ppo(max_steps=2, num_ppo_epochs=3, noise_multiplier=2.0)
    Stage(
        tiny_policy("gpt2"), algorithm, dataset(prompts()), folder=tmp_path, run="run", ledger=Ledger(":memory:"),
        report=told.append,
    ).train()  # fmt: skip
    assert [sorted(report.metrics or ()) for report in told] == 2 * [sorted(metric.name for metric in algorithm.metrics)]
