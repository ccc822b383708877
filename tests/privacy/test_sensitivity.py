"""Adding or removing one unit moves every release by at most C, whatever the unit holds."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import (
    HUGE_PAIR,
    HUGE_SCORE,
    LONG_TEXT,
    TOLERANCE,
    WORDS,
    dpo,
    everyone,
    grpo,
    moved,
    neighbours,
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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpalign.algorithms import DPO, GRPO, PPO, RLOO, SFT, Algorithm, Offline, RewardModelling
from dpalign.algorithms.base import Rows, unit_means
from dpalign.algorithms.rollouts import rollouts_of
from dpalign.data import DataConfig, build_units
from dpalign.errors import DPAlignError
from dpalign.privacy.entropy import SeededEntropy, SystemEntropy
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.mechanism import GRID, GaussianMechanism, towards_zero
from dpalign.training import Stage
from dpalign.training.loop import unit_gradients
from tiny import dataset, words

Algorithms = Callable[[], Algorithm]
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
float_attack = importlib.import_module("float_attack")
FloatMechanism = float_attack.FloatMechanism


# Broken on purpose -----------------------------------------------------------------------------------------


class WhitenedAdvantages(PPO):
    def advantages(self, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, scores: Tensor, mask: Tensor):
        advantages, returns = super().advantages(logprobs, ref_logprobs, values, scores, mask)
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8), returns


def with_scores(rows: Rows, scores: Tensor) -> Rows:
    return Rows(rows.unit, rows.tensors | {"scores": scores})


class WhitenedRewards(PPO):
    def rows(self, policy, units, coins):
        rows = super().rows(policy, units, coins)
        scores = rows.tensors["scores"]
        return with_scores(rows, (scores - scores.mean()) / (scores.std() + 1e-8))


class RunningRewardScale(PPO):
    seen = 0.0

    def rows(self, policy, units, coins):
        rows = super().rows(policy, units, coins)
        self.seen += float(rows.tensors["scores"].square().sum())
        return with_scores(rows, rows.tensors["scores"] / self.seen**0.5)


class BatchTokenMean(SFT):
    def row_losses(self, policy, rows):
        loss, metrics = super().row_losses(policy, rows)
        tokens = rows.tensors["learned"][:, 1:].sum(1)
        return loss * tokens / tokens.mean(), metrics


class BatchBaseline(RLOO):
    """The baseline of a rollout is the mean of all others of the batch."""

    def row_losses(self, policy, rows):
        alike = rows.tensors | {"prompt": torch.zeros_like(rows.unit)}
        return super().row_losses(policy, Rows(torch.zeros_like(rows.unit), alike))


class FilledUpBaseline(RLOO):
    """Rows that only fill a micro-batch up count in the baseline of the unit that they repeat."""

    def row_losses(self, policy, rows):
        return super().row_losses(policy, replace(rows, unit=torch.zeros_like(rows.unit)))


class BatchDeviation(GRPO):
    """A rollout's advantage is divided by the deviation over the batch (scale_rewards="batch" of TRL)."""

    def row_losses(self, policy, rows):
        scores = rows.tensors["scores"]
        return super().row_losses(policy, with_scores(rows, scores / (scores.std() + 1e-4)))


class SharedGroup(GRPO):
    """Mean and deviation are those of all rollouts of the batch."""

    def row_losses(self, policy, rows):
        alike = rows.tensors | {"prompt": torch.zeros_like(rows.unit)}
        return super().row_losses(policy, Rows(torch.zeros_like(rows.unit), alike))


class TokensOfTheBatch(GRPO):
    """The loss is divided by the mean number of tokens of the batch's completions (loss_type="bnpo" of TRL)."""

    def row_losses(self, policy, rows):
        loss, metrics = super().row_losses(policy, rows)
        return loss / rows.tensors["completion_mask"].sum(1).mean(), metrics


class OfTheBatch(Offline):
    """The best of all completions of the batch are learned, or all by a softmax over the batch."""

    def weights(self, scores):
        return super().weights(scores.view(1, -1)).view_as(scores)


class OfAllTokens(Offline):
    """A completion's tokens are divided by the mean length of the rows that are computed together."""

    def row_losses(self, policy, rows):
        loss, metrics = super().row_losses(policy, rows)
        return loss * self.config.max_completion_length / rows.tensors["completion_mask"].sum(1).mean(), metrics


