"""A private step on whole weights against the non-private one and Opacus' ghost clipping, on the same rows.

    python benchmarks/full_finetuning.py --json

All train the weights of every linear layer of the same GPT-2's blocks (distilgpt2's shape, random weights; embeddings,
norms and biases are frozen) with AdamW, `--micro` rows in a forward and backward pass:

private      `adapter.kind: full`: SFT's loss, sums of integer products (`privacy/products.py`), noise, as the loop has them;
plain        transformers' model and torch's cross entropy, ordinary autograd: gradients of the micro-batches add up;
own          as `private` with the gradients of ordinary autograd: no unit's own, no clip, no noise;
opacus       `GradSampleModuleFastGradientClipping`: norms in a first backward pass, the clipped sum in a second one,
             Gaussian noise by torch. Its sum is one of float32 numbers, and its noise comes from torch's generator.

Time: all live in one process and take turns, so that whatever else the machine does hits each; ratios are medians over
rounds. Memory: each in a child process of its own, see private_step.py; what its peak grows by in two steps. Parts of the
private step are timed by themselves: `noise`, with AdamW, is the same however many rows there are.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that waits sleeps instead of spinning

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from models import gpt2, word_tokenizer
from private_step import Step, peak_of_steps, seconds, take
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpalign.gradients import PerUnitGradients
from dpalign.models import AdapterConfig, Policy
from dpalign.privacy.entropy import SystemEntropy
from dpalign.privacy.mechanism import GaussianMechanism

CLIP, SIGMA, GAMMA = 1.0, 1.0, 0.01
KINDS = ("private", "plain", "own", "opacus")


def base(args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    model = gpt2(args.vocab, args.layers, args.hidden, args.heads, positions=max(128, args.tokens))
    return model.requires_grad_(False).train()


def with_linear_layers(args: argparse.Namespace) -> PreTrainedModel:
    """GPT-2 with `nn.Linear` in the place of its Conv1D, which Opacus does not know; their weights are trained."""
    model = base(args)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            linear.bias.requires_grad_(False)
            model.set_submodule(name, linear)
    return model


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """`(rows,)` mean negative log-likelihood."""
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def whole_policy(args: argparse.Namespace) -> Policy:
    policy = Policy(base(args).eval(), word_tokenizer(args.vocab))
    policy.add_adapter("sft", AdapterConfig(kind="full"))
    return policy


def policy_losses(policy: Policy, ids: Tensor) -> Tensor:
    """The same as `losses`, as SFT computes it: the logits of a few positions at a time."""
    logprobs, _ = policy.logprobs(ids[:, :-1], torch.ones_like(ids[:, 1:]), ids[:, 1:])
    return -logprobs.mean(1)


def private_step(args: argparse.Namespace, spent: dict[str, list[float]] | None = None) -> Step:
    policy = whole_policy(args)
    gradients = PerUnitGradients(policy)
    optimizer = torch.optim.AdamW(gradients.parameters)

    def step(ids: Tensor) -> None:
        mechanism = GaussianMechanism(
            [p.shape for p in gradients.parameters],
            max_grad_norm=CLIP,
            noise_multiplier=SIGMA,
            divisor=len(ids),
            entropy=SystemEntropy(),
            products=True,
        )
        began = time.perf_counter()
        for part in ids.split(args.micro):
            with gradients.collect(torch.arange(len(part)), len(part)):
                policy_losses(policy, part).sum().backward()
            with torch.no_grad():
                mechanism.add(gradients.grads())
        summed = time.perf_counter()
        take(mechanism, gradients, optimizer)
        if spent is not None:
            spent["sum"].append(summed - began)
            spent["noise"].append(time.perf_counter() - summed)

    return step


def plain_step(args: argparse.Namespace) -> Step:
    return autograd_step(args, with_linear_layers(args), losses)


def own_step(args: argparse.Namespace) -> Step:
    return autograd_step(args, whole_policy(args), policy_losses)


def autograd_step(args: argparse.Namespace, model: Any, losses_of: Callable[[Any, Tensor], Tensor]) -> Step:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step(ids: Tensor) -> None:
        for part in ids.split(args.micro):
            (losses_of(model, part).sum() / len(ids)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def opacus_step(args: argparse.Namespace) -> Step:
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    warnings.filterwarnings("ignore", message="Full backward hook")
    model = GradSampleModuleFastGradientClipping(
        with_linear_layers(args), max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="sum", strict=False
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def step(ids: Tensor) -> None:
        sums = [torch.zeros_like(p) for p in trained]
        for part in ids.split(args.micro):
            model.enable_hooks()
            found = losses(model, part)
            found.sum().backward(retain_graph=True)
            optimizer.zero_grad(set_to_none=True)
            factors = CLIP / (model.get_norm_sample() + GAMMA)
            model.disable_hooks()
            (factors * found).sum().backward()
            for p, total in zip(trained, sums, strict=True):
                total += p.grad
            optimizer.zero_grad(set_to_none=True)
        for p, total in zip(trained, sums, strict=True):
            p.grad = total.add_(torch.normal(0.0, SIGMA * CLIP, p.shape)).div_(len(ids))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


STEPS = {"private": private_step, "plain": plain_step, "own": own_step, "opacus": opacus_step}


def peaks(arguments: list[str]) -> dict[str, float]:
    """MiB, each in a process of its own."""
    environment, found = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, {}
    for kind in KINDS:
        command = [sys.executable, __file__, *arguments, "--child", kind]
        child = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        found[kind] = float(child.stdout.splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--rows", type=int, default=256, help="of a step")
    parser.add_argument("--micro", type=int, default=16, help="rows of a forward and backward pass")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    ids = torch.randint(args.vocab, (args.rows, args.tokens), generator=torch.Generator().manual_seed(1))
    if args.child:
        print(peak_of_steps(STEPS[args.child](args), ids))
        return

    memory, spent = peaks(given), {"sum": [], "noise": []}
    steps = {kind: STEPS[kind](args) for kind in KINDS[1:]} | {"private": private_step(args, spent)}
    for step in steps.values():
        seconds(step, ids[: args.micro])  # warm-up
    for part in spent.values():
        part.clear()
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(args.rounds):
        for kind in KINDS if number % 2 == 0 else reversed(KINDS):
            times[kind].append(seconds(steps[kind], ids))
    trained = sum(p.numel() for p in with_linear_layers(args).parameters() if p.requires_grad)
    result = {
        "trained": trained,
        "time_ratio": _ratio(times["private"], times["plain"]),
        "time_ratio_own": _ratio(times["private"], times["own"]),
        "time_ratio_opacus": _ratio(times["opacus"], times["plain"]),
        "sum_ratio": _ratio(spent["sum"], times["plain"]),
        "time_over_opacus": _ratio(times["private"], times["opacus"]),
        "memory_ratio": round(memory["private"] / memory["plain"], 4),
        "memory_ratio_opacus": round(memory["opacus"] / memory["plain"], 4),
        "memory_over_opacus": round(memory["private"] / memory["opacus"], 4),
        "noise_seconds": round(statistics.median(spent["noise"]), 3),
    }
    if not args.json:
        print(f"GPT-2 {args.layers} x {args.hidden}, {trained:,} weights, {args.rows} rows x {args.tokens} tokens")
        for kind in KINDS:
            print(f"{kind:8} {statistics.median(times[kind]):7.3f} s/step   {memory[kind]:7.1f} MiB peak")
        parts = {part: statistics.median(found) for part, found in spent.items()}
        print(f"of the private step {parts['sum']:.3f} s are the sum and {parts['noise']:.3f} s noise and AdamW")
    print(json.dumps(result))


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 4)


if __name__ == "__main__":
    main()
