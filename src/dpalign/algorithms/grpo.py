"""Private group-relative policy optimisation (GRPO: Shao et al. 2024, arXiv 2402.03300; Dr. GRPO: arXiv 2503.20783).

A unit is a prompt with its group of rollouts, or all prompts of a person. Mean and standard deviation of the rewards
are those of the rollout's own group, lengths are constant or the completion's own: nothing is computed across units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import Policy
from ..settings.grpo import GRPOConfig
from .base import Rows
from .rollouts import RolloutAlgorithm, groups_of, in_micro_batches, rollouts_of

SMALLEST = 1e-4  # added to a standard deviation, as in TRL


class GRPO(RolloutAlgorithm[GRPOConfig]):
    """The clipped surrogate on standardised rewards, with the KL divergence from the reference in the loss."""

    name = "grpo"
    Config = GRPOConfig

    def prepare(self, policy: Policy, rows: Rows) -> Rows:
        """With several passes or minibatches the rollouts are of an older policy, whose log-probabilities are kept."""
        if self.config.passes == 1 and self.config.minibatches == 1:
            return rows
        with torch.no_grad():
            old_logprobs, _ = in_micro_batches(policy, rollouts_of(rows), self.config)
        return Rows(rows.unit, rows.tensors | {"old_logprobs": old_logprobs})

    def row_losses(self, policy: Policy, rows: Rows) -> tuple[Tensor, Tensor]:
        """Per token max(-A ratio, -A clip(ratio)) + beta k3, summed and divided by a length; all rows of a prompt are
        among `rows`."""
        config, rollouts = self.config, rollouts_of(rows)
        mask, scores, ref_logprobs = rollouts.completion_mask, rows.tensors["scores"], rows.tensors["ref_logprobs"]
        logprobs, _ = policy.completion_logprobs(rollouts, config.min_completion_length, config.temperature)
        old_logprobs = rows.tensors.get("old_logprobs", logprobs.detach())  # on-policy: those of now
        advantages = standardised(scores, groups_of(rows), by_deviation=config.scale_rewards == "group").unsqueeze(1)
        ratio = torch.exp((logprobs - old_logprobs) * mask)
        high = config.cliprange if config.cliprange_high is None else config.cliprange_high
        clipped_ratio = ratio.clamp(1 - config.cliprange, 1 + high)
        policy_loss = torch.max(-advantages * ratio, -advantages * clipped_ratio)
        towards_ref = (ref_logprobs - logprobs) * mask
        kl_estimate = torch.exp(towards_ref) - towards_ref - 1  # k3 (Schulman 2020): never below 0
        token_loss = (policy_loss + self.beta * kl_estimate) * mask
        length = mask.sum(1).clamp(min=1) if config.loss_type == "grpo" else config.max_completion_length
        kl = ((old_logprobs - ref_logprobs) * mask).sum(1)
        return token_loss.sum(1) / length, torch.stack([scores, kl, mask.sum(1)], 1)


def standardised(rewards: Tensor, group: Tensor, *, by_deviation: bool) -> Tensor:
    """`(rows,)` reward of each row minus the mean of its group, over the group's standard deviation if asked to.

    In double precision, so that equal rewards are exactly 0.

    Args:
        rewards: `(rows,)`. group: `(rows,)` int64; every group has at least 2 rows.
    """
    _, place = group.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    count, values = torch.bincount(place).double(), rewards.double()
    centred = values - (torch.zeros_like(count).index_add_(0, place, values) / count)[place]
    if by_deviation:
        variance = torch.zeros_like(count).index_add_(0, place, centred**2) / (count - 1)
        centred = centred / (variance.sqrt()[place] + SMALLEST)
    return centred.to(rewards.dtype)
