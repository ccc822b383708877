"""A private training step against the non-private step of the same model on the same rows.

    python benchmarks/private_step.py --json

Both train the same LoRA adapter of the same GPT-2 (random weights) with the same language-modelling
loss and AdamW, all rows in one forward pass:

private      one gradient per row (`PerUnitGradients`), clipped, summed and noised (`GaussianMechanism`);
non-private  ordinary autograd on plain `nn.Linear` layers: mean loss, backward. No leaves, clip or noise.

Time: both live in one process and alternate (A B, B A, ...), so that whatever else the machine does
hits both; `time_ratio` is the median over pairs of private / non-private. OpenMP threads sleep while they
wait (`OMP_WAIT_POLICY`): spinning ones would make the time depend on what else runs.

Memory: each kind runs in a child process of its own. Its peak is the process's highest resident set
(`ru_maxrss`) after two steps minus the highest before them, taken when the model is built and one step
on a single row has made all lazy buffers. glibc is told to give every block above 64 KiB its own mapping
(`MALLOC_MMAP_THRESHOLD_`), so that freed tensors leave the resident set at once and the peak is that of
living tensors and not of a heap's fragmentation. `memory_ratio` is private / non-private of these peaks:
activations, gradients and optimiser state; weights, which both hold equally, would only flatter it.
Needs Linux (ru_maxrss in KiB).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that waits sleeps instead of spinning

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from models import gpt2, word_tokenizer
from torch import Tensor, nn

from dpalign.gradients import PerUnitGradients
from dpalign.models import AdapterConfig, Policy
from dpalign.privacy.entropy import SystemEntropy
from dpalign.privacy.mechanism import GaussianMechanism

Step = Callable[[Tensor], None]


def build_policy(args: argparse.Namespace) -> Policy:
    torch.manual_seed(0)  # the same weights for both kinds
    policy = Policy(gpt2(args.vocab, args.layers, args.hidden, args.heads), word_tokenizer(args.vocab))
    policy.add_adapter("sft", AdapterConfig(r=args.rank))
    return policy


def row_losses(policy: Policy, ids: Tensor) -> Tensor:
    """`(rows,)` mean negative log-likelihood of `(rows, tokens)` ids."""
    logits, _ = policy(ids, torch.ones_like(ids), ids.shape[1])
    nll = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return nll.mean(1)


def take(mechanism: GaussianMechanism, gradients: PerUnitGradients, optimizer: torch.optim.Optimizer) -> None:
    """A step along the noisy mean of what the mechanism has summed."""
    noisy, _ = mechanism.release()
    for p, gradient in zip(gradients.parameters, noisy, strict=True):
        p.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def private_step(args: argparse.Namespace) -> Step:
    policy = build_policy(args)
    gradients = PerUnitGradients(policy)
    optimizer = torch.optim.AdamW(gradients.parameters)

    def step(ids: Tensor) -> None:
        units = len(ids)
        mechanism = GaussianMechanism(
            [p.shape for p in gradients.parameters],
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            divisor=units,
            entropy=SystemEntropy(),
        )
        with gradients.collect(torch.arange(units), units):
            row_losses(policy, ids).sum().backward()
        with torch.no_grad():
            mechanism.add(gradients.grads())
        take(mechanism, gradients, optimizer)

    return step


def plain_step(args: argparse.Namespace) -> Step:
    policy = build_policy(args)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])

    def step(ids: Tensor) -> None:
        row_losses(policy, ids).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Step, ids: Tensor) -> float:
    start = time.perf_counter()
    step(ids)
    return time.perf_counter() - start


def peak_of_steps(step: Step, ids: Tensor) -> float:
    """MiB by which two steps raise this process's highest resident set."""
    step(ids[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step(ids)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def peak_in_child(kind: str, arguments: list[str]) -> float:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *arguments, "--child", kind]
    child = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(child.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--rank", type=int, default=4, help="LoRA rank")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=8, help="measured pairs of steps")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--child", choices=["private", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    ids = torch.randint(args.vocab, (args.rows, args.tokens), generator=torch.Generator().manual_seed(1))
    build = {"private": private_step, "plain": plain_step}
    if args.child:
        print(peak_of_steps(build[args.child](args), ids))
        return

    memory = {kind: peak_in_child(kind, given) for kind in build}
    steps = {kind: make(args) for kind, make in build.items()}
    for step in steps.values():
        seconds(step, ids)  # warm-up
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for pair in range(args.pairs):
        for kind in ("private", "plain") if pair % 2 == 0 else ("plain", "private"):
            times[kind].append(seconds(steps[kind], ids))

    time_ratio = statistics.median(a / b for a, b in zip(times["private"], times["plain"], strict=True))
    memory_ratio = memory["private"] / memory["plain"]
    if not args.json:
        print(f"GPT-2 {args.layers} x {args.hidden}, LoRA r={args.rank}, {args.rows} rows x {args.tokens} tokens")
        for kind in steps:
            print(f"{kind:8} {statistics.median(times[kind]):7.3f} s/step   {memory[kind]:7.1f} MiB peak")
    print(json.dumps({"time_ratio": round(time_ratio, 4), "memory_ratio": round(memory_ratio, 4)}))


if __name__ == "__main__":
    main()
