"""The Python trainers do what the command does, and leave the objects that they are given alone."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from dpalign import (
    DPAlignError,
    DPPPOTrainer,
    DPRewardTrainer,
    DPSFTTrainer,
    PPOConfig,
    Privacy,
    RewardModelConfig,
    SFTConfig,
)
from tiny import VOCABULARY, tiny_base, tiny_folder, tiny_object, tiny_tokenizer, words

SMALL = {"target_epsilon": 8.0, "expected_batch_size": 8, "max_steps": 2}
TOY = {"dataset_name": "toy", "model_is_public": True}


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **options})


def sft(folder, model=None, **options) -> DPSFTTrainer:
    rows = [{"text": words(6, seed)} for seed in range(32)]
    if model is None:
        model = tiny_object("llama", folder.parent / "base")
    options = {"peft_config": lora(), "quiet": True, **options}
    privacy = Privacy(**TOY | options.pop("privacy", {}))
    config = SFTConfig(output_dir=str(folder), max_length=12, learning_rate=0.05, **SMALL)
    return DPSFTTrainer(model, config, Dataset.from_list(rows), privacy=privacy, **options)


def reward(prompts, completions, **columns):
    return [min(len(c), 40) / 40 for c in completions]


def ppo(folder, model, **options) -> DPPPOTrainer:
    config = PPOConfig(
        output_dir=str(folder), max_prompt_length=8, max_completion_length=5, **SMALL | {"target_epsilon": 30.0}
    )
    rows = [{"prompt": words(3, seed)} for seed in range(32)]
    scored = {"reward_is_public": True, "reward_range": (0, 1)}
    privacy = Privacy(**TOY | scored | options.pop("privacy", {}))
    return DPPPOTrainer(model, config, rows, reward_funcs=reward, privacy=privacy, quiet=True, **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 18).view(2, 8)).logits


def test_sft_trains_resumes_and_saves(tmp_path):
    trainer = sft(tmp_path / "run")
    summary = trainer.train()
    assert summary["private"] and 0 < summary["epsilon"] <= 8
    assert trainer.privacy["stages"][0]["mechanisms"][0]["steps"] == 2
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert trainer.train()["epsilon"] == summary["epsilon"]  # finished: nothing more is drawn
    assert sft(tmp_path / "run").train()["epsilon"] == summary["epsilon"]
    with pytest.raises(DPAlignError, match="holds a run already"):
        sft(tmp_path / "run").train(resume_from_checkpoint=False)


def test_ppo_takes_a_python_reward(tmp_path):
    trainer = ppo(tmp_path / "run", tiny_object("gpt2", tmp_path / "base"), processing_class=tiny_tokenizer())
    assert 0 < trainer.train()["epsilon"] <= 30


def test_what_is_not_private_is_refused(tmp_path):
    with pytest.raises(DPAlignError, match="only plain LoRA"):
        sft(tmp_path / "run", peft_config=LoraConfig(use_dora=True))
    with pytest.raises(DPAlignError, match="model_is_public=True"):
        sft(tmp_path / "run", privacy={"model_is_public": False})
    with pytest.raises(DPAlignError, match="call train"):
        sft(tmp_path / "other").save_model(str(tmp_path / "out"))


# Objects ---------------------------------------------------------------------------------------------------------


def test_the_callers_object_is_never_changed(tmp_path):
    model, tokenizer = tiny_object("llama", tmp_path / "base"), tiny_tokenizer()
    tokenizer.pad_token = None
    model.train()
    for p in model.parameters():
        p.requires_grad_(True)
    before = copy.deepcopy(model)
    trainer = sft(tmp_path / "run", model, processing_class=tokenizer)
    trainer.train()
    assert model.training and all(p.requires_grad for p in model.parameters()) and tokenizer.pad_token is None
    assert [n for n, _ in model.named_modules()] == [n for n, _ in before.named_modules()]
    assert model.config.to_dict() == before.config.to_dict()
    assert model.generation_config.to_dict() == before.generation_config.to_dict()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert (logits(trainer.model) - logits(model.eval())).abs().max() > 1e-3  # and yet it has learned


def test_the_base_shares_the_objects_memory(tmp_path):
    model = tiny_object("llama", tmp_path / "base")
    policy, _ = sft(tmp_path / "run", model)._models()
    theirs = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in policy.parameters()} == theirs
    assert not {id(p) for p in policy.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("hand_on", ["the same object", "the trainer's model"])
def test_a_second_trainer_states_the_first_ones_stage(hand_on, tmp_path):
    model = tiny_object("llama", tmp_path / "base")
    first = sft(tmp_path / "one", model, privacy={"ledger": str(tmp_path / "l")})
    first.train()
    given = model if hand_on == "the same object" else first.model
    with pytest.raises(DPAlignError, match="all stages together would spend"):
        ppo(tmp_path / "two", given, privacy={"ledger": str(tmp_path / "l")}).train()
    second = ppo(tmp_path / "two", given, privacy={"ledger": str(tmp_path / "l"), "composition": "sequential"})
    second.train()
    stages = second.privacy["stages"]
    assert [s["stage"] for s in stages] == ["sft", "ppo"]
    assert 1.01 * max(s["epsilon_alone"] for s in stages) < second.privacy["epsilon"] <= 30
    # What the release is trained from is what the first one trained, not the base.
    assert "earlier" in second._models()[0].adapters if hand_on == "the trainer's model" else True
    assert (
        sft(tmp_path / "one", model, privacy={"ledger": str(tmp_path / "l")}).train()["epsilon"]
        == first.summary["epsilon"]
    )


def test_a_trainers_model_that_was_edited_since_is_refused(tmp_path):
    first = sft(tmp_path / "one")
    first.train()
    edited = first.model
    with torch.no_grad():
        next(p for n, p in edited.named_parameters() if "lora_B" in n).add_(1)
    with pytest.raises(DPAlignError, match="its adapter is another one"):
        ppo(tmp_path / "two", edited).train()
    assert not (tmp_path / "two" / "private").exists()


def merged(folder):
    model = get_peft_model(tiny_object("llama", folder), lora(init_lora_weights=False))
    return model.merge_and_unload()


def resized(folder):
    model = tiny_object("llama", folder)
    model.resize_token_embeddings(VOCABULARY + 4)
    return model


def edited(folder):
    model = tiny_object("llama", folder)
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    return model


def reconfigured(folder):
    model = tiny_object("llama", folder)
    model.config.rms_norm_eps = 1e-2
    return model


class Other(LlamaForCausalLM):
    """Another forward on the same weights."""


REFUSED = {
    "merged": (merged, r"q_proj.weight is another one\): save it and its tokenizer with save_pretrained"),
    "resized": (resized, "not what .* holds .*(vocab_size|embed_tokens)"),
    "edited": (edited, "its model.norm.weight is another one"),
    "reconfigured": (reconfigured, "its config has another rms_norm_eps"),
    "of its own class": (lambda folder: Other.from_pretrained(tiny_folder("llama", folder)), "it is a Other"),
    "from nowhere": (lambda folder: tiny_base("llama"), "was not loaded from a folder"),
    "peft": (lambda folder: get_peft_model(tiny_object("llama", folder), lora()), "peft adapters does not say"),
    "peft inside": (None, "peft adapters does not say"),
    "no model": (lambda folder: 7, "was not loaded from a folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_object_that_its_folder_does_not_hold_is_refused(case, tmp_path):
    make, message = REFUSED[case]
    if case == "peft inside":
        get_peft_model(tiny_object("llama", tmp_path / "base"), lora()).save_pretrained(tmp_path / "adapter")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    else:
        model = make(tmp_path / "base")
    with pytest.raises(DPAlignError, match=message):
        sft(tmp_path / "run", model, processing_class=tiny_tokenizer()).train()
    assert not (tmp_path / "run" / "private").exists()


def test_an_object_whose_folder_is_gone_is_refused(tmp_path):
    model = tiny_object("llama", tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(DPAlignError, match="save it and its tokenizer with save_pretrained"):
        sft(tmp_path / "run", model).train()


def test_a_half_precision_object_is_compared_in_its_own_dtype(tmp_path):
    tiny_folder("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    assert sft(tmp_path / "run", model).train()["private"]


def test_a_classifier_object_gets_a_new_head_and_its_model_goes_on(tmp_path):
    tiny_folder("llama", tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    model.config.pad_token_id = 0
    head = model.score.weight.clone()
    rows = [{"chosen": words(5, s), "rejected": words(5, 99 + s)} for s in range(32)]

    def trainer(given, name, **options):
        settings = {"max_length": 8, "learning_rate": 0.05, **SMALL, "target_epsilon": 30.0}
        config = RewardModelConfig(output_dir=str(tmp_path / name), **settings)
        return DPRewardTrainer(given, config, rows, privacy=Privacy(**TOY, **options), quiet=True)

    first = trainer(model, "one")
    first.train()
    assert torch.equal(model.score.weight, head)
    assert isinstance(first.model, PeftModel)
    second = trainer(first.model, "two", composition="sequential")
    second.train()
    assert [s["stage"] for s in second.privacy["stages"]] == ["reward_model", "reward_model"]


def test_a_tokenizer_object_beside_a_name_has_to_be_the_folders(tmp_path):
    base = str(tiny_folder("llama", tmp_path / "base"))
    assert sft(tmp_path / "run", base, processing_class=tiny_tokenizer()).train()["private"]
    other = tiny_tokenizer()
    other.add_tokens(["w7 w8"])
    with pytest.raises(DPAlignError, match="processing_class is not the tokenizer of"):
        sft(tmp_path / "other", base, processing_class=other).train()
    assert not (tmp_path / "other").exists()
