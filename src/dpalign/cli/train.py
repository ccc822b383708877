"""`dpalign sft`, `dpalign ppo` and `dpalign run`: one recipe, one stage of it or all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..algorithms import PPOConfig, RewardModelConfig, RLOOConfig, SFTConfig
from ..errors import DPAlignError
from ..pipeline import run_recipe
from ..planning import split_parts
from ..recipe import STAGES, Recipe
from ..reporting.progress import Reporter
from ..reporting.tables import print_summary
from .parsing import recipe_from

DESCRIPTIONS = {
    "run": "Runs all stages of a recipe under one (epsilon, delta). The same command resumes an interrupted run.",
    "sft": "Private supervised fine-tuning on `text`, or on `prompt` and `completion`.",
    "reward": "Private reward model on `chosen` and `rejected` (and `prompt`): what people prefer, as a score.",
    "rloo": "Private RLOO: several completions of a prompt, each with the others as its baseline; no value head.",
    "ppo": "Private PPO on `prompt`, or on the first tokens of `text`, against a public reward or a private reward "
    "model.",
}


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns what summary.json holds."""
    command, rest = arguments[0], arguments[1:]
    recipe = recipe_from(command, rest, DESCRIPTIONS[command])
    if command != "run":
        recipe = only_stage(recipe, command)
    reporter = Reporter()
    summary = run_recipe(recipe, reporter=reporter)
    if not as_json:
        print_summary(summary)
    return summary


def only_stage(recipe: Recipe, name: str) -> Recipe:
    """The recipe with one stage, which takes the same units as it would in the whole recipe."""
    present = list(recipe.stages)
    if recipe.composition == "sequential" and len(present) > 1:
        raise DPAlignError(
            f"the stages {', '.join(present)} share one budget, which only `dpalign run` can divide: use it, or write "
            "a recipe for this stage alone."
        )
    defaults = {"sft": SFTConfig, "reward": RewardModelConfig, "ppo": PPOConfig, "rloo": RLOOConfig}
    if getattr(recipe, name) is None:
        recipe = dataclasses.replace(recipe, **{name: defaults[name]()})
    low, high = split_parts(recipe)[name]
    split: Any = None if (low, high) == (0.0, 1.0) else {name: [low, high]}
    stages: dict[str, Any] = dict.fromkeys(STAGES) | {name: getattr(recipe, name)}
    return dataclasses.replace(recipe, split=split, **stages)
