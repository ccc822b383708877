"""PPO in TRL 0.11's loop: python SCRIPT POLICY PROMPTS OUTPUT."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from dpalign.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from dpalign.trl import LengthSampler

policy, prompts, output = sys.argv[1:]
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(policy)
model = AutoModelForCausalLMWithValueHead.from_pretrained(
    policy, peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
)
dataset = load_dataset("json", data_files=prompts, split="train").rename_columns({"prompt": "query"})
dataset = dataset.map(lambda row: {"input_ids": tokenizer(row["query"]).input_ids})
dataset.set_format("torch")


def collator(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


config = PPOConfig(batch_size=16, mini_batch_size=8, learning_rate=1e-3, ppo_epochs=1, init_kl_coef=0.05)
trainer = PPOTrainer(config, model, None, tokenizer, dataset=dataset, data_collator=collator)
generation = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.pad_token_id}
lengths = LengthSampler(4, 9)

for batch in trainer.dataloader:
    queries = batch["input_ids"]
    responses = trainer.generate(queries, return_prompt=False, length_sampler=lengths, **generation)
    batch["response"] = tokenizer.batch_decode(responses)
    rewards = [torch.tensor(float(text.count("good"))) for text in batch["response"]]
    stats = trainer.step(queries, responses, rewards)
    trainer.log_stats(stats, batch, rewards)
trainer.save_pretrained(output)
