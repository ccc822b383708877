"""The reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..domains import LENGTH, SCALE, within
from ..errors import DPAlignError


@dataclass
class RewardConfig:
    """The public reward function.

    Args:
        source: `vader` (sentiment lexicon, -1 to 1), `classifier:PATH` (a Hugging Face text-classification
            model), `module:function` with the signature f(prompts, completions, **columns) -> list[float],
            `reward_model` (that of this recipe's reward stage) or `reward_model:PATH` (the release of one).
        is_public: declares that the reward was made without the private data; `vader` is public by itself, and the
            release of a reward model says itself what it was made from.
        text: what is read: `completion`, or `prompt+completion`. Default: the completion, and both for a reward model.
        label: classifier label whose score is the reward; default: the last label.
        use_logit: the label's logit instead of its probability.
        max_length: tokens that a classifier reads; every text is padded to that many.
        scale, shift: the reward is scale * score + shift; constants, never statistics of private data.
        low, high: declared range of the reward; clipped to it for training and for the noised metric. Needed
            for callables and logits; -4 to 4 standard deviations for a reward model.
        columns: columns of the data that the function is given as keyword arguments, None where a record has none.
        batched: call a Python function with 32 rows at a time instead of one (the last row repeated, where there are
            fewer). Faster with a model behind it; that rows do not touch each other is then checked, not structure.
    """

    source: str = "vader"
    is_public: bool = False
    text: Literal["completion", "prompt+completion"] | None = None
    label: str | None = None
    use_logit: bool = False
    max_length: int = within(128, LENGTH)
    scale: float = within(1.0, SCALE)
    shift: float = within(0.0, SCALE)
    low: float | None = within(None, SCALE)
    high: float | None = within(None, SCALE)
    columns: list[str] = field(default_factory=list)
    batched: bool = False

    def validate(self) -> None:
        """Raises DPAlignError for a range that is empty, and a scale that makes all texts alike."""
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise DPAlignError(f"the reward's range [{self.low}, {self.high}] must be finite and not empty.")
        if self.scale == 0:
            raise DPAlignError("a reward of scale 0 is the same for all texts.")