class ReferenceOfTheBatch(DPO):
    """Log-ratios are centred over the batch (the KL point of KTO, say), not taken as they are."""

    def row_losses(self, policy, rows):
        reference = rows.tensors["reference"]
        centre = (reference[0::2] - reference[1::2]).mean() / 2
        moved = reference - centre * torch.tensor([1.0, -1.0]).repeat(len(reference) // 2)
        return super().row_losses(policy, Rows(rows.unit, rows.tensors | {"reference": moved}))


class CentredMargins(RewardModelling):
    def row_losses(self, model, rows):
        margin = rows.tensors["margin"]
        return super().row_losses(model, Rows(rows.unit, rows.tensors | {"margin": margin - margin.mean()}))


class ScaledByMeanScore(RewardModelling):
    def row_losses(self, model, rows):
        loss, metrics = super().row_losses(model, rows)
        return loss / model(rows.tensors["ids"], rows.tensors["mask"]).detach().abs().mean(), metrics


class CentredOverTheBatch(RewardModelling):
    """Keeps the mean score of the batch near 0, instead of that of each pair."""

    def row_losses(self, model, rows):
        loss, metrics = super().row_losses(model, rows)
        return loss + model(rows.tensors["ids"], rows.tensors["mask"]).mean() ** 2, metrics


class ClipTheBatch(GaussianMechanism):
    def add(self, grads, metrics=None):
        super().add([g.sum(0, keepdim=True) for g in grads], metrics)


class ClipEachTensor(GaussianMechanism):
    def add(self, grads, metrics=None):
        for i, g in enumerate(grads):
            super().add([g if i == j else torch.zeros_like(h) for j, h in enumerate(grads)])


class ValueHeadUnclipped(GaussianMechanism):
    def add(self, grads, metrics=None):
        adapter, head = grads[:-2], grads[-2:]
        super().add([*adapter, *(torch.zeros_like(h) for h in head)], metrics)
        for total, h in zip(self._sums[-2:], head, strict=True):
            total += torch.round(h.sum(0) / self.grid).to(torch.int64)


class KeepNotFinite(GaussianMechanism):
    def clip_factors(self, norms: Tensor) -> Tensor:
        return (self.max_grad_norm / norms).clamp(max=1.0)

    def are_bounded(self, steps: list[Tensor]) -> Tensor:
        return torch.ones(len(steps[0]), dtype=torch.bool)


class ClipRows(Stage):
    def _accumulate(self, mechanism, phase, positions):
        batch = phase.of(positions)
        rows = len(batch.unit)
        with self.gradients.collect(torch.arange(rows), rows):
            losses, metrics = self.algorithm.row_losses(self.model, batch)
            losses.sum().backward()
        mechanism.add(self.gradients.grads(), metrics)


class ClipPairs(Stage):
    """One clip for every pair of a judge."""

    def _accumulate(self, mechanism, phase, positions):
        batch = phase.of(positions)
        units = len(batch.unit) // 2
        row_unit = torch.arange(units).repeat_interleave(2)
        with self.gradients.collect(row_unit, units):
            losses, metrics = self.algorithm.row_losses(self.model, batch)
            unit_means(losses, row_unit, units).sum().backward()
        mechanism.add(self.gradients.grads(), unit_means(metrics, row_unit, units))


class MeanOfParts(Stage):
    """The parts that a unit's rows are taken in count alike, however many rows each of them has."""

    def _accumulate(self, mechanism, phase, positions):
        algorithm, parts = self.algorithm, phase.of(positions).split(self.algorithm.rows_at_once)
        found = [
            unit_gradients(self.model, algorithm, self.gradients, part, algorithm.examples_at_once) for part in parts
        ]
        grads = [sum(gradients) / len(parts) for gradients in zip(*(grads for grads, _ in found), strict=True)]
        mechanism.add(grads, sum(metrics for _, metrics in found) / len(parts))


class MicroBatchMean(Stage):
    def _accumulate(self, mechanism, phase, positions):
        batch = phase.of(positions)
        with self.gradients.collect(batch.unit, len(positions)):
            losses, metrics = self.algorithm.row_losses(self.model, batch)
            losses.mean().backward()
        mechanism.add(self.gradients.grads(), metrics)


class DivideByDrawn(Stage):
    def _step(self, phase, positions, sample, step):
        sample.step = replace(sample.step, divisor=max(1, len(positions)))
        return super()._step(phase, positions, sample, step)


def cut_by_position(data, call):
    """Two minibatches cut out of one sample, instead of two samples."""
    return everyone(data, call)[:5] if call % 2 else everyone(data, call)[5:]


# 1 ---------------------------------------------------------------------------------------------------------


def sensitivity(algorithm: Algorithms, units: list, outlier: list, **settings) -> float:
    """|S(D + x) - S(D)| / C, the largest over the releases of one stage."""
    one, other = (run_stage(algorithm(), data, **settings) for data in neighbours(units, outlier))
    return moved(one.sums, other.sums) / algorithm().config.max_grad_norm


class EveryColumn(PPO):
    """Passes every column that some drawn record has to the reward, which knows only its own."""

    def __init__(self, config, reward):
        own = reward.function
        reward.function = lambda prompts, completions, **given: own(prompts, completions, **given)  # what it takes is hidden
        super().__init__(config, reward)

    def encode(self, policy, record):
        return replace(
            super().encode(policy, record), columns={k: v for k, v in record.items() if k not in ("id", "prompt")}
        )

    def rows(self, policy, units, coins):
        self.config.reward.columns = sorted({k for unit in units for prompt in unit for k in prompt.columns})
        return super().rows(policy, units, coins)


SFT_CASE = (texts(), LONG_TEXT)
ODD_KEY_CASE = (prompts(), [{**HUGE_SCORE[0], "note": "a column that nobody else has"}])
PPO_CASE = (prompts(), HUGE_SCORE)
GOOD_CASE = (prompts(), [{"id": "x2", "prompt": "w1 w2 w9 w3", "score": 1e5}])
PAIR_CASE = (pairs(), HUGE_PAIR)
LONG_PAIR_CASE = (pairs(), [{"id": "x2", "chosen": "w9", "rejected": words(60, 2)}])
WEIGHTED = {"method": "weighted", "reward_temperature": 2.0}
INFINITE_CASE = (pairs(), [{"id": "x2", "chosen": "w9", "rejected": words(9, 2), "margin": 1e39}])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("algorithm", "case", "settings"),
    [
        (sft, SFT_CASE, {}),
        (partial(sft, clipping="automatic", gradient_checkpointing=True), SFT_CASE, {}),
        (ppo, PPO_CASE, {}),
        (partial(ppo, clipping="automatic"), PPO_CASE, {}),
        (partial(ppo, num_generations=3), PPO_CASE, {}),
        (ppo, ODD_KEY_CASE, {}),
        (partial(ppo, num_ppo_epochs=2, learning_rate=0.1), PPO_CASE, {}),
        (partial(ppo, num_mini_batches=2, num_ppo_epochs=2, learning_rate=0.1), PPO_CASE, {"sampler": own_coins}),
        (partial(ppo, max_steps=3, noised_baseline=True, adaptive_kl_target=1.0), PPO_CASE, {}),
        (rloo, PPO_CASE, {}),
        (partial(rloo, num_generations=3, max_steps=2, clipping="automatic"), PPO_CASE, {"sampler": own_coins}),
        (grpo, PPO_CASE, {}),
        (partial(grpo, loss_type="grpo", num_iterations=2, learning_rate=0.1, clipping="automatic"), PPO_CASE, {}),
        (
            partial(grpo, scale_rewards="none", num_mini_batches=2, num_iterations=2, learning_rate=0.1),
            PPO_CASE,
            {"sampler": own_coins},
        ),
        (offline, PPO_CASE, {}),
        (partial(offline, keep=2, max_steps=2, clipping="automatic"), PPO_CASE, {"sampler": own_coins}),
        (partial(offline, **WEIGHTED), PPO_CASE, {}),
        (partial(offline, **WORDS), PPO_CASE, {}),
        (dpo, PAIR_CASE, {}),
        (partial(dpo, loss="square", clipping="automatic"), LONG_PAIR_CASE, {}),
        (
            partial(dpo, label_smoothing=0.1, max_steps=2, gradient_checkpointing=True),
            PAIR_CASE,
            {"sampler": own_coins},
        ),
        (reward, PAIR_CASE, {}),
        (reward, LONG_PAIR_CASE, {}),
        (reward, INFINITE_CASE, {}),
        (partial(reward, pooling="mean"), PAIR_CASE, {}),
        (partial(reward, clipping="automatic", gradient_checkpointing=True), PAIR_CASE, {}),
        (
            partial(reward, center_rewards_coefficient=0.5, label_smoothing=0.1, max_steps=2),
            PAIR_CASE,
            {"sampler": own_coins},
        ),
    ],
)
def test_one_unit_moves_every_release_by_at_most_c(kind, algorithm, case, settings):
    """PRIVACY test 1: neighbour test of the whole step, all trainables, an adversarial outlier."""
    assert 0.3 < sensitivity(algorithm, *case, kind=kind, **settings) <= TOLERANCE


