"""Private REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).

A unit is a prompt with its group of rollouts, or all prompts of a person. The baseline of a rollout is the mean of
the other rollouts of its own prompt, so it stays inside the unit; there is no value head to train, and so less noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import Policy
from ..settings.rloo import RLOOConfig
from .base import Rows
from .rollouts import RolloutAlgorithm, groups_of, rollouts_of


class RLOO(RolloutAlgorithm[RLOOConfig]):
    """REINFORCE on whole completions; the KL penalty against the reference is part of the reward."""

    name = "rloo"
    Config = RLOOConfig

    def row_losses(self, policy: Policy, rows: Rows) -> tuple[Tensor, Tensor]:
        """-advantage * log pi(completion), divided by the constant length; all rows of a prompt are among `rows`."""
        config, rollouts = self.config, rollouts_of(rows)
        mask, scores = rollouts.completion_mask, rows.tensors["scores"]
        logprobs, _ = policy.completion_logprobs(rollouts, config.min_completion_length, config.temperature)
        kl = ((logprobs.detach() - rows.tensors["ref_logprobs"]) * mask).sum(1)
        advantages = leave_one_out(scores - self.beta * kl, groups_of(rows))
        loss = -advantages * (logprobs * mask).sum(1) / config.max_completion_length
        return loss, torch.stack([scores, kl, mask.sum(1)], 1)


def leave_one_out(returns: Tensor, group: Tensor) -> Tensor:
    """`(rows,)` return of each row minus the mean return of the other rows of its group.

    Args:
        returns: `(rows,)`. group: `(rows,)` int64; every group has the same number of rows, at least 2.
    """
    _, place = group.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    count = torch.bincount(place)[place].to(returns)
    total = returns.new_zeros(len(returns)).index_add_(0, place, returns)[place]
    return returns - (total - returns) / (count - 1)
