"""Peak memory of one private update: flat in the units that are drawn, in the rows of a unit, and in the vocabulary.

    python benchmarks/memory_flat.py --json

All of it through the training loop, on GPT-2 shapes with random weights and LoRA; figures of three pairs of updates:

peak_4096_over_256: DP-PPO (rollouts, reward, reference, gradients, noise, step) that draws 4,096 units, over about 256;
peak_64_rows_over_1: DP-SFT on 8 units of 64 texts each, over 512 units of one;
logits_overhead: what DP-SFT with a vocabulary of 128,000, on 8 rows of 512 predicted tokens, needs more than with one of
    256, in float32 logits of one such row (512 x 128,000 x 4 bytes).

Each update runs in a child process of its own, two of them at a time, forked from one that has imported the libraries.
Its peak is the process's highest resident set (`ru_maxrss`) minus the resident set when the update begins: rows,
activations, gradients and noise, and not the weights, which would only flatter a ratio. glibc is told to give every
block above 64 KiB its own mapping, as in private_step.py. Needs Linux.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that waits sleeps instead of spinning

import argparse
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from models import gpt2, word_tokenizer

from dpalign.algorithms import PPO, SFT, PPOConfig, SFTConfig
from dpalign.data import DataConfig, build_units
from dpalign.models import AdapterConfig, Policy
from dpalign.privacy.ledger import Ledger
from dpalign.rewards import Reward
from dpalign.training import Stage

LARGE, SMALL = 128_000, 256  # vocabularies


@dataclass(frozen=True)
class Update:
    """One update: of `stage`, that draws `drawn` of `units` units on average, each of `records` texts or prompts."""

    stage: str
    units: int
    drawn: int
    records: int
    tokens: int
    vocabulary: int
    micro_batch_size: int


def algorithm_of(update: Update) -> SFT | PPO:
    settings = {
        "expected_batch_size": update.drawn, "max_steps": 1, "noise_multiplier": 1.0, "adapter": AdapterConfig(r=4),
        "micro_batch_size": update.micro_batch_size,
    }  # fmt: skip
    if update.stage == "sft":
        return SFT(SFTConfig(max_length=update.tokens + 1, **settings))  # the first one is not predicted
    lengths = {"max_prompt_length": update.tokens, "max_completion_length": update.tokens}
    reward = Reward(lambda prompts, completions: [len(text) / 1000 for text in completions], 0.0, 1.0)
    return PPO(PPOConfig(min_completion_length=update.tokens, **lengths, **settings), reward)


def records_of(update: Update) -> list[dict[str, str]]:
    chance, column = random.Random(0), "text" if update.stage == "sft" else "prompt"
    length = update.tokens + (update.stage == "sft")
    return [
        {column: " ".join(f"w{chance.randrange(1, update.vocabulary)}" for _ in range(length)), "person": f"p{unit}"}
        for unit in range(update.units)
        for _ in range(update.records)
    ]


def resident() -> int:
    """KiB that this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() // 1024


def highest() -> int:
    """KiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak(update: Update, layers: int, hidden: int) -> int:
    """KiB by which the update raises this process's resident set at most."""
    torch.manual_seed(0)
    tokens = 2 * update.tokens + 1  # prompt and completion; or a text
    policy = Policy(gpt2(update.vocabulary, layers, hidden, hidden // 32, tokens), word_tokenizer(update.vocabulary))
    ledger, began = Ledger(":memory:"), []
    config = DataConfig(name="made-up", unit="person", max_records_per_unit=update.records)
    data = build_units(records_of(update), config, ledger)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(
            policy, algorithm_of(update), data, folder=Path(folder), run="run", ledger=ledger,
            begins=lambda first, last: began.extend([resident(), highest()]),
        )  # fmt: skip
        stage.train()
    before, highest_before = began
    if highest() <= highest_before:
        raise SystemExit("loading took more memory than the update: nothing was measured; take larger sizes.")
    return highest() - before


def forked(update: Update, layers: int, hidden: int) -> int:
    """`peak` in a process of its own."""
    fork = multiprocessing.get_context("fork")
    found = fork.SimpleQueue()
    child = fork.Process(target=lambda: found.put(peak(update, layers, hidden)))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(child.exitcode)
    return found.get()


def peaks_of(updates: dict[str, Update], arguments: list[str]) -> dict[str, int]:
    """Of some updates, one after the other."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    asked = json.dumps({name: asdict(update) for name, update in updates.items()})
    command = [sys.executable, __file__, *arguments, "--child", asked]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise SystemExit(child.returncode)
    return json.loads(child.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--drawn", type=int, nargs=2, default=[256, 4096], help="units of the first pair of updates")
    parser.add_argument("--records", type=int, default=64, help="texts of a unit, in the second pair")
    parser.add_argument("--tokens", type=int, default=512, help="predicted tokens of a row, in the third pair")
    parser.add_argument("--vocab", type=int, default=LARGE, help="the larger vocabulary, in the third pair")
    parser.add_argument("--at_once", type=int, default=2, help="processes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    if args.child:
        asked = {name: Update(**update) for name, update in json.loads(args.child).items()}
        print(json.dumps({name: forked(update, args.layers, args.hidden) for name, update in asked.items()}))
        return

    few, many = args.drawn
    updates = {  # dealt out in turn: each process has about as much to do
        "many_units": Update("ppo", many, many, 1, 8, 4000, 128),
        "large_vocabulary": Update("sft", 8, 8, 1, args.tokens, args.vocab, 8),
        "few_units": Update("ppo", many, few, 1, 8, 4000, 128),
        "many_rows": Update("sft", 8, 8, args.records, 64, 2000, 8),
        "small_vocabulary": Update("sft", 8, 8, 1, args.tokens, SMALL, 8),
        "few_rows": Update("sft", 8 * args.records, 8 * args.records, 1, 64, 2000, 8),
    }
    shares = [dict(list(updates.items())[first :: args.at_once]) for first in range(args.at_once)]
    with ThreadPoolExecutor(args.at_once) as pool:
        peaks = {
            name: kib for found in pool.map(lambda share: peaks_of(share, given), shares) for name, kib in found.items()
        }
    row = args.tokens * args.vocab * 4 / 1024  # KiB of float32 logits
    if not args.json:
        for name, update in updates.items():
            print(f"{name:16} {peaks[name] / 1024:8.1f} MiB   {update}")
        print(f"{'logits of a row':16} {row / 1024:8.1f} MiB")
    result = {
        f"peak_{many}_over_{few}": peaks["many_units"] / peaks["few_units"],
        f"peak_{args.records}_rows_over_1": peaks["many_rows"] / peaks["few_rows"],
        "logits_overhead": (peaks["large_vocabulary"] - peaks["small_vocabulary"]) / row,
    }
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
