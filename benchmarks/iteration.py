"""One private iteration beside one of TRL's, in turn: what `ppo_iteration.py` and `rloo_iteration.py` share."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from models import gpt2, word_tokenizer

from dpalign.algorithms.base import Rows, encode_units, unit_means
from dpalign.algorithms.rollouts import RolloutAlgorithm
from dpalign.gradients import PerUnitGradients
from dpalign.models import Policy
from dpalign.models.kernels import chunks
from dpalign.privacy.entropy import SystemEntropy
from dpalign.privacy.mechanism import GaussianMechanism

HOME = Path(__file__).resolve().parent.parent


def length_reward(prompts: list[str], completions: list[str]) -> list[float]:
    return [min(len(text) / 200, 1.0) for text in completions]


class Private:
    """A private stage on fixed prompts: every call of `iterate` is one iteration on all of them.

    Built from the parts that `dpalign.training.Stage` uses, without its ledger and checkpoints.
    """

    def __init__(self, policy: Policy, prompts: list[str], algorithm: RolloutAlgorithm) -> None:
        self.policy, self.config, self.algorithm = policy, algorithm.config, algorithm
        algorithm.setup(policy)
        self.examples = encode_units(self.algorithm, policy, [[{"prompt": prompt}] for prompt in prompts])
        self.gradients = PerUnitGradients(policy)
        self.optimizer = torch.optim.AdamW(self.gradients.parameters, lr=self.config.learning_rate)

    def iterate(self) -> dict[str, float]:
        """Seconds of each phase; `reference` includes decoding and scoring."""
        clock = [self._now()]  # start, generated, collected, end
        generator = self.algorithm.generator
        sample = generator.sample

        def timed_sample(*args):
            sampled = sample(*args)
            clock.append(self._now())
            return sampled

        with patch.object(generator, "sample", timed_sample):
            phase = self.algorithm.rows(self.policy, self.examples, [SystemEntropy()] * len(self.examples))
        clock.append(self._now())
        self._train(phase)
        clock.append(self._now())
        start, generated, collected, end = clock
        return {"generate": generated - start, "reference": collected - generated, "train": end - collected}

    def _train(self, phase: Rows) -> None:
        config, together = self.config, self.config.micro_batch_size // self.algorithm.rows_per_example
        mechanism = GaussianMechanism(
            [p.shape for p in self.gradients.parameters],
            max_grad_norm=config.max_grad_norm,
            noise_multiplier=1.0,
            divisor=len(self.examples),  # all of them: what Poisson sampling would have drawn
            entropy=SystemEntropy(),
            metrics=self.algorithm.metrics,
            metrics_noise_multiplier=10.0,
            device=self.policy.device,
        )
        for units, count in chunks(len(self.examples), together):
            batch = phase.of(units)
            with self.gradients.collect(batch.unit, len(units)):
                losses, metrics = self.algorithm.row_losses(self.policy, batch)
                unit_means(losses, batch.unit, len(units)).sum().backward()
            with torch.no_grad():
                means = unit_means(metrics, batch.unit, len(units))
                mechanism.add([g[:count] for g in self.gradients.grads()], means[:count])
        noisy, _ = mechanism.release()
        for p, gradient in zip(self.gradients.parameters, noisy, strict=True):
            p.grad = gradient.to(p.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _now(self) -> float:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class TRL:
    """The child process, in an environment of its own; `iterate` has it run one iteration."""

    def __init__(self, python: Path, worker: str, settings: dict) -> None:
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name(worker)), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if settings["quiet"] else None,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(settings["threads"])},
        )

    def iterate(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("the TRL worker stopped: run again without --json to see why.")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def options(description: str | None, environment: str) -> argparse.ArgumentParser:
    """What both scripts are told; TRL's Python lies in `environment`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--rank", type=int, default=4, help="LoRA rank")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--micro-batch-size", type=int, default=32, help="ours")
    parser.add_argument("--trl-mini-batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=6, help="measured pairs of iterations")
    parser.add_argument("--trl-python", type=Path, default=HOME / environment / "bin" / "python")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    return parser


def compare(args: argparse.Namespace, worker: str, make: Callable[[], RolloutAlgorithm], rows: int) -> None:
    """Runs both on `args.prompts` prompts, and prints each iteration and the median ratio.

    worker: TRL's script. make: our algorithm. rows: completions of an iteration.
    """
    settings = vars(args)
    python = settings.pop("trl_python")
    if not python.exists():
        sys.exit(f"{python} is missing: run make bench-setup.")
    torch.set_num_threads(args.threads)
    chance = random.Random(0)
    prompts = [[chance.randrange(1, args.vocab) for _ in range(args.prompt_tokens)] for _ in range(args.prompts)]
    trl = TRL(python, worker, settings | {"prompts": prompts, "quiet": args.json})

    torch.manual_seed(0)
    policy = Policy(gpt2(args.vocab, args.layers, args.hidden, args.heads), word_tokenizer(args.vocab))
    ours = Private(policy, [" ".join(f"w{token}" for token in prompt) for prompt in prompts], make())
    trl.iterate()  # warm-up, first while ours has nothing to do yet
    ours.iterate()
    our_times, trl_times, phases = [], [], []
    for pair in range(args.pairs):
        if pair % 2:
            theirs = trl.iterate()
        phases.append(ours.iterate())
        if not pair % 2:
            theirs = trl.iterate()
        assert theirs["tokens"] == rows * args.new_tokens
        our_times.append(sum(phases[-1].values()))
        trl_times.append(theirs["seconds"])
        if not args.json:
            for name, seconds, parts in (("ours", our_times[-1], phases[-1]), ("TRL", *list(theirs.values())[:2])):
                detail = ", ".join(f"{phase} {value:.2f}" for phase, value in parts.items())
                print(f"{name:5} {seconds:6.2f} s  ({detail})")
    trl.close()
    ratio = statistics.median(a / b for a, b in zip(our_times, trl_times, strict=True))
    result = {"ratio": ratio, "ours_s": statistics.median(our_times), "trl_s": statistics.median(trl_times)}
    print(json.dumps({k: round(v, 4) for k, v in result.items()}))
