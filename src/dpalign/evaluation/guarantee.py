"""What a model that is measured, or that measures, says of its own past."""

from __future__ import annotations

import math

from ..privacy.statement import read_statement
from ..rewards import RewardConfig, is_reward_model
from ..rewards.load import RELEASED


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


def is_outside_the_guarantee(source: str, is_public: bool) -> bool:
    """Whether a reward's numbers rest on private data without a guarantee, or on something that nobody declares public.

    A reward model's own statement decides, whatever is declared.
    """
    if is_reward_model(RewardConfig(source=source)):
        epsilon = stated_epsilon(source.removeprefix(f"{RELEASED}:"))
        return not is_public if epsilon is None else epsilon == math.inf
    return source != "vader" and not is_public