@pytest.mark.parametrize(
    ("algorithm", "case", "settings"),
    [
        (partial(ppo, WhitenedAdvantages, micro_batch_size=20), PPO_CASE, {}),
        (partial(ppo, WhitenedRewards), PPO_CASE, {}),
        (partial(ppo, RunningRewardScale), PPO_CASE, {}),
        (partial(sft, BatchTokenMean, max_grad_norm=5.0, micro_batch_size=20), SFT_CASE, {}),
        (partial(ppo, micro_batch_size=20), PPO_CASE, {"mechanism": ClipTheBatch}),
        (partial(ppo, EveryColumn), ODD_KEY_CASE, {}),
        (ppo, PPO_CASE, {"mechanism": ClipEachTensor}),
        (ppo, PPO_CASE, {"mechanism": ValueHeadUnclipped}),
        (partial(ppo, num_mini_batches=2), PPO_CASE, {"sampler": cut_by_position}),
        (partial(rloo, BatchBaseline, micro_batch_size=20), PPO_CASE, {}),
        (partial(grpo, BatchDeviation, scale_rewards="none", micro_batch_size=20), PPO_CASE, {}),
        (partial(grpo, SharedGroup, micro_batch_size=20), PPO_CASE, {}),
        (partial(offline, OfTheBatch, max_grad_norm=0.1), GOOD_CASE, {}),
        (partial(offline, OfTheBatch, max_grad_norm=0.1, **WEIGHTED), GOOD_CASE, {}),
        (partial(offline, OfTheBatch, **WORDS), GOOD_CASE, {}),
        (partial(dpo, ReferenceOfTheBatch, max_grad_norm=20.0, micro_batch_size=20), PAIR_CASE, {}),
        (partial(reward, CentredMargins, micro_batch_size=20), PAIR_CASE, {}),
        (partial(rloo, FilledUpBaseline, max_grad_norm=90.0, micro_batch_size=8), GOOD_CASE, {}),
        (reward, PAIR_CASE, {"mechanism": ClipEachTensor}),
    ],
)
def test_the_neighbour_test_kills(algorithm, case, settings):
    """PRIVACY test 1, mutants: whitening, batch token mean, batch or per-tensor clips, cut minibatches."""
    assert sensitivity(algorithm, *case, **settings) > TOLERANCE


# 2 ---------------------------------------------------------------------------------------------------------


def change_of_others(algorithm: Algorithms, units: list, mates: tuple[list, list]) -> float:
    """Largest change of any other unit's clipped gradient when the last unit is exchanged, over C."""
    one, other = (run_stage(algorithm(), dataset([*units, mate])).contributions[0][:-1] for mate in mates)
    return float((one - other).norm(dim=1).max()) / algorithm().config.max_grad_norm


SHORT_TEXT = [{"id": "x", "text": "w1 w2"}]
OTHER_SCORE = [{"id": "x", "prompt": "w1", "score": 1e5}]
LOW_SCORE = [{"id": "x", "prompt": "w1", "score": 1.0}]
OTHER_PAIR = [{"id": "x", "chosen": "w60 w61", "rejected": "w62 w63 w64", "preference": 0.5}]


@pytest.mark.parametrize(
    ("algorithm", "units", "mates"),
    [
        (partial(sft, micro_batch_size=20), texts(), (LONG_TEXT, SHORT_TEXT)),
        (partial(ppo, micro_batch_size=20), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(ppo, num_ppo_epochs=2), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(rloo, micro_batch_size=20), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(grpo, num_iterations=2, micro_batch_size=20), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(offline, micro_batch_size=20), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(offline, micro_batch_size=20, **WEIGHTED), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(offline, micro_batch_size=20, **WORDS), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(dpo, micro_batch_size=20), pairs(), (HUGE_PAIR, OTHER_PAIR)),
        (partial(reward, micro_batch_size=20), pairs(), (HUGE_PAIR, OTHER_PAIR)),
        (partial(reward, micro_batch_size=20, ties="skip"), pairs(), (HUGE_PAIR, OTHER_PAIR)),
    ],
)
def test_a_batch_mate_changes_nobody_else(algorithm, units, mates):
    """PRIVACY test 2: swapping one unit leaves every other clipped gradient as it was."""
    assert change_of_others(algorithm, units, mates) < 1e-9


