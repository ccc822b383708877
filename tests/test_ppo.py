"""DP-PPO's arithmetic by hand, and the law that its rollouts are drawn from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from dpalign.algorithms import PPO, PPOConfig
from dpalign.algorithms.base import Rows, encode_units
from dpalign.algorithms.rollouts import rollouts_of
from dpalign.errors import DPAlignError
from dpalign.evaluation import evaluate_policy, public_prompts
from dpalign.models import AdapterConfig, Policy
from dpalign.models.policy import Rollouts
from dpalign.rewards import Reward, RewardConfig
from tiny import tiny_base, tiny_policy, tiny_tokenizer, words

EOS = 1


def ppo(score: float = 1.0, **settings) -> PPO:
    settings = {"noise_multiplier": 1.0, "expected_batch_size": 8, "max_prompt_length": 4} | settings
    return PPO(PPOConfig(**settings), Reward(lambda prompts, completions, **_: [score] * len(completions), -5, 5))


# Rewards, advantages, loss -----------------------------------------------------------------------------------


def test_advantages_worked_by_hand():
    # Row 0 has three tokens and score 2; row 1 ends after two with score -1, and what follows must not matter.
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.0, 0.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.0, -0.5], [-1.0, -1.0, 9.0]])
    values = torch.tensor([[0.5, 0.2, -0.3], [0.0, 1.0, 7.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    algorithm = ppo(beta=0.1, gamma=0.9, lam=0.8)
    advantages, returns = algorithm.advantages(logprobs, ref_logprobs, values, torch.tensor([2.0, -1.0]), mask)
    # Rewards: -0.1 * (0.5, -1, 0) + (0, 0, 2), and (0, -1). A_t = r_t + 0.9 V_(t+1) - V_t + 0.72 A_(t+1).
    assert torch.allclose(advantages, torch.tensor([[0.55592, 1.286, 2.3], [-0.54, -2.0, 0.0]]), atol=1e-6)
    assert torch.allclose(returns, torch.tensor([[1.05592, 1.486, 2.0], [-0.54, -1.0, 0.0]]), atol=1e-6)


def test_the_kl_penalty_is_on_every_token_and_the_score_on_the_last():
    algorithm = ppo(beta=0.5, gamma=1.0, lam=0.0)  # then the advantage is the token's own reward
    logprobs, zeros = torch.tensor([[-1.0, -3.0, -2.0, 0.0]]), torch.zeros(1, 4)
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    ref_logprobs = torch.tensor([[-2.0, -2.0, -4.0, -9.0]])
    advantages, _ = algorithm.advantages(logprobs, ref_logprobs, zeros, torch.tensor([10.0]), mask)
    assert advantages.tolist() == [[-0.5, 0.5, 10 - 1.0, 0.0]]
    algorithm.baseline = 4.0
    advantages, _ = algorithm.advantages(logprobs, ref_logprobs, zeros, torch.tensor([10.0]), mask)
    assert advantages.tolist() == [[-0.5, 0.5, 6 - 1.0, 0.0]]


@dataclass
class FixedPolicy:
    """Answers with given log-probabilities and values."""

    logprobs: Tensor
    values: Tensor

    def completion_logprobs(self, rollouts: Rollouts, *law: float) -> tuple[Tensor, Tensor]:
        return self.logprobs, self.values


def test_loss_worked_by_hand():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    zeros, ids = torch.zeros(2, 3), torch.zeros(2, 5, dtype=torch.int64)
    rows = Rows(torch.zeros(2, dtype=torch.int64), {
        "input_ids": ids, "attention_mask": ids, "completion_mask": mask, "ref_logprobs": zeros - 0.25,
        "scores": torch.tensor([1.0, 2.0]), "old_logprobs": zeros, "old_values": zeros,
        "advantages": torch.tensor([[1.0, -1.0, 5.0], [2.0, 0.0, 1.0]]),
        "returns": torch.tensor([[0.5, 0.5, 9.0], [0.0, 0.0, 0.0]]),
    })  # fmt: skip
    # Ratios 1.5, 1.5 and 1, 1, 0.5; values 1 and 0.1 in row 0.
    policy = FixedPolicy(
        torch.tensor([[1.5, 1.5, 1.0], [1.0, 1.0, 0.5]]).log(), torch.tensor([[1.0, 0.1, 3.0], [0.0, 0.0, 0.0]])
    )
    losses, metrics = ppo(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, max_completion_length=3).row_losses(
        policy, rows
    )
    # Row 0: the gain is clipped to 1.2, the loss of -1 is not (1.5). Value terms max(0.5^2, 0.3^2) / 2, 0.4^2 / 2.
    first = -1.2 + 1.5 + 0.1 * 0.5 * (0.25 + 0.16)
    second = -2.0 + 0.0 - 0.5  # a ratio that fell below 0.8 on a good token is not clipped
    assert losses.tolist() == pytest.approx([first / 3, second / 3])  # a constant length, not the row's own
    assert metrics.tolist() == [[1.0, 0.5, 2.0], [2.0, 0.75, 3.0]]  # score, KL to the reference, length


def test_a_value_that_moved_far_pays_for_where_it_was_clipped():
    """It has reached its return, by a step that is five times too large: the loss is that of a step of 0.2."""
    one, ids = torch.ones(1, 1), torch.zeros(1, 2, dtype=torch.int64)
    rows = Rows(torch.zeros(1, dtype=torch.int64), {
        "input_ids": ids, "attention_mask": ids, "completion_mask": one, "ref_logprobs": 0 * one, "scores": one[0],
        "old_logprobs": 0 * one, "old_values": 0 * one, "advantages": 0 * one, "returns": one,
    })  # fmt: skip
    losses, _ = ppo(cliprange_value=0.2, vf_coef=1.0, max_completion_length=1).row_losses(FixedPolicy(0 * one, one), rows)
    assert losses.tolist() == pytest.approx([0.5 * 0.8**2])


# Rollouts ----------------------------------------------------------------------------------------------------


def collected(algorithm: PPO, units: int, kind: str = "gpt2", policy: Policy | None = None) -> Rows:
    policy = policy or tiny_policy(kind)
    if not policy.adapters:
        algorithm.setup(policy)
    examples = encode_units(algorithm, policy, [[{"prompt": words(1 + i % 4, i)}] for i in range(units)])
    torch.manual_seed(3)
    return algorithm.rows(policy, examples, None)


def test_a_completion_without_eos_pays_the_penalty():
    rows = collected(ppo(score=0.75, missing_eos_penalty=0.5, max_completion_length=8), 200)
    rollouts = rollouts_of(rows)
    ended = (rollouts.completion_ids == EOS).any(1)
    assert 5 < ended.sum() < 195
    assert rows.tensors["scores"].tolist() == [0.75 if e else 0.25 for e in ended.tolist()]
    # The mask counts the EOS itself and nothing after it.
    lengths = rollouts.completion_mask.sum(1).long()
    last = rollouts.completion_ids.gather(1, lengths.unsqueeze(1) - 1).squeeze(1)
    assert bool((last[ended] == EOS).all()) and bool((lengths[~ended] == 8).all())


def test_min_completion_length_is_part_of_the_law():
    algorithm = ppo(max_completion_length=6, min_completion_length=3)
    policy = tiny_policy("gpt2")
    algorithm.setup(policy)
    rollouts = rollouts_of(collected(algorithm, 300, policy=policy))
    assert not (rollouts.completion_ids[:, :3] == EOS).any() and (rollouts.completion_ids[:, 3:] == EOS).any()
    with torch.no_grad():
        logprobs, _ = policy.completion_logprobs(rollouts, 3)
        logits, _ = policy(rollouts.input_ids[:, :-1], rollouts.attention_mask[:, :-1], 6)
    logits[:, :3, EOS] = -math.inf
    expected = logits.log_softmax(2).gather(2, rollouts.completion_ids.unsqueeze(2)).squeeze(2)
    assert torch.allclose(logprobs, expected * rollouts.completion_mask, atol=1e-5)
    ignoring = policy.completion_logprobs(rollouts, 0)[0]
    assert (ignoring - logprobs)[:, :3].max() < -1e-4  # EOS's share was given to the others


def goodness(completions: Tensor, probabilities: Tensor) -> float:
    """p-value of the completions' tokens under the probabilities."""
    counts = torch.bincount(completions, minlength=len(probabilities)).double()
    expected = probabilities.double() / probabilities.double().sum() * len(completions)
    assert expected.min() > 5
    return float(chisquare(counts.numpy(), expected.numpy()).pvalue)


