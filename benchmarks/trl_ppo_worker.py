"""TRL's side of `ppo_iteration.py`: started by it with the Python of .venv-trl, never by hand.

The settings arrive as one JSON argument. For every line on stdin the worker runs one PPO iteration (generate,
score, `PPOTrainer.step`) and answers with one line of JSON on stdout; while it waits it is blocked in a read.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings

warnings.simplefilter("ignore")
answers = os.fdopen(os.dup(1), "w", buffering=1)  # the pipe to the parent; prints of libraries go to stderr
os.dup2(2, 1)

import torch  # noqa: E402
from models import gpt2, word_tokenizer  # noqa: E402
from peft import LoraConfig  # noqa: E402
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer  # noqa: E402

settings = json.loads(sys.argv[1])
torch.set_num_threads(settings["threads"])
torch.manual_seed(0)
model = AutoModelForCausalLMWithValueHead.from_pretrained(
    gpt2(settings["vocab"], settings["layers"], settings["hidden"], settings["heads"]),
    peft_config=LoraConfig(
        r=settings["rank"], lora_alpha=2 * settings["rank"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    ),
)
prompts = [torch.tensor(prompt) for prompt in settings["prompts"]]
tokenizer = word_tokenizer(settings["vocab"])
config = PPOConfig(
    batch_size=len(prompts),
    mini_batch_size=settings["trl_mini_batch_size"],
    gradient_accumulation_steps=len(prompts) // settings["trl_mini_batch_size"],  # one update, as ours
    ppo_epochs=1,
    init_kl_coef=0.2,
    adap_kl_ctrl=False,
)
trainer = PPOTrainer(config, model, tokenizer=tokenizer)
generation = {
    "do_sample": True,
    "top_k": 0,
    "top_p": 1.0,
    "min_new_tokens": settings["new_tokens"],
    "max_new_tokens": settings["new_tokens"],
    "pad_token_id": tokenizer.pad_token_id,
    "eos_token_id": tokenizer.eos_token_id,
}

for _ in sys.stdin:
    start = time.perf_counter()
    responses = trainer.generate(prompts, batch_size=len(prompts), return_prompt=False, **generation)
    generated = time.perf_counter()
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    scores = [torch.tensor(min(len(text) / 200, 1.0)) for text in texts]  # the reward of ppo_iteration.py
    stats = trainer.step(prompts, responses, scores)
    end = time.perf_counter()
    phases = {
        "generate": generated - start,
        "reference": stats["time/ppo/forward_pass"],
        "train": stats["time/ppo/optimize_step"],
    }
    tokens = sum(len(response) for response in responses)
    answers.write(json.dumps({"seconds": end - start, "phases": phases, "tokens": tokens}) + "\n")
