"""Reward, KL, perplexity, distinct-n and ROUGE of sampled completions of public prompts.

Everything here is exact, so it is for prompts that are declared public only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..algorithms.completions import columns_of, read_prompt, sample
from ..data.load import Record
from ..data.text import as_string
from ..errors import DPAlignError
from ..models import Policy
from ..models.generation import Prompt, answers, asked_again, padded
from ..models.policy import Rollouts
from ..rewards import Reward
from ..settings.rollouts import SamplingConfig
from .text_overlap import rouge
from .texts import TextEvaluation, per_token

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """Means over prompts, with the half-width of a 95% interval (`_ci95`, normal) where it makes sense.

    reward: mean reward of the completions; unscored: completions that the reward could not score, which its mean leaves
    out. reference_reward: the same under a second reward that is used for evaluation only. kl: nats per completion
    against the model that the newest stage started from. perplexity: of the completions under the frozen base model;
    its interval is the delta method's. distinct_n: distinct over all token n-grams, without an interval because it
    depends on the number of completions. completion_length: tokens. rouge1, rouge2, rougeL: F1 against reference texts.
    text_loss: nats per token of held-out public texts, `text_records` of them, where the run learns from texts.
    """

    reward: float
    reward_ci95: float
    kl: float
    perplexity: float
    distinct_2: float
    completion_length: float
    prompts: int
    unscored: int = 0
    kl_ci95: float = math.nan
    perplexity_ci95: float = math.nan
    completion_length_ci95: float = math.nan
    distinct_1: float = math.nan
    distinct_3: float = math.nan
    reference_reward: float | None = None
    reference_reward_ci95: float | None = None
    reference_unscored: int | None = None
    rouge1: float | None = None
    rouge1_ci95: float | None = None
    rouge2: float | None = None
    rouge2_ci95: float | None = None
    rougeL: float | None = None
    rougeL_ci95: float | None = None
    text_loss: float | None = None
    text_loss_ci95: float | None = None
    text_records: int | None = None

    def as_dict(self) -> dict[str, float]:
        """Without what was not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def without_reference(self) -> Evaluation:
        """The same without the reference reward's numbers."""
        return replace(self, reference_reward=None, reference_reward_ci95=None, reference_unscored=None)

    def with_text(self, found: TextEvaluation | None) -> Evaluation:
        """The same with what was measured on texts, if anything was."""
        return (
            self
            if found is None
            else replace(
                self, text_loss=found.text_loss, text_loss_ci95=found.text_loss_ci95, text_records=found.text_records
            )
        )


@dataclass(frozen=True)
class PublicPrompts:
    """Prompts, the columns that the reward is given, and the records they are of; all of one length."""

    prompts: list[Prompt]
    columns: dict[str, list[Any]]
    records: list[Record]

    @property
    def texts(self) -> list[str]:
        """For people and judges."""
        return [as_string(prompt.text) for prompt in self.prompts]

    def columns_of(self, reward: Reward) -> dict[str, list[Any]]:
        """What a reward is given by the settings that it was loaded from: not all are the prompts' own."""
        return {name: [record.get(name) for record in self.records] for name in reward.columns}


@dataclass(frozen=True)
class Measured:
    """A model's evaluation and what it rests on: texts and rewards `(prompts,)`, NaN where there is none."""

    evaluation: Evaluation
    prompts: list[str]
    completions: list[str]
    rewards: Tensor


def public_prompts(
    policy: Policy, records: list[Record], config: SamplingConfig, at_most: int | None = None
) -> PublicPrompts:
    """Prompts of the first `at_most` usable records (default all); texts too short for one are left out."""
    usable: list[tuple[Record, Prompt]] = []
    for record in records:
        if at_most is not None and len(usable) >= at_most:
            break
        prompt = read_prompt(policy.tokenizer, record, config)
        if prompt is not None:
            usable.append((record, prompt))
    if not usable:
        raise DPAlignError(
            "none of the public records is long enough for a prompt: lower prompt_min_tokens (--prompt_tokens)."
        )
    prompts = [prompt for _, prompt in usable]
    return PublicPrompts(prompts, columns_of(prompts, config), [record for record, _ in usable])


def evaluate_policy(
    policy: Policy,
    prompts: PublicPrompts,
    reward: Reward,
    config: SamplingConfig,
    *,
    seed: int = 0,
    reference_reward: Reward | None = None,
) -> tuple[Evaluation, list[tuple[str, str]]]:
    """`measure_policy`, with the texts as pairs of prompt and completion."""
    measured = measure_policy(policy, prompts, reward, config, seed=seed, reference_reward=reference_reward)
    return measured.evaluation, list(zip(measured.prompts, measured.completions, strict=True))


