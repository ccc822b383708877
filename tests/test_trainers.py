"""The Python trainers do what the command does."""

import pytest
from datasets import Dataset
from peft import LoraConfig

from dpalign import DPAlignError, DPPPOTrainer, DPSFTTrainer, PPOConfig, SFTConfig
from dpalign.rewards import RewardConfig
from tiny import tiny_base, tiny_tokenizer, words

SMALL = {"target_epsilon": 8.0, "expected_batch_size": 8, "max_steps": 2}


def sft(folder, **options) -> DPSFTTrainer:
    rows = [{"text": words(6, seed)} for seed in range(32)]
    options = {"model_is_public": True, "quiet": True, "dataset_name": "toy", "output_dir": str(folder), **options}
    return DPSFTTrainer(
        tiny_base("llama"), SFTConfig(max_length=12, **SMALL), Dataset.from_list(rows),
        processing_class=tiny_tokenizer(), peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), **options,
    )  # fmt: skip


def test_sft_trains_resumes_and_saves(tmp_path):
    trainer = sft(tmp_path / "run")
    summary = trainer.train()
    assert summary["private"] and 0 < summary["epsilon"] <= 8
    assert trainer.privacy["stages"][0]["mechanisms"][0]["steps"] == 2
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert sft(tmp_path / "run").train()["epsilon"] == summary["epsilon"]  # finished: nothing more is drawn
    with pytest.raises(DPAlignError, match="holds a run already"):
        sft(tmp_path / "run").train(resume_from_checkpoint=False)


def test_ppo_takes_a_python_reward(tmp_path):
    def reward(prompts, completions, **columns):
        return [min(len(c), 40) / 40 for c in completions]

    trainer = DPPPOTrainer(
        tiny_base("gpt2"),
        PPOConfig(max_prompt_length=8, max_completion_length=5, reward=RewardConfig(is_public=True, low=0, high=1), **SMALL),
        [{"prompt": words(3, seed)} for seed in range(32)],
        processing_class=tiny_tokenizer(), reward_funcs=reward, model_is_public=True, quiet=True,
        dataset_name="toy", output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert 0 < trainer.train()["epsilon"] <= 8


def test_what_is_not_private_is_refused(tmp_path):
    with pytest.raises(DPAlignError, match="eval_dataset would be measured without noise"):
        sft(tmp_path, eval_dataset=[{"text": "w1"}])
    with pytest.raises(DPAlignError, match="only plain LoRA"):
        DPSFTTrainer(
            "tiny-review-lm", SFTConfig(**SMALL), [{"text": "a b"}], peft_config=LoraConfig(use_dora=True),
            dataset_name="toy", output_dir=str(tmp_path),
        )  # fmt: skip
    with pytest.raises(DPAlignError, match="declared public"):
        sft(tmp_path / "run", model_is_public=False).train()
    with pytest.raises(DPAlignError, match="call train"):
        sft(tmp_path / "other").save_model(str(tmp_path / "out"))
