"""GRPO against a function: python SCRIPT MODEL PROMPTS OUTPUT."""

import sys

from datasets import load_dataset
from peft import LoraConfig
from dpalign import DPGRPOTrainer, GRPOConfig, Privacy

model, prompts, output = sys.argv[1:]


def praise(completions, **kwargs):
    return [float("good" in completion) for completion in completions]


trainer = DPGRPOTrainer(
    model=model,
    args=GRPOConfig(
        output_dir=output,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_steps=2,
        num_generations=4,
        max_completion_length=8,
        cliprange=0.2,
        beta=0.04,
        loss_type="dr_grpo",
    ),
    reward_funcs=praise,
    train_dataset=load_dataset("json", data_files=prompts, split="train"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    privacy=Privacy(target_epsilon=8, dataset_name="prompts", model_is_public=True, reward_is_public=True, reward_range=(0, 1)),
)
trainer.train()
trainer.save_model(output)
