"""Stacked adapters: what trains, what is frozen, what generation sees."""

import pytest
import torch

from dpalign.models import AdapterConfig, Policy
from tiny import tiny_policy


def stacked(kind: str = "llama") -> Policy:
    policy = tiny_policy(kind)
    policy.add_adapter("sft", AdapterConfig(r=2))
    torch.manual_seed(0)
    for name, p in policy.named_parameters():
        if ".sft." in name:
            torch.nn.init.normal_(p, std=0.3)
    policy.finish_stage()
    policy.add_adapter("ppo", AdapterConfig(r=1, freeze_a=True))
    for name, p in policy.named_parameters():
        if "lora_B.ppo." in name:
            torch.nn.init.normal_(p, std=0.3)
    policy.add_value_head()
    return policy


def trainable(policy: Policy) -> set[str]:
    return {name for name, p in policy.named_parameters() if p.requires_grad}


def prompts(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    return policy.encode_prompts([[3, 4, 5], [6, 7], [8, 9, 10]], 4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_switching_adapters_never_changes_what_trains(kind):
    policy = stacked(kind)
    before = trainable(policy)
    assert before and all("lora_B.ppo." in n or n.startswith("value_head.") for n in before)
    ids, mask = prompts(policy)
    for switch in (policy.reference, policy.base, policy.merged):
        with switch():
            policy.generate(ids, mask, 3)
        assert trainable(policy) == before
    with policy.reference(), policy.merged():
        policy.generate(ids, mask, 3)
    assert trainable(policy) == before


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_merged_weights_are_the_same_law_and_leave_no_trace(kind):
    policy = stacked(kind)
    ids, mask = prompts(policy)
    original = {n: p.clone() for n, p in policy.named_parameters()}
    plain = policy(ids, mask, 4)[0]
    with policy.merged():
        merged = policy(ids, mask, 4)[0]
    assert (plain - merged).abs().max() < 1e-5
    assert all(torch.equal(p, original[n]) for n, p in policy.named_parameters())


def test_reference_is_the_model_before_the_newest_stage():
    policy, before = stacked(), tiny_policy("llama")
    ids, mask = prompts(policy)
    with policy.base():
        assert torch.equal(policy(ids, mask, 4)[0], before(ids, mask, 4)[0])
    with policy.reference():
        reference = policy(ids, mask, 4)[0]
        with policy.merged():
            assert (policy(ids, mask, 4)[0] - reference).abs().max() < 1e-5
    for name, p in policy.named_parameters():
        if "lora_B.ppo." in name:
            p.data.zero_()
    assert (policy(ids, mask, 4)[0] - reference).abs().max() < 1e-6
    assert (reference - before(ids, mask, 4)[0]).abs().max() > 1e-2


def test_a_base_with_dropout_has_none():
    policy = tiny_policy("gpt2")
    policy.train()
    ids, mask = prompts(policy)
    assert torch.equal(policy(ids, mask, 4)[0], policy(ids, mask, 4)[0])
