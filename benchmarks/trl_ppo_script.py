"""A script of TRL 0.11's PPO loop, as a generator: `trl_ppo_curve.py` runs it with `trl` and with `dpalign.trl`.

`library` stands for the import; nothing else differs. By hand only as TRL's side, in TRL's environment: started with a
folder, it runs a seed for each line of JSON on stdin, one update for each further line.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any


def updates(library: Any, folder: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """After each update: its mean reward, KL to the start, seconds of the wall's clock and of the processor.

    Args:
        folder: the policy and its tokenizer. settings: options of `trl_ppo_curve.py`, a seed and the prompts' texts.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    torch.set_num_threads(settings["threads"])
    library.set_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = library.AutoModelForCausalLMWithValueHead.from_pretrained(
        folder, peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    rows = [
        {"input_ids": [tokenizer.bos_token_id, *tokenizer(text).input_ids[: settings["prompt_tokens"]]]}
        for text in settings["prompts"]
    ]
    dataset = Dataset.from_list([row | {"query": tokenizer.decode(row["input_ids"][1:])} for row in rows])
    dataset.set_format("torch")
    config = library.PPOConfig(
        batch_size=settings["batch_size"],
        mini_batch_size=settings["mini_batch_size"],
        ppo_epochs=settings["ppo_epochs"],
        learning_rate=settings["learning_rate"],
        init_kl_coef=settings["init_kl_coef"],
        seed=settings["seed"],
    )
    trainer = library.PPOTrainer(
        config, model, None, tokenizer, dataset=dataset,
        data_collator=lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    )  # fmt: skip
    generation = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "min_new_tokens": settings["new_tokens"],
        "max_new_tokens": settings["new_tokens"],
        "pad_token_id": tokenizer.pad_token_id,
    }
    analyzer = SentimentIntensityAnalyzer()

    def batches() -> Iterator[dict[str, Any]]:
        while True:
            yield from trainer.dataloader

    wall, cpu = time.perf_counter(), time.process_time()
    for batch in batches():
        queries = batch["input_ids"]
        responses = trainer.generate(queries, batch_size=len(queries), return_prompt=False, **generation)
        texts = tokenizer.batch_decode(responses)
        rewards = [torch.tensor(analyzer.polarity_scores(text)["compound"]) for text in texts]
        stats = trainer.step(queries, responses, rewards)
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        yield {
            "reward": float(torch.stack(rewards).mean()),
            "kl": float(stats["objective/kl"]),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "tokens": sum(map(len, responses)),
            "first_row": [int(token) for token in rows[0]["input_ids"]],
        }
        wall, cpu = time.perf_counter(), time.process_time()


def answers(library: Any, folder: str, lines: Iterable[str]) -> Iterator[str]:
    """One line of JSON for each line: of a seed's first update where the line has settings, of its next where not."""
    running: Iterator[dict[str, Any]] = iter(())
    for line in lines:
        if line.strip():
            running = updates(library, folder, json.loads(line))
        yield json.dumps(next(running)) + "\n"


def main() -> None:
    warnings.simplefilter("ignore")
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of libraries go to stderr
    import trl

    for line in answers(trl, sys.argv[1], sys.stdin):
        pipe.write(line)


if __name__ == "__main__":
    main()
