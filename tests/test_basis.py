"""Input directions of a frozen A: what they are, and that no record is read for them."""

import pytest
import torch

from dpalign.algorithms import PPO, PPOConfig, SFTConfig
from dpalign.algorithms.base import encode_units
from dpalign.algorithms.basis import leading_inputs
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig
from dpalign.rewards import Reward
from tiny import tiny_policy

ADAPTER = AdapterConfig(r=2, freeze_a=True, init_a="synthetic_gradient", init_rows=64)


def ppo(reward=lambda prompts, completions, **_: [float("w3" in c.split()) for c in completions]) -> PPO:
    return PPO(PPOConfig(adapter=ADAPTER, max_completion_length=5, prompt_max_tokens=3), Reward(reward, 0.0, 1.0))


def test_leading_inputs_are_the_best_low_rank_input_space():
    torch.manual_seed(0)
    gradient = torch.randn(7, 2) @ torch.randn(2, 5)
    rows = leading_inputs(gradient, 2)
    assert torch.allclose(rows @ rows.T, torch.eye(2), atol=1e-5)
    assert torch.allclose(gradient @ rows.T @ rows, gradient, atol=1e-4)
    assert not torch.allclose(gradient @ rows[:1].T @ rows[:1], gradient, atol=1e-1)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_is_orthonormal_and_frozen_and_nothing_else_changes(kind):
    policy = tiny_policy(kind)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    torch.manual_seed(0)
    ppo().setup(policy)
    a = {n: p for n, p in policy.named_parameters() if "lora_A" in n}
    assert a and not any(p.requires_grad for p in a.values())
    assert all(torch.allclose(p @ p.T, torch.eye(2), atol=1e-4) for p in a.values())
    assert all("lora_B" in n or n.startswith("value_head") for n, p in policy.named_parameters() if p.requires_grad)
    assert all(p.grad is None for p in policy.parameters())
    after = {n.replace("base_model.model.", "").replace("base_layer.", ""): p for n, p in policy.named_parameters()}
    assert all(torch.equal(after[n], p) for n, p in before.items())


def test_the_directions_depend_on_the_reward_and_not_on_records():
    def directions(algorithm: PPO, records: list) -> torch.Tensor:
        policy = tiny_policy("llama")
        assert all(encode_units(algorithm, policy, records))
        torch.manual_seed(0)
        algorithm.setup(policy)
        return torch.cat([p.flatten() for n, p in policy.named_parameters() if "lora_A" in n])

    one = directions(ppo(), [[{"prompt": "w1"}]])
    assert torch.equal(one, directions(ppo(), [[{"prompt": "w9 w9"}]] * 3))
    other = ppo(lambda prompts, completions, **_: [float("w8" in c.split()) for c in completions])
    assert not torch.allclose(one, directions(other, [[{"prompt": "w1"}]]), atol=1e-2)


def test_sft_has_no_synthetic_gradient():
    with pytest.raises(DPAlignError, match="for stages that sample completions"):
        SFTConfig(adapter=ADAPTER).validate()
    PPOConfig(adapter=ADAPTER).validate()