@pytest.mark.parametrize(
    ("algorithm", "units", "mates"),
    [
        (partial(sft, BatchTokenMean, max_grad_norm=5.0, micro_batch_size=20), texts(), (LONG_TEXT, SHORT_TEXT)),
        (partial(ppo, WhitenedAdvantages, micro_batch_size=20), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(ppo, WhitenedRewards), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(rloo, BatchBaseline, micro_batch_size=20), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(grpo, BatchDeviation, scale_rewards="none", micro_batch_size=20), prompts(), (HUGE_SCORE, LOW_SCORE)),
        (partial(grpo, SharedGroup, micro_batch_size=20), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(grpo, TokensOfTheBatch, max_grad_norm=3.0, micro_batch_size=20), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(offline, OfTheBatch, **WEIGHTED), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(offline, OfTheBatch, **WORDS), prompts(), (HUGE_SCORE, OTHER_SCORE)),
        (partial(dpo, ReferenceOfTheBatch, max_grad_norm=20.0, micro_batch_size=20), pairs(), (HUGE_PAIR, OTHER_PAIR)),
        (partial(reward, CentredMargins, micro_batch_size=20), pairs(), (HUGE_PAIR, OTHER_PAIR)),
        (partial(reward, ScaledByMeanScore, max_grad_norm=9.0, micro_batch_size=20), pairs(), (HUGE_PAIR, OTHER_PAIR)),
        (
            partial(reward, CentredOverTheBatch, max_grad_norm=9.0, micro_batch_size=20),
            pairs(),
            (HUGE_PAIR, OTHER_PAIR),
        ),
    ],
)
def test_the_batch_mate_test_kills(algorithm, units, mates):
    """PRIVACY test 2, mutants."""
    assert change_of_others(algorithm, units, mates) > 1e-2


# 3 and 4 ---------------------------------------------------------------------------------------------------

TOO_SHORT = [{"id": "short", "text": "w1", "score": 0.0}]  # no prompt can be cut from it: a unit without rows
CUT = {"prompt_min_tokens": 3, "prompt_max_tokens": 3}
CUT_PROMPTS = [
    *([{"id": str(i), "text": words(5, i), "score": 1.0}] for i in range(3)), TOO_SHORT, TOO_SHORT,
    *([{"id": str(i), "text": words(5, i), "score": 1.0}] for i in range(3, 6)), TOO_SHORT,
]  # fmt: skip
# People with one, two and three records, so that a micro-batch may have fewer rows than one of them.
JUDGES = [[pair for (pair,) in pairs(12)[4 * i : 4 * i + 1 + i % 4]] for i in range(3)]
AUTHORS = [[text for (text,) in texts(12)[4 * i : 4 * i + 1 + i % 4]] for i in range(3)]
ASKING = [[prompt for (prompt,) in prompts(12)[4 * i : 4 * i + 1 + i % 4]] for i in range(3)]


def variation(algorithm: Callable, units: list, changes: list[dict], **settings) -> float:
    """Largest distance of a run's releases, metrics included, from those of the run with the first settings."""
    traces = [run_stage(algorithm(**change), dataset(units), **settings) for change in changes]
    assert traces[0].sums[0].norm() > 0.3
    return max(moved(traces[0].sums + traces[0].metrics, t.sums + t.metrics) for t in traces[1:])


WIDTHS = [{"max_length": 24}, {"max_length": 5}, {"max_length": 40}]
PROMPT_WIDTHS = [{"max_prompt_length": 8}, {"max_prompt_length": 7}, {"max_prompt_length": 30}]
MICRO = [{"micro_batch_size": size} for size in (20, 1, 2, 3)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("algorithm", "units", "changes"),
    [
        (sft, texts(), WIDTHS),
        (partial(ppo, num_generations=2), prompts(), PROMPT_WIDTHS),
        (sft, texts(), MICRO),
        (partial(ppo, num_generations=2, num_ppo_epochs=2, learning_rate=0.1), prompts(), MICRO),
        (partial(ppo, **CUT), CUT_PROMPTS, MICRO),
        (partial(rloo, num_generations=3), prompts(), PROMPT_WIDTHS),
        (partial(rloo, num_generations=3), prompts(), MICRO),
        (partial(rloo, **CUT), CUT_PROMPTS, MICRO),
        (partial(grpo, num_iterations=2, learning_rate=0.1), prompts(), MICRO),
        (offline, prompts(), PROMPT_WIDTHS),
        (partial(offline, **WEIGHTED), prompts(), MICRO),
        (partial(offline, **WORDS), prompts(), MICRO),
        (partial(offline, **CUT), CUT_PROMPTS, MICRO),
        (reward, pairs(), WIDTHS[::2]),
        (partial(reward, pooling="mean", append_eos=True), pairs(), WIDTHS[::2]),
        (partial(reward, center_rewards_coefficient=0.5, expected_batch_size=2), JUDGES, MICRO),
        (partial(dpo, expected_batch_size=2), JUDGES, MICRO),
        (partial(sft, expected_batch_size=2), AUTHORS, MICRO),
        (partial(rloo, expected_batch_size=2, num_generations=3), ASKING, MICRO),
        (partial(grpo, expected_batch_size=2, num_iterations=2, learning_rate=0.1), ASKING, MICRO),
        (partial(reward, ties="skip"), [*pairs(), OTHER_PAIR, OTHER_PAIR], MICRO),
    ],
)
def test_padding_and_micro_batches_change_nothing(kind, algorithm, units, changes):
    """PRIVACY tests 3 and 4: padding and micro-batch invariance; k micro-batches are one batch."""
    assert variation(algorithm, units, changes, kind=kind) < 1e-9


class NoPositions(PPO):
    def setup(self, policy):
        super().setup(policy)
        policy._accepts_positions = False


