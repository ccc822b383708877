"""DPO on pairs that the policy writes and a reward labels: no record is read (the idea of DPPrefSyn, whose reward is
private and whose pairs are synthetic).

For each prompt the model that the stage started from writes several completions; the one that the reward scores highest
is chosen over the one that it scores lowest. A private reward is a release, so all that follows is post-processing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..models import Policy
from ..rewards import Reward
from ..settings.dpo import DPOConfig
from .base import Rows, Tokens
from .pairs import LOSSES, measured, pair_metrics
from .rollouts import CompletionAlgorithm, rollouts_of


class OwnPairs(CompletionAlgorithm[DPOConfig]):
    """What a section `dpo` is whose prompts are no one's; its metrics are those of DPO."""

    name = "dpo"
    Config = DPOConfig

    @classmethod
    def tokens(cls, config: DPOConfig) -> Tokens:
        return Tokens(trained=2 * config.positions, read=(config.num_generations + 2) * config.positions)

    def __init__(self, config: DPOConfig, reward: Reward) -> None:
        super().__init__(config, reward)
        self.rows_per_example = 2  # that are learned from
        self.metrics = pair_metrics(config.margin_range)

    def sampling(self, policy: Policy) -> AbstractContextManager[None]:
        return policy.reference()

    def learned(self, rows: Rows) -> Rows:
        """The best and the worst completion of every prompt: chosen, rejected, chosen, rejected, ...

        None of a prompt whose completions score alike, or of which one has no score.
        """
        scores = rows.tensors["scores"].view(-1, self.config.num_generations)  # (prompts, completions)
        ends = torch.stack([scores.argmax(1), scores.argmin(1)], 1)
        differ = scores.isfinite().all(1) & (scores.amax(1) > scores.amin(1))
        first = torch.arange(len(scores), device=scores.device) * self.config.num_generations
        places = (first.unsqueeze(1) + ends)[differ].flatten()
        return Rows(rows.unit[places], {name: tensor[places] for name, tensor in rows.tensors.items()})

    def row_losses(self, policy: Policy, rows: Rows) -> tuple[Tensor, Tensor]:
        """The loss of a pair stands in both of its rows, whose mean the loop takes."""
        config, rollouts = self.config, rollouts_of(rows)
        logprobs, _ = policy.completion_logprobs(rollouts, config.min_completion_length, config.temperature)
        ratios = (logprobs - rows.tensors["ref_logprobs"]) * rollouts.completion_mask
        rewards = config.beta * ratios.sum(1)
        chosen, rejected = rewards[0::2], rewards[1::2]
        margin, preference = torch.zeros_like(chosen), torch.ones_like(chosen)
        loss = LOSSES[config.loss](chosen, rejected, margin, preference, config.label_smoothing)
        metrics = measured(loss, chosen - rejected, preference)
        return loss.repeat_interleave(2), metrics.repeat_interleave(2, 0)
