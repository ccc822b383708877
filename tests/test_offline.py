"""Offline alignment's arithmetic by hand, and what its completions are sampled from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dpalign import DPOfflineTrainer, Privacy
from dpalign import OfflineConfig as OfflineArguments
from dpalign.algorithms import Offline, OfflineConfig
from dpalign.algorithms.base import Rows, encode_units
from dpalign.algorithms.offline import best, summary
from dpalign.domains import check_settings
from dpalign.errors import DPAlignError
from dpalign.models.policy import Rollouts
from dpalign.rewards import Reward
from helpers import ledger_rows, reviews, small_model
from tiny import tiny_policy, words

NAN = math.nan


def offline(score=lambda prompts, completions, **_: [len(c) / 20 for c in completions], **settings) -> Offline:
    settings = {"noise_multiplier": 1.0, "expected_batch_size": 8, "max_prompt_length": 6} | settings
    return Offline(OfflineConfig(**settings), Reward(score, -5, 5))


# Weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "keep", "weights"),
    [
        ([1.0, 4.0, 3.0, 2.0], 1, [0, 1, 0, 0]),
        ([1.0, 4.0, 3.0, 2.0], 2, [0, 1, 1, 0]),
        ([4.0, 4.0, 3.0, 2.0], 1, [0.5, 0.5, 0, 0]),
        ([4.0, 3.0, 3.0, 3.0], 2, [1, 1 / 3, 1 / 3, 1 / 3]),
        ([2.0, 2.0, 2.0, 2.0], 3, [0.75, 0.75, 0.75, 0.75]),
        ([-1.0, NAN, -2.0, NAN], 1, [1, 0, 0, 0]),
        ([-1.0, NAN, NAN, NAN], 2, [1, 0, 0, 0]),
        ([NAN, NAN, NAN, NAN], 1, [0, 0, 0, 0]),
        ([1.0, 1.0 + 1e-6, 0.0, 0.0], 1, [0.5, 0.5, 0, 0]),
        ([1e-4, 2e-4, 0.0, -1e-4], 1, [0, 1, 0, 0]),
        ([0.0, 0.0, 0.0, NAN], 1, [1 / 3, 1 / 3, 1 / 3, 0]),
    ],
)
def test_the_best_by_hand(scores, keep, weights):
    assert best(torch.tensor([scores]), keep)[0].tolist() == pytest.approx(weights)
    backwards = best(torch.tensor([scores[::-1], [0.0, 1.0, 2.0, 3.0]]), keep)[0]
    assert backwards.tolist() == pytest.approx(weights[::-1]), "neither the place nor another prompt says anything"


def test_the_softmax_by_hand():
    scores = torch.tensor([[0.0, math.log(3.0), NAN], [NAN, NAN, NAN], [2.0, 2.0, 2.0], [-900.0, NAN, -901.0]])
    found = offline(method="weighted", reward_temperature=1.0, num_generations=3).weights(scores)
    assert found[0].tolist() == pytest.approx([0.25, 0.75, 0])
    assert found[1].tolist() == [0, 0, 0] and found[2].tolist() == pytest.approx([1 / 3] * 3)
    assert found[3].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 0, 1 / (1 + math.e)])
    sharper = offline(method="weighted", reward_temperature=0.5, num_generations=3).weights(scores)
    assert sharper[0].tolist() == pytest.approx([0.1, 0.9, 0])


def test_the_summary_by_hand():
    scores = torch.tensor([[1.0, 5.0, 3.0, NAN], [7.0, 7.0, 7.0, 7.0], [NAN] * 4])
    weights = torch.tensor([[0.0, 0.75, 0.25, 0.0], [0.5] * 4, [0.0] * 4])
    means = summary(scores, weights).mean(1)
    # Reward 9 / 3; by weight 0.75 * 5 + 0.25 * 3; share 1 / (4 * (0.5625 + 0.0625)).
    assert torch.allclose(means, torch.tensor([[3.0, 4.5, 0.4], [7.0, 7.0, 1.0], [NAN] * 3]), equal_nan=True)


# Loss --------------------------------------------------------------------------------------------------------


@dataclass
class FixedPolicy:
    """Answers with given log-probabilities."""

    logprobs: Tensor

    def completion_logprobs(self, rollouts: Rollouts, *law: float) -> tuple[Tensor, Tensor]:
        return self.logprobs, torch.zeros_like(self.logprobs)


def test_loss_worked_by_hand():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    ids = torch.zeros(2, 5, dtype=torch.int64)
    rows = Rows(torch.zeros(2, dtype=torch.int64), {
        "input_ids": ids, "attention_mask": ids, "completion_mask": mask, "weights": torch.tensor([0.25, 0.75]),
        "ref_logprobs": torch.tensor([[-1.5, -1.0, 9.0], [-0.5, -0.5, -1.0]]),
        "told": torch.tensor([[0.5, 0.6, 0.7], [1.5, 1.6, 1.7]]),
    })  # fmt: skip
    logprobs = torch.tensor([[-1.0, -0.5, 7.0], [-1.0, -1.0, -1.0]], requires_grad=True)
    losses, metrics = offline(max_completion_length=3).row_losses(FixedPolicy(logprobs), rows)
    assert losses.tolist() == pytest.approx([0.25 * 1.5 / 3, 0.75 * 3 / 3])
    # Reward, KL of the start against the policy (-2.5 + 1.5, and -2 + 3), length, reward by weight, share.
    assert torch.allclose(metrics, torch.tensor([[0.5, -1.0, 2.0, 0.6, 0.7], [1.5, 1.0, 3.0, 1.6, 1.7]]))
    losses.sum().backward()
    assert torch.allclose(logprobs.grad, -torch.tensor([[0.25, 0.25, 0.0], [0.75, 0.75, 0.75]]) / 3)


# Rows --------------------------------------------------------------------------------------------------------

UNITS = [[{"prompt": words(2, 1)}, {"prompt": words(3, 2)}], [{"prompt": words(1, 3)}]]


def rows_of(algorithm: Offline, moved_by: float) -> Rows:
    """Rows of the units, with the stage's adapter moved."""
    policy = tiny_policy("llama")
    algorithm.setup(policy)
    for p in policy.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=moved_by, generator=torch.Generator().manual_seed(1))
    examples = encode_units(algorithm, policy, UNITS)
    torch.manual_seed(3)
    return algorithm.rows(policy, examples, None)


