"""A reward model on pairs of chats: python SCRIPT MODEL PAIRS OUTPUT."""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import RewardConfig, RewardTrainer

model, pairs, output = sys.argv[1:]

trainer = RewardTrainer(
    model=model,
    args=RewardConfig(
        output_dir=output,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_steps=2,
        max_length=48,
    ),
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"),
)
trainer.train()
trainer.save_model(output)
