"""From a setting to a checked reward."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch

from ..errors import DPAlignError
from ..models import ModelConfig, Normalization, RewardModel
from ..models.reward_model import normalization_of
from .base import PROBES, Reward, RewardConfig, RewardFunction, check_reward
from .classifier import classifier
from .learned import learned
from .lexicon import vader

RELEASED = "reward_model"


def load_reward(
    config: RewardConfig,
    device: str | torch.device = "cpu",
    function: RewardFunction | None = None,
    trained: tuple[RewardModel, Normalization] | None = None,
) -> Reward:
    """Builds the reward that `config` names, or wraps `function`, and checks it.

    Args:
        trained: the reward model of this run's reward stage, for the source `reward_model`.

    Raises:
        DPAlignError: unknown source, not declared public, no range, or `check_reward` refuses it.
    """
    low, high, scale, shift = config.low, config.high, config.scale, config.shift
    if is_reward_model(config) and function is None:
        if config.source == RELEASED:
            if trained is None:
                raise DPAlignError(
                    f"reward.source {RELEASED} needs a stage that trains one in the recipe, or a path behind it."
                )
            model, normalization = trained
        else:
            path = config.source.removeprefix(f"{RELEASED}:")
            normalization = normalization_of(Path(path))
            model = RewardModel.load(ModelConfig(name_or_path=path), device)
        function = learned(model, config.text)
        scale, shift = scale * normalization.scale, scale * normalization.shift + shift
        low, high = (-4.0 if low is None else low), (4.0 if high is None else high)
    elif config.source == "vader" and function is None:
        function = vader(config.text)
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    else:
        if not config.is_public:
            raise DPAlignError(
                f"reward {config.source!r} must be declared public (reward.is_public: true): a reward made from "
                "private data without a guarantee would void the one printed here."
            )
        if function is None and config.source.startswith("classifier:"):
            function = classifier(config.source.removeprefix("classifier:"), config, device)
            if not config.use_logit:
                low, high = (0.0 if low is None else low), (1.0 if high is None else high)
        elif function is None:
            function = _import_function(config.source)
    if low is None or high is None:
        raise DPAlignError(f"reward {config.source!r} needs its declared range: set reward.low and reward.high.")
    reward = Reward(function, low, high, scale, shift)
    check_reward(function, config.source, {c: [None] * len(PROBES) for c in config.columns})
    return reward


def is_reward_model(config: RewardConfig) -> bool:
    """Whether the reward is a trained reward model, whose past is checked by its privacy statement."""
    return config.source == RELEASED or config.source.startswith(f"{RELEASED}:")


def _import_function(source: str) -> RewardFunction:
    module, _, name = source.partition(":")
    if not name:
        raise DPAlignError(
            f"reward {source!r} is not known: use vader, classifier:PATH, reward_model, reward_model:PATH or "
            "module:function."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a file beside the recipe, as with `python -m`
    try:
        function: RewardFunction = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DPAlignError(f"reward {source!r} cannot be imported: {error}") from None
    if not callable(function):
        raise DPAlignError(f"reward {source!r} is not a function.")
    return function
