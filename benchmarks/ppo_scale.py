"""Seconds of one DP-PPO iteration at the sizes of GPT-2 small, medium and large (random weights).

    python benchmarks/ppo_scale.py --sizes small,medium,large --prompts 256 --device cuda
    python benchmarks/ppo_scale.py --sizes small --prompts 8 --device cpu

Compares the phases of dpalign's own iteration with each other, for every size: `generate` (sampling with the
adapter merged), `reference` (log-probabilities under the reference model, decoding, scoring) and `train`
(forward and backward with one gradient per prompt, clip, noise, AdamW). The median of `--iterations` follows
one warm-up. Prints a table, and one line of JSON for each size.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that waits sleeps instead of spinning

import argparse
import json
import random
import statistics

import torch
from iteration import Private, length_reward
from models import gpt2, word_tokenizer

from dpalign.algorithms.ppo import PPO, PPOConfig
from dpalign.models import AdapterConfig, Policy
from dpalign.rewards import Reward

SIZES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20)}  # layers, hidden, heads
SIZES |= {"tiny": (1, 32, 2)}  # to try the script
PHASES = ("generate", "reference", "train")


def measure(size: str, args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    policy = Policy(gpt2(args.vocab, *SIZES[size], positions=1024).to(args.device), word_tokenizer(args.vocab))
    parameters = policy.model.num_parameters()
    chance = random.Random(0)
    prompts = [
        " ".join(f"w{chance.randrange(1, args.vocab)}" for _ in range(args.prompt_tokens)) for _ in range(args.prompts)
    ]
    config = PPOConfig(
        micro_batch_size=args.micro_batch_size,
        max_prompt_length=args.prompt_tokens,
        max_completion_length=args.new_tokens,
        min_completion_length=args.new_tokens,
        adapter=AdapterConfig(r=args.rank),
    )
    ours = Private(policy, prompts, PPO(config, Reward(length_reward, 0.0, 1.0)))
    ours.iterate()
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    runs = [ours.iterate() for _ in range(args.iterations)]
    result = {"size": size, "parameters": parameters}
    result |= {"trained": sum(p.numel() for p in ours.gradients.parameters)}
    result |= {"prompts": args.prompts, "new_tokens": args.new_tokens, "device": args.device}
    result |= {f"{phase}_s": round(statistics.median(run[phase] for run in runs), 4) for phase in PHASES}
    result["iteration_s"] = round(statistics.median(sum(run.values()) for run in runs), 4)
    if args.device.startswith("cuda"):
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small", help=f"of {', '.join(SIZES)}, separated by commas")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--rank", type=int, default=4, help="LoRA rank")
    parser.add_argument("--micro-batch-size", type=int, default=PPOConfig.micro_batch_size)
    parser.add_argument("--iterations", type=int, default=3, help="measured iterations")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    sizes = args.sizes.split(",")
    if unknown := [size for size in sizes if size not in SIZES]:
        parser.error(f"unknown size {unknown[0]!r}: choose from {', '.join(SIZES)}.")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here: use --device cpu.")

    results = [measure(size, args) for size in sizes]
    print(f"{'size':8}{'parameters':>12}" + "".join(f"{phase + ' s':>13}" for phase in (*PHASES, "iteration")))
    for result in results:
        seconds = "".join(f"{result[f'{phase}_s']:13.2f}" for phase in (*PHASES, "iteration"))
        print(f"{result['size']:8}{result['parameters'] / 1e6:10.0f} M{seconds}")
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
