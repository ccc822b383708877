"""The private stages of a recipe as subjects of an audit; reads no record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..audit import Subject
from ..errors import DPAlignError
from ..models import Policy
from ..models.loading import device_of
from ..plan import PlannedStage
from ..recipe import Recipe
from ..rewards import Reward
from ..rewards.load import load_reward
from ..run import Models, public_models
from ..settings.rewards import RELEASED, RewardConfig
from .plan_recipe import planned

WRITTEN = 64  # units that the audit writes itself, at most


def subjects_of(recipe: Recipe, only: str | None) -> list[Subject]:
    """Those that draw and train, or the one that is named.

    Raises:
        DPAlignError: the recipe has no such stage, or one that is not private.
    """
    plan = planned(recipe)
    stages = [stage for stage in plan.stages.values() if not stage.is_measurement and only in (None, stage.name)]
    if not stages:
        raise DPAlignError(
            f"the recipe has no stage {only or ''} that trains on private units: there is nothing to audit."
        )
    return [_subject(recipe, stage) for stage in stages]


def _subject(recipe: Recipe, stage: PlannedStage) -> Subject:
    config: Any = stage.config
    models = Models.load(recipe)
    rewards = {
        name: _reward(recipe, entering, models)
        for name, entering in stage.kind.entering(config).items()
        if isinstance(entering, RewardConfig)
    }
    return Subject(
        kind=stage.kind,
        config=replace(config, save_steps=stage.plan.steps, eval_steps=None),
        plan=replace(stage.plan, beside=((),), target_epsilon=stage.plan.epsilon),
        make_model=lambda: Models.load(recipe).of(stage.kind.model_kind),
        declared_units=stage.units.count,
        written=min(WRITTEN, int(stage.units.count)),
        chats=False,
        rewards=rewards,
    )


def _reward(recipe: Recipe, config: RewardConfig, models: Models) -> Reward:
    """As it is loaded for a run; for one that the run has still to train, a constant with its range."""
    if config.source == RELEASED:
        low, high = -4.0 if config.low is None else config.low, 4.0 if config.high is None else config.high
        return Reward(lambda prompts, completions, **_: [low] * len(completions), low, high, rows_at_once=None)
    policy = models.of(Policy)
    return load_reward(config, device_of(recipe.device), public=public_models(recipe, policy))
