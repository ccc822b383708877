"""`dpalign sft`, `dpalign ppo` and `dpalign run`: one recipe, one stage of it or all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..algorithms import PPOConfig, SFTConfig
from ..pipeline import STAGES, run_recipe
from ..recipe import Recipe
from ..reporting.progress import Reporter
from ..reporting.tables import print_summary
from .parsing import recipe_from

DESCRIPTIONS = {
    "run": "Runs all stages of a recipe under one (epsilon, delta). The same command resumes an interrupted run.",
    "sft": "Private supervised fine-tuning on `text`, or on `prompt` and `completion`.",
    "ppo": "Private PPO on `prompt`, or on the first tokens of `text`, against a public reward.",
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
    present = [s for s in STAGES if getattr(recipe, s) is not None]
    split = recipe.split
    if split is None and len(present) > 1:
        split = {s: 1 / len(present) for s in present}
    default = SFTConfig() if name == "sft" else PPOConfig()
    stages: dict[str, Any] = dict.fromkeys(STAGES) | {name: getattr(recipe, name) or default}
    return dataclasses.replace(recipe, split=split, **stages)
