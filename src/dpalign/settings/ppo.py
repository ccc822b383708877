"""Settings of DP-PPO."""

from __future__ import annotations

from dataclasses import dataclass

from ..domains import within
from ..errors import DPAlignError
from .rollouts import RolloutConfig


@dataclass(kw_only=True)
class PPOConfig(RolloutConfig):
    """Settings of DP-PPO. Records have `prompt`, or `text` whose first tokens become the prompt.

    Args:
        num_ppo_epochs: T_PPO, passes over one sample; each costs noise, and the paper found no gain above 1.
        num_mini_batches: K Poisson samples whose union is rolled out together; with 1 every update is on-policy.
        gamma, lam: discount and lambda of generalised advantage estimation (Schulman et al. 2016).
        cliprange: clip of the probability ratio.
        cliprange_value: clip of the value update.
        vf_coef: weight of the value loss.
        noised_baseline: subtract the noised mean reward of earlier steps from the reward (needs metrics).
    """

    num_ppo_epochs: int = within(1, "[1, 1000]")
    num_mini_batches: int = within(1, "[1, 1000]")
    gamma: float = within(1.0, "[0, 1]")
    lam: float = within(0.95, "[0, 1]")
    cliprange: float = within(0.2, "(0, 1000]")
    cliprange_value: float = within(0.2, "(0, 1e6]")
    vf_coef: float = within(0.1, "[0, 1e6]")
    noised_baseline: bool = False

    @property
    def passes(self) -> int:
        return self.num_ppo_epochs

    @property
    def minibatches(self) -> int:
        return self.num_mini_batches

    def validate(self) -> None:
        super().validate()
        if self.noised_baseline and self.metrics_noise_ratio == 0:
            raise DPAlignError("noised_baseline needs the noised metrics: metrics_noise_ratio > 0.")
