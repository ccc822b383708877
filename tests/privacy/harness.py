"""Runs one stage on a tiny model with every coin fixed, and says what each release would have summed.

Fixed coins: a unit's participation is a function of its id, a completion is a function of its prompt,
and every release is answered by the same made-up gradient. What is left to differ between neighbouring
datasets is what the mechanism has to bound.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from dpalign.algorithms import (
    DPO,
    GRPO,
    PPO,
    RLOO,
    SFT,
    Algorithm,
    DPOConfig,
    GRPOConfig,
    Offline,
    OfflineConfig,
    PPOConfig,
    RewardModelConfig,
    RewardModelling,
    RLOOConfig,
    SFTConfig,
)
from dpalign.algorithms.base import micro_batches
from dpalign.algorithms.rollouts import RolloutConfig
from dpalign.data import UnitDataset
from dpalign.data.load import Record
from dpalign.engines import Local
from dpalign.models import AdapterConfig, AdapterStack, RewardModel
from dpalign.models.policy import Rollouts
from dpalign.privacy.gate import Gate
from dpalign.privacy.ledger import Intent, Ledger
from dpalign.privacy.mechanism import GaussianMechanism
from dpalign.rewards import Reward, RewardConfig
from dpalign.training import Stage
from tiny import VOCABULARY, dataset, tiny_policy, words

Sampler = Callable[[UnitDataset, int], list[int]]
TOLERANCE = 1 + 1e-5


@dataclass
class Trace:
    """What one stage did.

    sums: clipped gradient sum before the noise, `(trainables,)` float64, one per release.
    metrics: the metrics block's sum before the noise, one per release.
    contributions: every unit's clipped gradient `(units, trainables)`, one per release.
    gradients: what the optimizer was given, one per optimizer step.
    """

    sums: list[Tensor] = field(default_factory=list)
    metrics: list[Tensor] = field(default_factory=list)
    contributions: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    intents: list[Intent] = field(default_factory=list)
    log: list[dict] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class Interrupted(BaseException):
    """A crash in the middle of a run."""


def everyone(data: UnitDataset, call: int) -> list[int]:
    return list(range(len(data.units)))


def nobody(data: UnitDataset, call: int) -> list[int]:
    return []


def own_coins(data: UnitDataset, call: int) -> list[int]:
    """Each unit with probability 0.6, whoever else is there."""
    return [i for i, unit in enumerate(data.ids) if zlib.crc32(unit + bytes([call])) < 0.6 * 2**32]


def through(gate: type[Gate]) -> type[Stage]:
    """A stage whose units are behind another gate."""

    class Elsewhere(Stage):
        def __init__(self, *arguments, **settings) -> None:
            super().__init__(*arguments, **settings)
            self.gate.__class__ = gate

    return Elsewhere


def run_stage(
    algorithm: Algorithm,
    data: UnitDataset,
    *,
    kind: str = "gpt2",
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    stage_class: type[Stage] = Stage,
    mechanism: type[GaussianMechanism] = GaussianMechanism,
    sampler: Sampler = everyone,
    answers_are_fixed: bool = True,
    completions_are_fixed: bool = True,
    folder: Path | None = None,
    ledger: Ledger | None = None,
) -> Trace:
    """Trains `algorithm` on `data` with fixed coins; adapter and head start random, not at zero.

    Args:
        answers_are_fixed: every release is answered by the same made-up gradient and metrics, so that later
            releases see equal earlier ones; False lets the real answer through.
        dtype: of the base; adapter and head are float64 with a float64 base and float32 otherwise.
        sampler: which units take part; it may raise `Interrupted`.
    """
    trace, calls = Trace(), Counter[str]()

    class Recorder(mechanism):  # type: ignore[misc, valid-type]
        def __init__(self, shapes: list[torch.Size], **settings) -> None:
            super().__init__(shapes, **settings | {"dtype": torch.float64})
            trace.contributions.append(torch.zeros(0, sum(s.numel() for s in shapes), dtype=torch.float64))

        def add(self, grads: list[Tensor], metrics: Tensor | None = None) -> None:
            super().add(grads, metrics)
            flat = torch.cat([g.flatten(1) for g in grads], 1)[: calls["here"]].double().cpu()
            factors = self.clip_factors(flat.norm(dim=1)).unsqueeze(1)
            clipped = torch.where(factors > 0, flat * factors, 0.0)
            trace.contributions[-1] = torch.cat([trace.contributions[-1], clipped])

        def release(self) -> tuple[list[Tensor], dict[str, float] | None]:
            trace.sums.append(torch.cat([total.flatten() for total in self._sums]).double().cpu() * (self.grid or 1.0))
            trace.metrics.append(self._metrics_sum.double().cpu() * self.metrics_grid)
            answer, metrics = super().release()
            if answers_are_fixed:
                torch.manual_seed(len(trace.sums))
                answer = [torch.randn_like(a) for a in answer]
                metrics = {m.name: m.low + 0.4 * (m.high - m.low) for m in self.metrics} or None
            trace.gradients.append(torch.cat([a.flatten() for a in answer]).cpu())
            return answer, metrics

    def draw(units: int, rate: float, entropy: object) -> np.ndarray:
        calls["samples"] += 1
        return np.array(sampler(data, calls["samples"]), dtype=np.int64)

    def parts(*arguments) -> Iterator[list[int]]:
        for part in micro_batches(*arguments):
            calls["here"] = len(part)  # a micro-batch is filled up with units that are none
            yield part

    setup = algorithm.setup

    def wide_setup(model) -> None:
        setup(model)
        if dtype == torch.float64:
            model.to(dtype)
        generator = torch.Generator().manual_seed(7)
        for p in model.parameters():
            if p.requires_grad:
                p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)

    algorithm.setup = wide_setup  # type: ignore[method-assign]
    ledger = ledger or Ledger(":memory:")
    with (
        tempfile.TemporaryDirectory() as temporary,
        patch("dpalign.privacy.gate.GaussianMechanism", Recorder),
        patch("dpalign.privacy.gate.poisson_sample", draw),
        patch("dpalign.training.loop.micro_batches", parts),
        patch.object(Local, "sample", fixed_completions if completions_are_fixed else Local.sample),
        suppress(Interrupted),
    ):
        folder = folder or Path(temporary)
        log = folder / "metrics.jsonl"
        model: AdapterStack = tiny_policy(kind, dtype).to(device)
        if isinstance(algorithm, RewardModelling):
            model = RewardModel.from_policy(model, algorithm.config.text)
        stage = stage_class(model, algorithm, data, folder=folder, run="run", ledger=ledger, log=log)
        stage.train()
        trace.log = [json.loads(line) for line in log.read_text().splitlines()]
        trace.files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))
    trace.intents = ledger.intents()
    return trace


def fixed_completions(generator, *arguments) -> Rollouts:
    return completions_of_prompts(*arguments)


def completions_of_prompts(policy, ids: Tensor, mask: Tensor, config: RolloutConfig, coins=None) -> Rollouts:
    """A fixed completion for every (prompt, how often it came before), some ended by EOS."""
    width, seen = config.max_completion_length, Counter[tuple]()
    completions = torch.zeros(len(ids), width, dtype=torch.int64)
    for row, (prompt, inside) in enumerate(zip(ids, mask, strict=True)):
        key = tuple(prompt[inside > 0].tolist())
        generator = torch.Generator().manual_seed(zlib.crc32(repr((key, seen[key])).encode()))
        completions[row] = torch.randint(0, VOCABULARY, (width,), generator=generator)
        completions[row, 2 + sum(key) % width :] = 1  # EOS at a place that the prompt fixes
        seen[key] += 1
    completions = completions.to(ids.device)
    ended = (completions == 1).long()
    inside = (ended.cumsum(1) - ended == 0).float()
    return Rollouts(torch.cat([ids, completions], 1), torch.cat([mask, inside.long()], 1), inside)


def moved(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest L2 distance between the releases of two runs."""
    assert len(one) == len(other) > 0
    return max(float((a - b).norm()) for a, b in zip(one, other, strict=True))


