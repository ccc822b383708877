"""Everything that a trainer still has to be told, in one message, before anything is read or written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import DPAlignError
from ..models import embedded
from ..privacy.statement import read_statement
from ..rewards import is_reward_model
from ..rewards.load import models_named, needs_declaring, singles
from ..settings.models import TINY_REVIEW_LM
from ..settings.privacy import Privacy
from ..settings.prompts import PromptedConfig
from ..settings.rewards import FITTED, RewardConfig
from ..settings.trainers import TrainerArguments

T = TypeVar("T")


class Asked:
    """Collects what is missing and what contradicts itself."""

    def __init__(self, trainer: str) -> None:
        self.trainer = trainer
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def attempt(self, make: Callable[[], T]) -> T | None:
        """What `make()` returns; what it refuses is a line."""
        try:
            return make()
        except DPAlignError as error:
            self.say(str(error).rstrip("."))
            return None

    def answer(self) -> None:
        """Raises DPAlignError with all that was said."""
        if self.lines:
            raise DPAlignError("\n- ".join([f"{self.trainer} has to be told more before it can begin:", *self.lines]))


def draws(args: TrainerArguments) -> bool:
    """Whether the stage reads train_dataset; otherwise its prompts are no one's."""
    return args.draws if isinstance(args, PromptedConfig) else True


def chosen(asked: Asked, args: TrainerArguments, privacy: Privacy) -> dict[str, Any]:
    """The budget, which may stand in either; target_epsilon, target_delta and noise_multiplier of the stage."""
    budget = {}
    for name in ("target_epsilon", "target_delta", "noise_multiplier"):
        given = [value for value in (getattr(args, name), getattr(privacy, name)) if value is not None]
        if len(set(given)) > 1:
            asked.say(f"{name} is {given[0]:g} in args and {given[1]:g} in Privacy: give it once")
        budget[name] = given[0] if given else None
    if draws(args) and budget["target_epsilon"] is None and budget["noise_multiplier"] is None:
        asked.say("Privacy(target_epsilon=...): the epsilon that the run may spend (inf: no privacy)")
    return budget


def ask_for_names(asked: Asked, args: TrainerArguments, privacy: Privacy) -> None:
    """Where the run lies, and what it is accounted under."""
    if not args.output_dir:
        asked.say(f"{type(args).__name__}(output_dir=...): the run's folder; only release/ in it is for sharing")
    if draws(args) and not privacy.dataset_name:
        asked.say("Privacy(dataset_name=...): the ledger's key of train_dataset; all runs on one name add up")


def ask_what_is_public(
    asked: Asked, privacy: Privacy, model: str | None, reward: RewardConfig | None, has_eval: bool
) -> None:
    """What nobody can check: that the model, the reward and eval_dataset hold nothing of the private data.

    model: its name or folder; None if there is something else wrong with it.
    """
    if model is not None and not privacy.model_is_public and not _says_itself(asked, model):
        asked.say(
            f"Privacy(model_is_public=True), if it is: model {model!r} is no dpalign release, and weights made from "
            "the private data would void the guarantee"
        )
    if reward is not None:
        ask_for_reward(asked, reward)
    if has_eval and not privacy.eval_is_public:
        asked.say(
            "Privacy(eval_is_public=True), if it is: eval_dataset is measured without noise (a held-out part of "
            "private data is private: leave it out)"
        )


def ask_for_reward(asked: Asked, reward: RewardConfig) -> None:
    """What nobody can check of it, or of what it is made of."""
    parts = asked.attempt(lambda: (list(singles(reward)), models_named(reward)))
    unknown = [part for part in (parts[0] if parts else []) if needs_declaring(part)]
    named = [name for name in (parts[1] if parts else []) if not _says_itself(asked, name)]
    if (named and not reward.is_public) or any(not part.is_public for part in unknown):
        asked.say("Privacy(reward_is_public=True), if it is: a reward made from private data would void the guarantee")
    is_probability = reward.source.startswith("classifier:") and not reward.use_logit
    known = is_reward_model(reward) or reward.is_written or reward.kind == FITTED
    has_range = reward.source == "vader" or known or is_probability
    if not has_range and (reward.low is None or reward.high is None):
        asked.say("Privacy(reward_range=(low, high)): the reward is clipped to it, and its metric needs it")


def ask_for_units(asked: Asked, args: TrainerArguments, privacy: Privacy) -> None:
    """Says the count that becomes public, beside what is missing; it is not missing itself."""
    if not draws(args):
        plain, of_records = Privacy(), ("dataset_name", "dataset_version", "unit", "declared_units")
        for name in (*of_records, "max_records_per_unit"):
            if getattr(privacy, name) != getattr(plain, name):
                asked.say(f"Privacy({name}=...) is of private records, and this stage reads none: leave it out")
        return
    if asked.lines and privacy.declared_units is None:
        asked.say(
            "(not needed) Privacy(declared_units=...): otherwise the number of units in train_dataset becomes public"
        )
    if asked.lines and privacy.unit is None:
        asked.say("(not needed) Privacy(unit=...): the column that names a person; otherwise each record is a unit")


def with_reward(section: Any, privacy: Privacy, asked: Asked) -> Any:
    """The settings with what `privacy` declares of the reward."""
    reward = section.reward
    changes: dict[str, Any] = {"is_public": True} if privacy.reward_is_public else {}
    if privacy.reward_range is not None:
        low, high = privacy.reward_range
        if (reward.low, reward.high) not in ((None, None), (low, high)):
            asked.say(f"args.reward has low {reward.low} and high {reward.high}, Privacy a reward_range: give one")
        changes |= {"low": low, "high": high}
    return dataclasses.replace(section, reward=dataclasses.replace(reward, **changes))


def recipe_target(target: float | None) -> float:
    """Of the recipe: that of its only stage, or none where its noise is given."""
    return math.inf if target is None else target


def _says_itself(asked: Asked, model: str) -> bool:
    """Whether a model has a privacy statement, or is our own."""
    stated = asked.attempt(lambda: read_statement(embedded.resolve(model)))
    return model == TINY_REVIEW_LM or stated is not None
