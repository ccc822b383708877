"""Reward, KL, perplexity and distinct-n of sampled completions of public prompts.

Everything here is exact, so it is for prompts that are declared public only.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..algorithms.rollouts import RolloutConfig, encode_prompt, sample
from ..data.load import Record
from ..errors import DPAlignError
from ..models import Policy
from ..models.policy import Rollouts
from ..rewards import Reward


@dataclass(frozen=True)
class Evaluation:
    """Means over prompts, with the half-width of a 95% interval where it makes sense.

    reward: mean reward of the completions. kl: nats per completion against the model that the newest stage started from.
    perplexity: of the completions under the frozen base model. distinct_2: distinct over all token
    bigrams. completion_length: tokens.
    """

    reward: float
    reward_ci95: float
    kl: float
    perplexity: float
    distinct_2: float
    completion_length: float
    prompts: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class PublicPrompts:
    """Token ids of prompts, and the columns that the reward is given; all of one length."""

    ids: list[list[int]]
    columns: dict[str, list[Any]]


def public_prompts(
    policy: Policy, records: list[Record], config: RolloutConfig, at_most: int | None = None
) -> PublicPrompts:
    """Prompts of the first `at_most` records (default all); texts too short for one are left out."""
    encoded = [(record, encode_prompt(policy, record, config)) for record in records]
    usable = [(record, ids) for record, ids in encoded if ids is not None][:at_most]
    if not usable:
        raise DPAlignError("none of the public records is long enough for a prompt: lower prompt_min_tokens.")
    columns = {name: [record.get(name) for record, _ in usable] for name in config.reward.columns}
    return PublicPrompts([ids for _, ids in usable], columns)


@torch.no_grad()
def evaluate_policy(
    policy: Policy,
    prompts: PublicPrompts,
    reward: Reward,
    config: RolloutConfig,
    *,
    seed: int = 0,
) -> tuple[Evaluation, list[tuple[str, str]]]:
    """Samples one completion per prompt from the policy and measures it.

    Args:
        seed: of the sampling; the same for every model that is compared.

    Returns:
        The means, and (prompt, completion) texts.
    """
    ids, mask = policy.encode_prompts(prompts.ids, max(map(len, prompts.ids)))
    torch.manual_seed(seed)
    rollouts = sample(policy, ids, mask, config)
    logprobs = logprobs_under(policy, rollouts, config)
    with policy.base():
        base_logprobs = logprobs_under(policy, rollouts, config)
    with policy.reference():
        reference_logprobs = logprobs_under(policy, rollouts, config)
    texts = policy.decode(rollouts)
    prompt_texts = policy.tokenizer.batch_decode(prompts.ids, skip_special_tokens=True)
    scores = reward(prompt_texts, texts, prompts.columns)
    scored = scores[~scores.isnan()]
    lengths = rollouts.completion_mask.sum(1)
    return Evaluation(
        reward=float(scored.mean()),
        reward_ci95=1.96 * float(scored.std()) / math.sqrt(max(1, len(scored))),
        kl=float((logprobs - reference_logprobs).sum(1).mean()),
        perplexity=float(torch.exp(-base_logprobs.sum() / lengths.sum())),
        distinct_2=distinct(rollouts.completion_ids, rollouts.completion_mask, 2),
        completion_length=float(lengths.mean()),
        prompts=len(prompts.ids),
    ), list(zip(prompt_texts, texts, strict=True))


def logprobs_under(policy: Policy, rollouts: Rollouts, config: RolloutConfig) -> Tensor:
    """`(rows, completion)` log-probabilities of the completions under the policy as it is switched now."""
    head, policy.value_head = policy.value_head, None
    try:
        return torch.cat(
            [
                policy.completion_logprobs(rollouts[start : start + 64], config.min_completion_length)[0]
                for start in range(0, len(rollouts.input_ids), 64)
            ]
        )
    finally:
        policy.value_head = head


def distinct(ids: Tensor, mask: Tensor, n: int) -> float:
    """Distinct n-grams over all n-grams of the completions' tokens (Li et al. 2016)."""
    grams = [
        tuple(row[i : i + n])
        for row, length in zip(ids.tolist(), mask.sum(1).int().tolist(), strict=True)
        for i in range(length - n + 1)
    ]
    return len(set(grams)) / max(1, len(grams))


def evaluate_stages(
    policy: Policy, prompts: PublicPrompts, reward: Reward, config: RolloutConfig, *, seed: int = 0
) -> dict[str, tuple[Evaluation, list[tuple[str, str]]]]:
    """`evaluate_policy` of the base model and of the policy after each stage, by the stage's name."""
    results = {}
    with policy.base():
        results["pretrained"] = evaluate_policy(policy, prompts, reward, config, seed=seed)
    for count, name in enumerate(policy.adapters, 1):
        with policy.only(policy.adapters[:count]):
            results[name] = evaluate_policy(policy, prompts, reward, config, seed=seed)
    return results
