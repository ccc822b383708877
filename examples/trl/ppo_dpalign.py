"""PPO by a trainer, as TRL 0.26 to 1.9 had it: python SCRIPT POLICY REWARD_MODEL PROMPTS OUTPUT."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from dpalign.trl import PPOConfig, PPOTrainer, Privacy

policy, reward, prompts, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
reward_model = AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=torch.float32)
value_model = AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=torch.float32)
dataset = load_dataset("json", data_files=prompts, split="train")
dataset = dataset.map(lambda row: {"input_ids": tokenizer(row["prompt"]).input_ids}, remove_columns=["prompt"])

trainer = PPOTrainer(
    args=PPOConfig(
        output_dir=output,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        total_episodes=32,
        num_ppo_epochs=1,
        learning_rate=1e-3,
        response_length=8,
        stop_token="eos",
        kl_coef=0.05,
        num_sample_generations=0,
        max_prompt_length=16,
    ),
    processing_class=tokenizer,
    model=model,
    ref_model=None,
    reward_model=reward_model,
    privacy=Privacy(target_epsilon=8, dataset_name="prompts", model_is_public=True, reward_is_public=True, reward_range=(-4, 4)),
    train_dataset=dataset,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
trainer.save_model(output)
