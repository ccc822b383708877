"""What helps a private reward model: where the score is read, and how the gradients of pairs are clipped.

    .venv/bin/python benchmarks/reward_head.py

A linear head on frozen features of the embedded model, trained on the demo's pairs as dpalign trains it (Poisson samples,
clipping, noise at the accountant's sigma, Adam with linear decay), but on features computed once, so that a setting takes
a second. Sampling and noise are seeded: for learning curves only, no guarantee attaches. Prints accuracy and nats per pair
on the 500 public pairs, mean over --seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math

import torch
from torch import Tensor

from dpalign.data.demo import demo_file
from dpalign.models import ModelConfig, RewardModel, TextFormat
from dpalign.privacy import accountant

DELTA = 1e-5


@torch.no_grad()
def features(name: str) -> dict[str, Tensor]:
    """Differences chosen - rejected `(pairs, hidden)` of the last hidden states, by where they are read."""
    pairs = [json.loads(line) for line in demo_file(f"demo:movie-preferences/{name}").read_text().splitlines()]
    texts = [text for pair in pairs for text in (pair["chosen"], pair["rejected"])]
    model = RewardModel.load(ModelConfig(), text=TextFormat(40, prepend_bos=True, append_eos=True))
    parts = []
    for start in range(0, len(texts), 128):
        ids, mask = model.pad([model.encode(text) for text in texts[start : start + 128]])
        hidden = model.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        rows, last = torch.arange(len(ids)), mask.sum(1) - 1
        mean = (hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        parts.append((hidden[rows, last], hidden[rows, last - 1], mean))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return {n: c[0::2] - c[1::2] for n, c in zip(("EOS", "last token", "mean"), columns, strict=True)}


def train(x: Tensor, epsilon: float, batch: int, steps: int, rate: float, gamma: float | None, seed: int) -> Tensor:
    """Weights of the head; `gamma` is that of automatic clipping, None clips flat at 1."""
    q = batch / len(x)
    sigma = accountant.noise_multiplier(epsilon, DELTA, sampling_rate=q, steps=steps)
    torch.manual_seed(seed)
    weight = torch.zeros(x.shape[1])
    optimizer = torch.optim.Adam([weight], rate, betas=(0.9, 0.99))
    for step in range(steps):
        sample = x[torch.rand(len(x)) < q]
        gradients = -torch.sigmoid(-(sample @ weight)).unsqueeze(1) * sample
        norms = gradients.norm(dim=1, keepdim=True)
        factors = (1 / norms).clamp(max=1) if gamma is None else 1 / (norms + gamma)
        weight.grad = ((gradients * factors).sum(0) + sigma * torch.randn_like(weight)) / batch
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
    return weight


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 4.0, math.inf])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    trained, held_out = features("pairs"), features("public_pairs")
    print("epsilon  read at     clipping        accuracy  nats")
    for epsilon, where, gamma in itertools.product(given.epsilons, trained, (0.01, 2.0, 5.0, None)):
        margins = torch.stack(
            [
                held_out[where] @ train(trained[where], epsilon, given.batch_size, given.steps, 3e-2, gamma, seed)
                for seed in range(given.seeds)
            ]
        )
        accuracy, nats = (margins > 0).double().mean(), torch.nn.functional.softplus(-margins).mean()
        clipping = "flat" if gamma is None else f"gamma {gamma:g}"
        print(f"{epsilon:<8g} {where:<11s} {clipping:<15s} {accuracy:.3f}     {nats:.3f}", flush=True)


if __name__ == "__main__":
    main()
