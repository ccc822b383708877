"""Input directions of a frozen A: what they are, and that no record is read for them."""

import pytest
import torch

from dpalign.algorithms import DPO, PPO, SFT, DPOConfig, PPOConfig, SFTConfig
from dpalign.algorithms.base import encode_units
from dpalign.algorithms.basis import Sketch, align_to_activations, check_own_text, leading_inputs
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig
from dpalign.rewards import Reward, RewardConfig
from dpalign.training.self_check import check_stage
from tiny import tiny_policy

ADAPTER = AdapterConfig(r=2, freeze_a=True, init_a="synthetic_gradient", init_rows=64)


def share(words):
    """A reward: how many of a completion's five words are among these."""
    return lambda prompts, completions, **_: [len(set(c.split()) & words) / 5 for c in completions]


LOW, EVEN = {f"w{i}" for i in range(40)}, {f"w{i}" for i in range(0, 96, 2)}


def ppo(reward=None) -> PPO:
    config = PPOConfig(adapter=ADAPTER, max_completion_length=5, prompt_max_tokens=3)
    return PPO(config, Reward(reward or share(LOW), 0.0, 1.0))


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


def test_the_gradient_is_of_all_rollouts_each_once(monkeypatch):
    policy, written, read = tiny_policy("llama"), [], []
    sample, logprobs = policy.sample, policy.completion_logprobs
    monkeypatch.setattr(policy, "sample", lambda *a, **k: written.append(sample(*a, **k)) or written[-1])
    monkeypatch.setattr(policy, "completion_logprobs", lambda r, *a, **k: read.append(r.input_ids) or logprobs(r, *a, **k))
    torch.manual_seed(0)
    ppo().setup(policy)
    assert len(read) == 2 and torch.equal(torch.cat(read), written[-1].input_ids)  # 64 rows, 32 at once


def test_the_directions_depend_on_the_reward_and_not_on_records():
    def directions(algorithm: PPO, records: list) -> torch.Tensor:
        policy = tiny_policy("llama")
        assert all(encode_units(algorithm, policy, records))
        torch.manual_seed(0)
        algorithm.setup(policy)
        return torch.cat([p.flatten() for n, p in policy.named_parameters() if "lora_A" in n])

    one = directions(ppo(), [[{"prompt": "w1"}]])
    assert torch.equal(one, directions(ppo(), [[{"prompt": "w9 w9"}]] * 3))
    assert not torch.allclose(one, directions(ppo(share(EVEN)), [[{"prompt": "w1"}]]), atol=1e-2)


@pytest.mark.parametrize(("score", "what"), [(0.5, "says the same of 64"), (float("nan"), "cannot score any of 64")])
def test_a_reward_without_a_gradient_is_refused(score, what):
    policy = tiny_policy("llama")
    with pytest.raises(DPAlignError, match=f"synthetic_gradient: the reward {what} completions"):
        ppo(lambda prompts, completions, **_: [score] * len(completions)).setup(policy)
    assert not any(p.grad is not None for p in policy.parameters())


def test_a_reward_that_reads_columns_is_refused():
    """Self-written prompts have none, so that it would score something else, or nothing. Also as a part of a mean."""
    for reward in (
        RewardConfig(source="m:f", columns=["answer"]),
        RewardConfig(source="mean", of=[{"source": "vader"}, {"source": "m:f", "columns": ["answer"]}]),
    ):
        with pytest.raises(DPAlignError, match=r"reward\.columns answer: .* init_a synthetic_gradient"):
            PPOConfig(adapter=ADAPTER, reward=reward).validate()
        PPOConfig(reward=reward).validate()


def test_fewer_directions_than_a_rank_are_completed_and_more_than_inputs_refused():
    torch.manual_seed(0)
    gradient = torch.randn(3, 8)
    rows = leading_inputs(gradient, 5)
    assert torch.allclose(rows @ rows.T, torch.eye(5), atol=1e-5)
    assert torch.allclose(gradient @ rows[:3].T @ rows[:3], gradient, atol=1e-4)
    policy = tiny_policy("llama")
    inputs = policy.model.config.hidden_size
    for algorithm in (
        SFT(SFTConfig(adapter=AdapterConfig(r=inputs + 1, init_a="activations"), max_length=12)),
        PPO(PPOConfig(adapter=AdapterConfig(r=inputs + 1, init_a="synthetic_gradient")), Reward(share(LOW), 0.0, 1.0)),
    ):
        with pytest.raises(DPAlignError, match=f"adapter.r {inputs + 1}: a layer has {inputs} inputs"):
            algorithm.setup(tiny_policy("llama"))
        rewards = {"reward": algorithm.reward} if isinstance(algorithm, PPO) else {}
        with pytest.raises(DPAlignError, match=f"adapter.r {inputs + 1}: a layer has {inputs} inputs"):  # before a draw
            check_stage(policy, type(algorithm), algorithm.config, rewards, people=False, chats=False)
        assert not policy.adapters


# What a layer reads --------------------------------------------------------------------------------------------------

READS = AdapterConfig(r=2, freeze_a=True, init_a="activations", init_rows=24, target_modules="all-linear")


