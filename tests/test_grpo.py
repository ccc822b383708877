"""DP-GRPO's arithmetic by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import dpalign
from dpalign import DPGRPOTrainer, Privacy
from dpalign.algorithms import GRPO, GRPOConfig
from dpalign.algorithms.base import Rows, encode_units
from dpalign.algorithms.grpo import standardised
from dpalign.domains import check_settings
from dpalign.errors import DPAlignError
from dpalign.models.policy import Rollouts
from dpalign.rewards import Reward
from helpers import call, ledger_rows, small_model, statement, write_recipe
from tiny import tiny_policy, words


def grpo(**settings: Any) -> GRPO:
    settings = {"noise_multiplier": 1.0, "expected_batch_size": 8, "max_prompt_length": 6} | settings
    return GRPO(GRPOConfig(**settings), Reward(lambda p, completions, **_: [len(c) / 20 for c in completions], -5, 5))


# Advantages --------------------------------------------------------------------------------------------------------

REWARDS = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 0.0])
GROUP = torch.tensor([7, 7, 7, 2, 2, 2])
# Means 3 and 10; squares 4 + 1 + 9 = 14 and 0 + 100 + 100 = 200, over 3 - 1.
BY_HAND = [x / (math.sqrt(7) + 1e-4) for x in (-2, -1, 3)] + [x / (10 + 1e-4) for x in (0, 10, -10)]


def test_advantages_worked_by_hand():
    assert standardised(REWARDS, GROUP, by_deviation=True).tolist() == pytest.approx(BY_HAND, rel=1e-6)
    assert standardised(REWARDS, GROUP, by_deviation=False).tolist() == pytest.approx([-2, -1, 3, 0, 10, -10])
    order = torch.tensor([3, 0, 4, 1, 5, 2])
    shuffled = standardised(REWARDS[order], GROUP[order], by_deviation=True)
    assert shuffled.tolist() == pytest.approx([BY_HAND[i] for i in order], rel=1e-6)


def over_the_batch(rewards: Tensor, group: Tensor, *, by_deviation: bool) -> Tensor:
    """Mutant: the mean is the group's, the deviation that of all rows (TRL's scale_rewards="batch")."""
    return standardised(rewards, group, by_deviation=False) / (rewards.std() + 1e-4)


def of_the_group(advantages: Callable[..., Tensor]) -> float:
    """By how much another group's rewards move the first group's advantages."""
    alone = advantages(REWARDS[:3], GROUP[:3], by_deviation=True)
    return float((advantages(REWARDS, GROUP, by_deviation=True)[:3] - alone).abs().max())


def test_another_group_moves_nothing():
    assert of_the_group(standardised) < 1e-7 < 0.1 < of_the_group(over_the_batch)


@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e5 + 0.3])
def test_equal_rewards_have_no_advantage_at_all(value):
    """A deviation of 0 would make of a rounded mean an advantage of its own."""
    rewards = torch.full((7,), value)
    assert standardised(rewards, torch.zeros(7, dtype=torch.int64), by_deviation=True).tolist() == [0.0] * 7


def test_a_missing_score_stays_in_its_group():
    rewards, group = torch.tensor([1.0, math.nan, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])
    assert standardised(rewards, group, by_deviation=True).isnan().tolist() == [True, True, False, False]
    assert standardised(rewards[:0], group[:0], by_deviation=True).shape == (0,)


# The loss ------------------------------------------------------------------------------------------------------------


@dataclass
class FixedPolicy:
    """Answers with given log-probabilities."""

    logprobs: Tensor

    def completion_logprobs(self, rollouts: Rollouts, *law: float) -> tuple[Tensor, Tensor]:
        return self.logprobs, torch.zeros_like(self.logprobs)


MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
# Beyond the end stands what would be seen at once: exp(99) is infinite.
OLD = torch.tensor([[-1.0, -2.0, -99.0], [-1.0, -1.0, -3.0]])
NOW = torch.tensor([[-0.5, -2.1, 0.0], [-0.5, -1.5, -3.0]])
REF = torch.tensor([[-1.5, -1.0, 99.0], [-0.5, -2.0, -2.0]])


def rows_of(scores: list[float], **more: Tensor) -> Rows:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    tensors = {
        "input_ids": ids, "attention_mask": ids, "completion_mask": MASK, "scores": torch.tensor(scores),
        "ref_logprobs": REF, "prompt": torch.tensor([0, 0]),
    }  # fmt: skip
    return Rows(torch.zeros(2, dtype=torch.int64), tensors | more)


def expected(advantage: float, row: int, beta: float, low: float, high: float) -> list[float]:
    """The loss of each token of a row, by its definition."""
    found = []
    for place in range(int(MASK[row].sum())):
        now, old, ref = (float(t[row, place]) for t in (NOW, OLD, REF))
        ratio = math.exp(now - old)
        clipped = min(max(ratio, 1 - low), 1 + high)
        found.append(-min(ratio * advantage, clipped * advantage) + beta * (math.exp(ref - now) - (ref - now) - 1))
    return found


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
@pytest.mark.parametrize("high", [None, 0.4, 0.9])
def test_loss_worked_by_hand(loss_type, high):
    config = {"beta": 0.3, "max_completion_length": 4, "cliprange": 0.1, "cliprange_high": high, "num_generations": 2}
    logprobs = NOW.clone().requires_grad_()
    losses, metrics = grpo(loss_type=loss_type, scale_rewards="none", num_iterations=2, **config).row_losses(
        FixedPolicy(logprobs), rows_of([1.0, 3.0], old_logprobs=OLD)
    )
    tokens = [expected(a, row, 0.3, 0.1, high or 0.1) for row, a in enumerate((-1.0, 1.0))]
    lengths = (4, 4) if loss_type == "dr_grpo" else (2, 3)
    assert losses.tolist() == pytest.approx([sum(t) / n for t, n in zip(tokens, lengths, strict=True)], rel=1e-5)
    # Scores, KL of the policy that wrote them against the reference, and lengths.
    assert metrics.tolist() == [[1.0, pytest.approx(-0.5), 2.0], [3.0, pytest.approx(-0.5), 3.0]]
    losses.sum().backward()
    # Where the clip holds only the KL is left: ratio e^0.5 = 1.65 of the good completion is beyond 1 + high, and e^-0.5
    # = 0.61 is not held, for the minimum takes the ratio that is worse.
    of_kl = 0.3 * (1 - torch.exp(REF - NOW))
    assert logprobs.grad[1, 0] * lengths[1] == pytest.approx(
        float(of_kl[1, 0]) - (math.exp(0.5) if high == 0.9 else 0), rel=1e-5
    )
    assert logprobs.grad[1, 1] * lengths[1] == pytest.approx(float(of_kl[1, 1]) - math.exp(-0.5), rel=1e-5)
    assert logprobs.grad[0, 2] == 0  # beyond the end


def test_on_policy_it_is_the_policy_gradient():
    """One pass: the ratio is 1, its gradient that of log pi, and the KL estimate pulls to the reference."""
    logprobs = NOW.clone().requires_grad_()
    algorithm = grpo(beta=0.3, max_completion_length=4, num_generations=2)
    losses, _ = algorithm.row_losses(FixedPolicy(logprobs), rows_of([1.0, 3.0]))
    losses.sum().backward()
    advantage = 1 / (math.sqrt(2) + 1e-4)  # of 1 and 3: deviation sqrt(2)
    wanted = torch.tensor([[advantage], [-advantage]]) + 0.3 * (1 - torch.exp((REF - NOW) * MASK))
    assert torch.allclose(logprobs.grad, wanted * MASK / 4, rtol=1e-5)


def test_the_kl_pulls_towards_the_reference():
    """Mutant: its sign. The estimate is never below 0, 0 at the reference, and its gradient leads there."""
    for better, sign in ((0.5, 1), (-0.5, -1)):
        logprobs = (REF + better).requires_grad_()
        losses, _ = grpo(beta=1.0, num_generations=2).row_losses(FixedPolicy(logprobs), rows_of([2.0, 2.0]))
        assert bool((losses > 0).all())
        losses.sum().backward()
        assert bool((logprobs.grad * sign * MASK >= 0).all()) and bool((logprobs.grad * MASK != 0).any())
    at_reference, _ = grpo(num_generations=2).row_losses(FixedPolicy(REF.clone()), rows_of([2.0, 2.0]))
    assert at_reference.tolist() == [0.0, 0.0]


def test_what_wrote_the_rollouts_is_kept_for_later_passes():
    units = [[{"prompt": words(2, 1)}, {"prompt": words(3, 2)}], [{"prompt": words(1, 3)}]]
    for settings, kept in (({}, False), ({"num_iterations": 2}, True), ({"num_mini_batches": 2}, True)):
        algorithm, policy = grpo(num_generations=3, max_completion_length=4, **settings), tiny_policy("llama")
        algorithm.setup(policy)
        assert policy.value_head is None and policy.heads() == []
        rows = algorithm.rows(policy, encode_units(algorithm, policy, units), None)
        assert ("old_logprobs" in rows.tensors) == kept
        assert (
            rows.tensors["prompt"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and rows.unit.tolist() == [0] * 6 + [1] * 3
        )
        if kept:  # of the policy as it is, and nothing is learned yet
            mask = rows.tensors["completion_mask"]
            assert torch.allclose(rows.tensors["old_logprobs"] * mask, rows.tensors["ref_logprobs"] * mask, atol=1e-5)


# Settings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_generations": 1}, "num_generations 1 must be at least 2"),
        ({"scale_rewards": "batch"}, "scale_rewards batch divides by the standard deviation over all units"),
        ({"scale_rewards": "mean"}, "scale_rewards 'mean': expected group or none"),
        ({"loss_type": "dapo"}, "loss_type dapo divides by the tokens of all units"),
        ({"loss_type": "bnpo"}, "loss_type bnpo divides by the tokens of all units"),
        ({"loss_type": "sapo"}, "loss_type 'sapo': expected dr_grpo or grpo"),
        ({"cliprange": 1.0}, "cliprange 1.0 must be"),
        ({"cliprange_high": 0.0}, "cliprange_high 0.0 must be"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(DPAlignError, match=says):
        check_settings(GRPOConfig(**changes))


def test_booleans_as_in_trl():
    assert (GRPOConfig(scale_rewards=True).scale_rewards, GRPOConfig(scale_rewards=False).scale_rewards) == (
        "group", "none",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("epsilon", "privacy's is target_epsilon, and the clip of GRPO's ratio .* is cliprange"),
        ("epsilon_high", "it is called cliprange_high"),
        ("delta", "privacy's is target_delta"),
        ("steps_per_generation", "it is called num_mini_batches"),
        ("mask_truncated_completions", "missing_eos_penalty"),
    ],
)
def test_names_of_trl_that_mean_something_else_here(name, said):
    with pytest.raises(DPAlignError, match=f"GRPOConfig has no {name}: .*{said}"):
        dpalign.GRPOConfig(**{name: 1})


# From end to end ---------------------------------------------------------------------------------------------------------

STAGE: dict[str, Any] = {
    "expected_batch_size": 8, "max_steps": 2, "micro_batch_size": 32, "prepend_bos": True, "adapter": {"r": 2},
    "prompt_max_tokens": 4, "max_prompt_length": 5, "max_completion_length": 6, "num_iterations": 2,
}  # fmt: skip


def test_dpalign_grpo(tmp_path, capsys):
    """Private, after SFT in one run and alone by its command; on self-written prompts it draws nothing."""
    recipe = write_recipe(tmp_path, ppo=None, grpo=STAGE)
    done = call(capsys, "run", recipe, "--json").json
    assert [s["stage"] for s in done["stages"]] == ["sft", "grpo"] and 0 < done["epsilon"] <= 2
    assert ledger_rows(tmp_path, stage="grpo") == 2
    (stated,) = [s for s in statement(tmp_path / "run")["stages"] if s["stage"] == "grpo"]
    assert all(mechanism["passes"] == 2 for mechanism in stated["mechanisms"])
    alone = call(capsys, "grpo", recipe, "--output_dir", tmp_path / "alone", "--json").json
    assert [s["stage"] for s in alone["stages"]] == ["grpo"]
    free = ("--grpo.prompts", "self_written", "--grpo.metrics_noise_ratio", 10, "--output_dir", tmp_path / "free")
    assert call(capsys, "grpo", recipe, *free, "--json").json["epsilon"] == 0
    assert "keep one of them" in call(capsys, "run", recipe, "--rloo.max_steps", 1).error
    refused = call(capsys, "grpo", recipe, "--grpo.loss_type", "dapo", "--output_dir", tmp_path / "refused")
    assert refused.error.startswith("grpo: loss_type dapo divides by the tokens of all units")


def test_the_trainer(tmp_path):
    args = dpalign.GRPOConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=8, max_steps=1, max_completion_length=4,
        max_prompt_length=8, num_generations=3, scale_rewards=False, loss_type="grpo",
    )  # fmt: skip
    privacy = Privacy(
        target_epsilon=8, dataset_name="toy", model_is_public=True, reward_is_public=True, reward_range=(0, 1),
        ledger=str(tmp_path / "ledger.sqlite"),
    )  # fmt: skip
    rows = [{"prompt": f"The film {i}"} for i in range(32)]

    def short(completions: list[str]) -> list[float]:
        return [1 / (1 + len(c)) for c in completions]

    trainer = DPGRPOTrainer(small_model(), args, rows, reward_funcs=short, privacy=privacy, quiet=True)
    assert 0 < trainer.train()["epsilon"] <= 8 and trainer.privacy["stages"][0]["stage"] == "grpo"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_climbs_the_reward(kind, tmp_path):
    """Fifteen updates on self-written prompts against the share of one word."""
    from dpalign.training import OwnTextStage

    config = GRPOConfig(
        prompts="self_written", max_steps=15, expected_batch_size=16, learning_rate=3e-2, max_prompt_length=9,
        max_completion_length=6, num_iterations=2, beta=0.0,
    )  # fmt: skip
    reward = Reward(lambda p, completions, **_: [float(c.split().count("w5")) for c in completions], 0, 6)
    told: list[Any] = []
    OwnTextStage(tiny_policy(kind), GRPO(config, reward), None, folder=tmp_path, report=told.append).train()
    first, last = ([r.metrics["reward"] for r in part] for part in (told[:3], told[-3:]))
    assert sum(last) > 3 * sum(first) and sum(last) > 0.6