class RowlessUnitsCount(Stage):
    """A unit without rows adds a metric of 0 in company, and nothing alone."""

    def _accumulate(self, mechanism, phase, positions):
        batch = phase.of(positions)
        if len(batch.unit) == 0:
            return
        with self.gradients.collect(batch.unit, len(positions)):
            losses, metrics = self.algorithm.row_losses(self.model, batch)
            unit_means(losses, batch.unit, len(positions)).sum().backward()
        mechanism.add(self.gradients.grads(), unit_means(metrics, batch.unit, len(positions)))


@pytest.mark.parametrize(
    ("algorithm", "units", "changes", "settings"),
    [
        (partial(ppo, NoPositions), prompts(), PROMPT_WIDTHS, {}),
        (partial(ppo, WhitenedAdvantages), prompts(), MICRO, {}),
        (partial(sft, BatchTokenMean, max_grad_norm=5.0), [*texts(), LONG_TEXT], MICRO, {}),
        (partial(sft, max_grad_norm=5.0), texts(), MICRO, {"stage_class": MicroBatchMean}),
        (sft, texts(), MICRO, {"mechanism": ClipTheBatch}),
        (partial(ppo, **CUT), CUT_PROMPTS, MICRO, {"stage_class": RowlessUnitsCount}),
        (partial(rloo, BatchBaseline), prompts(), MICRO, {}),
        (partial(rloo, FilledUpBaseline, max_grad_norm=90.0), prompts(), MICRO, {}),
        (partial(grpo, TokensOfTheBatch, max_grad_norm=3.0), prompts(), MICRO, {}),
        (partial(offline, OfAllTokens, max_grad_norm=90.0), prompts(), MICRO, {}),
        (partial(reward, CentredMargins), [*pairs(), HUGE_PAIR], MICRO, {}),
        (partial(reward, max_grad_norm=5.0), pairs(), MICRO, {"stage_class": MicroBatchMean}),
        (partial(sft, expected_batch_size=2), AUTHORS, MICRO, {"stage_class": MeanOfParts}),
        (partial(reward, ties="skip"), [*pairs(), OTHER_PAIR, OTHER_PAIR], MICRO, {"stage_class": RowlessUnitsCount}),
    ],
)
def test_the_invariance_test_kills(algorithm, units, changes, settings):
    """PRIVACY tests 3 and 4, mutants: no position ids, anything averaged over the micro-batch."""
    assert variation(algorithm, units, changes, **settings) > 1e-3


# 11 --------------------------------------------------------------------------------------------------------


def divisors(stage_class: type[Stage]) -> list[float]:
    """What the sum was divided by, for batches of 1, 5 and 8 drawn units."""
    found = []
    for size in (1, 5, 8):
        trace = run_stage(
            sft(), dataset(texts()), stage_class=stage_class, answers_are_fixed=False,
            sampler=lambda data, call, size=size: list(range(size)),
        )  # fmt: skip
        found.append(float(trace.sums[0].norm() / trace.gradients[0].norm()))
    return found


def test_the_divisor_is_the_expected_batch_size():
    """PRIVACY test 11: the noisy sum is divided by a constant, not by the number of drawn units."""
    assert divisors(Stage) == pytest.approx([8, 8, 8], rel=1e-6)
    assert divisors(DivideByDrawn) == pytest.approx([1, 5, 8], rel=1e-6)


# 12, 13, 14 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "units", "outlier"),
    [
        (dpo, *PAIR_CASE),
        (reward, *PAIR_CASE),
        (reward, *LONG_PAIR_CASE),
        (partial(reward, clipping="automatic"), *PAIR_CASE),
        (partial(ppo, num_generations=2), *PPO_CASE),
        (partial(ppo, num_generations=4), *PPO_CASE),
        (rloo, *PPO_CASE),
        (partial(rloo, num_generations=4), *PPO_CASE),
        (partial(grpo, num_generations=4), *PPO_CASE),
        # All completions with the same weight, and a clip that is shorter than any of them.
        (partial(offline, **WEIGHTED | {"reward_temperature": 1e6}, max_grad_norm=0.01), *PPO_CASE),
    ],
)
def test_a_pair_and_a_group_of_rollouts_are_one_unit(algorithm, units, outlier):
    """PRIVACY tests 12 and 13: both rows of a pair, or all rollouts of a prompt, share one clip."""
    assert 0.3 < sensitivity(algorithm, units, outlier) <= TOLERANCE
    assert sensitivity(algorithm, units, outlier, stage_class=ClipRows) > 1.1


def people(of: Callable[[int], dict], of_x: Callable[[int], dict]) -> tuple[list[dict], list[dict]]:
    """Records of eight people with two each, and of x, who has ten."""
    return (
        [{"person": f"a{i}"} | of(2 * i + k) for i in range(8) for k in range(2)],
        [{"person": "x"} | of_x(i) for i in range(10)],
    )


WRITERS = people(lambda i: {"text": f"w1 w2 w{i}"}, lambda i: {"text": f"w40 w41 w42 w{i}"})
JUDGED = people(
    lambda i: {"chosen": f"w1 w2 w3 w{10 + i}", "rejected": f"w1 w2 w4 w{30 + i}"},
    lambda i: {"chosen": f"w40 w41 w{50 + i}", "rejected": f"w42 w{70 + i}", "margin": 10.0**i, "preference": 1.0},
)
KEY = 3
ASKERS = people(
    lambda i: {"prompt": f"w1 w2 w{i}", "score": 4.0}, lambda i: {"prompt": f"w40 w41 w{i}", "score": 10.0**i}
)