# Algorithms and neighbouring datasets ----------------------------------------------------------------------

SMALL = {
    "noise_multiplier": 0.0, "max_steps": 1, "micro_batch_size": 5, "clipping": "flat", "max_grad_norm": 1.0,
    "adapter": AdapterConfig(r=2),
}  # fmt: skip


def sft(algorithm: type[SFT] = SFT, **changes) -> SFT:
    return algorithm(SFTConfig(**SMALL | {"expected_batch_size": 8, "max_length": 24} | changes))


def ppo(algorithm: type[PPO] = PPO, **changes) -> PPO:
    """DP-PPO whose reward is the record's `score` column."""
    settings: dict = {"expected_batch_size": 8, "max_prompt_length": 8, "max_completion_length": 6, "beta": 0.05}
    settings["reward"] = RewardConfig(columns=["score"])
    reward = Reward(lambda prompts, completions, score: score, -1e6, 1e6)
    return algorithm(PPOConfig(**SMALL | settings | changes), reward)


def rloo(algorithm: type[RLOO] = RLOO, **changes) -> RLOO:
    """DP-RLOO whose reward is the record's `score` times a share that the completion fixes."""
    settings: dict = {"expected_batch_size": 8, "max_prompt_length": 8, "max_completion_length": 6, "beta": 0.05}
    settings |= {"num_generations": 2, "reward": RewardConfig(columns=["score"])}
    return algorithm(RLOOConfig(**SMALL | settings | changes), Reward(shared_score, -1e6, 1e6))


