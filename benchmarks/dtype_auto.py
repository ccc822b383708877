"""How fast float32 and bfloat16 are on this machine, and which of them `dtype: auto` picks.

    python benchmarks/dtype_auto.py --json
    python benchmarks/dtype_auto.py --device cuda --prompts 256

Tokens per second of rounds of DP-PPO as a run does them: prompts are completed, the reference reads them, and every
prompt gives a gradient. Of the embedded model, and of one that has SmolLM2-135M's shape and random weights (nothing is
downloaded). Rounds in the two dtypes alternate, so that what else the machine does meets both; each speed is that of
the median round. `share` is what auto's pick has of the faster one's speed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from models import word_tokenizer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from dpalign.algorithms import PPOConfig
from dpalign.algorithms.base import micro_batches
from dpalign.algorithms.ppo import PPO
from dpalign.gradients import PerUnitGradients
from dpalign.models import AdapterConfig, ModelConfig, Policy
from dpalign.models.generation import Prompt
from dpalign.models.loading import device_of
from dpalign.models.precision import faster_dtype
from dpalign.privacy.context import own_context
from dpalign.privacy.entropy import SystemEntropy
from dpalign.rewards import Reward
from dpalign.settings.models import TINY_REVIEW_LM
from dpalign.training.loop import unit_gradients

DTYPES = ("float32", "bfloat16")
SMOLLM2 = "smollm2-135m, random"
PROMPT_TOKENS = 6


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(TINY_REVIEW_LM, "smollm2"), default=[TINY_REVIEW_LM, "smollm2"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=64, help="of a round")
    parser.add_argument("--micro_batch_size", type=int, default=32)
    parser.add_argument("--completion_tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="in each dtype, after one to warm up")
    parser.add_argument("--layers", type=int, default=30, help="of the model of SmolLM2's shape")
    parser.add_argument("--vocabulary", type=int, default=49152, help="of the model of SmolLM2's shape")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measured(name, given, Path(folder)) for name in given.models]
    if given.json:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}))
    else:
        show(rows)


@own_context()
def measured(name: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One model's row."""
    device = device_of(given.device)
    path = name if name == TINY_REVIEW_LM else smollm2_shaped(folder / name, given.layers, given.vocabulary)
    rounds = {dtype: Rounds(ModelConfig(path, dtype=dtype), device, given) for dtype in DTYPES}  # type: ignore[arg-type]
    seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for number in range(given.rounds + 1):
        for dtype, one in rounds.items():
            took = one.seconds()
            if number > 0:
                seconds[dtype].append(took)
    tokens = given.prompts * (PROMPT_TOKENS + given.completion_tokens)
    speed = {dtype: tokens / statistics.median(took) for dtype, took in seconds.items()}
    began = time.perf_counter()
    auto = faster_dtype(ModelConfig(path), device)
    row: dict[str, Any] = {"model": path if name == TINY_REVIEW_LM else SMOLLM2, "device": device}
    row |= {f"tokens_per_second_{dtype}": round(speed[dtype], 1) for dtype in DTYPES}
    row |= {"auto": auto, "tokens_per_second_auto": round(speed[auto], 1)}
    row |= {"share": round(speed[auto] / max(speed.values()), 3)}
    return row | {"choosing_s": round(time.perf_counter() - began, 3)}


class Rounds:
    """Rounds of DP-PPO on prompts of random tokens, every completion at full length."""

    def __init__(self, model: ModelConfig, device: str, given: argparse.Namespace) -> None:
        self.config = PPOConfig(
            max_prompt_length=PROMPT_TOKENS,
            max_completion_length=given.completion_tokens,
            min_completion_length=given.completion_tokens,
            micro_batch_size=given.micro_batch_size,
            adapter=AdapterConfig(r=1, freeze_a=True),
        )
        torch.manual_seed(0)
        self.policy = Policy.load(model, device)
        self.algorithm = PPO(self.config, Reward(lambda prompts, completions: [0.0] * len(completions), -1.0, 1.0))
        self.algorithm.setup(self.policy)
        self.gradients = PerUnitGradients(self.policy)
        ids, size = random.Random(0), self.policy.model.config.vocab_size
        self.prompts = [[Prompt(ids.choices(range(2, size), k=PROMPT_TOKENS), "")] for _ in range(given.prompts)]

    def seconds(self) -> float:
        """Of one round."""
        began, size = self._now(), self.config.micro_batch_size
        rows = self.algorithm.rows(self.policy, self.prompts, [SystemEntropy()] * len(self.prompts))
        for units in micro_batches(rows, list(range(len(self.prompts))), size, size):
            unit_gradients(self.policy, self.algorithm, self.gradients, rows.of(units), size)
        return self._now() - began

    def _now(self) -> float:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def smollm2_shaped(folder: Path, layers: int, vocabulary: int) -> str:
    """A folder with a model of SmolLM2-135M's shape."""
    shape = LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)
    word_tokenizer(shape.vocab_size).save_pretrained(folder)
    return str(folder)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Tokens per second of DP-PPO")
    for name in rows[0]:
        table.add_column(name.removeprefix("tokens_per_second_"))
    for row in rows:
        table.add_row(*[f"{value:,}" if isinstance(value, float) else str(value) for value in row.values()])
    Console().print(table)


if __name__ == "__main__":
    main()
