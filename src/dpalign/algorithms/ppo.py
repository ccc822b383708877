"""Private proximal policy optimisation (Wu et al. 2024, algorithm 1; PPO: Schulman et al. 2017).

A unit is a prompt with its rollouts. Nothing below is computed across units: no whitening of
advantages or rewards, no running statistics, no early stop; the only batch quantity that anything
adapts to is the noised KL.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..models import Policy
from ..rewards import Reward
from ..settings.ppo import PPOConfig
from .base import Rows
from .rollouts import RolloutAlgorithm, in_micro_batches, rollouts_of


class PPO(RolloutAlgorithm[PPOConfig]):
    """The clipped surrogate with a per-token KL penalty in the reward and the score on the last token."""

    name = "ppo"
    Config = PPOConfig

    def __init__(self, config: PPOConfig, reward: Reward) -> None:
        super().__init__(config, reward)
        self.baseline = 0.0

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        policy.add_value_head()

    # 1. and 2. prompts and rollouts: see `RolloutAlgorithm`

    def prepare(self, policy: Policy, rows: Rows) -> Rows:
        """With several passes or minibatches the rollouts are of an older policy, whose numbers are kept."""
        if self.config.passes == 1 and self.config.minibatches == 1:
            return rows
        rollouts = rollouts_of(rows)
        with torch.no_grad():
            logprobs, values = in_micro_batches(policy, rollouts, self.config)
        advantages, returns = self.advantages(
            logprobs, rows.tensors["ref_logprobs"], values, rows.tensors["scores"], rollouts.completion_mask
        )
        old = {"old_logprobs": logprobs, "old_values": values, "advantages": advantages, "returns": returns}
        return Rows(rows.unit, rows.tensors | old)

    # 3. Rewards and advantages ---------------------------------------------------------------------------

    def advantages(
        self, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, scores: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Generalised advantage estimation on per-token rewards; every row by itself.

        Args:
            logprobs, ref_logprobs, values, mask: `(rows, completion)`; scores: `(rows,)`.
        Returns:
            advantages, returns: `(rows, completion)`.
        """
        config = self.config
        rewards = -self.beta * (logprobs - ref_logprobs) * mask  # per-token KL penalty, estimator k1
        last = mask.sum(1).long().clamp(min=1) - 1  # the score falls on the last token (EOS, or the cut)
        rewards = rewards.scatter_add(1, last.unsqueeze(1), (scores - self.baseline).to(rewards.dtype).unsqueeze(1))
        advantage = torch.zeros_like(scores)
        advantages = torch.zeros_like(rewards)
        next_value = torch.zeros_like(scores)  # beyond the last token there is nothing to come
        for t in reversed(range(mask.shape[1])):
            delta = rewards[:, t] + config.gamma * next_value - values[:, t]
            advantage = (delta + config.gamma * config.lam * advantage) * mask[:, t]
            advantages[:, t] = advantage
            next_value = values[:, t] * mask[:, t]
        return advantages, (advantages + values) * mask

    # 4. Loss -------------------------------------------------------------------------------------------

    def row_losses(self, policy: Policy, rows: Rows) -> tuple[Tensor, Tensor]:
        """Clipped policy loss plus value loss, summed over tokens and divided by the constant length."""
        config, rollouts = self.config, rollouts_of(rows)
        mask, scores, ref_logprobs = rollouts.completion_mask, rows.tensors["scores"], rows.tensors["ref_logprobs"]
        logprobs, values = policy.completion_logprobs(rollouts, config.min_completion_length, config.temperature)
        if "old_logprobs" not in rows.tensors:  # on-policy: the old policy is the current one, detached
            old_logprobs, old_values = logprobs.detach(), values.detach()
            advantages, returns = self.advantages(old_logprobs, ref_logprobs, old_values, scores, mask)
        else:
            old_logprobs, old_values = rows.tensors["old_logprobs"], rows.tensors["old_values"]
            advantages, returns = rows.tensors["advantages"], rows.tensors["returns"]
        ratio = torch.exp(logprobs - old_logprobs)
        clipped_ratio = ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
        policy_loss = torch.max(-advantages * ratio, -advantages * clipped_ratio)
        clipped_values = old_values + (values - old_values).clamp(-config.cliprange_value, config.cliprange_value)
        value_loss = 0.5 * torch.max((values - returns) ** 2, (clipped_values - returns) ** 2)
        token_loss = (policy_loss + config.vf_coef * value_loss) * mask
        kl = ((old_logprobs - ref_logprobs) * mask).sum(1)
        metrics = torch.stack([scores, kl, mask.sum(1)], 1)
        return token_loss.sum(1) / config.max_completion_length, metrics

    # 5. What adapts, from noised metrics only ------------------------------------------------------------

    def adapt(self, noised: Mapping[str, float]) -> None:
        super().adapt(noised)
        if self.config.noised_baseline:
            self.baseline += 0.3 * (noised["reward"] - self.baseline)

    def state(self) -> dict[str, float]:
        return super().state() | {"baseline": self.baseline}

    def load_state(self, state: dict[str, float]) -> None:
        super().load_state(state)
        self.baseline = state["baseline"]
