"""DP-RLOO's arithmetic by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dpalign.algorithms import RLOO, RLOOConfig
from dpalign.algorithms.base import Rows, encode_units
from dpalign.algorithms.rloo import leave_one_out
from dpalign.domains import check_settings
from dpalign.errors import DPAlignError
from dpalign.models.policy import Rollouts
from dpalign.rewards import Reward
from tiny import tiny_policy, words


def rloo(**settings) -> RLOO:
    settings = {"noise_multiplier": 1.0, "expected_batch_size": 8, "max_prompt_length": 6} | settings
    return RLOO(RLOOConfig(**settings), Reward(lambda p, completions, **_: [len(c) / 20 for c in completions], -5, 5))


def test_leave_one_out_worked_by_hand():
    returns = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 0.0])
    # Others of the first group of three: 4, 3.5, 1.5; the second group lies apart in the batch.
    group = torch.tensor([7, 7, 7, 2, 2, 2])
    assert leave_one_out(returns, group).tolist() == pytest.approx([-3.0, -1.5, 4.5, 0.0, 15.0, -15.0])
    order = torch.tensor([3, 0, 4, 1, 5, 2])
    assert leave_one_out(returns[order], group[order]).tolist() == pytest.approx([0.0, -3.0, 15.0, -1.5, -15.0, 4.5])
    pairs = leave_one_out(torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]))
    assert pairs.tolist() == [-2.0, 2.0, 0.0, 0.0]


def test_leave_one_out_adds_up_to_zero_and_ignores_a_constant():
    returns = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = torch.arange(12) // 4
    found = leave_one_out(returns, group)
    assert found.view(3, 4).sum(1).abs().max() < 1e-12
    assert torch.allclose(found, leave_one_out(returns + 100 * group, group), atol=1e-9)
    assert leave_one_out(returns[:0], group[:0]).shape == (0,)


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
        "input_ids": ids, "attention_mask": ids, "completion_mask": mask, "scores": torch.tensor([1.0, 2.0]),
        "ref_logprobs": torch.tensor([[-1.5, -1.0, 9.0], [-0.5, -0.5, -1.0]]), "prompt": torch.tensor([0, 0]),
    })  # fmt: skip
    logprobs = torch.tensor([[-1.0, -0.5, 7.0], [-1.0, -1.0, -1.0]], requires_grad=True)
    losses, metrics = rloo(beta=0.5, max_completion_length=3).row_losses(FixedPolicy(logprobs), rows)
    # KL 1 and -1, so returns 1 - 0.5 and 2 + 0.5, advantages -2 and 2; log-probabilities -1.5 and -3.
    assert losses.tolist() == pytest.approx([-2 * 1.5 / 3, 2 * 3 / 3])
    assert metrics.tolist() == [[1.0, 1.0, 2.0], [2.0, -1.0, 3.0]]  # score, KL to the reference, length
    losses.sum().backward()
    # The KL is part of the reward, not of the loss: the gradient is that of -A log pi, and nothing beyond the end.
    assert torch.allclose(logprobs.grad, torch.tensor([[2.0, 2.0, 0.0], [-2.0, -2.0, -2.0]]) / 3)


def test_a_missing_score_leaves_its_whole_group_without_a_gradient_of_its_own():
    advantages = leave_one_out(torch.tensor([1.0, float("nan"), 2.0, 3.0]), torch.tensor([0, 0, 1, 1]))
    assert advantages.isnan().tolist() == [True, True, False, False]


def test_rollouts_are_grouped_by_prompt_within_their_units():
    algorithm, policy = rloo(num_generations=3, max_completion_length=4), tiny_policy("llama")
    algorithm.setup(policy)
    assert policy.value_head is None and policy.heads() == []
    units = [[{"prompt": words(2, 1)}, {"prompt": words(3, 2)}], [{"prompt": words(1, 3)}]]
    rows = algorithm.rows(policy, encode_units(algorithm, policy, units), None)
    assert rows.tensors["prompt"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert rows.unit.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    prompts = [tuple(row[:6].tolist()) for row in rows.tensors["input_ids"]]
    assert [prompts.index(p) for p in prompts] == [0, 0, 0, 3, 3, 3, 6, 6, 6]


def test_one_rollout_has_no_baseline():
    with pytest.raises(DPAlignError, match="num_generations 1 must be at least 2"):
        check_settings(RLOOConfig(num_generations=1))
