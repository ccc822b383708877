"""What a reward is worth where it is used: what a judge gives to the completions that it chooses.

How often a reward agrees with people says little of what it does to a policy's text, which is not people's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..algorithms.completions import sample
from ..models import Policy
from ..models.generation import answers, padded
from ..rewards import Reward
from ..settings.rollouts import SamplingConfig
from .metrics import PublicPrompts


@dataclass(frozen=True)
class BestOf:
    """Means over prompts; `_ci95` are half-widths of 95% intervals (normal).

    judge: the judge's score of the completion that the reward chooses among `completions`. gain: by how much that is
    above the mean of them all. kl_at_most: nats that such a choice is away from the policy, at most.
    """

    judge: float
    judge_ci95: float
    gain: float
    gain_ci95: float
    kl_at_most: float
    completions: int
    prompts: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def best_of(
    policy: Policy,
    prompts: PublicPrompts,
    rewards: Mapping[str, Reward],
    judge: Reward,
    config: SamplingConfig,
    count: int,
    *,
    seed: int = 0,
) -> dict[str, BestOf]:
    """What each reward chooses among the same `count` completions of every prompt, as a judge sees it.

    Args:
        seed: of the sampling.
    """
    repeated = [prompt for prompt in prompts.prompts for _ in range(count)]
    torch.manual_seed(seed)
    texts = answers(policy, repeated, sample(policy, *padded(policy, repeated), config))
    asked = [prompt.text for prompt in repeated]

    def scores(reward: Reward) -> Tensor:
        given = prompts.columns_of(reward)
        columns = {name: [value for value in values for _ in range(count)] for name, values in given.items()}
        return reward(asked, texts, columns).view(-1, count)

    judged = scores(judge)
    return {name: chosen(scores(reward), judged) for name, reward in rewards.items()}


def chosen(scores: Tensor, judged: Tensor) -> BestOf:
    """Of scores and a judge's, both `(prompts, completions)`; equal best ones share, and NaN is never chosen.

    Prompts count that have a score and whose completions all have the judge's.
    """
    known = judged.isfinite().all(1) & scores.isfinite().any(1)
    scores, judged = scores[known].nan_to_num(nan=-math.inf), judged[known].double()
    best = (scores == scores.amax(1, keepdim=True)).double()
    picked = (judged * best).sum(1) / best.sum(1)
    prompts, count = judged.shape
    most = math.log(count) - (count - 1) / count
    return BestOf(*_mean(picked), *_mean(picked - judged.mean(1)), most, completions=count, prompts=prompts)


def _mean(values: Tensor) -> tuple[float, float]:
    half = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), half
