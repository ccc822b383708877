"""Settings of DP-RLOO."""

from __future__ import annotations

from dataclasses import dataclass

from ..domains import within
from .rollouts import RolloutConfig


@dataclass(kw_only=True)
class RLOOConfig(RolloutConfig):
    """Settings of DP-RLOO. Records have `prompt`, or `text` whose first tokens become the prompt.

    Args:
        num_generations: rollouts per prompt, at least 2; the baseline of one is the mean of the others.
    """

    num_generations: int = within(2, "[2, 1024]")