@torch.no_grad()
def measure_policy(
    policy: Policy,
    prompts: PublicPrompts,
    reward: Reward,
    config: SamplingConfig,
    *,
    seed: int = 0,
    reference_reward: Reward | None = None,
    references: list[str] | None = None,
) -> Measured:
    """Samples one completion per prompt from the policy and measures it.

    Args:
        seed: of the sampling; the same for every model that is compared.
        reference_reward: a second reward, for evaluation only.
        references: the text that each completion is compared with by ROUGE.
    """
    ids, mask = padded(policy, prompts.prompts)
    torch.manual_seed(seed)
    rollouts = sample(policy, ids, mask, config)
    logprobs, reference_logprobs, base_logprobs = _logprobs(policy, prompts.prompts, rollouts, config)
    texts = answers(policy, prompts.prompts, rollouts)
    asked = [prompt.text for prompt in prompts.prompts]
    scores = reward(asked, texts, prompts.columns)
    lengths = rollouts.completion_mask.sum(1)
    mean_reward, reward_ci95, unscored = _mean(scores)
    kl, kl_ci95, _ = _mean((logprobs - reference_logprobs).sum(1))
    length, length_ci95, _ = _mean(lengths)
    perplexity, perplexity_ci95 = perplexity_of(base_logprobs.sum(1), lengths)
    more: dict[str, Any] = {}
    for n in (1, 2, 3):
        more[f"distinct_{n}"] = distinct(rollouts.completion_ids, rollouts.completion_mask, n)
    if reference_reward is not None:
        names = ("reference_reward", "reference_reward_ci95", "reference_unscored")
        more |= zip(names, _mean(reference_reward(asked, texts, prompts.columns_of(reference_reward))), strict=True)
    if references is not None:
        for name, values in rouge(texts, references).items():
            more[name], more[f"{name}_ci95"], _ = _mean(values)
    evaluation = Evaluation(
        reward=mean_reward,
        reward_ci95=reward_ci95,
        unscored=unscored,
        kl=kl,
        kl_ci95=kl_ci95,
        perplexity=perplexity,
        perplexity_ci95=perplexity_ci95,
        completion_length=length,
        completion_length_ci95=length_ci95,
        prompts=len(prompts.prompts),
        **more,
    )
    return Measured(evaluation, prompts.texts, texts, scores)


def _logprobs(
    policy: Policy, prompts: list[Prompt], rollouts: Rollouts, config: SamplingConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """`(rows, completion)` log-probabilities under the policy, the model that its newest stage started from, and the
    base, each behind the prompts as it is asked; of a policy with fewer stages than two some of them are one model,
    which is asked once."""
    stages = len(policy.adapters)
    logprobs = logprobs_under(policy, rollouts, config)
    if stages == 0:
        return logprobs, logprobs, logprobs
    with policy.base():
        base = logprobs_under(policy, asked_again(policy, prompts, rollouts), config)
    if stages == 1:
        return logprobs, base, base
    with policy.reference():
        return logprobs, logprobs_under(policy, asked_again(policy, prompts, rollouts), config), base


def _mean(values: Tensor) -> tuple[float, float, int]:
    # Mean, half-width of its 95% normal interval (NaN of fewer than two values), and how many values were NaN.
    known = values[~values.isnan()].double()
    half = 1.96 * float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return float(known.mean()), half, len(values) - len(known)


def perplexity_of(logprobs: Tensor, lengths: Tensor) -> tuple[float, float]:
    """exp of the mean negative log-probability per token, and the half-width of its 95% interval.

    Args:
        logprobs, lengths: `(rows,)` nats and tokens of each completion.
    """
    nats, half = per_token(-logprobs, lengths)
    return math.exp(nats), math.exp(nats) * half


def logprobs_under(policy: Policy, rollouts: Rollouts, config: SamplingConfig) -> Tensor:
    """`(rows, completion)` log-probabilities of the completions under the policy as it is switched now."""
    chunks = [rollouts[start : start + 64] for start in range(0, len(rollouts.input_ids), 64)]
    law = (config.min_completion_length, config.temperature)
    return torch.cat([policy.completion_logprobs(chunk, *law, with_values=False)[0] for chunk in chunks])


def distinct(ids: Tensor, mask: Tensor, n: int) -> float:
    """Distinct n-grams over all n-grams of the completions' tokens (Li et al. 2016)."""
    grams = [
        tuple(row[i : i + n])
        for row, length in zip(ids.tolist(), mask.sum(1).int().tolist(), strict=True)
        for i in range(length - n + 1)
    ]
    return len(set(grams)) / max(1, len(grams))


def evaluate_stages(
    policy: Policy,
    prompts: PublicPrompts,
    reward: Reward,
    config: SamplingConfig,
    *,
    seed: int = 0,
    reference_reward: Reward | None = None,
) -> dict[str, tuple[Evaluation, list[tuple[str, str]]]]:
    """`evaluate_policy` of the base model and of the policy after each stage, by the stage's name."""

    def measure() -> tuple[Evaluation, list[tuple[str, str]]]:
        return evaluate_policy(policy, prompts, reward, config, seed=seed, reference_reward=reference_reward)

    return of_each_stage(policy, measure)


def of_each_stage(policy: Policy, measure: Callable[[], T]) -> dict[str, T]:
    """What `measure` finds of the base model, `pretrained`, and of the policy after each stage, by the stage's name."""
    results = {}
    with policy.base():
        results["pretrained"] = measure()
    for count, name in enumerate(policy.adapters, 1):
        with policy.only(policy.adapters[:count]):
            results[name] = measure()
    return results
