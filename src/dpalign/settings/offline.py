"""Settings of alignment from scored completions, without reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..domains import within
from ..errors import DPAlignError
from .rollouts import ScoredConfig


@dataclass(kw_only=True)
class OfflineConfig(ScoredConfig):
    """Settings of offline alignment. Records have `prompt`, or `text` whose first tokens become the prompt.

    Args:
        method: what is learned of a prompt's completions. `filtered`: the `keep` best of them. `weighted`: all of them,
            each with its share of a softmax of their rewards.
        num_generations: completions per prompt, at least 2, sampled from the model that the stage started from.
        keep: of a prompt's completions that `filtered` learns; equal ones share a place.
        reward_temperature: of `weighted`: a completion's share is softmax(reward / reward_temperature).
    """

    method: Literal["filtered", "weighted"] = "filtered"
    num_generations: int = within(4, "[2, 1024]")
    keep: int = within(1, "[1, 1023]")
    reward_temperature: float = within(0.5, "[1e-6, 1e6]")

    def validate(self) -> None:
        super().validate()
        for name, method, plain in (("keep", "filtered", 1), ("reward_temperature", "weighted", 0.5)):
            if self.method != method and getattr(self, name) != plain:
                raise DPAlignError(f"{name} is for method {method}, not {self.method}: leave {name} out.")
        if self.keep >= self.num_generations:
            raise DPAlignError(
                f"keep {self.keep} of num_generations {self.num_generations} completions leaves nothing out: keep "
                "fewer, or sample more."
            )
