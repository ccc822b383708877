"""The numbers of TRL 0.11's PPO step, over a whole batch: rewards, advantages, losses. Nothing here is private.

Whitening, token means and the KL controller join the rows of a batch, so no row has a bounded share of an update: this
is for runs without privacy alone, and `dpalign.algorithms.ppo` never calls it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import PPOConfig


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is 1."""
    return (values * mask).sum() / mask.sum()


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of `values` where `mask` is 1."""
    count = mask.sum()
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask) * count / (count - 1)


def whitened(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """`values` of variance 1, and mean 0 unless it is kept."""
    mean = masked_mean(values, mask)
    white = (values - mean) * torch.rsqrt(masked_variance(values, mask) + 1e-8)
    return white if shift_mean else white + mean


@dataclass
class Coefficient:
    """The KL coefficient; adaptive (Ziegler et al. 2019) where there is a target."""

    value: float
    target: float | None
    horizon: float

    def update(self, kl: float, rows: int) -> None:
        if self.target is not None:
            error = max(-0.2, min(0.2, kl / self.target - 1))
            self.value *= 1 + error * rows / self.horizon


@dataclass
class RunningMoments:
    """Mean and standard deviation of all scores so far."""

    mean: float = 0.0
    variance: float = 1.0
    std: float = 1.0
    count: float = 1e-24

    def update(self, scores: Tensor) -> None:
        variance, mean = (float(moment) for moment in torch.var_mean(scores.float(), unbiased=False))
        rows, total = scores.numel(), self.count + scores.numel()
        shift = mean - self.mean
        square = variance * rows + self.variance * self.count + shift**2 * self.count * rows / total
        self.mean += shift * rows / total
        self.variance, self.count = square / total, total
        self.std = (square / (total - 1)) ** 0.5 if total > 1 else 1.0


@dataclass(frozen=True)
class Batch:
    """What a batch was sampled with, all `(rows, completion)` but `scores` `(rows,)`; nothing has a gradient.

    kl: of every token, under `kl_penalty`. penalties: -coefficient * kl. values, advantages, returns: as in TRL.
    """

    mask: Tensor
    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    penalties: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def collected(
    config: PPOConfig,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    coefficient: float,
) -> Batch:
    """The per-token KL penalty, the score on the last token, generalised advantage estimation, whitening."""
    difference = logprobs - ref_logprobs
    kl = {"kl": difference, "abs": difference.abs(), "mse": 0.5 * difference.square()}[config.kl_penalty] * mask
    penalties = -coefficient * kl
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * (mask > 0)).argmax(1)  # of the tokens that count
    rewards = penalties.scatter_add(1, last[:, None], scores[:, None].to(penalties.dtype))
    values, rewards = values * mask, rewards * mask
    if config.whiten_rewards:
        rewards = whitened(rewards, mask, shift_mean=False)
    advantages = estimated(rewards, values, config.gamma, config.lam)
    returns = advantages + values
    return Batch(
        mask, scores, logprobs, ref_logprobs, kl, penalties, values, whitened(advantages, mask), returns
    )  # fmt: skip


def estimated(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016) of `(rows, tokens)`."""
    found, advantage = [], torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        advantage = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        found.append(advantage)
    return torch.stack(found[::-1], 1)


def losses(config: PPOConfig, batch: Batch, rows: Tensor, logprobs: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Of a minibatch: `loss/policy`, `loss/value`, and what TRL reports beside them. Means over its tokens.

    Args:
        rows: of the batch. logprobs, values: `(rows, completion)` now, with gradients.
    """
    mask, advantages, old = batch.mask[rows], batch.advantages[rows], batch.logprobs[rows]
    returns, old_values = batch.returns[rows], batch.values[rows]
    clipped = old_values + (values - old_values).clamp(-config.cliprange_value, config.cliprange_value)
    errors, clipped_errors = (values - returns) ** 2, (clipped - returns) ** 2
    ratio = torch.exp(logprobs - old)
    gains = -advantages * ratio
    clipped_gains = -advantages * ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
    policy = masked_mean(torch.max(gains, clipped_gains), mask)
    value = 0.5 * masked_mean(torch.max(errors, clipped_errors), mask)
    if float(masked_mean(ratio.detach(), mask)) > config.ratio_threshold:  # a minibatch that is skipped, as in TRL
        policy, value = policy * 0.0, value * 0.0
    with torch.no_grad():
        rest = {
            "loss/total": policy + config.vf_coef * value,
            "policy/approxkl": 0.5 * masked_mean((logprobs - old) ** 2, mask),
            "policy/policykl": masked_mean(old - logprobs, mask),
            "policy/clipfrac": masked_mean((clipped_gains > gains).float(), mask),
            "policy/advantages_mean": masked_mean(advantages, mask),
            "policy/ratio": masked_mean(ratio, mask),
            "returns/mean": masked_mean(returns, mask),
            "returns/var": masked_variance(returns, mask),
            "val/vpred": masked_mean(values, mask),
            "val/error": masked_mean(errors, mask),
            "val/clipfrac": masked_mean((clipped_errors > errors).float(), mask),
            "val/mean": masked_mean(old_values, mask),
            "val/var": masked_variance(old_values, mask),
        }
    return {"loss/policy": policy, "loss/value": value, **rest}
