"""Whole weights: `adapter.kind: full` is a full fine-tuning that is released, resumed and built upon as an adapter is."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpalign.algorithms import SFT, SFTConfig
from dpalign.algorithms.base import encode_units, micro_batches, unit_means
from dpalign.errors import DPAlignError
from dpalign.gradients import PerUnitGradients
from dpalign.models import AdapterConfig, ModelConfig, Policy
from dpalign.models.whole import WholeLinear
from dpalign.privacy.entropy import SystemEntropy
from dpalign.privacy.mechanism import GaussianMechanism
from dpalign.privacy.products import Products, measure
from dpalign.training.loop import unit_gradients
from helpers import call, in_fresh_process, reviews, statement, write_jsonl, write_recipe
from test_chats import chat_recipe
from test_gradients import GROUPS, ONE_ROW_EACH, UNITS, one_by_one, row_losses, some_rollouts, trainable
from test_resume import kill_after
from tiny import tiny_folder, tiny_policy, words

FULL = AdapterConfig(kind="full")


def whole_policy(kind: str, checkpointing: bool = False, head: bool = True) -> Policy:
    """All linear layers and perhaps a value head, all random."""
    policy = tiny_policy(kind)
    policy.add_adapter("stage", FULL)
    if head:
        policy.add_value_head()
    move(policy)
    policy.checkpoint_activations(checkpointing)
    return policy


def move(policy: Policy, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in trainable(policy):
            p.add_(0.05 * torch.randn_like(p))


def layers(policy: Policy) -> list[WholeLinear]:
    return [m for m in policy.modules() if isinstance(m, WholeLinear)]


def logits(policy: Policy, seed: int = 2) -> Tensor:
    rollouts = some_rollouts(3, seed)
    with torch.no_grad():
        return policy(rollouts.input_ids, rollouts.attention_mask, rollouts.input_ids.shape[1])[0]


def mechanism_of(gradients: PerUnitGradients) -> GaussianMechanism:
    return GaussianMechanism(
        [p.shape for p in gradients.parameters],
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        divisor=1.0,
        entropy=SystemEntropy(),
        products=True,
    )


def summed(held: GaussianMechanism) -> list[Tensor]:
    held._settle()
    return held._sums


ONE = [{"text": words(40, 50)}]
LONG, SHORT = [[{"text": words(40, i)}] for i in range(7)], [[{"text": "w1 w2"}] for _ in range(6)]
PERSON = [{"text": words(i + 3, i)} for i in range(3)]
COMPANIES = {"first": [ONE, *LONG], "end": [*LONG, ONE], "last": [*LONG, *SHORT[:2], ONE], "alone": [ONE]}
COMPANIES |= {"persons": [PERSON, ONE, PERSON, *LONG], "short": [*SHORT[:3], ONE, *SHORT[3:]]}


# Gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("row_unit", [ONE_ROW_EACH, GROUPS], ids=["one row each", "groups"])
def test_gradients_are_those_of_a_loop_over_units(kind, row_unit, checkpointing):
    policy, rollouts = whole_policy(kind, checkpointing), some_rollouts(len(row_unit))
    expected = one_by_one(policy, rollouts, row_unit).double()
    policy.zero_grad()
    gradients = PerUnitGradients(policy)
    with gradients.collect(row_unit, UNITS):
        unit_means(row_losses(policy, rollouts), row_unit, UNITS).sum().backward()
    grads = gradients.grads()
    assert sum(isinstance(g, Products) for g in grads) == len(layers(policy)) == len(grads) - 2  # the value head's
    found = torch.cat([(g.dense() if isinstance(g, Products) else g.double()).flatten(1) for g in grads], 1)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_a_layer_that_takes_no_part_is_named():
    policy = whole_policy("gpt2", head=False)
    gradients = PerUnitGradients(policy)
    with gradients.collect(ONE_ROW_EACH, UNITS):
        pass
    with pytest.raises(DPAlignError, match=r"c_attn.*took no part in the loss"):
        gradients.grads()


def test_rows_that_are_mixed_are_refused():
    policy = whole_policy("gpt2", head=False)
    gradients, layer = PerUnitGradients(policy), layers(policy)[0]
    with gradients.collect(ONE_ROW_EACH, UNITS), pytest.raises(DPAlignError, match="rows of the micro-batch"):
        layer(torch.zeros(1, UNITS, layer.in_features))


# The stack ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_weight_is_the_layers_own(kind):
    """A model whose weights are those sums is the same model; the reference is the one before."""
    policy, plain = whole_policy(kind, head=False), tiny_policy(kind)
    before = logits(plain)
    with policy.reference():
        assert torch.equal(logits(policy), before)
    modules = dict(plain.model.named_modules())
    for name, layer in policy.model.get_base_model().named_modules():
        if isinstance(layer, WholeLinear):
            modules[name].weight.data += layer.get_delta_weight("stage")
    assert torch.allclose(logits(policy), logits(plain), atol=1e-5) and not torch.allclose(before, logits(plain))
    with policy.merged():
        assert torch.allclose(logits(policy), logits(plain), atol=1e-5)


def test_stages_stand_on_each_other():
    """Whole on whole, LoRA on whole, whole on LoRA: the reference is the stack without the newest, and one adapter is all."""
    policy = tiny_policy("gpt2")
    for number, config in enumerate((FULL, AdapterConfig(r=2), FULL, AdapterConfig(r=3, target_modules="all-linear"))):
        before = logits(policy)
        policy.add_adapter(f"stage{number}", config)
        assert torch.allclose(logits(policy), before, atol=1e-5)
        move(policy, number)
        assert not torch.allclose(logits(policy), before, atol=1e-3)
        with policy.reference():
            assert torch.allclose(logits(policy), before, atol=1e-5)
        policy.finish_stage()
    assert {name.split(".")[-2] for name in policy.stage_state()} == {"stage3"}
    plain, modules = tiny_policy("gpt2"), {}
    modules = dict(plain.model.named_modules())
    for name, (down, up) in policy.concatenated().items():
        modules[name].weight.data += (up @ down).T
    assert torch.allclose(logits(policy), logits(plain), atol=1e-4)
    policy.drop_newest()
    policy.drop_newest()
    assert policy.adapters == ["stage0", "stage1"] and all(set(m.whole) == {"stage0"} for m in layers(policy))


def test_ordinary_gradients_are_the_same():
    """Of text that the model writes itself: backward without a collector."""
    policy, rollouts = whole_policy("gpt2"), some_rollouts(UNITS)
    gradients = PerUnitGradients(policy)
    with gradients.collect(ONE_ROW_EACH, UNITS):
        row_losses(policy, rollouts).sum().backward()
    found = [g.dense().sum(0) if isinstance(g, Products) else g.double().sum(0) for g in gradients.grads()]
    row_losses(policy, rollouts).sum().backward()
    for p, expected in zip(gradients.parameters, found, strict=True):
        assert p.grad is not None and torch.allclose(p.grad.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_reward_model_takes_whole_weights_over():
    policy = whole_policy("gpt2", head=False)
    policy.finish_stage()
    other = tiny_policy("gpt2")
    other.copy_adapters(policy)
    assert torch.equal(logits(other), logits(policy)) and len(layers(other)) == len(layers(policy))
    assert not trainable(other)


def test_a_release_is_plain_peft_and_is_read_as_whole_weights(tmp_path):
    folder = tiny_folder("llama", tmp_path / "base")
    policy = Policy.load(ModelConfig(str(folder), is_public=True, dtype="float32"))
    policy.add_adapter("sft", FULL)
    move(policy)
    policy.save_adapter(tmp_path / "release", str(folder))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "release")
    rollouts = some_rollouts(3)
    theirs = plain(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask).logits
    again = Policy.load(ModelConfig(str(tmp_path / "release"), is_public=True, dtype="float32"))
    assert len(layers(again)) == len(layers(policy)) and all(layer.whole for layer in layers(again))
    mask = rollouts.attention_mask.bool()
    for found in (logits(policy), logits(again)):
        assert torch.allclose(found[mask], theirs[mask], atol=1e-4)


@pytest.mark.parametrize("config", [FULL, AdapterConfig(r=2, target_modules="all-linear")], ids=["full", "lora"])
def test_a_gate_of_one_number_keeps_its_gap(config):
    """What makes a sigmoid take its numbers one by one, also where the gate is adapted."""
    policy = tiny_policy("qwen2_moe")
    policy.add_adapter("stage", config)
    policy.add_adapter("second", config)
    gates = [m for m in policy.modules() if isinstance(m, LoraLayer) and m.out_features == 1]
    assert gates and all(gate(torch.randn(2, 5, gate.in_features)).stride()[-2] == 2 for gate in gates)


def test_on_a_base_in_parts_a_release_stays_an_adapter(tmp_path, monkeypatch):
    """Whose layers have no weight of their own to be added to."""
    folder = tiny_folder("llama", tmp_path / "base")
    policy = Policy.load(ModelConfig(str(folder), is_public=True, dtype="float32"))
    policy.add_adapter("sft", FULL)
    move(policy)
    policy.save_adapter(tmp_path / "release", str(folder))
    monkeypatch.setattr("dpalign.models.whole.is_placeholder", lambda weight: True)
    again = Policy.load(ModelConfig(str(tmp_path / "release"), is_public=True, dtype="float32"))
    assert not layers(again) and torch.allclose(logits(again), logits(policy), atol=1e-4)
    with pytest.raises(DPAlignError, match=r"in parts: set model\.dtype"):
        again.add_adapter("second", FULL)


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fewer_bits_are_refused(dtype):
    policy = tiny_policy("gpt2", dtype)
    with pytest.raises(DPAlignError, match=r"c_attn is held in b?float16, or in parts: set model.dtype to float32"):
        policy.add_adapter("stage", FULL)


@pytest.mark.parametrize("setting, value", [("r", 8), ("lora_alpha", 4), ("freeze_a", "true"), ("init_rows", 7)])
def test_settings_of_lora_are_refused_beside_it(tmp_path, capsys, setting, value):
    write_recipe(tmp_path, sft={"adapter": {"kind": "full", "r": 4}})
    done = call(capsys, "run", tmp_path / "recipe.yaml", f"--sft.adapter.{setting}", value)
    assert done.status == 1 and setting in done.err and "whole weights" in done.err
    assert not (tmp_path / "ledger.sqlite").exists()


# The pipeline -------------------------------------------------------------------------------------------------------

STEPS = 4
WHOLE = {
    "sft": {"max_steps": STEPS, "save_steps": 2, "adapter": {"kind": "full", "r": None}},
    "ppo": {"max_steps": STEPS, "save_steps": 2, "adapter": {"kind": "full", "r": None, "target_modules": ["q_proj", "up_proj"], "layers": [0]}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two stages of whole weights, killed in the first and resumed: folder, standard error."""
    folder = tmp_path_factory.mktemp("whole")
    write_recipe(folder, **WHOLE)
    kill_after(folder, 3)
    status, _, err = in_fresh_process(folder, "run", folder / "recipe.yaml", "--json")
    assert status == 0, err
    return folder, err


