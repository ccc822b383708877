"""Settings of alignment from scored completions, without reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..domains import within
from ..errors import DPAlignError
from .rollouts import ScoredConfig

GOOD, BAD = "A good answer: ", "A bad answer: "
CONDITIONAL = "conditional"
MEANINGS = {"keep": "filtered", "reward_temperature": "weighted", "good": CONDITIONAL, "bad": CONDITIONAL}


@dataclass(kw_only=True)
class OfflineConfig(ScoredConfig):
    """Settings of offline alignment. Records have `prompt`, or `text` whose first tokens become the prompt.

    Args:
        method: what is learned of a prompt's completions; `filtered`: the `keep` best of them. `weighted`: all of them,
            each with its share of a softmax of their rewards. `conditional`: the better half behind the words `good`,
            the worse half behind the words `bad`; the policy is then asked with `good`.
        num_generations: completions per prompt, at least 2, sampled from the model that the stage started from.
        keep: of a prompt's completions that `filtered` learns; equal ones share a place.
        reward_temperature: of `weighted`: a completion's share is softmax(reward / reward_temperature).
        good, bad: public words that `conditional` puts in front of a prompt; in a chat they are a system message (where
            its template has none, the beginning of its first message), else the beginning of the prompt.
    """

    method: Literal["filtered", "weighted", "conditional"] = "filtered"
    num_generations: int = within(4, "[2, 1024]")
    keep: int = within(1, "[1, 1023]")
    reward_temperature: float = within(0.5, "[1e-6, 1e6]")
    good: str = GOOD
    bad: str = BAD

    def validate(self) -> None:
        super().validate()
        for name, method in MEANINGS.items():
            if self.method != method and getattr(self, name) != OfflineConfig.__dataclass_fields__[name].default:
                raise DPAlignError(f"{name} is for method {method}, not {self.method}: leave {name} out.")
        if self.good.strip() == self.bad.strip():
            raise DPAlignError("good and bad are the same words: the policy could not tell what is asked for.")
        if self.method == CONDITIONAL and self.truncate_prompts:
            raise DPAlignError("truncate_prompts would cut off what method conditional puts in front of a prompt.")
        if self.keep >= self.num_generations:
            raise DPAlignError(
                f"keep {self.keep} of num_generations {self.num_generations} completions leaves nothing out: keep "
                "fewer, or sample more."
            )
