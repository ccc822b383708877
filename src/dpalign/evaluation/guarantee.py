"""What a model that is measured, or that measures, says of its own past."""

from __future__ import annotations

import math

from ..models import embedded
from ..privacy.statement import read_statement
from ..rewards import RewardConfig, is_reward_model
from ..rewards.load import models_named, needs_declaring, singles
from ..settings.models import TINY_REVIEW_LM
from ..settings.rewards import RELEASED


def stated_epsilon(name_or_path: str) -> float | None:
    """Epsilon in the privacy.json of a release, infinite if it is not private; None of what has no statement.

    Data that is declared public playing private changes nothing: the statement decides.

    Raises:
        DPAlignError: there is a privacy.json, and it is damaged.
    """
    stated = read_statement(name_or_path)
    if stated is None:
        return None
    value, _ = stated
    epsilon = float(value["epsilon"])
    return epsilon if value["private"] and not math.isnan(epsilon) else math.inf


def is_outside_the_guarantee(reward: RewardConfig) -> bool:
    """Whether a reward's numbers rest on private data without a guarantee, or on something that nobody declares public.

    The statement of a reward model, or of a model that a reward asks, decides, whatever is declared.
    """
    named = [(name, name == TINY_REVIEW_LM or reward.is_public) for name in models_named(reward)]
    for part in singles(reward):
        if is_reward_model(part):
            named.append((part.source.removeprefix(f"{RELEASED}:"), part.is_public))
        elif needs_declaring(part) and not part.is_public:
            return True
    return any(_is_outside(name, is_public) for name, is_public in named)


def _is_outside(model: str, is_public: bool) -> bool:
    epsilon = stated_epsilon(embedded.resolve(model))
    return not is_public if epsilon is None else epsilon == math.inf