def grpo(algorithm: type[GRPO] = GRPO, **changes) -> GRPO:
    """DP-GRPO with the reward of `rloo`."""
    settings: dict = {"expected_batch_size": 8, "max_prompt_length": 8, "max_completion_length": 6, "beta": 0.05}
    settings |= {"num_generations": 3, "reward": RewardConfig(columns=["score"])}
    return algorithm(GRPOConfig(**SMALL | settings | changes), Reward(shared_score, -1e6, 1e6))


def offline(algorithm: type[Offline] = Offline, **changes) -> Offline:
    """Learning from scored completions, with the reward of `rloo`."""
    settings: dict = {"expected_batch_size": 8, "max_prompt_length": 8, "max_completion_length": 6}
    settings |= {"num_generations": 3, "reward": RewardConfig(columns=["score"])}
    return algorithm(OfflineConfig(**SMALL | settings | changes), Reward(shared_score, -1e6, 1e6))


WORDS = {"method": "conditional", "good": "w80 w81 ", "bad": "w90 ", "max_prompt_length": 10}  # of `offline`


def shared_score(prompts: list[str], completions: list[str], score: list) -> list[float]:
    return [s * (zlib.crc32(c.encode()) % 100) / 100 for c, s in zip(completions, score, strict=True)]


def reward(algorithm: type[RewardModelling] = RewardModelling, **changes) -> RewardModelling:
    return algorithm(RewardModelConfig(**SMALL | {"expected_batch_size": 8, "max_length": 24} | changes))


def dpo(algorithm: type[DPO] = DPO, **changes) -> DPO:
    return algorithm(DPOConfig(**SMALL | {"expected_batch_size": 8, "max_length": 24, "beta": 0.5} | changes))


def texts(count: int = 8) -> list[list[Record]]:
    """Short, nearly equal texts: their gradients point the same way, so a coupling moves them all."""
    return [[{"id": f"t{i:02}", "text": f"w1 w2 w3 w{10 + i}"}] for i in range(count)]


def prompts(count: int = 8, score: float = 4.0, spread: float = 4.0) -> list[list[Record]]:
    """Prompts of different lengths; their scores are `score`, `score + spread`, and so on."""
    return [
        [{"id": f"p{i:02}", "prompt": f"w1 w2 {words(1 + i % 4, i)} w{i}", "score": score + spread * i}]
        for i in range(count)
    ]


def pairs(count: int = 8) -> list[list[Record]]:
    """Short pairs that differ in two words: their gradients point the same way."""
    return [
        [{"id": f"r{i:02}", "chosen": f"w1 w2 w3 w{10 + i}", "rejected": f"w1 w2 w4 w{30 + i}", "margin": 0.1 * i}]
        for i in range(count)
    ]


LONG_TEXT: list[Record] = [{"id": "x2", "text": words(40, 1)}]
HUGE_SCORE: list[Record] = [{"id": "x2", "prompt": "w7 w8 w9 w10 w11", "score": -1e5}]
HUGE_PAIR: list[Record] = [{"id": "x2", "chosen": words(40, 1), "rejected": "w7", "margin": 1e6, "preference": 0.0}]


def neighbours(units: list[list[Record]], outlier: list[Record]) -> tuple[UnitDataset, UnitDataset]:
    """D and D + x; x comes in the middle, so every later position and micro-batch shifts."""
    half = len(units) // 2
    return dataset(units, len(units)), dataset([*units[:half], outlier, *units[half:]], len(units))
