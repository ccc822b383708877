"""The mean of several public scores, each on the scale of text that a public model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.text import Text
from ..errors import DPAlignError
from ..settings.rewards import RewardConfig
from .base import Reward
from .judge import scales
from .weighted import Weighted
from .written import PublicModels


class Mean(Weighted):
    """A weighted mean of the parts' standardised scores; a row that one of them cannot score has none.

    It is also the free scores that a reward model adds to its own: each part's share of the mean is one of them.

    Raises:
        DPAlignError: a part that scores all self-written text alike, or none of it.
    """

    def __init__(self, config: RewardConfig, parts: Sequence[Reward], public: PublicModels) -> None:
        functions = [AsFunction(part) for part in parts]

        def fit() -> dict[str, Tensor]:
            rows = public.own_rows(config)
            found = torch.stack([torch.tensor(f(*rows)) for f in functions], 1)
            silent = [p.source for p, of in zip(config.parts, found.isfinite().any(0), strict=True) if not of]
            if silent:
                raise DPAlignError(
                    f"reward {silent[0]!r}, a part of a mean, has no score for any text that the model writes itself, "
                    "which has no columns: it must score None in their place."
                )
            return scales(found, [part.source for part in config.parts])

        fitted = public.constants(config, fit)
        weights = torch.tensor(config.weights or [1.0] * len(parts), dtype=torch.float64)
        shares = weights / weights.sum() / fitted["deviations"].double()
        super().__init__(functions, shares.tolist(), fitted["means"].tolist())
        self.config, self.public, self.parts = config, public, parts

    @property
    def count(self) -> int:
        return len(self.parts)

    def scores(self, texts: Sequence[Text]) -> Tensor:
        """`(texts, parts)` float32 on the CPU, whose sum is the mean; NaN where a part cannot score a text.

        Of a chat the last answer is what is read (and all of it, by a part that reads prompts); of a string, all.
        """
        rows = [answered(text) for text in texts]
        prompts, completions = [prompt for prompt, _ in rows], [completion for _, completion in rows]
        found = torch.tensor([f(prompts, completions) for f in self.functions], dtype=torch.float64).T
        return ((found - torch.tensor(self.centres)) * torch.tensor(self.weights)).float()

    def written(self) -> list[str]:
        """What a public model wrote for the parts: text of the kind that people judge, and nobody's."""
        found = [part.function.written() for part in self.parts if hasattr(part.function, "written")]
        return [text for texts in found for text in texts]

    def kept(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return self.public.kept(self.config)


def answered(text: Text) -> tuple[Text, str]:
    """What was asked, and the answer that ends a text; of a string, and of a chat without an answer, nothing was."""
    if isinstance(text, str) or not text:
        return "", str(text or "")
    content = text[-1].get("content")
    return text[:-1], content if isinstance(content, str) else ""


class AsFunction:
    """A reward with its range and its care for rows, as a function; NaN for a row that it cannot score."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def __call__(self, prompts: Sequence[Text], completions: list[str], **columns: list[Any]) -> list[float]:
        nothing: dict[str, list[Any]] = {name: [None] * len(completions) for name in self.reward.columns}
        return self.reward(prompts, list(completions), nothing | columns).tolist()