def person_sensitivity(algorithm: Algorithms, rows: tuple[list, list], unit: str | None, **settings) -> float:
    """What a person with 10 records (bounded to 3) moves the sum by, over C."""
    config = DataConfig(name="people", unit=unit, max_records_per_unit=3, declared_units=8)
    ledger, (others, x) = Ledger(":memory:"), rows
    ledger._secrets["people"] = bytes([KEY] * 32)  # always the same 3 of the 10: others show the mutants less well
    one, other = (run_stage(algorithm(), build_units(r, config, ledger), **settings) for r in (others, others + x))
    return moved(one.sums, other.sums)


@pytest.mark.parametrize(
    ("algorithm", "rows", "mutant", "often"),
    [
        (sft, WRITERS, ClipRows, 3),
        (reward, JUDGED, ClipPairs, 3),
        (partial(ppo, num_generations=2), ASKERS, ClipRows, 2),
        (rloo, ASKERS, ClipRows, 2),
        (grpo, ASKERS, ClipRows, 2),
        (offline, ASKERS, ClipRows, 2),
    ],
)
def test_a_person_is_one_unit(algorithm, rows, mutant, often):
    """PRIVACY test 14: a person's records share one clip, be they texts, judged pairs or prompts with their groups."""
    assert 0.3 < person_sensitivity(algorithm, rows, "person") <= TOLERANCE
    assert person_sensitivity(algorithm, rows, "person", stage_class=mutant) > 1.5
    assert person_sensitivity(algorithm, rows, None) > often


def test_the_baseline_stays_inside_the_prompts_group():
    """PRIVACY test 14: a person's two prompts do not share a baseline, and neither do two people."""
    owners = [[{"id": f"{i}", "prompt": f"w{i} w{j}", "score": 1.0} for j in (1, 2)] for i in range(3)]
    seen = []

    class Watched(RLOO):
        def rows(self, policy, units, coins):
            scores = torch.tensor([1.0, 3.0, 10.0, 20.0, 0.0, 0.0, 5.0, 4.0, 7.0, 7.0, -1.0, 1.0])
            return with_scores(super().rows(policy, units, coins), scores)

        def row_losses(self, policy, rows):
            logprobs = policy.completion_logprobs(rollouts_of(rows))[0].detach().sum(1)
            losses, metrics = super().row_losses(policy, rows)
            seen.append(-losses.detach() / logprobs * self.config.max_completion_length)
            return losses, metrics

    run_stage(rloo(Watched, beta=0.0, micro_batch_size=2, expected_batch_size=3), dataset(owners))
    assert torch.cat(seen).tolist() == pytest.approx([-2, 2, -10, 10, 0, 0, 1, -1, 0, 0, -2, 2])


# 20 --------------------------------------------------------------------------------------------------------


class NormInBfloat16(GaussianMechanism):
    def add(self, grads, metrics=None):
        norms = torch.cat([g.flatten(1) for g in grads], 1).bfloat16().norm(dim=1)
        factors = self.clip_factors(norms).to(grads[0].dtype)
        for g, total in zip(grads, self._sums, strict=True):
            total += torch.round(torch.tensordot(factors, g, dims=1).double() / self.grid).to(torch.int64)


def largest_contribution(mechanism_class: type[GaussianMechanism], dtype: torch.dtype) -> float:
    """Largest |contribution| / C over 200 random units whose gradients come in `dtype`."""
    torch.manual_seed(0)
    largest = 0.0
    for unit in range(200):
        grads = [(1 + unit) * torch.randn(1, *shape).to(dtype) for shape in ((30, 7), (11,))]
        mechanism = bare_mechanism(mechanism_class, [g.shape[1:] for g in grads])
        mechanism.add(grads)
        total = torch.cat([t.double().flatten() for t in mechanism._sums]) * mechanism.grid
        largest = max(largest, float(total.norm()))
    return largest


def bare_mechanism(mechanism_class: type[GaussianMechanism], shapes: list[torch.Size], **changes) -> GaussianMechanism:
    settings = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "divisor": 1.0, "clipping": "flat"}
    return mechanism_class(shapes, **{"entropy": SystemEntropy()} | settings | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_gradients_keep_the_bound(dtype):
    """PRIVACY test 20: norm and clip in float32 whatever comes in; a bfloat16 norm breaks the bound."""
    assert 0.99 < largest_contribution(GaussianMechanism, dtype) <= TOLERANCE
    assert largest_contribution(NormInBfloat16, dtype) > 1.001


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("algorithm", "mutant", "case"),
    [
        (sft, partial(sft, BatchTokenMean, max_grad_norm=5.0, micro_batch_size=20), SFT_CASE),
        (partial(ppo, num_ppo_epochs=2, num_generations=2), partial(ppo, WhitenedRewards), PPO_CASE),
        (rloo, partial(rloo, BatchBaseline, micro_batch_size=20), PPO_CASE),
        (reward, partial(reward, CentredMargins, micro_batch_size=20), PAIR_CASE),
    ],
)
def test_the_whole_step_on_a_bfloat16_base(kind, algorithm, mutant, case):
    """PRIVACY test 20: neighbour test of the whole step on a bfloat16 base."""
    assert 0.3 < sensitivity(algorithm, *case, kind=kind, dtype=torch.bfloat16) <= TOLERANCE
    assert sensitivity(mutant, *case, kind=kind, dtype=torch.bfloat16) > TOLERANCE


def sum_and_noise_error(mechanism: type, dtype: torch.dtype) -> tuple[float, float]:
    """Relative error of a sum of 4096 gradients, and the share of coordinates whose noise vanished."""
    torch.manual_seed(0)
    grads = [0.01 * torch.rand(4096, 50)]
    settings = {"max_grad_norm": 1.0, "divisor": 1.0, "clipping": "flat", "dtype": dtype}
    shapes = [torch.Size([50])]
    quiet = mechanism(shapes, noise_multiplier=0.0, entropy=SystemEntropy(), **settings)
    noisy = mechanism(shapes, noise_multiplier=0.01, entropy=SeededEntropy(0), **settings)
    for start in range(0, 4096, 8):
        for each in (quiet, noisy):
            each.add([grads[0][start : start + 8]])
    exact, found = grads[0].double().sum(0), quiet.release()[0][0]
    error = float((found.double() - exact).norm() / exact.norm())
    return error, float((noisy.release()[0][0] == found).float().mean())


