"""Calling a reward function safely, and checking it.

A reward must score every row by itself. One that whitens, ranks or remembers lets one person's text
change another's score, which no clip bounds: `check_reward` looks for that on public probe texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..errors import DPAlignError

RewardFunction = Callable[..., list[float]]

PROBES = [
    ("The film", " was a delight from start to finish, warm and funny."),
    ("I expected", " little, and even that was too much: dull, loud and far too long."),
    ("Acting aside,", " the script has nothing to say."),
    ("My sister", " loved it; I fell asleep twice."),
    ("What a", " wonderful, generous, beautiful piece of work!"),
    ("Terrible.", " Avoid at all costs, the worst thing I have ever seen."),
    ("Two hours", ""),
    ("It is", " a film about trains."),
]


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
    """

    source: str = "vader"
    is_public: bool = False
    text: Literal["completion", "prompt+completion"] | None = None
    label: str | None = None
    use_logit: bool = False
    max_length: int = 128
    scale: float = 1.0
    shift: float = 0.0
    low: float | None = None
    high: float | None = None
    columns: list[str] = field(default_factory=list)


class Reward:
    """A reward function with its declared range, called so that no row can disturb another."""

    def __init__(self, function: RewardFunction, low: float, high: float, scale: float = 1.0, shift: float = 0.0):
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise DPAlignError(f"the reward's range [{low}, {high}] must be finite and not empty.")
        self.function, self.low, self.high, self.scale, self.shift = function, low, high, scale, shift

    def __call__(
        self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]] | None = None
    ) -> torch.Tensor:
        """`(rows,)` float32 rewards in [low, high]; NaN for a row that cannot be scored.

        A row that makes the function raise is scored alone, so that it cannot fail the others; what was
        raised is never shown, because it may quote the row.
        """
        columns = columns or {}
        try:
            scores = [float(s) for s in self.function(prompts, completions, **columns)]
            if len(scores) != len(completions):
                raise ValueError
        except Exception:
            scores = [
                self._score_alone(p, c, {k: v[i : i + 1] for k, v in columns.items()})
                for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
            ]
        raw = torch.tensor(scores, dtype=torch.float32) * self.scale + self.shift
        return torch.where(torch.isfinite(raw), raw.clamp(self.low, self.high), torch.nan)

    def _score_alone(self, prompt: str, completion: str, columns: dict[str, list[Any]]) -> float:
        try:
            (score,) = self.function([prompt], [completion], **columns)
            return float(score)
        except Exception:
            return math.nan


def check_reward(function: RewardFunction, name: str = "reward", columns: dict[str, list[Any]] | None = None) -> None:
    """Refuses a reward whose score for a row depends on other rows or on earlier calls.

    Scores public probe texts; swaps one of them; reverses them; and repeats the first call after that
    different history. Every other row must keep its score.

    Raises:
        DPAlignError: the reward fails on the probe, returns NaN, the wrong length, or couples rows.
    """
    prompts, completions = [p for p, _ in PROBES], [c for _, c in PROBES]
    columns = columns or {}

    def score(p: list[str], c: list[str]) -> list[float]:
        try:
            scores = list(function(p, c, **{name: values[: len(c)] for name, values in columns.items()}))
        except Exception as error:
            raise DPAlignError(
                f"reward {name!r} raised {type(error).__name__} on the public probe texts: {error}"
            ) from None
        if len(scores) != len(c):
            raise DPAlignError(f"reward {name!r} returned {len(scores)} scores for {len(c)} completions.")
        try:
            values = [float(s) for s in scores]
        except (TypeError, ValueError):
            raise DPAlignError(f"reward {name!r} must return numbers, one per completion.") from None
        if not all(math.isfinite(v) for v in values):
            raise DPAlignError(f"reward {name!r} returned NaN or infinity on the public probe texts.")
        return values

    first = score(prompts, completions)
    extreme = " awful" * 40
    swapped = score(["X", *prompts[1:]], [extreme, *completions[1:]])
    backwards = score(prompts[::-1], completions[::-1])[::-1]
    alone = [score([p], [c])[0] for p, c in PROBES]
    again = score(prompts, completions)
    tolerance = 1e-3 * max(1.0, max(abs(v) for v in first))
    for other in (swapped[1:], backwards[1:], alone[1:], again[1:]):
        if any(abs(a - b) > tolerance for a, b in zip(first[1:], other, strict=True)):
            raise DPAlignError(
                f"reward {name!r} scores a completion differently when other completions or earlier calls change "
                "(whitening, ranking, running statistics or randomness): score every completion by itself."
            )