def test_generation_is_on_policy_whatever_the_base_prefers():
    base = tiny_base("gpt2")
    base.generation_config.update(do_sample=True, top_k=5, temperature=0.5, repetition_penalty=3.0, top_p=0.5)
    policy = Policy(base, tiny_tokenizer())
    prompt = torch.tensor([[7, 8, 9]])
    ids, mask = prompt.expand(20_000, 3), torch.ones(20_000, 3, dtype=torch.int64)
    with torch.no_grad():
        probabilities = policy(prompt, mask[:1], 1)[0][0, 0].softmax(0)
    torch.manual_seed(0)
    drawn = policy.generate(ids, mask, 1).completion_ids[:, 0]
    assert goodness(drawn, probabilities) > 1e-3
    for other in ({"top_p": 0.9}, {"temperature": 0.9}):
        assert goodness(policy.generate(ids, mask, 1, **other).completion_ids[:, 0], probabilities) < 1e-9


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_left_padding_changes_nothing(kind):
    policy = tiny_policy(kind)
    policy.add_value_head()
    torch.nn.init.normal_(policy.value_head.weight)
    prompt, completion = [7, 8, 9], torch.tensor([[11, 12, 13, 14]])

    def measured(width: int) -> Tensor:
        ids, mask = policy.encode_prompts([prompt], width)
        inside = torch.ones(1, 4)
        rollouts = Rollouts(torch.cat([ids, completion], 1), torch.cat([mask, inside.long()], 1), inside)
        with torch.no_grad():
            return torch.cat(policy.completion_logprobs(rollouts))

    assert (measured(3) - measured(11)).abs().max() < 1e-5
    policy._accepts_positions = False  # positions counted from the padding instead of from the mask
    assert kind == "llama" or (measured(3) - measured(11)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_on_policy_shortcut_is_the_first_pass(kind):
    def first_pass(epochs: int) -> tuple[Tensor, Tensor]:
        algorithm = ppo(num_ppo_epochs=epochs, max_completion_length=5, beta=0.3, num_generations=2)
        algorithm.reward = Reward(lambda p, completions, **_: [len(c) / 10 for c in completions], -5, 5)
        policy = tiny_policy(kind)
        policy.add_adapter("sft", AdapterConfig(r=2))
        algorithm.setup(policy)
        torch.manual_seed(1)
        trained = [p for p in policy.parameters() if p.requires_grad]
        for p in trained:
            torch.nn.init.normal_(p, std=0.2)
        rows = collected(algorithm, 6, policy=policy)
        assert ("old_logprobs" not in rows.tensors) == (epochs == 1)
        losses, _ = algorithm.row_losses(policy, rows.of(list(range(6))))
        losses.sum().backward()
        return losses.detach(), torch.cat([p.grad.flatten() for p in trained])

    (losses, gradient), (stored_losses, stored_gradient) = first_pass(1), first_pass(2)
    assert len(losses) == 12 and gradient.norm() > 1e-2
    assert (losses - stored_losses).abs().max() < 1e-5
    assert (gradient - stored_gradient).abs().max() < 1e-5 * max(1.0, float(gradient.norm()))


# What adapts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "factor"), [(3.0, 1 + 0.2 * 8 / 100), (2.2, 1 + 0.1 * 8 / 100), (-50, 1 - 0.2 * 8 / 100)]
)
def test_adaptive_kl_moves_by_the_noised_kl_and_nothing_else(kl, factor):
    algorithm = ppo(beta=0.5, adaptive_kl_target=2.0, adaptive_kl_horizon=100, max_completion_length=4)
    policy = tiny_policy("gpt2")
    algorithm.setup(policy)
    rows = collected(algorithm, 8, policy=policy)
    far = rows.tensors | {"ref_logprobs": rows.tensors["ref_logprobs"] - 9}
    algorithm.row_losses(policy, Rows(rows.unit, far).of([0, 1]))
    algorithm.adapt({"reward": 3.0, "kl": kl, "completion_length": 4.0})
    assert algorithm.beta == pytest.approx(0.5 * factor)
    other = ppo(beta=0.5)
    other.load_state(algorithm.state())
    other.adapt({"reward": 3.0, "kl": kl, "completion_length": 4.0})  # not asked to adapt
    assert other.beta == algorithm.beta and other.baseline == 0


def test_the_baseline_follows_the_noised_reward():
    algorithm = ppo(noised_baseline=True)
    for reward in (1.0, 2.0):
        algorithm.adapt({"reward": reward, "kl": 0.0, "completion_length": 4.0})
    assert algorithm.baseline == pytest.approx(0.3 + 0.3 * 1.7)
    with pytest.raises(DPAlignError, match="metrics_noise_ratio > 0"):
        PPOConfig(noised_baseline=True, metrics_noise_ratio=0).validate()


def test_evaluation_gives_the_reward_its_columns():
    policy = tiny_policy("llama")
    config = PPOConfig(max_completion_length=4, reward=RewardConfig(columns=["score"]))
    records = [{"prompt": f"w{i} w2", "score": i / 4} for i in range(4)]
    reward = Reward(lambda prompts, completions, score: score, 0.0, 1.0)
    result, texts = evaluate_policy(policy, public_prompts(policy, records, config), reward, config)
    assert result.reward == pytest.approx((0 + 1 + 2 + 3) / 16) and len(texts) == 4
    result, _ = evaluate_policy(policy, public_prompts(policy, records, config, at_most=2), reward, config)
    assert result.prompts == 2 and result.reward == pytest.approx(1 / 8)
