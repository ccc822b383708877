"""A base in 4 or 8 bits: rows stay apart, gradients are those of the widened weights, plain peft loads the release.

What needs bitsandbytes is skipped where it is not installed (`pip install 'dpalign[quantized]'`).
"""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from conftest import FRESH
from dpalign import DPAlignError, DPRewardTrainer, DPSFTTrainer, Privacy, RewardModelConfig, SFTConfig
from dpalign.gradients import PerUnitGradients
from dpalign.models import AdapterConfig, ModelConfig, Policy, RewardModel, quantized, verify
from dpalign.models.quantized import KINDS, kind_of, prepare, settings_of
from dpalign.training.loop import hash_of
from helpers import call, judged, reviews, small_model, write_recipe

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


# What is asked for ----------------------------------------------------------------------------------------------------


def test_the_missing_package_is_named_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    called = call(capsys, "run", write_recipe(tmp_path), "--model.quantization", "nf4")
    assert called.status == 1
    assert "quantization nf4 needs the package bitsandbytes: pip install 'dpalign[quantized]'." in called.err
    assert "release" not in {path.name for path in (tmp_path / "run").iterdir()}
    assert settings_of("none", "float32") == {}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_read_from_transformers_own_configuration(kind):
    config = BitsAndBytesConfig(**KINDS[kind])
    assert kind_of(config, "float32") == kind_of(config.to_dict(), "float32") == kind
    assert kind_of(None, "bfloat16") == "none"
    if kind != "int8":
        config.bnb_4bit_compute_dtype = torch.bfloat16
        assert kind_of(config, "bfloat16") == kind
        with pytest.raises(DPAlignError, match=r"bnb_4bit_compute_dtype torch\.bfloat16 and a model in float32"):
            kind_of(config, "float32")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            BitsAndBytesConfig(load_in_8bit=True),
            r"^llm_int8_threshold=6.0: with an outlier threshold, a feature in which",
        ),
        (
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_has_fp16_weight=True),
            "llm_int8_has_fp16",
        ),
        (BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"]), "llm_int8_skip_modules="),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="float32"), "bnb_4bit_quant_storage="),
        (BitsAndBytesConfig(), "neither load_in_4bit nor load_in_8bit"),
        ({"quant_method": "gptq", "bits": 4}, "only transformers' BitsAndBytesConfig is read here"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(given, said):
    with pytest.raises(DPAlignError, match=said):
        kind_of(given, "float32")


def test_layers_that_couple_records_are_refused_wherever_they_come_from():
    class Linear8bitLt(torch.nn.Linear):
        state = SimpleNamespace(threshold=0.0, has_fp16_weights=False)

    model = torch.nn.Sequential(Linear8bitLt(2, 2))
    prepare(model)
    Linear8bitLt.state = SimpleNamespace(threshold=6.0, has_fp16_weights=False)
    with pytest.raises(DPAlignError, match=r"0 is quantised by LLM\.int8: with an outlier threshold"):
        prepare(model)


def test_a_trainer_names_what_it_takes():
    with pytest.raises(DPAlignError, match="SFTConfig has no load_in_4bit: say model_init_kwargs="):
        SFTConfig(output_dir="x", load_in_4bit=True)
    declared = Privacy(noise_multiplier=1.0, dataset_name="toy", model_is_public=True)
    args = SFTConfig(output_dir="x", model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)})
    with pytest.raises(DPAlignError, match=r"llm_int8_threshold=6\.0"):
        DPSFTTrainer(small_model(), args, reviews(8), privacy=declared, quiet=True)


def test_a_run_from_before_the_setting_goes_on():
    old = RewardModelConfig.Section(model=ModelConfig("base", True))
    known = {"model": {name: v for name, v in vars(old.model).items() if name != "quantization"}}
    assert hash_of({"model": vars(old.model)}) == hash_of(known)
    assert hash_of({"model": vars(old.model) | {"quantization": "nf4"}}) != hash_of(known)


# What is computed -----------------------------------------------------------------------------------------------------