def moments(policy, length: int, rows: int) -> dict[str, torch.Tensor]:
    """The second moment of every linear layer's input, of the very texts that `align_to_activations` lets be written."""
    found: dict[str, torch.Tensor] = {}
    kept: list = []
    sample = policy.sample
    policy.sample = lambda *a, **k: kept.append(sample(*a, **k)) or kept[-1]
    torch.manual_seed(0)
    align_to_activations(policy, rows=rows, length=length, micro_batch_size=8)
    del policy.sample
    written = kept[-1]
    mask = written.attention_mask[:, :-1]
    hooks = []
    for name, module in policy.named_modules():
        if hasattr(module, "lora_A"):

            def seen(module, arguments, name=name):
                inputs = arguments[0][mask.bool()].double()
                found[name] = inputs.T @ inputs

            hooks.append(module.register_forward_pre_hook(seen))
    policy.logprobs(written.input_ids[:, :-1], mask, written.input_ids[:, 1:])
    for hook in hooks:
        hook.remove()
    assert written.attention_mask.sum(1).max() <= length
    return found


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_has_the_leading_directions_of_what_its_layer_reads_and_padding_is_not_read(kind):
    policy = tiny_policy(kind)
    policy.add_adapter("sft", READS)
    found = moments(policy, length=6, rows=24)
    assert found
    for name, moment in found.items():
        a = policy.get_submodule(name).lora_A["sft"].weight.detach().double()
        assert torch.allclose(a @ a.T, torch.eye(2, dtype=torch.float64), atol=1e-5)
        share = torch.trace(a @ moment @ a.T) / torch.linalg.eigvalsh(moment)[-2:].sum()
        assert share.item() > 1 - 1e-5, name


def test_a_sketch_is_of_all_that_was_added():
    torch.manual_seed(0)
    inputs = torch.randn(500, 400) * torch.logspace(1, -2, 400) + torch.linspace(0, 1, 400)  # more than a sketch has
    sketch = Sketch(400, 3)
    for part in inputs.split(70):
        sketch.add(part)
    exact = leading_inputs(inputs.double(), 3)
    assert torch.allclose((sketch.leading(3) @ exact.T).abs(), torch.eye(3, dtype=torch.float64), atol=0.02)
    one = torch.zeros(20, 40)
    one[:, 7] = 2.0  # a moment of rank 1
    single = Sketch(40, 3)
    single.add(one)
    found = single.leading(3)
    assert found[0].abs().argmax() == 7 and torch.allclose(found @ found.T, torch.eye(3, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize(("algorithm", "records"), [
    (SFT(SFTConfig(adapter=READS, max_length=12)), [{"text": "w1 w2"}, {"text": "w9 w9 w9"}]),
    (DPO(DPOConfig(adapter=READS, max_length=12)), [
        {"prompt": "w1", "chosen": "w2", "rejected": "w3"}, {"prompt": "w9", "chosen": "w9 w9", "rejected": "w1"},
    ]),
])  # fmt: skip
def test_the_directions_are_frozen_and_no_record_is_read_for_them(algorithm, records):
    def directions(record: dict) -> torch.Tensor:
        policy = tiny_policy("llama")
        assert all(encode_units(algorithm, policy, [[record]]))
        torch.manual_seed(0)
        algorithm.setup(policy)
        assert all("lora_B" in name for name, p in policy.named_parameters() if p.requires_grad)
        found = [p for n, p in policy.named_parameters() if "lora_A" in n]
        assert all(torch.allclose(p @ p.T, torch.eye(2), atol=1e-4) for p in found)
        return torch.cat([p.flatten() for p in found])

    assert torch.equal(*[directions(record) for record in records])


def test_dpo_on_its_own_pairs_has_them_too():
    config = DPOConfig(adapter=READS, prompts="self_written", max_prompt_length=9, max_completion_length=4)
    policy = tiny_policy("llama")
    torch.manual_seed(0)
    DPO.of(config)(config, Reward(lambda p, c, **_: [0.0] * len(c), 0.0, 1.0)).setup(policy)
    a = [p for name, p in policy.named_parameters() if "lora_A" in name]
    assert a and all(torch.allclose(p @ p.T, torch.eye(2), atol=1e-4) for p in a)


def test_a_text_without_room_is_refused_before_anything_is_drawn():
    policy = tiny_policy("llama")
    check_own_text("sft", policy, 3)  # BOS, and a token that is read before one that is learned
    with pytest.raises(DPAlignError, match=r"sft\.adapter\.init_a activations: .* at least 3 tokens .* reads 2"):
        check_own_text("sft", policy, 2)


def test_sft_has_no_synthetic_gradient():
    with pytest.raises(DPAlignError, match="for stages that sample completions"):
        SFTConfig(adapter=ADAPTER).validate()
    PPOConfig(adapter=ADAPTER).validate()


def test_a_stage_that_samples_has_a_gradient_instead():
    with pytest.raises(DPAlignError, match=r"init_a activations is for .*here it may be random or synthetic_gradient"):
        PPOConfig(adapter=READS).validate()
    with pytest.raises(DPAlignError, match="here it may be random or activations"):
        DPOConfig(adapter=ADAPTER).validate()
    SFTConfig(adapter=READS).validate()
    DPOConfig(adapter=READS).validate()
