"""The mean of several public scores, each on the scale of text that a public model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.text import Text
from ..settings.rewards import RewardConfig
from .base import Reward
from .judge import scales
from .weighted import Weighted
from .written import PublicModels


def mean(config: RewardConfig, parts: Sequence[Reward], public: PublicModels) -> Weighted:
    """A weighted mean of the parts' standardised scores; a row that one of them cannot score has none.

    Raises:
        DPAlignError: a part that scores all self-written text alike.
    """
    functions = [AsFunction(part) for part in parts]

    def fit() -> dict[str, Tensor]:
        rows = public.own_rows(config)
        return scales(torch.stack([torch.tensor(f(*rows)) for f in functions], 1), [p.source for p in config.parts])

    fitted = public.constants(config, fit)
    weights = torch.tensor(config.weights or [1.0] * len(parts), dtype=torch.float64)
    shares = weights / weights.sum() / fitted["deviations"].double()
    return Weighted(functions, shares.tolist(), fitted["means"].tolist())


class AsFunction:
    """A reward with its range and its care for rows, as a function; NaN for a row that it cannot score."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def __call__(self, prompts: Sequence[Text], completions: list[str], **columns: list[Any]) -> list[float]:
        return self.reward(prompts, list(completions), columns).tolist()
