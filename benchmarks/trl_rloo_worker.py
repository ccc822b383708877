"""TRL's side of `rloo_iteration.py`: started by it with the Python of .venv-trl-new, never by hand.

The settings arrive as one JSON argument. The trainer trains; before each step it waits for a line on stdin, and behind
it it answers with one line of JSON on stdout. While it waits it is blocked in a read.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings

warnings.simplefilter("ignore")
answers = os.fdopen(os.dup(1), "w", buffering=1)  # the pipe to the parent; prints of libraries go to stderr
os.dup2(2, 1)

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from models import gpt2, word_tokenizer  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import RLOOConfig, RLOOTrainer  # noqa: E402

settings = json.loads(sys.argv[1])
torch.set_num_threads(settings["threads"])
torch.manual_seed(0)
rows, written = len(settings["prompts"]) * settings["generations"], []


def length_reward(completions: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
    written.append(sum(map(len, completion_ids)))
    return [min(len(text) / 200, 1.0) for text in completions]  # the reward of rloo_iteration.py


class Turns(TrainerCallback):
    """A step is one iteration: completions, reward, reference, and all micro-batches' gradients."""

    def on_step_begin(self, args, state, control, **_):
        if not sys.stdin.readline():
            sys.exit()
        written.clear()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        seconds = time.perf_counter() - self.start
        answers.write(json.dumps({"seconds": seconds, "phases": {}, "tokens": sum(written)}) + "\n")


trainer = RLOOTrainer(
    model=gpt2(settings["vocab"], settings["layers"], settings["hidden"], settings["heads"]),
    reward_funcs=length_reward,
    args=RLOOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=settings["trl_mini_batch_size"],
        gradient_accumulation_steps=rows // settings["trl_mini_batch_size"],  # one update, as ours
        num_generations=settings["generations"],
        max_completion_length=settings["new_tokens"],
        generation_kwargs={"min_new_tokens": settings["new_tokens"]},
        beta=0.05,
        max_steps=10**6,
        learning_rate=1e-4,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list(
        [{"prompt": " ".join(f"w{token}" for token in prompt)} for prompt in settings["prompts"]]
    ),
    processing_class=word_tokenizer(settings["vocab"]),
    peft_config=LoraConfig(
        r=settings["rank"], lora_alpha=2 * settings["rank"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    ),
    callbacks=[Turns()],
)
trainer.train()
