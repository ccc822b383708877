"""`sft_coefficient` holds a policy to what its stage started from, on that model's own texts."""

from __future__ import annotations

import json

import pytest
import torch

from dpalign import DPPPOTrainer, PPOConfig, Privacy
from dpalign.algorithms import PPOConfig as PPOSettings
from dpalign.algorithms.anchor import AT_ONCE, TEXTS, Anchor, divergences
from dpalign.models import AdapterConfig
from tiny import tiny_folder, tiny_policy, words


def policy_at(scale: float):
    """A policy whose newest adapter has moved so far from what it started from."""
    policy = tiny_policy("llama")
    policy.add_adapter("ppo", AdapterConfig(r=2))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(0, scale) if scale else p.zero_()
    return policy


def settings(**changes):
    lengths = {"max_prompt_length": 4, "prompt_max_tokens": 3, "max_completion_length": 5, "micro_batch_size": 48}
    return PPOSettings(**lengths | {"sft_coefficient": 2.0} | changes)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_is_that_of_whole_laws(temperature):
    policy, anchor = policy_at(0.5), Anchor(settings())
    written = anchor._written(policy)
    whole = written.completion_mask.all(1)
    texts = written[torch.cat([(~whole).nonzero()[:3, 0], whole.nonzero()[:3, 0]])]  # three that end early
    assert texts.completion_mask.sum() < texts.completion_mask.numel()
    assert texts.input_ids.shape == (6, 9) and (texts.input_ids[:, 0] == 1).all()  # BOS and 3 + 5 tokens
    policy.eval()
    laws = []
    for adapters in ([], ["ppo"]):
        with torch.no_grad(), policy.only(adapters):
            logits = policy.model(texts.input_ids).logits[:, :-1].double() / temperature
            laws.append(logits.log_softmax(-1))
    each = torch.nn.functional.kl_div(laws[1], laws[0], log_target=True, reduction="none").sum(-1)
    expected = (each * texts.completion_mask).sum(1)
    found = divergences(policy, texts, temperature)
    assert (expected > 0.01).all() and torch.allclose(found.double(), expected, rtol=1e-4)


def gradients(policy):
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def test_its_gradient_is_added_to_the_noised_one_and_is_zero_at_the_start():
    policy = policy_at(0.0)
    trained = [p for p in policy.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.full_like(p, 3.0)
    Anchor(settings()).add_gradient(policy, 0)
    assert all(torch.allclose(p.grad, torch.tensor(3.0), atol=1e-6) for p in trained)

    policy, anchor = policy_at(0.3), Anchor(settings())
    for p in (p for p in policy.parameters() if p.requires_grad):
        p.grad = torch.full_like(p, 3.0)
    anchor.add_gradient(policy, 1)
    added = {name: gradient - 3 for name, gradient in gradients(policy).items()}
    policy.zero_grad()
    texts = anchor._written(policy)[AT_ONCE : 2 * AT_ONCE]  # of the second update
    (2 * divergences(policy, texts, 1.0).sum() / texts.completion_mask.sum()).backward()
    expected = gradients(policy)
    assert added.keys() == expected.keys() and max(g.abs().max() for g in expected.values()) > 1e-3
    assert all(torch.allclose(added[name], expected[name], atol=1e-5) for name in expected)


def test_the_same_seed_has_the_same_texts_and_nobody_elses_coins():
    policy, other = policy_at(0.3), policy_at(0.0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    texts = Anchor(settings())._written(policy)
    assert torch.equal(torch.rand(3), expected) and len(texts.input_ids) == TEXTS
    assert torch.equal(Anchor(settings())._written(other).input_ids, texts.input_ids)  # of what they started from
    assert not torch.equal(Anchor(settings(seed=1))._written(policy).input_ids, texts.input_ids)


def scripted(prompts, completions):
    return [min(len(text), 40) / 40 for text in completions]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_folder("llama", tmp_path_factory.mktemp("base") / "base"))


@pytest.mark.parametrize("prompts", ["private", "self_written"])
def test_a_policy_that_is_held_stays(prompts, base, tmp_path, monkeypatch):
    monkeypatch.setattr("dpalign.algorithms.anchor.TEXTS", 64)
    monkeypatch.setattr("dpalign.algorithms.anchor.AT_ONCE", 16)
    kl = {}
    for coefficient in (0.0, 1e4):
        folder = tmp_path / str(coefficient)
        args = PPOConfig(
            output_dir=str(folder), expected_batch_size=8, micro_batch_size=8, max_steps=8, learning_rate=0.05,
            lr_scheduler_type="linear", prompts=prompts, max_prompt_length=8, prompt_max_tokens=4, max_completion_length=5,
            sft_coefficient=coefficient, eval_steps=8, insecure_seed=4 if prompts == "private" else None,
        )  # fmt: skip
        private = {"dataset_name": "toy", "noise_multiplier": 1.0} if prompts == "private" else {}
        told = {"model_is_public": True, "reward_is_public": True, "reward_range": (0, 1), "eval_is_public": True}
        rows = [{"prompt": words(3, seed)} for seed in range(16)] if prompts == "private" else None
        shown = [{"prompt": words(3, seed)} for seed in range(50, 82)]
        privacy = Privacy(**told, **private, ledger=str(folder) + ".sqlite")
        DPPPOTrainer(base, args, rows, shown, reward_funcs=scripted, privacy=privacy, quiet=True).train()
        kl[coefficient] = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])["measured"]["kl"]
    assert kl[0.0] > 0.3 and abs(kl[1e4]) < kl[0.0] / 3
