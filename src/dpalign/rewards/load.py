"""From a setting to a checked reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from ..data.text import TEMPLATE_COLUMNS
from ..errors import DPAlignError
from ..models import ModelConfig, Normalization, RewardModel
from ..models.bases import base_path
from ..models.loading import check_ids, embedding_rows
from ..models.reward_model import FORMAT_FILE, WEIGHTS_FILE, normalization_of
from ..settings.rewards import BASE, CONTRAST, FITTED, JUDGE, MEAN, RELEASED, RewardConfig
from .base import BATCH, PROBES, Reward, RewardFunction, check_reward
from .classifier import classifier
from .contrast import Contrast
from .foreign import import_function
from .judge import judge
from .learned import Learned
from .lexicon import vader
from .mean import AsFunction, Mean
from .memory import Memory
from .own import OwnReward
from .weighted import Weighted, terms_of
from .written import Fitted, PublicModels, from_kept

Trained = tuple[RewardModel, Normalization]


def load_reward(
    config: RewardConfig,
    device: str | torch.device = "cpu",
    function: RewardFunction | None = None,
    trained: Trained | None = None,
    texts: Sequence[tuple[str, str]] = PROBES,
    public: PublicModels | None = None,
) -> Reward:
    """Builds the reward that `config` names, or wraps `function`, and checks it.

    Args:
        trained: the reward model of this run's reward stage, for the source `reward_model`.
        texts: prompts and completions that no record has touched, to check the batched form on: the run's own kind.
        public: the run's own public model, and where constants are kept; default: there is no run.

    Raises:
        DPAlignError: unknown source, not declared public, no range, or `check_reward` refuses it.
    """
    if config.kind == FITTED and function is None:
        return _load_fitted(config, public or PublicModels(device=device))
    source = _source(config, device, function, trained, public or PublicModels(device=device))
    low = source.low if config.low is None else config.low
    high = source.high if config.high is None else config.high
    if low is None or high is None:
        raise DPAlignError(f"reward {config.source!r} needs its declared range: set reward.low and reward.high.")
    scale, shift = config.scale * source.scale, config.scale * source.shift + config.shift
    at_once = None if source.is_own else BATCH if config.batched else 1
    reward = Reward(source.function, low, high, scale, shift, at_once, given_columns(config))
    _check(reward, config, texts)
    return reward


@dataclass(frozen=True)
class _Source:
    """A function, the range that its kind has by itself, and what brings it to that scale.

    is_own: it is dpalign's, which scores every row by itself; a person's is called with care.
    """

    function: Callable[..., Any]
    low: float | None = None
    high: float | None = None
    scale: float = 1.0
    shift: float = 0.0
    is_own: bool = True


def _source(
    config: RewardConfig,
    device: str | torch.device,
    function: RewardFunction | None,
    trained: Trained | None,
    public: PublicModels,
) -> _Source:
    if function is None and config.source == "vader":
        return _Source(vader(config.text), -1.0, 1.0)
    if function is None and is_reward_model(config):
        found = _trained(trained) if config.source == RELEASED else _released(config, device, public)
        model, normalization = found
        return _Source(_learned(model, config), -4.0, 4.0, normalization.scale, normalization.shift)
    if function is None and config.source == CONTRAST:
        return _Source(Contrast(config, public), -4.0, 4.0)
    if function is None and config.source == MEAN:
        parts = [load_reward(part, device, public=public) for part in config.parts]
        return _Source(Mean(config, parts, public), -4.0, 4.0)
    if function is None and config.kind == JUDGE:
        return _Source(judge(config, public), -4.0, 4.0)
    is_own = function is None or is_made_of_own(function)  # a person's function is called with care
    if not config.is_public and not (is_own and is_stated(config)):
        raise DPAlignError(
            f"reward {config.source!r} must be declared public (reward.is_public: true): a reward made from "
            "private data without a guarantee would void the one printed here."
        )
    if function is None and config.source.startswith("classifier:"):
        function = classifier(config.source.removeprefix("classifier:"), config, device)
        return _Source(function, *((None, None) if config.use_logit else (0.0, 1.0)))
    if function is None:
        return _Source(_import_function(config.source), is_own=False)
    return _Source(function, is_own=is_own)


def _trained(trained: Trained | None) -> Trained:
    if trained is None:
        raise DPAlignError(
            f"reward.source {RELEASED} needs a stage that trains one in the recipe, or a path behind it."
        )
    return trained


def _load_fitted(config: RewardConfig, public: PublicModels) -> Reward:
    """A reward as a run has fitted it: the same section and constants, in a range and on a scale of one's own."""
    fitted = Fitted.read(config)
    found = load_reward(fitted.section, public.device, public=fitted.public(public))
    low, high = (found.low if config.low is None else config.low), (found.high if config.high is None else config.high)
    scale, shift = config.scale * found.scale, config.scale * found.shift + config.shift
    return Reward(found.function, low, high, scale, shift, None, given_columns(config))


def try_reward(config: RewardConfig, device: str | torch.device) -> None:
    """Loads and checks what can be without text that a model writes; nothing is kept.

    Raises:
        DPAlignError: what `load_reward` would refuse of it.
    """
    for part in singles(config):
        if not part.is_written:
            load_reward(part, device)


def singles(config: RewardConfig) -> Iterator[RewardConfig]:
    """The rewards that a mean or a weighted sum is made of, or it alone."""
    if config.kind == FITTED:
        yield from singles(Fitted.read(config).section)
    elif config.source == MEAN:
        for part in config.parts:
            yield from singles(part)
    elif terms := terms_of(config.source):
        yield from (replace(config, source=name) for name in terms)
    else:
        yield config