def test_no_gradient_and_no_noise_is_lost_in_the_sum():
    """PRIVACY test 20: a bfloat16 sum loses gradients and noise; a sum of integers loses neither."""
    for dtype in (torch.float32, torch.float64):
        error, vanished = sum_and_noise_error(GaussianMechanism, dtype)
        assert error < 2e-5 and vanished == 0  # the margin below C takes 1.5e-5
    error, vanished = sum_and_noise_error(FloatMechanism, torch.bfloat16)
    assert error > 0.05 and vanished > 0.5
    with pytest.raises(DPAlignError, match="float32 or float64"):
        bare_mechanism(GaussianMechanism, [torch.Size([2])], dtype=torch.bfloat16)


def test_a_norm_of_exactly_the_bound_is_kept_and_one_step_more_is_not():
    """C is what a unit may add: neither less nor more."""
    mechanism = bare_mechanism(GaussianMechanism, [torch.Size([2]), torch.Size([1])], max_grad_norm=1.0, noise_multiplier=1.0)
    most = 1.0 / mechanism.grid  # a power of two
    assert most == int(most)
    one = torch.tensor([[most, 0.0], [0.0, 0.0], [most, 0.0], [math.nan, 0.0]])
    other = torch.tensor([[0.0], [-most], [1.0], [0.0]])
    assert mechanism.are_bounded([one, other]).tolist() == [True, True, False, False]


# The integer sum -------------------------------------------------------------------------------------------


def test_the_sum_is_the_same_in_every_order_and_every_cut():
    torch.manual_seed(1)
    grads, order = [torch.randn(64, 300), torch.randn(64, 7)], torch.randperm(64)
    sums = []
    for size, places in ((64, torch.arange(64)), (5, order), (1, order.flip(0))):
        mechanism = bare_mechanism(GaussianMechanism, [g.shape[1:] for g in grads], noise_multiplier=0.7)
        for chunk in places.split(size):
            mechanism.add([g[chunk] for g in grads])
        sums.append(torch.cat([total.flatten() for total in mechanism._sums]))
    assert all(torch.equal(total, sums[0]) for total in sums) and sums[0].dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(1e-30, 1e30), sigma=st.floats(1e-3, 1e3), bound=st.floats(1e-3, 1e3), seed=st.integers(0, 999),
    clipping=st.sampled_from(["flat", "automatic"]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_no_unit_moves_the_integers_by_more_than_c(scale, sigma, bound, seed, clipping, dtype):
    """Exactly, whatever comes in; and what is below C loses less than a step of the grid in each coordinate."""
    torch.manual_seed(seed)
    gradient = (torch.randn(1, 500, dtype=torch.float64) * scale).to(dtype)
    mechanism = bare_mechanism(
        GaussianMechanism, [torch.Size([500])], max_grad_norm=bound, noise_multiplier=sigma, clipping=clipping,
    )  # fmt: skip
    mechanism.add([gradient])
    squared = sum(int(k) ** 2 for k in mechanism._sums[0])
    assert squared <= Fraction(bound) ** 2 / Fraction(mechanism.grid) ** 2
    assert mechanism.grid <= max(GRID * sigma, 2.0**-40) * bound and math.log2(mechanism.grid).is_integer()


def test_rounding_is_towards_zero():
    values = torch.cat([torch.randn(10_000) * 10.0**k for k in range(-3, 6)] + [torch.arange(-9, 9) / 2])
    for dtype in (torch.float32, torch.float64):
        given = values.to(dtype)
        rounded = towards_zero(given)
        assert torch.equal(rounded, rounded.trunc()) and (rounded.abs() <= given.abs()).all()
        assert ((given - rounded).abs() <= 1).all() and ((rounded == 0) | (rounded.sign() == given.sign())).all()


class TenTimesTooMuch(GaussianMechanism):
    def clip_factors(self, norms: Tensor) -> Tensor:
        return 10 * super().clip_factors(norms)


def test_a_contribution_above_c_is_not_added_however_it_came_about():
    gradient = [torch.randn(1, 50)]
    mechanism = bare_mechanism(TenTimesTooMuch, [torch.Size([50])])
    mechanism.add(gradient)
    assert not mechanism._sums[0].any()

    class Unchecked(TenTimesTooMuch):
        def are_bounded(self, steps: list[Tensor]) -> Tensor:
            return torch.ones(1, dtype=torch.bool)

    mutant = bare_mechanism(Unchecked, [torch.Size([50])])
    mutant.add(gradient)
    assert float(mutant._sums[0].double().norm()) * mutant.grid > 9


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": -0.5}, {"gamma": math.nan}, {"gamma": math.inf}, {"max_grad_norm": 0.0}, {"max_grad_norm": math.nan},
        {"max_grad_norm": math.inf}, {"noise_multiplier": -1.0}, {"noise_multiplier": math.nan}, {"divisor": 0.0},
        {"noise_multiplier": math.inf}, {"divisor": math.nan}, {"divisor": math.inf}, {"clipping": "hinge"},
        {"metrics_noise_multiplier": math.nan}, {"metrics_noise_multiplier": -1.0},
        {"clipping": "none", "noise_multiplier": 1.0},
    ],
)  # fmt: skip
def test_constants_for_which_the_bound_would_not_hold(changes):
    with pytest.raises(DPAlignError):
        bare_mechanism(GaussianMechanism, [torch.Size([2])], **changes)


def test_the_low_bits_tell_nothing():
    """The attack of benchmarks/float_attack.py: a float sum tells who was in it, an integer sum does not."""
    result = float_attack.main(["--trials", "4", "--json"])
    assert result["before_right"] == 4 and result["before_impossible"] > 400 and result["ours_impossible"] == 0


