"""Held-out units measured once, by one Gaussian release: for those who have no public held-out data.

The mean reward of the policy and of the model it started from, and how often the policy wins, are one block of bounded
numbers per unit: adding or removing a unit moves their scaled sum by at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..algorithms.base import OUT_OF_MEMORY, Entering, Reading, StageKind, Tokenizer, Tokens
from ..algorithms.completions import PROMPT_COLUMNS, check_prompt, columns_of, read_prompt, sample
from ..data import UnitDataset
from ..data.load import Record
from ..errors import DPAlignError
from ..files import damaged, private_folder, read_own, write_json
from ..models import Policy
from ..models.generation import answers, asked, words_room
from ..models.kernels import chunks
from ..privacy.context import own_context
from ..privacy.entropy import SystemEntropy
from ..privacy.gate import Gate, PrivateStep
from ..privacy.ledger import Ledger
from ..privacy.mechanism import MetricRange
from ..rewards import Reward
from ..settings.base import StageConfig
from ..settings.measurement import MeasurementConfig
from ..settings.rollouts import SamplingConfig, samples
from ..training import StagePlan
from ..training.loop import hash_of

METRICS = ("reward", "reward_reference", "win_rate")


class Measurement(StageKind[MeasurementConfig]):
    """Mean reward of the policy and of its reference, and the policy's win rate, in one release."""

    name = "measurement"
    Config = MeasurementConfig
    model_kind = Policy
    columns = PROMPT_COLUMNS

    @classmethod
    def completed(cls, config: MeasurementConfig, others: Iterable[StageConfig]) -> MeasurementConfig:
        if config.sampling is not None:
            return config
        for other in others:
            if samples(other):
                like = {f.name: getattr(other, f.name) for f in fields(SamplingConfig)}
                return replace(config, sampling=SamplingConfig(**like))
        raise DPAlignError(
            f"stage {cls.name} has nothing to measure by: give it a section sampling, or the recipe a stage that "
            "samples completions."
        )

    @classmethod
    def sampling(cls, config: MeasurementConfig) -> SamplingConfig:
        """As a completed config has it."""
        if config.sampling is None:
            raise DPAlignError(f"stage {cls.name} has no section sampling.")
        return config.sampling

    @classmethod
    def entering(cls, config: MeasurementConfig) -> Entering:
        return {"reward": cls.sampling(config).reward}

    @classmethod
    def longest(cls, config: MeasurementConfig) -> int:
        return cls.sampling(config).positions

    @classmethod
    def tokens(cls, config: MeasurementConfig) -> Tokens:
        return Tokens(read=2 * cls.sampling(config).positions)  # the policy's completion, and its reference's

    @classmethod
    def check(cls, config: MeasurementConfig, tokenizer: Tokenizer, record: Record) -> Reading:
        return check_prompt(tokenizer, record, cls.sampling(config))


@own_context()
def measure_privately(
    policy: Policy,
    data: UnitDataset,
    plan: StagePlan,
    reward: Reward,
    config: SamplingConfig,
    *,
    folder: Path,
    run: str,
    ledger: Ledger,
    tell: Callable[[str], None] = lambda message: None,
) -> dict[str, Any] | None:
    """Mean reward of the policy and of its reference, and the policy's win rate, with the noise's standard deviation.

    Journaled before anything is read from the data. A finished measurement is read again, not drawn again; one that
    an interruption lost stays lost, for a second one would spend a second time.

    Returns:
        None if it was lost.
    """
    if not policy.adapters:
        raise DPAlignError("the model has no adapter to compare with its base: give a release.")
    result = private_folder(folder) / "result.json"
    mechanism = plan.mechanism().rounded()
    asked = asdict(config) | {"mechanism": mechanism, "model": policy.fingerprint(), "micro_batch_size": None}
    gate = data.gate(ledger, run=run, stage=Measurement.name, config_hash=hash_of(asked))
    journaled = gate.intents()
    same = (gate.config_hash, hash_of(mechanism))  # the second is that of 0.1.0
    if any(i.fingerprint != gate.fingerprint or i.config_hash not in same for i in journaled):
        raise DPAlignError(
            "the held-out data, the model or the settings have changed since it was measured: restore them, or use "
            "another folder."
        )
    if result.exists():
        return _read_result(result)
    if journaled:
        tell("the measurement was lost by an interruption; its budget is spent, and it is not repeated.")
        return None
    value = _measured_once(policy, data, plan, reward, config, gate)
    write_json(result, value)
    return value