def test_completions_are_of_what_the_stage_started_from():
    """However far the policy has moved, it learns from the same completions."""
    settings = {"num_generations": 4, "max_completion_length": 6}
    near, far = (rows_of(offline(**settings), moved) for moved in (1e-3, 3.0))
    assert all(torch.equal(near.tensors[name], far.tensors[name]) for name in ("input_ids", "scores", "weights"))
    assert torch.allclose(near.tensors["ref_logprobs"], far.tensors["ref_logprobs"])


def test_weights_are_by_prompt_within_their_units():
    rows = rows_of(offline(num_generations=4, max_completion_length=6), 0.1)
    assert rows.unit.tolist() == [0] * 8 + [1] * 4
    weights, scores = rows.tensors["weights"].view(3, 4), rows.tensors["scores"].view(3, 4)
    assert weights.sum(1).tolist() == pytest.approx([1.0] * 3) and len({*scores.flatten().tolist()}) > 3
    assert (weights * scores).sum(1).tolist() == pytest.approx(scores.max(1).values.tolist())


def test_a_completion_without_a_reward_is_not_learned():
    """Of the first prompt every second completion has one, of the last none has."""
    given = iter([1.0, NAN, 2.0, NAN, *[0.5] * 4, *[NAN] * 4])
    rows = rows_of(
        offline(lambda prompts, completions, **_: [next(given) for _ in completions], num_generations=4), 0.1
    )
    assert rows.tensors["weights"].tolist() == [0, 0, 1, 0, *[0.25] * 4, 0, 0, 0, 0]
    assert rows.tensors["scores"].isfinite().all()
    told = rows.tensors["told"].view(3, 4, 3).mean(1)
    assert told[:2].tolist() == [[1.5, 2.0, 0.25], [0.5, 0.5, 1.0]] and told[2].isnan().all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_generations": 1}, "num_generations 1 must be at least 2"),
        ({"keep": 4}, "keep 4 of num_generations 4 completions leaves nothing out"),
        ({"method": "weighted", "keep": 2}, "keep is for method filtered, not weighted"),
        ({"reward_temperature": 2.0}, "reward_temperature is for method weighted, not filtered"),
        ({"reward_temperature": 0.0, "method": "weighted"}, "reward_temperature 0.0 must be at least"),
    ],
)
def test_what_cannot_be_learned_is_refused(changes, says):
    with pytest.raises(DPAlignError, match=says):
        check_settings(OfflineConfig(**changes))


def test_a_trainer_on_private_prompts(tmp_path):
    """Every update draws, and is in the statement; its metrics have the declared names."""
    args = OfflineArguments(
        output_dir=str(tmp_path / "run"), method="weighted", reward_temperature=0.1, num_generations=3, max_steps=2,
        expected_batch_size=8, prepend_bos=True, prompt_max_tokens=4, max_prompt_length=5, max_completion_length=6,
    )  # fmt: skip
    privacy = Privacy(
        target_epsilon=8.0, dataset_name="reviews", declared_units=40, model_is_public=True, reward_is_public=True,
        reward_range=(0.0, 1.0), ledger=str(tmp_path / "ledger.sqlite"),
    )  # fmt: skip

    def short(completions):
        return [1 / (1 + len(c)) for c in completions]

    trainer = DPOfflineTrainer(small_model(), args, reviews(40), reward_funcs=short, privacy=privacy, quiet=True)
    done = trainer.train()
    assert done["private"] and 0 < done["epsilon"] <= 8 and ledger_rows(tmp_path) == 2
    assert [(s["stage"], s["units"]) for s in done["stages"]] == [("offline", 40)]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    names = ["reward", "forward_kl", "completion_length", "learned_reward", "learned_share"]
    assert [*line["noised_metrics"]] == names