def adapted(policy: Policy) -> Policy:
    policy.add_adapter("stage", AdapterConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(1)
    for p in policy.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    return policy


def widened(policy: Policy) -> Policy:
    """The same weights in an ordinary model, as bitsandbytes widens them."""
    from bitsandbytes.functional import dequantize_4bit

    plain = AutoModelForCausalLM.from_pretrained(small_model())
    for name, layer in policy.model.named_modules():
        if type(layer).__name__ == "Linear4bit":
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.get_submodule(name).weight.data = weight
        elif type(layer).__name__ == "Linear8bitLt":
            scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
            plain.get_submodule(name).weight.data = layer.weight.data.float() * scale[:, None] / 127
    return Policy(plain, policy.tokenizer)


def losses(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    logits, _ = policy(ids, torch.ones_like(ids), ids.shape[1])
    chosen = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    return -chosen.squeeze(2).sum(1)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_a_units_gradient_is_its_own_and_that_of_the_widened_weights(kind):
    torch.manual_seed(0)
    ids, others = torch.randint(2, 4096, (4, 9)), torch.randint(2, 4096, (4, 9))
    base = Policy.load(ModelConfig(small_model(), True, quantization=kind))  # it has computed without gradients by now
    reference, policy = adapted(widened(base)), adapted(base)
    collector = PerUnitGradients(policy)

    def gradients(rows: torch.Tensor) -> list[torch.Tensor]:
        with collector.collect(torch.arange(len(rows)), len(rows)):
            losses(policy, rows).sum().backward()
        return collector.grads()

    together, company = gradients(ids), gradients(torch.cat([ids[:1], others[1:]]))
    for name, mine, same in zip(collector.names, together, company, strict=True):
        assert torch.equal(mine[0], same[0]), name  # who else is there moves no bit
    for row in range(4):
        reference.zero_grad()
        losses(reference, ids[row : row + 1]).sum().backward()
        theirs = {n: p.grad for n, p in reference.named_parameters() if p.requires_grad}
        own = torch.cat([g[row].flatten() for g in together])
        plain = torch.cat([theirs[name].flatten() for name in collector.names])
        bound = 2e-5 if kind != "int8" else 0.2  # which rounds activations, too
        assert float((own - plain).norm() / plain.norm()) < bound


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_it_is_released_for_plain_peft(kind, tmp_path, capsys, monkeypatch):
    """Two stages, the self-check before them, and the release loaded by transformers and peft in a fresh process."""
    monkeypatch.setattr(verify, "in_fresh_process", FRESH)
    recipe = write_recipe(tmp_path, sft={"learning_rate": 0.05}, ppo={"learning_rate": 0.05})
    called = call(capsys, "run", recipe, "--model.quantization", kind, "--json")
    assert called.status == 0, called.err
    assert called.json["private"] and "MatMul8bitLt" not in called.err
    card = (tmp_path / "run" / "release" / "README.md").read_text()
    wanted = {"nf4": "load_in_4bit=True, bnb_4bit_quant_type='nf4', ", "int8": "load_in_8bit=True, "}[kind]
    assert f"quantization_config=BitsAndBytesConfig({wanted}" in card and "AutoTokenizer, BitsAndBytesConfig" in card


@needs_bitsandbytes
def test_a_release_that_is_not_what_was_trained_is_still_seen(tmp_path):
    policy = adapted(Policy.load(ModelConfig(small_model(), True, quantization="nf4")))
    policy.save_adapter(tmp_path, small_model())
    verify.check_release(policy, tmp_path, small_model())
    policy.quantization = {}  # as if the base were loaded in full
    with pytest.raises(DPAlignError, match="its logits are"):
        verify.check_release(policy, tmp_path, small_model())


@needs_bitsandbytes
def test_a_model_object_in_4_bits_is_trained(tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(small_model(), quantization_config=config)
    sizes = {"expected_batch_size": 8, "micro_batch_size": 8, "max_steps": 1, "max_length": 12}
    declared = Privacy(
        noise_multiplier=1.0, dataset_name="toy", model_is_public=True, ledger=str(tmp_path / "ledger.sqlite")
    )
    trainer = DPSFTTrainer(
        model, SFTConfig(output_dir=str(tmp_path / "run"), **sizes), reviews(32), privacy=declared, quiet=True
    )
    assert trainer._recipe.model.quantization == "nf4"
    trainer.train()
    assert any(type(m).__name__ == "Linear4bit" for m in trainer.model.modules())


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_reward_model_shares_the_weights_of_a_quantised_policy(kind, tmp_path):
    policy = adapted(Policy.load(ModelConfig(small_model(), True, quantization=kind)))
    policy.finish_stage()
    model = RewardModel.from_policy(policy)
    ids = torch.randint(2, 4096, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        hidden = policy(ids, mask, 7, with_hidden=True)[1]
        body = model.classifier.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(hidden, body) and model.quantization == policy.quantization
    mine, theirs = (
        dict(model.classifier.base_model.named_modules()),
        dict(policy.model.base_model.model.model.named_modules()),
    )
    layers = [name for name, m in mine.items() if name.endswith("base_layer")]
    assert layers and all(mine[n].weight.data_ptr() == theirs[n].weight.data_ptr() for n in layers)
    assert all(mine[n.removesuffix(".base_layer")] is not theirs[n.removesuffix(".base_layer")] for n in layers)
    ours, own = (dict(m.named_parameters()) for m in (policy.model.base_model.model.model, model.classifier.base_model))
    adapters = [name for name in own if ".lora_" in name]
    assert adapters and all(own[name] is not ours[name] for name in adapters)  # a head's stage trains another adapter


@needs_bitsandbytes
def test_pairs_train_a_reward_model_in_4_bits(tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    sizes = {"expected_batch_size": 8, "micro_batch_size": 8, "max_steps": 1, "max_length": 16}
    declared = Privacy(
        noise_multiplier=1.0, dataset_name="toy", model_is_public=True, ledger=str(tmp_path / "ledger.sqlite")
    )
    args = RewardModelConfig(
        output_dir=str(tmp_path / "run"), model_init_kwargs={"quantization_config": config}, **sizes
    )
    DPRewardTrainer(small_model(), args, judged(32), privacy=declared, quiet=True).train()
    card = (tmp_path / "run" / "reward_model" / "README.md").read_text()
    assert "num_labels=1, quantization_config=BitsAndBytesConfig(load_in_4bit=True" in card