def _read_result(path: Path) -> dict[str, Any]:
    value = read_own(path)
    noise = value.get("noise_standard_deviation")
    numbers = [part.get(name) for part in (value, noise) if isinstance(part, dict) for name in METRICS]
    if len(numbers) != 2 * len(METRICS) or not all(isinstance(number, int | float) for number in numbers):
        raise damaged(path)
    if not {"units", "epsilon"} <= value.keys():
        raise damaged(path)
    return value


def _measured_once(
    policy: Policy, data: UnitDataset, plan: StagePlan, reward: Reward, config: SamplingConfig, gate: Gate
) -> dict[str, Any]:
    block = (
        *(MetricRange(name, reward.low, reward.high) for name in METRICS[:2]),
        MetricRange(METRICS[2], 0.0, 1.0),
    )
    step = PrivateStep(plan.mechanism(), max_grad_norm=1.0, divisor=data.declared_units, metrics=block)
    (drawn,) = gate.draw([step], first=0, attempt=0)
    mechanism = drawn.measurement()
    for chunk, count in chunks(len(drawn.units), config.micro_batch_size):
        values = _contained(policy, [data.units[drawn.units[i]] for i in chunk], reward, config, drawn.coins)
        mechanism.add_metrics(values[:count])
    released = mechanism.release()[1] or {}
    deviation = plan.noise_multiplier * math.sqrt(len(block)) / data.declared_units
    return {
        **released,
        "noise_standard_deviation": {m.name: deviation * (m.high - m.low) / 2 for m in block},
        "units": data.declared_units,
        "epsilon": plan.epsilon,
    }


def _contained(
    policy: Policy, units: list[list[Record]], reward: Reward, config: SamplingConfig, coins: SystemEntropy
) -> torch.Tensor:
    """`_measure`, in which a unit that raises something counts as one without a prompt: the others go on."""
    try:
        return _measure(policy, units, reward, config, coins)
    except OUT_OF_MEMORY:
        raise
    except Exception:
        if len(units) == 1:
            return torch.full((1, 3), torch.nan, dtype=torch.float64)
    return torch.cat([_contained(policy, [unit], reward, config, coins) for unit in units])


@torch.no_grad()
def _measure(
    policy: Policy, units: list[list[Record]], reward: Reward, config: SamplingConfig, coins: SystemEntropy
) -> torch.Tensor:
    # One row per unit: the mean over its records of both rewards and of the wins; NaN where there is no prompt.
    encoded = [
        (unit, read_prompt(policy.tokenizer, record, config)) for unit, rows in enumerate(units) for record in rows
    ]
    rows = [(unit, prompt) for unit, prompt in encoded if prompt is not None]
    values = torch.full((len(units), 3), torch.nan, dtype=torch.float64)
    if not rows:
        return values
    prompts = [prompt for _, prompt in rows]
    width = config.max_prompt_length + words_room(policy)

    def sampled() -> torch.Tensor:
        ids, mask = policy.encode_prompts([asked(policy, prompt) for prompt in prompts], width)
        rollouts = sample(policy, ids, mask, config, [coins] * len(prompts))
        texts = [prompt.text for prompt in prompts]
        return reward(texts, answers(policy, prompts, rollouts), columns_of(prompts, config))

    ours = sampled()
    with policy.reference():
        theirs = sampled()
    wins = (ours > theirs).double() + 0.5 * (ours == theirs).double()
    wins = torch.where(ours.isnan() | theirs.isnan(), torch.nan, wins)
    per_row = torch.stack([ours.double(), theirs.double(), wins], 1)
    owner = torch.tensor([unit for unit, _ in rows])
    for unit in {unit for unit, _ in rows}:
        values[unit] = per_row[owner == unit].mean(0)
    return values
