"""From a setting to a checked reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data.text import TEMPLATE_COLUMNS
from ..errors import DPAlignError
from ..models import ModelConfig, Normalization, RewardModel
from ..models.loading import check_ids, embedding_rows
from ..models.reward_model import normalization_of
from ..settings.rewards import RewardConfig
from .base import BATCH, PROBES, Reward, RewardFunction, check_reward
from .classifier import classifier
from .foreign import import_function
from .learned import Learned
from .lexicon import vader
from .memory import Memory
from .own import OwnReward
from .weighted import Weighted, terms_of

RELEASED = "reward_model"


def load_reward(
    config: RewardConfig,
    device: str | torch.device = "cpu",
    function: RewardFunction | None = None,
    trained: tuple[RewardModel, Normalization] | None = None,
    texts: Sequence[tuple[str, str]] = PROBES,
) -> Reward:
    """Builds the reward that `config` names, or wraps `function`, and checks it.

    Args:
        trained: the reward model of this run's reward stage, for the source `reward_model`.
        texts: prompts and completions that no record has touched, to check the batched form on: the run's own kind.

    Raises:
        DPAlignError: unknown source, not declared public, no range, or `check_reward` refuses it.
    """
    low, high, scale, shift = config.low, config.high, config.scale, config.shift
    is_own = function is None or is_made_of_own(function)  # a person's function is called with care
    if is_reward_model(config) and function is None:
        if config.source == RELEASED:
            if trained is None:
                raise DPAlignError(
                    f"reward.source {RELEASED} needs a stage that trains one in the recipe, or a path behind it."
                )
            model, normalization = trained
        else:
            model, normalization = _released(config, device)
        function = _learned(model, config)
        scale, shift = scale * normalization.scale, scale * normalization.shift + shift
        low, high = (-4.0 if low is None else low), (4.0 if high is None else high)
    elif config.source == "vader" and function is None:
        function = vader(config.text)
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    else:
        if not config.is_public and not (is_own and is_stated(config)):
            raise DPAlignError(
                f"reward {config.source!r} must be declared public (reward.is_public: true): a reward made from "
                "private data without a guarantee would void the one printed here."
            )
        if function is None and config.source.startswith("classifier:"):
            function = classifier(config.source.removeprefix("classifier:"), config, device)
            if not config.use_logit:
                low, high = (0.0 if low is None else low), (1.0 if high is None else high)
        elif function is None:
            function, is_own = _import_function(config.source), False
    if low is None or high is None:
        raise DPAlignError(f"reward {config.source!r} needs its declared range: set reward.low and reward.high.")
    reward = Reward(function, low, high, scale, shift, None if is_own else BATCH if config.batched else 1)
    _check(reward, config, texts)
    return reward


def is_reward_model(config: RewardConfig) -> bool:
    """Whether the reward is a trained reward model, whose past is checked by its privacy statement."""
    return config.source == RELEASED or config.source.startswith(f"{RELEASED}:")


def single_rewards(config: RewardConfig) -> list[RewardConfig]:
    """Those that a weighted sum is made of, or the reward itself."""
    return [replace(config, source=name) for name in terms_of(config.source)] or [config]


def needs_declaring(config: RewardConfig) -> bool:
    """Whether nobody but its user can say that a single reward was made without the private data."""
    return config.source != "vader" and not is_reward_model(config)


def is_stated(config: RewardConfig) -> bool:
    """Whether all of a weighted sum are releases, each of which says itself what it was made from."""
    return bool(terms_of(config.source)) and not any(needs_declaring(one) for one in single_rewards(config))


def is_made_of_own(function: Callable[..., Any]) -> bool:
    """Whether all of it is dpalign's, and no row can touch another."""
    functions = function.functions if isinstance(function, Weighted) else [function]
    return all(isinstance(one, OwnReward) for one in functions)


def chat_writers(function: Callable[..., Any]) -> list[PreTrainedTokenizerBase]:
    """The tokenizers whose templates write the chats that a reward reads."""
    functions = function.functions if isinstance(function, Weighted) else [function]
    return [one.writes_with for one in functions if isinstance(one, OwnReward) and one.writes_with is not None]


def released(config: RewardConfig, device: str | torch.device = "cpu") -> Learned:
    """The released reward model that a source names, on the scale that it carries."""
    model, normalization = _released(config, device)
    return _learned(model, config, normalization)


def given_columns(config: RewardConfig) -> list[str]:
    """Columns that a reward is handed: those asked for; and where a model reads prompts, what its template takes."""
    more = TEMPLATE_COLUMNS if any(_reads_prompts(one) for one in single_rewards(config)) else ()
    return [*config.columns, *(name for name in more if name not in config.columns)]


def _reads_prompts(config: RewardConfig) -> bool:
    """Whether a model reads prompt and completion."""
    if is_reward_model(config):
        return config.text != "completion"
    return config.source.startswith("classifier:") and config.text == "prompt+completion"


def _released(config: RewardConfig, device: str | torch.device) -> tuple[RewardModel, Normalization]:
    path = config.source.removeprefix(f"{RELEASED}:")
    normalization = normalization_of(Path(path))
    return RewardModel.load(ModelConfig(name_or_path=path), device), normalization


def _learned(model: RewardModel, config: RewardConfig, constants: Normalization | None = None) -> Learned:
    check_ids(model.tokenizer.get_vocab().values(), embedding_rows(model.model))  # a policy may write any of them
    return Learned(model, config.text, constants)


def _import_function(source: str) -> RewardFunction:
    if not all(source.partition(":")):
        raise DPAlignError(
            f"reward {source!r} is not known: use vader, classifier:PATH, reward_model, reward_model:PATH or "
            "module:function."
        )
    return import_function(source, "reward")


def _check(reward: Reward, config: RewardConfig, texts: Sequence[tuple[str, str]]) -> None:
    """Raises DPAlignError for a reward whose rows may touch each other."""
    is_own, name = reward.rows_at_once is None, config.source
    if config.batched and is_own:
        raise DPAlignError(f"reward.batched is for Python functions: reward {name!r} is none.")
    check_reward(reward.function, name, config.columns)
    if not is_own and (unknown := Memory(reward.function).unknown):
        raise DPAlignError(
            f"reward {name!r} keeps a {', a '.join(sorted(unknown))} between its calls, whose state cannot be put back "
            "after every row: make it inside the function."
        )
    if config.batched:
        check_reward(reward.function, name, config.columns, list(islice(cycle(texts), BATCH)))