def is_reward_model(config: RewardConfig) -> bool:
    """Whether the reward is a trained reward model, whose past is checked by its privacy statement."""
    return config.source == RELEASED or config.source.startswith(f"{RELEASED}:")


def needs_declaring(config: RewardConfig) -> bool:
    """Whether nobody but its user can say that a single reward was made without the private data."""
    return config.source != "vader" and not is_reward_model(config) and not config.is_written


def is_stated(config: RewardConfig) -> bool:
    """Whether all of a weighted sum are public by themselves, or releases, each of which says what it was made from."""
    return bool(terms_of(config.source)) and not any(needs_declaring(one) for one in singles(config))


def is_made_of_own(function: Callable[..., Any]) -> bool:
    """Whether all of it is dpalign's, and no row can touch another."""
    functions = function.functions if isinstance(function, Weighted) else [function]
    return all(isinstance(one, OwnReward) for one in functions)


def chat_writers(function: Callable[..., Any]) -> list[PreTrainedTokenizerBase]:
    """The tokenizers whose templates write the chats that a reward reads, itself or in what it is made of."""
    if isinstance(function, AsFunction):
        return chat_writers(function.reward.function)
    if isinstance(function, Weighted):
        return [tokenizer for one in function.functions for tokenizer in chat_writers(one)]
    return [function.writes_with] if isinstance(function, OwnReward) and function.writes_with is not None else []


def released(config: RewardConfig, device: str | torch.device = "cpu") -> Learned:
    """The released reward model that a source names, on the scale that it carries."""
    model, normalization = _released(config, device, PublicModels(device=device))
    return _learned(model, config, normalization)


def models_named(config: RewardConfig) -> list[str]:
    """Causal language models that a reward names, and that must be public or releases."""
    named = [config.base] if config.is_written and config.base is not None else []
    if config.kind == FITTED:
        fitted = Fitted.read(config)
        return [*named, fitted.base, *models_named(fitted.section)]
    if config.kind == JUDGE and config.source != f"{JUDGE}:{BASE}":
        named.append(config.source.partition(":")[2])
    return list(dict.fromkeys([*named, *(name for part in config.parts for name in models_named(part))]))


def asked_columns(config: RewardConfig) -> list[str]:
    """Columns that a reward's functions ask for."""
    return list(dict.fromkeys([*config.columns, *(name for part in singles(config) for name in part.columns)]))


def given_columns(config: RewardConfig) -> list[str]:
    """Columns that a reward is handed: those asked for; and where a model reads prompts, what its template takes."""
    more = TEMPLATE_COLUMNS if any(_reads_prompts(one) for one in singles(config)) else ()
    return list(dict.fromkeys([*asked_columns(config), *more]))


def _reads_prompts(config: RewardConfig) -> bool:
    """Whether a model reads prompt and completion."""
    if is_reward_model(config):
        return config.text != "completion"
    return config.source.startswith("classifier:") and config.text == "prompt+completion"


def _released(
    config: RewardConfig, device: str | torch.device, public: PublicModels
) -> tuple[RewardModel, Normalization]:
    path = config.source.removeprefix(f"{RELEASED}:")
    normalization = normalization_of(Path(path))
    # Its scores are the same wherever a run goes on.
    model = RewardModel.load(ModelConfig(name_or_path=path, dtype="float32"), device)
    if model.free_head is not None:
        model.free = _free_of(Path(path), public)
        if model.free.count != model.free_head.in_features:
            raise DPAlignError(f"the free rewards in {path} are not those that it was made with: copy it again.")
    return model, normalization


def _free_of(release: Path, public: PublicModels) -> Mean:
    """The free rewards that a released reward model adds to its own, with their constants.

    Raises:
        DPAlignError: they cannot be read.
    """
    try:
        described = json.loads((release / FORMAT_FILE).read_text(encoding="utf-8"))["free"]
        saved = load_file(release / WEIGHTS_FILE)
        constants = {name.removeprefix("free."): value for name, value in saved.items() if name.startswith("free.")}
        section, made = from_kept(described, constants, base_path(release), public)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        raise DPAlignError(f"the free rewards in {release} cannot be read: copy the release again.") from None
    return Mean(section, [load_reward(part, public.device, public=made) for part in section.parts], made)


def _learned(model: RewardModel, config: RewardConfig, constants: Normalization | None = None) -> Learned:
    check_ids(model.tokenizer.get_vocab().values(), embedding_rows(model.model))  # a policy may write any of them
    return Learned(model, config.text, constants)


def _import_function(source: str) -> RewardFunction:
    if not all(source.partition(":")):
        raise DPAlignError(
            f"reward {source!r} is not known: use vader, classifier:PATH, judge:MODEL, contrast, mean, fitted:FOLDER, "
            "reward_model, reward_model:PATH or module:function."
        )
    return import_function(source, "reward")


def _check(reward: Reward, config: RewardConfig, texts: Sequence[tuple[str, str]]) -> None:
    """Raises DPAlignError for a reward whose rows may touch each other."""
    is_own, name = reward.rows_at_once is None, config.source
    if config.batched and is_own:
        raise DPAlignError(f"reward.batched is for Python functions: reward {name!r} is none.")
    check_reward(reward.function, name, asked_columns(config))
    if not is_own and (unknown := Memory(reward.function).unknown):
        raise DPAlignError(
            f"reward {name!r} keeps a {', a '.join(sorted(unknown))} between its calls, whose state cannot be put back "
            "after every row: make it inside the function."
        )
    if config.batched:
        check_reward(reward.function, name, config.columns, list(islice(cycle(texts), BATCH)))