# 21 --------------------------------------------------------------------------------------------------------


class OverflowingPairs(RewardModelling):
    """The margin of 7 makes the loss not a number."""

    def row_losses(self, model, rows):
        loss, metrics = super().row_losses(model, rows)
        return loss * torch.where(rows.tensors["margin"] == 7, torch.nan, 1.0), metrics


class Overflows(SFT):
    """The text that starts with w40 makes the loss infinite, the one with w41 not a number."""

    def row_losses(self, policy, rows):
        loss, metrics = super().row_losses(policy, rows)
        first = rows.tensors["ids"][:, 0]
        return loss * torch.where(first == 42, torch.inf, torch.where(first == 43, torch.nan, 1.0)), metrics


@pytest.mark.parametrize(
    ("algorithm", "units", "broken"),
    [
        (partial(sft, Overflows), texts(), {"id": "x", "text": "w40 w1 w2"}),
        (partial(sft, Overflows, clipping="automatic"), texts(), {"id": "x", "text": "w41 w1 w2"}),
        (ppo, prompts(), {"id": "x", "prompt": "w40 w41", "score": float("nan")}),
        (ppo, prompts(), {"id": "x", "prompt": "w40 w41", "score": float("inf")}),
        (partial(ppo, num_ppo_epochs=2), prompts(), {"id": "x", "prompt": "w40 w41", "score": None}),
        (rloo, prompts(), {"id": "x", "prompt": "w40 w41", "score": float("nan")}),
        (rloo, prompts(), {"id": "x", "prompt": "w40 w41", "score": "many"}),
        (partial(grpo, num_iterations=2), prompts(), {"id": "x", "prompt": "w40 w41", "score": float("nan")}),
        (partial(reward, OverflowingPairs), pairs(), {"id": "x", "chosen": "w40 w41", "rejected": "w42", "margin": 7}),
    ],
)
def test_a_unit_that_is_not_finite_adds_zero(algorithm, units, broken):
    """PRIVACY test 21: infinite or undefined losses and rewards count as zero, and the step goes on."""
    assert sensitivity(algorithm, units, [broken]) < 1e-9
    assert not sensitivity(algorithm, units, [broken], mechanism=KeepNotFinite) < 1e-9


@pytest.mark.parametrize("algorithm", [offline, partial(offline, **WEIGHTED), partial(offline, **WORDS)])
@pytest.mark.parametrize("score", [float("nan"), "many", None])
def test_a_prompt_whose_completions_have_no_reward_has_no_gradient(algorithm, score):
    """PRIVACY test 21: offline its weights are zero, so it adds exactly zero by itself."""
    unscored = [{"id": "x", "prompt": "w40 w41", "score": score}]
    assert sensitivity(algorithm, prompts(), unscored, mechanism=KeepNotFinite) == 0


# 22 --------------------------------------------------------------------------------------------------------

CONSTANT = (prompts(score=0.0, spread=0.0), [{"id": "x2", "prompt": "w7 w8 w9", "score": 1.0}])


def test_constant_reward_and_one_outlier():
    """PRIVACY test 22: where all rewards are equal, whitening would divide by nothing until x comes."""
    assert 0.1 < sensitivity(partial(ppo, beta=0.0), *CONSTANT) <= TOLERANCE
    assert sensitivity(partial(ppo, WhitenedRewards, beta=0.0), *CONSTANT) > TOLERANCE


def metrics_sensitivity(stage_class: type[Stage]) -> float:
    """What one unit moves the metrics block by, its declared bound being 1."""
    alone = [[{"id": str(i), "text": "w1", "score": 0.0}] for i in range(8)]  # units without rows
    x = [{"id": "x", "text": words(5, 1), "score": 1e6}]
    one, other = (
        run_stage(ppo(**CUT, micro_batch_size=20), data, stage_class=stage_class) for data in neighbours(alone, x)
    )
    return moved(one.metrics, other.metrics)


def test_one_unit_moves_the_metrics_by_at_most_one():
    """PRIVACY test 1 for the metrics block: units without rows add the same alone and in company."""
    assert 0.3 < metrics_sensitivity(Stage) <= TOLERANCE
    assert metrics_sensitivity(RowlessUnitsCount) > TOLERANCE


class MetricsNotClipped(GaussianMechanism):
    def _scaled(self, values: Tensor) -> Tensor:
        half = torch.tensor([(m.high - m.low) / 2 for m in self.metrics], dtype=torch.float64)
        return values.double() / half / len(self.metrics) ** 0.5


@pytest.mark.parametrize(("algorithm", "case"), [(reward, PAIR_CASE), (partial(rloo, kl_range=(-0.1, 0.1)), PPO_CASE)])
def test_the_metrics_of_a_pair_or_a_group_are_one_units(algorithm, case):
    """PRIVACY test 1 for the metrics block: loss, accuracy and margin of a pair; reward, KL and length of a group."""
    one, other = (run_stage(algorithm(), data) for data in neighbours(*case))
    assert 0.3 < moved(one.metrics, other.metrics) <= TOLERANCE
    one, other = (run_stage(algorithm(), data, mechanism=MetricsNotClipped) for data in neighbours(*case))
    assert moved(one.metrics, other.metrics) > TOLERANCE


def test_without_clipping_the_sum_is_that_of_the_units_that_are_finite():
    mechanism = bare_mechanism(GaussianMechanism, [torch.Size([2]), torch.Size([1, 2])], clipping="none")
    one = torch.tensor([[1.0, 2.0], [10.0, 20.0], [math.inf, 40.0], [5.0, 6.0]])
    other = torch.tensor([[[1.0, 1.0]], [[math.nan, 2.0]], [[4.0, 4.0]], [[8.0, 8.0]]])
    mechanism.add([one, other])
    assert [total.tolist() for total in mechanism._sums] == [[6.0, 8.0], [[9.0, 9.0]]]