def test_a_run_is_killed_resumed_and_released(finished):
    folder, err = finished
    assert "stage sft resumes after step 2 of 4" in err
    stated = statement(folder / "run")
    assert stated["private"] and stated["epsilon"] <= 2 and len(stated["stages"]) == 2
    config = json.loads((folder / "run" / "release" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["modules_to_save"] is None
    tensors = load_file(folder / "run" / "release" / "adapter_model.safetensors")
    changed = [name for name, t in tensors.items() if len(t) != t.shape[1] or not torch.equal(t, torch.eye(len(t)))]
    assert len(changed) == 7 and all(bool(tensors[name].any()) for name in changed)  # of one layer of a Llama


def test_a_release_of_whole_weights_is_used_like_any_other(finished, tmp_path, capsys):
    folder, _ = finished
    release = folder / "run" / "release"
    said = call(capsys, "generate", release, "--prompt", "The evening", "--max_completion_length", 5)
    assert said.status == 0
    done = call(capsys, "export", release, "--to", tmp_path / "merged", "--merge")
    assert done.status == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    ours = Policy.load(ModelConfig(str(release), is_public=True))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(ours(ids, torch.ones_like(ids), 4)[0], theirs(ids).logits, atol=1e-4)


def test_another_private_stage_on_such_a_release(finished, tmp_path, capsys):
    """Its own past counts, and its weights are the base that the new adapter stands on."""
    folder, _ = finished
    write_jsonl(tmp_path / "data.jsonl", reviews(64, marker="morning"))
    base = {"name_or_path": str(folder / "run" / "release")}
    path = write_recipe(tmp_path, model=base, sft={"max_steps": 1}, ppo=None, data={"name": "others"}, units_disjoint="declared")
    shutil.copy(folder / "ledger.sqlite", tmp_path / "ledger.sqlite")
    done = call(capsys, "run", path, "--json")
    assert done.status == 0, done.err
    assert {stage["stage"] for stage in statement(tmp_path / "run")["stages"]} >= {"sft", "ppo"}


def test_an_audit_sees_a_norm_that_is_measured_too_small(tmp_path, capsys, monkeypatch):
    def halved(factors):
        found = measure(factors)
        return replace(found, norm=found.norm / 2)

    monkeypatch.setattr("dpalign.privacy.mechanism.measure", halved)
    path = write_recipe(tmp_path, sft={"adapter": {"kind": "full", "r": None}}, ppo=None)
    done = call(capsys, "audit", path, "--canaries", 20)
    assert done.status == 1 and re.search(r"step +│ clip +│ [12]\.\d+ +│ 1 ", done.out)


def test_reward_model_and_rl_of_whole_weights_on_chats(tmp_path, capsys):
    """Preferences of people, a reward model, and a stage that learns from it, whose completions are read in chats."""
    stage = {"adapter": {"kind": "full", "r": None}}
    done = call(capsys, "run", chat_recipe(tmp_path, sft=stage, reward_model=stage, rloo=stage), "--json").json
    assert done["epsilon"] <= 2 and {s["stage"] for s in statement(tmp_path / "run")["stages"]} == {"sft", "reward_model", "rloo"}
    scores = load_file(tmp_path / "run" / "reward_model" / "adapter_model.safetensors")
    assert all(bool(t.any()) for t in scores.values()) and len(scores) == 15  # of seven layers, and the head


def test_processes_make_the_same_sum():
    """Integers: what two processes add of one sample is what one adds."""
    policy, rollouts = whole_policy("gpt2", head=False), some_rollouts(UNITS)
    gradients = PerUnitGradients(policy)
    with gradients.collect(ONE_ROW_EACH, UNITS):
        row_losses(policy, rollouts).sum().backward()
    grads, alone, first, second = gradients.grads(), *(mechanism_of(gradients) for _ in range(3))
    alone.add(grads)
    first.add([g[slice(0, 1)] for g in grads])
    second.add([g[slice(1, UNITS)] for g in grads])

    def add_up(sums):
        if sums is first._sums:
            for ours, theirs in zip(sums, summed(second), strict=True):
                ours += theirs

    first.combine(add_up)
    assert all(torch.equal(a, b) for a, b in zip(summed(alone), first._sums, strict=True))
    assert sum(bool(total.any()) for total in alone._sums) == len(alone._sums)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_who_shares_a_micro_batch_moves_no_integer_of_a_unit(kind):
    """Of whole weights and a micro-batch of eight: the same person's integers, wherever and beside whom they are."""
    policy, algorithm = tiny_policy(kind), SFT(SFTConfig(adapter=FULL, micro_batch_size=8, max_length=24))
    algorithm.setup(policy)
    move(policy)
    gradients, found = PerUnitGradients(policy), {}
    for name, units in COMPANIES.items():
        rows = algorithm.rows(policy, encode_units(algorithm, policy, units), None)
        for part in micro_batches(rows, list(range(len(units))), algorithm.examples_at_once, algorithm.rows_at_once):
            if units.index(ONE) not in part:
                continue
            grads, _ = unit_gradients(policy, algorithm, gradients, rows.of(part), algorithm.examples_at_once)
            place = part.index(units.index(ONE))
            held = mechanism_of(gradients)
            held.add([g[slice(place, place + 1)] for g in grads])
            alone = torch.cat([total.flatten() for total in summed(held)])
            beside = mechanism_of(gradients)
            beside.add(grads)
            others = mechanism_of(gradients)
            others.add([g[slice(0, place)] for g in grads])
            others.add([g[slice(place + 1, None)] for g in grads])
            both = zip(summed(beside), summed(others), strict=True)
            assert torch.equal(torch.cat([(a - b).flatten() for a, b in both]), alone)
            found[name] = alone
    assert set(found) == set(COMPANIES) and all(torch.equal(f, found["alone"]) for f in found.values())
    assert found["alone"].double().norm() > 0.9 * 2**40 / 2
