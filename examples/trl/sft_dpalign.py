"""Supervised fine-tuning on chats: python SCRIPT MODEL CHATS OUTPUT."""

import sys

from datasets import load_dataset
from peft import LoraConfig
from dpalign import DPSFTTrainer, Privacy, SFTConfig

model, chats, output = sys.argv[1:]

trainer = DPSFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=output,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_steps=2,
        max_length=48,
    ),
    train_dataset=load_dataset("json", data_files=chats, split="train"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    privacy=Privacy(target_epsilon=8, dataset_name="chats", model_is_public=True),
)
trainer.train()
trainer.save_model(output)
