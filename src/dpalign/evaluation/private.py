"""Held-out units measured once, by one Gaussian release: for those who have no public held-out data.

The mean reward of the policy and of the model it started from, and how often the policy wins, are one block of bounded
numbers per unit: adding or removing a unit moves their scaled sum by at most 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..algorithms.rollouts import RolloutConfig, encode_prompt, sample
from ..data import UnitDataset
from ..data.load import Record
from ..errors import DPAlignError
from ..files import private_folder, write_json
from ..models import Policy
from ..privacy import accountant
from ..privacy.accountant import SampledGaussian
from ..privacy.entropy import SystemEntropy
from ..privacy.gate import Gate, PrivateStep
from ..privacy.ledger import Ledger
from ..privacy.mechanism import MetricRange
from ..rewards import Reward
from ..training import StagePlan
from ..training.loop import hash_of

STAGE = "evaluation"


@dataclass(kw_only=True)
class PrivateEvaluationConfig:
    """One noisy measurement on held-out private units at the end of a run.

    Args:
        target_epsilon: epsilon of the measurement; default: the recipe's (its units are in no other stage).
        target_delta: the recipe's.
        noise_multiplier: sigma instead of target_epsilon.
    """

    target_epsilon: float | None = None
    target_delta: float | None = None
    noise_multiplier: float | None = None


def plan_evaluation(config: PrivateEvaluationConfig, units: float) -> StagePlan:
    """One release on all units.

    Raises:
        DPAlignError: not exactly one of target_epsilon and noise_multiplier.
    """
    delta = config.target_delta if config.target_delta is not None else accountant.default_delta(math.ceil(units))
    if (config.target_epsilon is None) == (config.noise_multiplier is None):
        raise DPAlignError("stage evaluation needs exactly one of target_epsilon and noise_multiplier.")
    sigma = config.noise_multiplier
    if sigma is None and config.target_epsilon is not None:
        sigma = accountant.noise_multiplier(config.target_epsilon, delta, sampling_rate=1.0, steps=1)
    return StagePlan.of(SampledGaussian(1.0, sigma or 0.0, 1), delta, config.target_epsilon)


def evaluate_privately(
    policy: Policy,
    data: UnitDataset,
    plan: StagePlan,
    reward: Reward,
    config: RolloutConfig,
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
    result = private_folder(folder) / "result.json"
    gate = _gate(data, plan, run, ledger)
    journaled = gate.intents()
    if any((i.fingerprint, i.config_hash) != (gate.fingerprint, gate.config_hash) for i in journaled):
        raise DPAlignError(
            "the held-out data or the settings have changed since it was measured: restore them, or use another folder."
        )
    if result.exists():
        value: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return value
    if journaled:
        tell("the private evaluation was lost by an interruption; its budget is spent, and it is not repeated.")
        return None
    value = _measured_once(policy, data, plan, reward, config, gate)
    write_json(result, value)
    return value


def _measured_once(
    policy: Policy, data: UnitDataset, plan: StagePlan, reward: Reward, config: RolloutConfig, gate: Gate
) -> dict[str, Any]:
    block = (
        MetricRange("reward", reward.low, reward.high),
        MetricRange("reward_reference", reward.low, reward.high),
        MetricRange("win_rate", 0.0, 1.0),
    )
    step = PrivateStep(plan.mechanism(), max_grad_norm=1.0, divisor=data.declared_units, metrics=block)
    (drawn,) = gate.draw([step], first=0, attempt=0)
    mechanism = drawn.measurement()
    for chunk, count in policy.chunks(len(drawn.units), config.micro_batch_size):
        values = _measure(policy, [data.units[drawn.units[i]] for i in chunk], reward, config, drawn.coins)
        mechanism.add_metrics(values[:count])
    released = mechanism.release()[1] or {}
    deviation = plan.noise_multiplier * math.sqrt(len(block)) / data.declared_units
    return {
        **released,
        "noise_standard_deviation": {m.name: deviation * (m.high - m.low) / 2 for m in block},
        "units": data.declared_units,
        "epsilon": plan.epsilon,
    }


def _gate(data: UnitDataset, plan: StagePlan, run: str, ledger: Ledger) -> Gate:
    return Gate(
        ledger,
        data.part,
        count=len(data.units),
        unit=data.unit,
        declared_units=data.declared_units,
        fingerprint=data.fingerprint,
        run=run,
        stage=STAGE,
        config_hash=hash_of(plan.mechanism().rounded()),
    )


@torch.no_grad()
def _measure(
    policy: Policy, units: list[list[Record]], reward: Reward, config: RolloutConfig, coins: SystemEntropy
) -> torch.Tensor:
    # One row per unit: the mean over its records of both rewards and of the wins; NaN where there is no prompt.
    encoded = [
        (unit, encode_prompt(policy, record, config), record) for unit, rows in enumerate(units) for record in rows
    ]
    rows = [(unit, prompt, record) for unit, prompt, record in encoded if prompt is not None]
    values = torch.full((len(units), 3), torch.nan, dtype=torch.float64)
    if not rows:
        return values
    ids, mask = policy.encode_prompts([prompt for _, prompt, _ in rows], config.max_prompt_length)
    prompts = policy.tokenizer.batch_decode([prompt for _, prompt, _ in rows], skip_special_tokens=True)
    columns = {name: [record.get(name) for _, _, record in rows] for name in config.reward.columns}
    ours = reward(prompts, policy.decode(sample(policy, ids, mask, config, coins)), columns)
    with policy.reference():
        theirs = reward(prompts, policy.decode(sample(policy, ids, mask, config, coins)), columns)
    wins = (ours > theirs).double() + 0.5 * (ours == theirs).double()
    wins = torch.where(ours.isnan() | theirs.isnan(), torch.nan, wins)
    per_row = torch.stack([ours.double(), theirs.double(), wins], 1)
    owner = torch.tensor([unit for unit, _, _ in rows])
    for unit in {unit for unit, _, _ in rows}:
        values[unit] = per_row[owner == unit].mean(0)
    return values
