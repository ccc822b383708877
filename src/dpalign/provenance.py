"""Where the models and rewards of a run come from: what made them, and what nobody has checked about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import DPAlignError
from .files import dumps
from .models import ModelConfig, RewardModel, embedded
from .models.bases import told
from .privacy.statement import StageStatement, merge_stages, read_statement
from .recipe import Recipe
from .rewards import RewardConfig, is_reward_model
from .rewards.load import models_named, needs_declaring, singles
from .rewards.weighted import PLUS, terms_of
from .settings.models import TINY_REVIEW_LM
from .settings.rewards import RELEASED
from .stages import STAGES, kind


@dataclass(frozen=True)
class Origin:
    """A model that enters a run: its name, the private stages that made it, and what remains unchecked about it."""

    name: str
    stages: tuple[StageStatement, ...]
    assumptions: tuple[str, ...]

    @staticmethod
    def from_json(value: dict[str, Any]) -> Origin:
        """From its fields as JSON has them."""
        stages = tuple(StageStatement.from_json(stage) for stage in value["stages"])
        return Origin(value["name"], stages, tuple(value["assumptions"]))

    @property
    def fingerprint(self) -> str:
        """Equal for the same name and the same spending."""
        return dumps([self.name, [asdict(stage) for stage in self.stages]])


def past_stages(origins: Mapping[str, Origin]) -> list[StageStatement]:
    """The private stages of all models together, each once."""
    return merge_stages([stage for origin in origins.values() for stage in origin.stages])


def past_assumptions(origins: Mapping[str, Origin]) -> set[str]:
    """What remains unchecked about the models."""
    return {text for origin in origins.values() for text in origin.assumptions}


def check_provenance(recipe: Recipe) -> dict[str, Origin]:
    """Where every model and reward that enters the run comes from, by the field that names it.

    Raises:
        DPAlignError: a model is neither embedded, declared public, nor a private release; a reward needs a stage that
            the recipe does not have; or a release's datasets differ from this run's and nobody declares them disjoint.
    """
    origins = {"model": _past(recipe, recipe.model.name_or_path, recipe.model.is_public)}
    for name, config in recipe.stages.items():
        stage = recipe.kind_of(name)
        for setting, entering in stage.entering(stage.completed(config, recipe.stages.values())).items():
            if isinstance(entering, ModelConfig):
                origins[f"{name}.{setting}"] = _past(recipe, entering.name_or_path, entering.is_public)
            else:
                origins |= _origins_of_reward(recipe, entering, f"{name}.{setting}")
    return origins


def _origins_of_reward(recipe: Recipe, reward: RewardConfig, name: str) -> dict[str, Origin]:
    """Of a reward, and of the models that it asks or has texts from."""
    origin = _origin(recipe, reward)
    origins = {} if origin is None else {name: origin}
    for number, model in enumerate(models_named(reward), 1):
        origins[f"{name}.model.{number}"] = _past(recipe, model, reward.is_public, "reward.is_public")
    return origins


def _origin(recipe: Recipe, entering: RewardConfig) -> Origin | None:
    """None of what is public by itself, made by a stage of the recipe, or by models it names; of a reward that is made
    of others, all that these have."""
    source, named = entering.source, _told_source(entering.source)
    declared = f"reward {named!r} was made without the private data, and scores each row by itself (declared)"
    if (parts := list(singles(entering))) != [entering]:
        is_sum = bool(terms_of(source))  # which is declared as a whole, with its weights
        found = [o for part in parts if not (is_sum and needs_declaring(part)) and (o := _origin(recipe, part))]
        assumptions = {text for origin in found for text in origin.assumptions}
        assumptions |= {declared} if is_sum and any(needs_declaring(part) for part in parts) else set()
        return Origin(source, tuple(merge_stages([s for o in found for s in o.stages])), tuple(sorted(assumptions)))
    if source == RELEASED:
        makers = [name for name in STAGES if kind(name).model_kind is RewardModel]
        if not set(makers) & set(recipe.stages):
            raise DPAlignError(
                f"reward.source {RELEASED} needs a section {' or '.join(makers)} in the recipe, or a path behind it."
            )
        return None
    if is_reward_model(entering):
        return _past(recipe, source.removeprefix(f"{RELEASED}:"), entering.is_public)
    return Origin(source, (), (declared,)) if needs_declaring(entering) else None


def _told_source(source: str) -> str:
    """The source of a reward, or of a sum of them, with the folders in it as a statement names them."""

    def term(text: str) -> str:
        kind, colon, rest = text.partition(":")
        return f"{told(kind) if '/' in kind else kind}{colon}{told(rest)}"

    return PLUS.join(map(term, source.split(PLUS)))


def _past(recipe: Recipe, name: str, is_public: bool, declaration: str = "model.is_public") -> Origin:
    stated = read_statement(embedded.resolve(name))
    if stated is None:
        if name == TINY_REVIEW_LM:
            return Origin(name, (), ())
        if not is_public:
            raise DPAlignError(
                f"model {name!r} must be declared public ({declaration}: true), or be a dpalign release: weights "
                "made from the private data would void the guarantee."
            )
        return Origin(name, (), (f"model {told(name)!r} was made without the private data (declared)",))
    value, stages = stated
    assumptions = set(value["assumptions"])
    if not value["private"] and _asks_for_privacy(recipe):
        raise DPAlignError(
            f"model {name} was trained without privacy on private data: nothing trained from it can be private; start "
            "from a public model or a private release."
        )
    datasets = {s.dataset for s in stages} | {recipe.data_of(n).name for n in recipe.drawing}
    if len(datasets) > 1:
        if recipe.units_disjoint != "declared":
            raise DPAlignError(
                f"the release {name} was trained on {sorted({s.dataset for s in stages})}, which cannot be compared "
                "with this run's data: use the same data.name, or declare units_disjoint: declared."
            )
        assumptions.add(f"the units of {', '.join(map(repr, sorted(datasets)))} are disjoint (declared)")
    return Origin(name, tuple(stages), tuple(sorted(assumptions)))


def _asks_for_privacy(recipe: Recipe) -> bool:
    asked = [c for c in recipe.stages.values() if c.noise_multiplier or not math.isinf(c.target_epsilon or math.inf)]
    return bool(asked) or not math.isinf(recipe.target_epsilon)
